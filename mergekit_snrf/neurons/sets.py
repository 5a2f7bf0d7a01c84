"""Projections, neuron names, and sets of neurons with their algebra.

A neuron is one row of a projection's ``nn.Linear.weight`` (shape out x in) for ``attn.q``, ``attn.k``,
``attn.v`` and ``fwd.up``, and one column for ``fwd.down`` (paper, Sec. 4.1). ``attn.k`` and ``attn.v`` count
the real rows, ``kv_heads * head_dim``, not the rows repeated for grouped-query attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mergekit_snrf.errors import SnrfError

MAX_LAYERS = 10_000
"""No decoder is this deep; a larger layer number in a file is taken for corruption."""


@dataclass(frozen=True)
class Projection:
    """A kind of weight matrix whose neurons SNRF edits.

    Attributes:
        name: as in the paper's figures, ``attn.k``.
        module: the path of the ``nn.Linear`` inside a decoder layer, ``self_attn.k_proj``.
        axis: the axis of the weight that counts neurons: 0 for rows, 1 for columns.
    """

    name: str
    module: str
    axis: int

    def __str__(self) -> str:
        return self.name


PROJECTIONS: dict[str, Projection] = {
    projection.name: projection
    for projection in (
        Projection("attn.q", "self_attn.q_proj", 0),
        Projection("attn.k", "self_attn.k_proj", 0),
        Projection("attn.v", "self_attn.v_proj", 0),
        Projection("fwd.up", "mlp.up_proj", 0),
        Projection("fwd.down", "mlp.down_proj", 1),
    )
}


def projection_named(name: str) -> Projection:
    """Return the projection called ``name``.

    Raises:
        SnrfError: there is no such projection.
    """
    try:
        return PROJECTIONS[name]
    except KeyError:
        raise SnrfError(f"unknown projection {name!r}; the projections are {', '.join(PROJECTIONS)}") from None


_LAYER = r"(?P<layer>0|[1-9][0-9]{0,4})"
_NEURON = re.compile(rf"(?P<projection>[a-z]+\.[a-z]+)\.L{_LAYER}\.N(?P<index>0|[1-9][0-9]{{0,9}})")
_KEY = re.compile(rf"layers\.{_LAYER}\.(?P<projection>[a-z]+\.[a-z]+)")


@dataclass(frozen=True, order=True)
class Site:
    """One projection in one decoder layer, the place of a set of neurons.

    Raises:
        SnrfError: the projection is unknown or the layer number is not in [0, MAX_LAYERS).
    """

    layer: int
    projection: str

    def __post_init__(self) -> None:
        projection_named(self.projection)
        if not 0 <= self.layer < MAX_LAYERS:
            raise SnrfError(f"layer {self.layer} is not in [0, {MAX_LAYERS})")

    @property
    def axis(self) -> int:
        """The axis of the weight that counts neurons."""
        return PROJECTIONS[self.projection].axis

    @property
    def module(self) -> str:
        """The module's path below ``...layers.{layer}.``."""
        return PROJECTIONS[self.projection].module

    @property
    def key(self) -> str:
        """The key of this site in mask and profile files, ``layers.14.fwd.up``."""
        return f"layers.{self.layer}.{self.projection}"

    @classmethod
    def from_key(cls, key: str) -> Site:
        """Parse ``layers.14.fwd.up``.

        Raises:
            SnrfError: ``key`` is not of that form, or names an unknown projection.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise SnrfError(
                f"{key!r} does not name a layer and projection; expected e.g. 'layers.14.fwd.up' with one of "
                f"{', '.join(PROJECTIONS)}"
            )
        return cls(int(match["layer"]), match["projection"])

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True, order=True)
class Neuron:
    """One neuron, written ``fwd.up.L14.N12953`` as in the paper's figures."""

    site: Site
    index: int

    @classmethod
    def parse(cls, name: str) -> Neuron:
        """Parse ``fwd.up.L14.N12953``.

        Raises:
            SnrfError: ``name`` is not of that form, or names an unknown projection.
        """
        match = _NEURON.fullmatch(name)
        if match is None:
            raise SnrfError(f"{name!r} is not a neuron; expected e.g. 'fwd.up.L14.N12953'")
        return cls(Site(int(match["layer"]), match["projection"]), int(match["index"]))

    def __str__(self) -> str:
        return f"{self.site.projection}.L{self.site.layer}.N{self.index}"


class NeuronSet(Mapping[Site, Tensor]):
    """A set of neurons: for every site one boolean tensor [neurons]; an absent site is an empty set.

    Immutable by convention. Two sets combine when the sites both have are of one length; otherwise they
    belong to different models and the operation raises ``SnrfError``.

    >>> import torch
    >>> a = NeuronSet({Site(0, "attn.k"): torch.tensor([True, True, False])})
    >>> b = NeuronSet({Site(0, "attn.k"): torch.tensor([False, True, True])})
    >>> [str(neuron) for neuron in (a & b).neurons()]
    ['attn.k.L0.N1']
    """

    def __init__(self, members: Mapping[Site, Bool[Tensor, " neurons"]]) -> None:
        for site, member in members.items():
            if member.dtype != torch.bool or member.ndim != 1 or member.numel() == 0:
                raise SnrfError(
                    f"{site}: a set of neurons is a torch.bool tensor of shape [neurons] with neurons > 0, got "
                    f"{member.dtype} of shape {list(member.shape)}"
                )
        self._members = {site: members[site] for site in sorted(members)}

    def __getitem__(self, site: Site) -> Bool[Tensor, " neurons"]:
        return self._members[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same neurons; sites without neurons do not count."""
        if not isinstance(other, NeuronSet):
            return NotImplemented
        mine, theirs = self.nonempty(), other.nonempty()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[s], theirs[s]) for s in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"NeuronSet({self.count()} neurons at {len(self.nonempty())} sites)"

    def count(self, site: Site | None = None) -> int:
        """Return the number of neurons at one site, or in all."""
        if site is not None:
            return int(self._members[site].sum()) if site in self._members else 0
        return sum(int(member.sum()) for member in self._members.values())

    def by_projection(self) -> dict[str, tuple[int, int, int]]:
        """Return (layers with neurons, neurons, neurons that the listed layers have) of every projection.

        A set may leave out layers without neurons, whose size is then not known.
        """
        found = {}
        for name in PROJECTIONS:
            members = [member for site, member in self._members.items() if site.projection == name]
            counts = [int(member.sum()) for member in members]
            found[name] = (sum(map(bool, counts)), sum(counts), sum(map(len, members)))
        return found

    def nonempty(self) -> dict[Site, Bool[Tensor, " neurons"]]:
        """Return the sites that have at least one neuron."""
        return {site: member for site, member in self._members.items() if bool(member.any())}

    def neurons(self) -> Iterator[Neuron]:
        """Iterate over the neurons, by layer, projection and index."""
        for site, member in self._members.items():
            for index in member.nonzero().flatten().tolist():
                yield Neuron(site, index)

    def _combined(self, other: NeuronSet, operation: str) -> NeuronSet:
        members: dict[Site, Tensor] = {}
        for site in {*self, *other}:
            mine, theirs = self.get(site), other.get(site)
            if mine is not None and theirs is not None and len(mine) != len(theirs):
                raise SnrfError(
                    f"{site}: cannot combine masks of different models, one has {len(mine)} neurons there and "
                    f"the other {len(theirs)}; use masks of models with the same decoder shape"
                )
            present = mine if mine is not None else theirs
            assert present is not None
            a = mine if mine is not None else torch.zeros_like(present)
            b = theirs if theirs is not None else torch.zeros_like(present)
            members[site] = {"&": a & b, "|": a | b, "-": a & ~b}[operation]
        return NeuronSet(members)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        """Intersection (Eq. 6 intersects over contexts and over both models)."""
        return self._combined(other, "&")

    def __or__(self, other: NeuronSet) -> NeuronSet:
        """Union."""
        return self._combined(other, "|")

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        """Difference: the neurons of ``self`` that are not in ``other``."""
        return self._combined(other, "-")

    def random(self, seed: int, *, disjoint: bool = False) -> NeuronSet:
        """Draw as many random neurons at every site as ``self`` has there (the control of Table 3).

        The draw depends on ``seed``, layer and projection only. It uses numpy's legacy MT19937 generator,
        the one whose stream numpy guarantees never to change.

        Args:
            seed: in [0, 2**32).
            disjoint: draw among the neurons that are not in ``self``.

        Raises:
            SnrfError: ``seed`` is out of range, or ``self`` has more than half of a site that it shall not share.
        """
        if not 0 <= seed < 2**32:
            raise SnrfError(f"seed must be in [0, 2**32), got {seed}")
        order = list(PROJECTIONS)
        members = {}
        for site, member in self._members.items():
            generator = np.random.RandomState([seed, site.layer, order.index(site.projection)])
            chosen = torch.zeros_like(member)
            picks = torch.from_numpy(generator.permutation(len(member)).astype(np.int64))
            count = int(member.sum())
            if disjoint:
                picks = picks[~member[picks]]
                if len(picks) < count:
                    raise SnrfError(
                        f"{site}: {count} of {len(member)} neurons are in the set, so there are too few others for a "
                        f"disjoint draw; leave out disjoint"
                    )
            chosen[picks[:count]] = True
            members[site] = chosen
        return NeuronSet(members)
