"""The inputs of a live decoder's projections, as hooks see them, and their running second moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.regmean import DenseMoment, Moment, SketchMoment
from mergekit_snrf.models.live import LiveDecoder
from mergekit_snrf.models.moments import INPUTS, InputSite

CLIP = 3.0
"""Inputs are clipped at this many medians of their norm."""

OVERSAMPLING = 2
"""Random directions of a sketch for every eigenvector that is kept."""

# Column blocks of a symmetric product: the lower triangle is never computed.
_BLOCKS = 4


def input_sizes(decoder: LiveDecoder) -> dict[InputSite, int]:
    """Return every input of a decoder with its size."""
    shape = decoder.shape
    sizes = {"attn": shape.hidden_size, "up": shape.hidden_size, "down": shape.intermediate_size}
    return {InputSite(layer, name): sizes[name] for layer in range(shape.layers) for name in INPUTS}


@contextmanager
def watched_inputs(
    decoder: LiveDecoder,
    counted: Bool[Tensor, "batch tokens"],
    visit: Callable[[InputSite, Float[Tensor, "counted d"]], None],
) -> Iterator[None]:
    """Visit the input of every projection at the counted tokens, once, while a batch runs through the model.

    Later passes of the same batch, as ``weight: gradient`` makes them, are not visited again.

    Args:
        counted: the tokens of the batch that count; padding never does.
        visit: takes float32, or float64 of a float64 model.

    Raises:
        SnrfError: an input was not seen, has another size, or holds NaN or infinite values.
    """
    sizes, seen = input_sizes(decoder), set[InputSite]()

    def hook(site: InputSite) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            if site in seen:
                return
            seen.add(site)
            tensor: Tensor = args[0].detach()
            if tensor.shape[:2] != counted.shape or tensor.shape[2] != sizes[site]:
                raise SnrfError(
                    f"{decoder.model}: {decoder.path}.{site.layer}.{site.module}",
                    f"reads {list(tensor.shape)}, expected [{', '.join(map(str, counted.shape))}, {sizes[site]}]",
                    "the model is not supported",
                )
            rows = tensor[counted.to(tensor.device)]
            rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
            visit(site, rows)

        return watch

    handles = [
        decoder.layers[site.layer].get_submodule(site.module).register_forward_pre_hook(hook(site)) for site in sizes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(sizes.keys() - seen)
    if missing:
        raise SnrfError(
            f"{decoder.model}: {decoder.path}.{missing[0].layer}.{missing[0].module}",
            "did not run as a module of the layer",
            "the model is not supported",
        )


class NormMedians:
    """Norms of the first inputs, from whose median the norm to clip at follows."""

    def __init__(self) -> None:
        self._norms: dict[InputSite, list[Tensor]] = {}

    def visit(self, site: InputSite, rows: Float[Tensor, "tokens d"]) -> None:
        """Keep the norms of some inputs."""
        self._norms.setdefault(site, []).append(rows.norm(dim=1).double().cpu())

    def medians(self) -> dict[InputSite, float]:
        """Return the median norm of every input."""
        return {site: float(torch.cat(norms).median()) for site, norms in self._norms.items()}


@dataclass
class InputSum:
    """The running second moment of one input.

    Attributes:
        clip: norm at which inputs are clipped.
        total: dense: the sum of x x^T, upper blocks only; sketch: the sum of x (x Omega)^T.
        trace: sum of ||x||^2 after clipping.
        tokens: how many inputs were added.
        clipped: how many of them were longer than ``clip``.
        largest: the largest norm before clipping.
    """

    clip: float
    total: Float[Tensor, "d width"]
    directions: Float[Tensor, "d width"] | None = field(default=None, repr=False)
    trace: float = 0.0
    tokens: int = 0
    clipped: int = 0
    largest: float = 0.0

    @classmethod
    def empty(cls, size: int, clip: float, sketch: int | None, seed: int) -> InputSum:
        """Return the sum of no inputs; a sketch of as many eigenvectors as half of the size is dense instead."""
        if sketch is None or OVERSAMPLING * sketch >= size:
            return cls(clip, torch.zeros(size, size, dtype=torch.float64))
        width = OVERSAMPLING * sketch
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(size, width, generator=generator) / math.sqrt(width)
        return cls(clip, torch.zeros(size, width, dtype=torch.float64), directions)

    def add(self, rows: Float[Tensor, "tokens d"]) -> None:
        """Add inputs, clipped."""
        norms = rows.norm(dim=1)
        self.tokens += len(rows)
        self.largest = max(self.largest, float(norms.max())) if len(rows) else self.largest
        self.clipped += int((norms > self.clip).sum())
        rows = rows * (self.clip / norms.clamp_min(self.clip))[:, None]
        self.trace += float(rows.double().square().sum())
        if self.directions is not None:
            self.total += (rows.mT @ (rows @ self.directions.to(rows))).to(self.total)
            return
        size = rows.shape[1]
        step = -(-size // _BLOCKS)
        for start in range(0, size, step):
            block = rows[:, start : start + step]
            self.total[start : start + step, start:] += (block.mT @ rows[:, start:]).to(self.total)

    def merge(self, other: InputSum) -> None:
        """Add the inputs of another sum."""
        self.total += other.total
        self.trace += other.trace
        self.tokens += other.tokens
        self.clipped += other.clipped
        self.largest = max(self.largest, other.largest)

    def normalised(self) -> InputSum:
        """Return the sum scaled to trace d, so that kinds of probes count alike."""
        factor = len(self.total) / self.trace if self.trace > 0 else 0.0
        scaled = InputSum(self.clip, self.total * factor, self.directions, self.trace * factor)
        scaled.tokens, scaled.clipped, scaled.largest = self.tokens, self.clipped, self.largest
        return scaled

    def moment(self, sketch: int | None, *, dense: bool) -> Moment:
        """Return the moment in the form that files hold.

        Args:
            sketch: eigenvectors of a sketch; None keeps the moment dense.
        """
        if self.directions is None:
            whole = torch.triu(self.total)
            whole = whole + torch.triu(whole, 1).mT
            if sketch is None or dense:
                return DenseMoment.of(whole)
            values, vectors = torch.linalg.eigh(whole)
            return SketchMoment.of(vectors[:, -sketch:].flip(1), values[-sketch:].flip(0), self.trace)
        assert sketch is not None
        vectors, values = _nystrom(self.total, self.directions.double())
        return SketchMoment.of(vectors[:, :sketch], values[:sketch], self.trace)


def _nystrom(
    image: Float[Tensor, "d width"], directions: Float[Tensor, "d width"]
) -> tuple[Float[Tensor, "d width"], Float[Tensor, " width"]]:
    """Return the eigenvectors and eigenvalues of C, falling, from its image C Omega (stabilised Nystrom)."""
    shift = torch.finfo(torch.float32).eps * float(image.norm())
    if shift == 0:
        return torch.linalg.qr(directions).Q, image.new_zeros(image.shape[1])
    shifted = image + shift * directions
    core = directions.mT @ shifted
    core = (core + core.mT) / 2
    factor, info = torch.linalg.cholesky_ex(core)
    if int(info):
        values, vectors = torch.linalg.eigh(core)
        root = vectors * values.clamp_min(shift * torch.finfo(torch.float64).eps).rsqrt()
        half = shifted @ root
    else:
        half = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
    left, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return left, (singular.square() - shift).clamp_min(0)
