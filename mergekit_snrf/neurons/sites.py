"""Projections, sites and neurons, and their names.

A neuron is one row of a projection's ``nn.Linear.weight`` (shape out x in) for ``attn.q``, ``attn.k``,
``attn.v`` and ``fwd.up``, and one column for ``fwd.down`` (paper, Sec. 4.1). ``attn.k`` and ``attn.v`` count
the real rows, ``kv_heads * head_dim``, not the rows repeated for grouped-query attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergekit_snrf.errors import SnrfError

MAX_LAYERS = 10_000  # No decoder is this deep; a file with a larger layer number is damaged.


@dataclass(frozen=True)
class Projection:
    """A kind of weight matrix whose neurons SNRF edits: its ``nn.Linear`` in a decoder layer, ``self_attn.k_proj``.

    ``axis`` of the weight counts neurons: 0 for rows, 1 for columns. The name is as in the paper's figures, ``attn.k``.
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

GROUPED = ("attn.k", "attn.v")  # Several query heads share each of their heads (GQA).

TOWERS = ("vision.mlp", "projector.mlp")
"""Neurons outside of the text decoder, which can only be deactivated: activations of the MLPs of a vision tower and of
what projects images into the decoder, in place of a projection. Their layers are numbered in the model's order."""


_LAYER = r"(?P<layer>0|[1-9][0-9]{0,4})"
_NEURON = re.compile(rf"(?P<projection>[a-z]+\.[a-z]+)\.L{_LAYER}\.N(?P<index>0|[1-9][0-9]{{0,9}})")
_KEY = re.compile(rf"layers\.{_LAYER}\.(?P<projection>[a-z]+\.[a-z]+)")


@dataclass(frozen=True, order=True)
class Site:
    """One projection in one decoder layer, the place of a set of neurons.

    ``SnrfError``: the projection is unknown or the layer number is not in [0, MAX_LAYERS).
    """

    layer: int
    projection: str

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS and self.projection not in TOWERS:
            known = f"the projections are {', '.join(PROJECTIONS)}"
            raise SnrfError(None, f"unknown projection {self.projection!r:.60}", known)
        if not 0 <= self.layer < MAX_LAYERS:
            raise SnrfError(None, f"layer {self.layer} is not in [0, {MAX_LAYERS})", "correct it")

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
        """Parse ``layers.14.fwd.up``, or raise ``SnrfError``."""
        match = _KEY.fullmatch(key)
        if match is None:
            remedy = f"write 'layers.14.fwd.up', with one of {', '.join(PROJECTIONS)}"
            raise SnrfError(None, f"{key!r:.60} does not name a layer and projection", remedy)
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
        """Parse ``fwd.up.L14.N12953``, or raise ``SnrfError``."""
        match = _NEURON.fullmatch(name)
        if match is None:
            raise SnrfError(None, f"{name!r:.60} does not name a neuron", "write it as 'fwd.up.L14.N12953'")
        return cls(Site(int(match["layer"]), match["projection"]), int(match["index"]))

    def __str__(self) -> str:
        return f"{self.site.projection}.L{self.site.layer}.N{self.index}"
