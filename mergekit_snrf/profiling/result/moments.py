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
from mergekit_snrf.models.moments import DEFAULT_SKETCH, DENSE_LIMIT, InputSite, moment_tensors
from mergekit_snrf.profiling.result.statistics import Sums

CLIP = 3.0
"""Inputs are clipped at this many medians of their norm."""

OVERSAMPLING = 2
"""Random directions of a sketch for every eigenvector that is kept."""

# Rows of a panel of a symmetric sum, left of which nothing is computed or kept: narrow ones waste less, wide ones
# multiply faster where the inputs outgrow the cache.
_NARROW, _WIDE, _NARROW_SIDE = 96, 256, 1024


@lru_cache(maxsize=4)
def _directions(size: int, width: int, seed: int) -> Float[Tensor, "size width"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator) / math.sqrt(width)


@lru_cache(maxsize=4)
def _moved(
    directions: Float[Tensor, "size width"], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "size width"]:
    """Return directions on a device: one copy for all inputs, not one for each."""
    return directions.to(device, dtype)


@dataclass
class InputSum:
    """The running second moment of one input.

    Attributes:
        size: d.
        clip: norm at which inputs are clipped.
        directions: Omega of a sketch; None: dense.
        total: dense: the sum of x x^T, its upper panels one after the other; sketch: the sum of x (x Omega)^T.
        counts: the sum of ||x||^2 after clipping, how many inputs were added, and how many were longer than ``clip``.
        largest: the largest norm before clipping.
    """

    size: int
    clip: float
    directions: Float[Tensor, "d width"] | None
    total: Float[Tensor, ...] = field(init=False)
    counts: Float64[Tensor, " 3"] = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    largest: Float64[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        shape = self.directions.shape if self.directions is not None else [sum(a * b for a, b in self._panels())]
        self.total = torch.zeros(shape, dtype=torch.float64)

    @property
    def tokens(self) -> int:
        """How many inputs were added."""
        return int(self.counts[1])

    def _panels(self) -> list[tuple[int, int]]:
        """Return height and width of every panel of a dense sum."""
        step = _NARROW if self.size <= _NARROW_SIDE else _WIDE
        return [(min(step, self.size - start), self.size - start) for start in range(0, self.size, step)]

    def _split(self) -> list[Float[Tensor, "height width"]]:
        panels = self._panels()
        parts = self.total.split([height * width for height, width in panels])
        return [part.view(panel) for part, panel in zip(parts, panels, strict=True)]

    def add(self, rows: Float[Tensor, "tokens d"]) -> None:
        """Add inputs, clipped; nothing here waits for a device that has room for the sum."""
        self._join(rows.device)
        norms = rows.norm(dim=1)
        long = norms > self.clip
        if len(rows):
            torch.maximum(self.largest, norms.max().to(self.largest), out=self.largest)
        # To ask whether any is too long is to wait for a device, and cheaper than a pass over them on a CPU.
        if self.clip and (rows.device.type != "cpu" or bool(long.any())):
            rows = rows * torch.where(long, self.clip / norms, 1.0).unsqueeze(1)
            norms = norms.clamp_max(self.clip)
        squared = norms.double().square().sum()
        added = torch.stack([squared, torch.full_like(squared, len(rows)), long.sum().to(squared)])
        self.counts += added.to(self.counts)
        if self.directions is not None:
            directions = _moved(self.directions, rows.device, rows.dtype)
            self.total.add_((rows.mT @ (rows @ directions)).to(self.total.device))
            return
        for panel in self._split():
            height, width = panel.shape
            right = rows[:, self.size - width :]
            # Added as float32, without a float64 copy of the product.
            panel.add_((right[:, :height].mT @ right).to(panel.device))

    def _join(self, device: torch.device) -> None:
        """Move the sums to a CUDA device; the large one only if a quarter of the memory stays free."""
        if device.type != "cuda" or self.total.device == device:
            return
        self.counts, self.largest = self.counts.to(device), self.largest.to(device)
        free, memory = torch.cuda.mem_get_info(device)
        if free - self.total.nbytes > memory / 4:
            self.total = self.total.to(device)

    def leave(self) -> None:
        """Move the sums to the CPU."""
        self.total, self.counts, self.largest = self.total.cpu(), self.counts.cpu(), self.largest.cpu()

    def normalise(self) -> None:
        """Scale the sum to trace d in float32, so that kinds of probes count alike and take less memory."""
        trace = float(self.counts[0])
        factor = self.size / trace if trace > 0 else 0.0
        self.total = (self.total * factor).to(torch.float32)
        self.counts[0] *= factor

    def moment(self, sketch: int | None) -> Moment:
        """Return the moment in the form that files hold, with so many eigenvectors of a sketch; None: dense."""
        trace, directions, total = float(self.counts[0]), self.directions, self.total
        if directions is None:
            total = self._whole()
            if sketch is None:
                return DenseMoment.of(total)
            width = OVERSAMPLING * sketch
            if width >= self.size:
                values, vectors = torch.linalg.eigh(total)
                return SketchMoment.of(vectors[:, -sketch:].flip(1), values[-sketch:].flip(0), trace)
            directions = _directions(self.size, width, 0)
            total = total @ directions.double()
        vectors, values = _nystrom(total.double(), directions.double(), sketch or 0)
        return SketchMoment.of(vectors, values, trace)

    def _whole(self) -> Float64[Tensor, "d d"]:
        whole = torch.zeros(self.size, self.size, dtype=torch.float64)
        for panel in self._split():
            height, width = panel.shape
            start = self.size - width
            whole[start : start + height, start:] = panel
        return whole.triu_() + whole.triu(1).mT


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
            width = OVERSAMPLING * (self.eigenvectors(size) or size)
            # Half of x x^T costs less than x (x Omega)^T where Omega has more than a quarter of its columns.
            directions = None if 4 * width >= size else _directions(size, width, seed)
            self.sums[site] = InputSum(size, clips[site], directions)

    def eigenvectors(self, size: int) -> int | None:
        """Return how many eigenvectors are kept of an input of a size; None: it is dense."""
        if self._sketch is None:
            return None if size <= DENSE_LIMIT else DEFAULT_SKETCH
        return min(self._sketch, size)

    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return the tensors of every input, on the CPU."""
        found = {}
        for site, one in self.sums.items():
            one.leave()
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
            moment = one.moment(self.eigenvectors(one.size))
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
    image: Float64[Tensor, "d width"], directions: Float64[Tensor, "d width"], count: int
) -> tuple[Float64[Tensor, "d count"], Float64[Tensor, " count"]]:
    """Return the leading eigenvectors and eigenvalues of C, falling, from its image C Omega (stabilised Nystrom)."""
    shift = torch.finfo(torch.float32).eps * float(image.norm())
    shifted = image + shift * directions
    core = directions.mT @ shifted
    root = _half_inverse((core + core.mT) / 2)
    half = shifted @ root
    values, vectors = torch.linalg.eigh(half.mT @ half)
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    inverse = torch.where(values > _floor(values[0]), values.rsqrt(), 0.0)
    return half @ (vectors * inverse), (values - shift).clamp_min(0)


def _half_inverse(matrix: Float64[Tensor, "k k"]) -> Float64[Tensor, "k k"]:
    """Return R with R R^T the inverse of a positive matrix, without directions that are lost in rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * torch.where(values > len(values) * _floor(values[-1]), values.rsqrt(), 0.0)


def _floor(largest: Float64[Tensor, ""]) -> Float64[Tensor, ""]:
    return largest.clamp_min(0) * torch.finfo(torch.float64).eps
