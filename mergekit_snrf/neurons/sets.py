"""Sets of neurons and their algebra."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.files.markdown import share
from mergekit_snrf.files.shown import Plotted
from mergekit_snrf.neurons.sites import PROJECTIONS, TOWERS, Neuron, Site

if TYPE_CHECKING:
    from torch import Tensor


def described(tensor: Tensor) -> str:
    """Return dtype and shape for messages: ``torch.float32 of shape [2, 3]``; also of numpy's arrays."""
    return f"torch.{_dtype(tensor)} of shape {list(tensor.shape)}"


def is_member(tensor: Tensor) -> bool:
    """Return whether a tensor, or numpy's array, can hold the neurons of a site: booleans of shape [neurons]."""
    return _dtype(tensor) == "bool" and tensor.ndim == 1 and len(tensor) > 0


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def count_rows(counts: Mapping[str, tuple[int, int, int]]) -> list[tuple[object, ...]]:
    """Return rows of a table from ``by_projection()``, with shares; the last row holds the sums."""
    sums = tuple(map(sum, zip(*counts.values(), strict=True)))
    return [(name, *row, share(*row[1:])) for name, row in {**counts, "all": sums}.items()]


class NeuronSet(Plotted, Mapping[Site, "Tensor"]):
    """A set of neurons: for every site one boolean tensor [neurons]; an absent site is an empty set.

    To be counted, the neurons may also be arrays of numpy: this module does not import torch. Immutable by convention.
    Two sets combine when the sites both have are of one length; otherwise they belong to different models and the
    operation raises ``SnrfError``.

    >>> import torch
    >>> a = NeuronSet({Site(0, "attn.k"): torch.tensor([True, True, False])})
    >>> b = NeuronSet({Site(0, "attn.k"): torch.tensor([False, True, True])})
    >>> [str(neuron) for neuron in (a & b).neurons()]
    ['attn.k.L0.N1']
    """

    def __init__(self, members: Mapping[Site, Bool[Tensor, " neurons"]]) -> None:
        for site, member in members.items():
            if not is_member(member):
                raise SnrfError(site, f"must be torch.bool of shape [neurons], got {described(member)}")
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
        return mine.keys() == theirs.keys() and all(
            len(mine[s]) == len(theirs[s]) and bool((mine[s] == theirs[s]).all()) for s in mine
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"NeuronSet({self.count()} neurons at {len(self.nonempty())} sites)"

    def count(self, site: Site | None = None) -> int:
        """Return the number of neurons at one site, or in all."""
        if site is not None:
            return int(self._members[site].sum()) if site in self._members else 0
        return sum(int(member.sum()) for member in self._members.values())

    def by_projection(self) -> dict[str, tuple[int, int, int]]:
        """Return (layers with neurons, neurons, neurons of the layers that the set lists) of every projection."""
        found = {}
        present = {site.projection for site in self._members}
        for name in (*PROJECTIONS, *(tower for tower in TOWERS if tower in present)):
            members = [member for site, member in self._members.items() if site.projection == name]
            counts = [int(member.sum()) for member in members]
            found[name] = (sum(map(bool, counts)), sum(counts), sum(map(len, members)))
        return found

    def nonempty(self) -> dict[Site, Bool[Tensor, " neurons"]]:
        """Return the sites that have at least one neuron."""
        return {site: member for site, member in self._members.items() if bool(member.any())}

    def of(self, *projections: str) -> NeuronSet:
        """Return the neurons of some projections, or of ``TOWERS``."""
        return NeuronSet({site: member for site, member in self._members.items() if site.projection in projections})

    def sha256(self) -> str:
        """Return a digest that two sets share if and only if they have the same neurons."""
        digest = hashlib.sha256()
        for site, member in sorted(self.nonempty().items(), key=lambda item: item[0].key):
            indices = ",".join(map(str, member.nonzero().flatten().tolist()))
            digest.update(f"{site.key}:{indices};".encode())
        return digest.hexdigest()

    def neurons(self) -> Iterator[Neuron]:
        """Iterate over the neurons, by layer, projection and index."""
        for site, member in self._members.items():
            for index in member.nonzero().flatten().tolist():
                yield Neuron(site, index)

    def _combined(self, other: NeuronSet, operation: Callable[[Tensor, Tensor], Tensor]) -> NeuronSet:
        if not isinstance(other, NeuronSet):
            raise unexpected("neurons", other, "a NeuronSet", "use .neurons of a mask")
        members: dict[Site, Tensor] = {}
        for site in {*self, *other}:
            mine, theirs = self.get(site), other.get(site)
            if mine is not None and theirs is not None and len(mine) != len(theirs):
                what = f"one mask has {len(mine)} neurons there and the other {len(theirs)}, so they do not combine"
                raise SnrfError(site, what, "use masks of models with the same decoder shape")
            empty = (self if mine is not None else other)[site] & False
            members[site] = operation(empty if mine is None else mine, empty if theirs is None else theirs)
        return NeuronSet(members)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        """Intersection (Eq. 6 intersects over contexts and over both models)."""
        return self._combined(other, operator.and_)

    def __or__(self, other: NeuronSet) -> NeuronSet:
        """Union."""
        return self._combined(other, operator.or_)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        """Difference: the neurons of ``self`` that are not in ``other``."""
        return self._combined(other, lambda mine, theirs: mine & ~theirs)

    def random(self, seed: int, *, disjoint: bool = False) -> NeuronSet:
        """Draw as many random neurons at every site as ``self`` has there (the control of Table 3).

        The draw depends on ``seed``, layer and projection only. It uses numpy's legacy MT19937 generator,
        the one whose stream numpy guarantees never to change.

        Args:
            seed: in [0, 2**32).
            disjoint: draw among the neurons that are not in ``self``.

        Raises:
            SnrfError: ``seed`` is out of range, or ``self`` has more than half of a site and the draw must avoid it.
        """
        if not 0 <= seed < 2**32:
            raise SnrfError(None, f"must be in [0, 2**32), got {seed}", field="seed")
        from torch import int64

        order, members = [*PROJECTIONS, *TOWERS], {}
        for site, member in self._members.items():
            generator = np.random.RandomState([seed, site.layer, order.index(site.projection)])
            chosen = member & False
            picks = member.new_tensor(generator.permutation(len(member)), dtype=int64)
            count, picks = int(member.sum()), picks[~member[picks]] if disjoint else picks
            if len(picks) < count:
                what = f"{count} of {len(member)} neurons are in the set, too many for a draw of as many others"
                raise SnrfError(site, what, "draw from all neurons")
            chosen[picks[:count]] = True
            members[site] = chosen
        return NeuronSet(members)
