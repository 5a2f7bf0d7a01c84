"""Blocks of query positions, with the range of keys that each attends to, and products over a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mergekit_snrf.profiling.impact.inputs import AttentionInputs

QUERY_ROWS = 32
"""Query positions of a block: fewer make small products, more visit too many keys beyond the diagonal."""

CPU_BLOCK_BYTES = 2**20
"""Default size of a block of changed scores on a CPU: about the cache of one core."""

ACCELERATOR_BLOCK_BYTES = 2**26
"""Default size on other devices, which want fewer and larger kernels."""


ONEDNN_ROWS = (8, 16, 32)
"""Numbers of rows of a block that oneDNN multiplies; QUERY_ROWS is the largest."""


class Block(NamedTuple):
    """Counted query rows start:stop and the range first:last of the keys that any of them attends to."""

    start: int
    stop: int
    first: int
    last: int
    hidden: Bool[Tensor, "rows keys"]
    extra: Float[Tensor, "rows keys"] | None

    @property
    def rows(self) -> slice:
        """The rows, as an index."""
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        """The keys, as an index."""
        return slice(self.first, self.last)

    def bias(self, like: Tensor) -> Float[Tensor, "rows keys"]:
        """Return what the mask adds to the scores."""
        bias = like.new_zeros(self.hidden.shape) if self.extra is None else self.extra.to(like)
        return bias.masked_fill(self.hidden, -torch.inf)


def block_size(device: torch.device, block_bytes: int | None) -> int:
    """Return the bytes of a block: ``block_bytes``, which must be positive, or the default of the device."""
    if block_bytes is None:
        return CPU_BLOCK_BYTES if device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    return block_bytes


class Span(NamedTuple):
    """Counted query rows start:stop, and the range first:last of the keys that any of them attends to.

    ``biased``: an additive mask changes scores there.
    """

    start: int
    stop: int
    first: int
    last: int
    biased: bool


@dataclass(frozen=True)
class Attended:
    """The counted rows of a probe that attend to any key, in ``spans``, and which keys any of them attends to.

    ``keys`` is the range of those keys; ``causal``: each row attends to itself and all keys of the range before it.
    """

    rows: Int[Tensor, " rows"]
    spans: list[Span]
    seen: Bool[Tensor, " tokens"]
    keys: slice
    causal: bool

    def blocks(self, inputs: AttentionInputs, item: int) -> list[Block]:
        """Return the spans with the mask of a layer."""
        visibility = Visibility.of(inputs, item, self.rows.device)
        blocks = []
        for start, stop, first, last, biased in self.spans:
            visible, extra = visibility.at(self.rows[start:stop])
            bias = extra[:, first:last] if biased and extra is not None else None
            blocks.append(Block(start, stop, first, last, ~visible[:, first:last], bias))
        return blocks


class Positions:
    """The counted positions of a batch, and what follows from them and the mask of a layer.

    What decides about shapes is found on the CPU and kept for all layers with the same mask, so that a device is
    waited for once a batch and not in every layer.
    """

    def __init__(self, counted: Shaped[Tensor, "batch tokens"]) -> None:
        self.counted = (counted != 0).cpu()
        self._rows: dict[tuple[int, torch.device], Tensor] = {}
        self._attended: dict[tuple[Any, ...], tuple[Any, Attended]] = {}

    def rows(self, item: int, device: torch.device) -> Int[Tensor, " rows"]:
        """Return the counted positions of a probe."""
        if (item, device) not in self._rows:
            self._rows[item, device] = self.counted[item].nonzero().flatten().to(device)
        return self._rows[item, device]

    def attended(self, inputs: AttentionInputs, item: int, size: int) -> Attended:
        """Return the counted rows of a probe that attend to any key, in spans of at most ``size``."""
        masks, device = (inputs.mask, inputs.key_mask), inputs.query.device
        key = (item, size, device, inputs.causal, inputs.window, *map(id, masks))
        if key not in self._attended:
            # The masks are kept as well: an id is only good as long as its object.
            self._attended[key] = masks, self._find(inputs, item, size)
        return self._attended[key][1]

    def _find(self, inputs: AttentionInputs, item: int, size: int) -> Attended:
        device, visibility = inputs.query.device, Visibility.of(inputs, item, torch.device("cpu"))
        tokens = self.counted.shape[1]
        spans, kept, seen = [], [self.counted.new_empty(0, dtype=torch.long)], torch.zeros(tokens, dtype=torch.bool)
        start, causal = 0, True
        for rows in self.counted[item].nonzero().flatten().split(size):
            visible, extra = visibility.at(rows)
            attends = visible.any(1)
            rows, visible = rows[attends], visible[attends]
            if not len(rows):
                continue
            keys = visible.any(0)
            seen |= keys
            span = keys.nonzero()
            first, last = _widened(int(span[0]), int(span[-1]) + 1, tokens)
            biased = extra is not None and bool((extra[attends, first:last] != 0).any())
            spans.append(Span(start, start + len(rows), first, last, biased))
            kept.append(rows)
            start += len(rows)
            begin, places = kept[1][0], torch.arange(tokens)
            causal &= not biased and torch.equal(visible, (places >= begin) & (places <= rows[:, None]))
        rows, places = torch.cat(kept), seen.nonzero().flatten()
        first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        causal &= len(rows) == last - first
        return Attended(rows.to(device), spans, seen.to(device), slice(first, last), causal)


class Visibility(NamedTuple):
    """Which keys the positions of one probe attend to, in one layer; fields as in ``AttentionInputs``."""

    tokens: int
    causal: bool
    window: int | None
    key_mask: Shaped[Tensor, " tokens"] | None
    mask: Shaped[Tensor, "tokens tokens"] | None

    @staticmethod
    def of(inputs: AttentionInputs, item: int, device: torch.device) -> Visibility:
        """Return that of probe ``item``, on a device."""
        key_mask = None if inputs.key_mask is None else inputs.key_mask[item].to(device)
        mask = None if inputs.mask is None else inputs.mask[item % len(inputs.mask), 0].to(device)
        return Visibility(inputs.query.shape[1], inputs.causal, inputs.window, key_mask, mask)

    def at(self, rows: Int[Tensor, " rows"]) -> tuple[Bool[Tensor, "rows tokens"], Float[Tensor, "rows tokens"] | None]:
        """Return which keys each row attends to, and the finite part of an additive mask."""
        if self.mask is not None:
            mask = self.mask[rows]
            if not mask.is_floating_point():
                return mask.bool(), None
            visible = mask > torch.finfo(mask.dtype).min / 2
            return visible, torch.where(visible, mask, 0.0)
        keys = torch.arange(self.tokens, device=rows.device)
        visible = torch.ones(len(rows), self.tokens, dtype=torch.bool, device=rows.device)
        if self.causal:
            visible &= keys <= rows[:, None]
        if self.window is not None:
            visible &= keys > rows[:, None] - self.window
        if self.key_mask is not None:
            visible &= self.key_mask != 0
        return visible, None


def _widened(first: int, last: int, tokens: int) -> tuple[int, int]:
    """Return the range with hidden keys added, if there are enough, so that it has a regular length."""
    missing = -(last - first) % key_step(last - first)
    below = min(missing, first)
    return first - below, min(tokens, last + missing - below)


def product(weights: Float[Tensor, "*dims rows keys"], values: Float[Tensor, "width keys"]) -> Tensor:
    """Return ``weights @ values^T`` over all leading dimensions."""
    if weights.device.type == "cpu" and _is_intel():
        return weights @ values.mT
    rows, keys = weights.shape[-2:]
    regular = rows in ONEDNN_ROWS and keys % key_step(keys) == 0
    if regular and weights.device.type == "cpu" and weights.dtype == torch.float32 and _onednn_linear():
        # torch.matmul leaves float32 to MKL, which on other makers' CPUs gets half of oneDNN's speed. But oneDNN
        # keeps code, some 0.2 MB, for every shape it has seen: irregular shapes would fill the memory.
        return torch.ops.mkldnn._linear_pointwise(weights, values.contiguous(), None, "none", [], "")
    return weights @ values.mT


def laid_out(values: Float[Tensor, "width keys"]) -> Float[Tensor, "width keys"]:
    """Return a copy in the memory layout that ``product`` multiplies fastest."""
    return values.mT.contiguous().mT if _is_intel() else values.contiguous()


def key_step(keys: int) -> int:
    """Return the step, about a sixteenth, that numbers of keys are rounded to."""
    return max(16, 1 << max(0, keys.bit_length() - 5))


@cache
def _is_intel() -> bool:
    """Return whether MKL, which torch multiplies with, runs on its maker's CPU; it is faster than oneDNN there."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpus:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in cpus)
    except OSError:  # Not Linux.
        return False


@cache
def _onednn_linear() -> bool:
    """Return whether this torch can be asked for oneDNN's float32 product; it has no public name."""
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "") == 1)
    except (AttributeError, RuntimeError, TypeError):
        return False
