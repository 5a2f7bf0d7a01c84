"""Running second moments of the inputs of every layer, and what a moments file holds of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mergekit_snrf.fusion.regmean import DenseMoment, Moment, SketchMoment
from mergekit_snrf.models.moments import DENSE_LIMIT, InputSite, moment_tensors
from mergekit_snrf.profiling.result.sums import Sums

CLIP = 3.0
"""Inputs are clipped at this many medians of their norm."""

DEFAULT_SKETCH = 512
"""Eigenvectors of a sketch, where an input is too wide for a dense moment."""

OVERSAMPLING = 2
"""Random directions of a sketch for every eigenvector that is kept."""

# Column blocks of a symmetric product: the lower triangle is never computed.
_BLOCKS = 4


@lru_cache(maxsize=4)
def _directions(size: int, width: int, seed: int) -> Float[Tensor, "size width"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator) / math.sqrt(width)


@dataclass
class InputSum:
    """The running second moment of one input.

    Attributes:
        clip: norm at which inputs are clipped.
        total: dense: the sum of x x^T, upper blocks only; sketch: the sum of x (x Omega)^T.
        directions: Omega of a sketch; None: dense.
        counts: the sum of ||x||^2 after clipping, how many inputs were added, and how many were longer than ``clip``.
        largest: the largest norm before clipping.
    """

    clip: float
    total: Float[Tensor, "d width"]
    directions: Float[Tensor, "d width"] | None
    counts: Float64[Tensor, " 3"] = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    largest: Float64[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @property
    def tokens(self) -> int:
        """How many inputs were added."""
        return int(self.counts[1])

    def add(self, rows: Float[Tensor, "tokens d"]) -> None:
        """Add inputs, clipped."""
        norms = rows.norm(dim=1)
        if len(rows):
            self.largest.clamp_(min=float(norms.max()))
        long = norms > self.clip
        clipped = int(long.sum())
        if self.clip and clipped:
            rows = rows * torch.where(long, self.clip / norms, 1.0)[:, None]
            norms = norms.clamp_max(self.clip)
        self.counts += torch.tensor([float(norms.double().square().sum()), len(rows), clipped], dtype=torch.float64)
        if self.directions is not None:
            self.total.add_((rows.mT @ (rows @ self.directions.to(rows))).to(self.total.device))
            return
        step = -(-rows.shape[1] // _BLOCKS)
        for start in range(0, rows.shape[1], step):
            block = rows[:, start : start + step]
            # Added as float32, without a float64 copy of the product.
            self.total[start : start + step, start:].add_((block.mT @ rows[:, start:]).to(self.total.device))

    def normalise(self) -> None:
        """Scale the sum to trace d in float32, so that kinds of probes count alike and take less memory."""
        trace = float(self.counts[0])
        factor = len(self.total) / trace if trace > 0 else 0.0
        self.total = (self.total * factor).to(torch.float32)
        self.counts[0] *= factor

    def moment(self, sketch: int | None) -> Moment:
        """Return the moment in the form that files hold, with so many eigenvectors of a sketch; None: dense."""
        trace = float(self.counts[0])
        if self.directions is None:
            whole = torch.triu(self.total.double())
            whole = whole + torch.triu(whole, 1).mT
            if sketch is None:
                return DenseMoment.of(whole)
            values, vectors = torch.linalg.eigh(whole)
            return SketchMoment.of(vectors[:, -sketch:].flip(1), values[-sketch:].flip(0), trace)
        vectors, values = _nystrom(self.total.double(), self.directions.double())
        return SketchMoment.of(vectors[:, :sketch], values[:sketch], trace)


class MomentSums(Sums):
    """The running second moments of all inputs of a model on one kind of probes.

    Float64 sums of float32 products do not depend on how the tokens are split beyond their last digits.

    Args:
        sizes: the size of each input.
        clips: the norm at which each input is clipped.
        sketch: eigenvectors kept of every input; None: dense up to ``DENSE_LIMIT``, 512 eigenvectors beyond.
        seed: of the random directions of sketches.
    """

    def __init__(self, sizes: Mapping[InputSite, int], clips: Mapping[InputSite, float], sketch: int | None, seed: int):
        self._sketch = sketch
        self.sums: dict[InputSite, InputSum] = {}
        for site, size in sorted(sizes.items()):
            kept = self.eigenvectors(size)
            width = None if kept is None or OVERSAMPLING * kept >= size else OVERSAMPLING * kept
            total = torch.zeros(size, size if width is None else width, dtype=torch.float64)
            directions = None if width is None else _directions(size, width, seed)
            self.sums[site] = InputSum(clips[site], total, directions)

    def eigenvectors(self, size: int) -> int | None:
        """Return how many eigenvectors are kept of an input of a size; None: it is dense."""
        if self._sketch is None:
            return None if size <= DENSE_LIMIT else DEFAULT_SKETCH
        return min(self._sketch, size)

    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return the tensors of every input."""
        found = {}
        for site, one in self.sums.items():
            found[f"{site.key}.total"] = one.total, "sum"
            found[f"{site.key}.counts"] = one.counts, "sum"
            found[f"{site.key}.largest"] = one.largest, "max"
            found[f"{site.key}.clip"] = torch.tensor(one.clip, dtype=torch.float64), "same"
        return found

    def normalise(self) -> None:
        """Scale every sum to trace d."""
        for one in self.sums.values():
            one.normalise()

    def tensors(self, which: str) -> dict[str, Tensor]:
        """Return the tensors of a moments file for one set, ``gain`` or ``keep``; the sums are given up on the way."""
        found: dict[str, Tensor] = {}
        for site, one in self.sums.items():
            moment = one.moment(self.eigenvectors(len(one.total)))
            found |= moment_tensors(site, which, moment, one.clip)
            one.total = one.total.new_empty(0)
        return found

    def facts(self) -> dict[str, dict[str, float]]:
        """Return for every input its tokens, how many were clipped, and the largest and the median norm."""
        return {
            site.key: {
                "tokens": one.tokens,
                "clipped": int(one.counts[2]),
                "largest": float(one.largest),
                "median": one.clip / CLIP,
            }
            for site, one in self.sums.items()
        }


def _nystrom(
    image: Float[Tensor, "d width"], directions: Float[Tensor, "d width"]
) -> tuple[Float[Tensor, "d width"], Float[Tensor, " width"]]:
    """Return the eigenvectors and eigenvalues of C, falling, from its image C Omega (stabilised Nystrom)."""
    shift = torch.finfo(torch.float32).eps * float(image.norm())
    if shift == 0:
        return torch.linalg.qr(directions).Q, image.new_zeros(image.shape[1])
    shifted = image + shift * directions
    core = directions.mT @ shifted
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    floor = float(values[-1]) * torch.finfo(torch.float64).eps * len(values)
    root = torch.where(values > floor, values.clamp_min(floor).rsqrt(), 0.0)
    left, singular, _ = torch.linalg.svd(shifted @ (vectors * root), full_matrices=False)
    return left, (singular.square() - shift).clamp_min(0)
