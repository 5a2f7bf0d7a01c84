"""Blocks of query positions, with the range of keys that each attends to, and products over a block."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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


def row_blocks(
    inputs: AttentionInputs, item: int, weights: Float[Tensor, " tokens"], size: int
) -> tuple[Int[Tensor, " rows"], list[Block], Bool[Tensor, " tokens"]]:
    """Return the counted rows of a probe, their blocks of at most ``size``, and which keys any of them attends to.

    Rows of weight 0 and rows that attend to nothing are left out.
    """
    blocks, kept, seen = [], [], torch.zeros_like(weights, dtype=torch.bool)
    start = 0
    for rows in weights.nonzero().flatten().split(size):
        visible, extra = _visible(inputs, item, rows)
        attends = visible.any(1)
        rows, visible = rows[attends], visible[attends]
        keys = visible.any(0)
        if not len(rows):
            continue
        seen |= keys
        span = keys.nonzero()
        first, last = _widened(int(span[0]), int(span[-1]) + 1, len(keys))
        extra = None if extra is None else extra[attends, first:last]
        blocks.append(Block(start, start + len(rows), first, last, ~visible[:, first:last], extra))
        kept.append(rows)
        start += len(rows)
    return torch.cat(kept) if kept else weights.new_empty(0, dtype=torch.long), blocks, seen


def _widened(first: int, last: int, tokens: int) -> tuple[int, int]:
    """Return the range with hidden keys added, if there are enough, so that it has a regular length."""
    missing = -(last - first) % key_step(last - first)
    below = min(missing, first)
    return first - below, min(tokens, last + missing - below)


def _visible(
    inputs: AttentionInputs, item: int, rows: Int[Tensor, " rows"]
) -> tuple[Bool[Tensor, "rows tokens"], Float[Tensor, "rows tokens"] | None]:
    """Return which keys each row attends to, and the finite part of an additive mask if it is not all zero."""
    if inputs.mask is not None:
        mask = inputs.mask[item % len(inputs.mask), 0].to(rows.device)[rows]
        if not mask.is_floating_point():
            return mask.bool(), None
        visible = mask > torch.finfo(mask.dtype).min / 2
        extra = torch.where(visible, mask, 0.0)
        return visible, extra if bool((extra != 0).any()) else None
    keys = torch.arange(inputs.query.shape[1], device=rows.device)
    visible = torch.ones(len(rows), len(keys), dtype=torch.bool, device=rows.device)
    if inputs.causal:
        visible &= keys <= rows[:, None]
    if inputs.window is not None:
        visible &= keys > rows[:, None] - inputs.window
    if inputs.key_mask is not None:
        visible &= inputs.key_mask[item].to(rows.device) != 0
    return visible, None


def product(weights: Float[Tensor, "*dims rows keys"], values: Float[Tensor, "width keys"]) -> Tensor:
    """Return ``weights @ values^T`` over all leading dimensions."""
    rows, keys = weights.shape[-2:]
    regular = rows in ONEDNN_ROWS and keys % key_step(keys) == 0
    if regular and weights.device.type == "cpu" and weights.dtype == torch.float32 and _onednn_linear():
        # torch.matmul leaves float32 to MKL, which on other makers' CPUs gets half of oneDNN's speed. But oneDNN
        # keeps code, some 0.2 MB, for every shape it has seen: irregular shapes would fill the memory.
        return torch.ops.mkldnn._linear_pointwise(weights, values.contiguous(), None, "none", [], "")
    return weights @ values.mT


def key_step(keys: int) -> int:
    """Return the step, about a sixteenth, that numbers of keys are rounded to."""
    return max(16, 1 << max(0, keys.bit_length() - 5))


@cache
def _onednn_linear() -> bool:
    """Return whether this torch can be asked for oneDNN's float32 product; it has no public name."""
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "") == 1)
    except (AttributeError, RuntimeError, TypeError):
        return False
