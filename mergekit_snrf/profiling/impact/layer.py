"""The exact impact of every attention and FFN neuron of a layer on each probe (Eq. 14), from captured tensors.

Eq. 14 removes a neuron by zeroing its weight row and its bias, and compares the output of the attention before
``o_proj`` (site pre_o) or after it (site post_o), or the output of the FFN after ``down_proj``, in the 2-norm over
the counted positions: ``impact = sqrt(sum_i w_i ||y_i - y'_i||^2)``. Here all neurons of a layer are removed, one
at a time, from what one forward pass captured. No model and no hook is needed; ``impact_heads`` has the derivation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.profiling.impact.compiled import compiled_changing
from mergekit_snrf.profiling.impact.heads import block_size, head_groups
from mergekit_snrf.profiling.impact.inputs import (
    AttentionInputs,
    Readout,
    full_precision,
    position_weights,
    working_dtype,
)
from mergekit_snrf.profiling.impact.screen import Screened
from mergekit_snrf.profiling.impact.sdpa import Backend, sdpa_squares, uses_sdpa

__all__ = [
    "AttentionInputs",
    "AttentionScores",
    "Backend",
    "Readout",
    "attention_impact",
    "attention_output",
    "column_norms",
    "ffn_impact",
    "released_attention_scores",
    "released_ffn_scores",
]


class AttentionScores(NamedTuple):
    """One nonnegative number for every neuron and probe: float64 for float64 inputs, else float32."""

    query: Float[Tensor, "batch heads*head_dim"]
    key: Float[Tensor, "batch kv_heads*head_dim"]
    value: Float[Tensor, "batch kv_heads*value_dim"]


@torch.no_grad()
def attention_impact(
    inputs: AttentionInputs,
    weights: Float[Tensor, "batch tokens"] | None = None,
    readout: Readout | None = None,
    block_bytes: int | None = None,
    *,
    screen: float | None = None,
    backend: Backend = "auto",
    compile: bool = False,
) -> AttentionScores:
    """Return the impact of every attn.q, attn.k and attn.v neuron on each probe (Eq. 14).

    Exact up to rounding: the score of every attended pair is changed by every neuron and goes through the
    softmax again, in blocks that stay in the cache. Key positions that no counted row attends to are not visited.

    With ``screen`` that is done for the top share of attn.q and of attn.k that a first-order estimate finds. The
    others get their estimate, clipped below the least exact impact of the probe and projection.

    Args:
        inputs: the captured layer; bfloat16 and float16 are computed in float32.
        weights: w_i >= 0, how much the squared change at query position i counts; positions of weight 0 cost
            nothing. None counts the positions of ``inputs.key_mask``, or all.
        readout: measure after o_proj (site post_o); None measures before it (site pre_o).
        block_bytes: size of a block of changed scores. Results agree for all sizes up to rounding.
        screen: share in (0, 1] of the attn.q and attn.k neurons to measure exactly; None is all, without estimates.
        backend: ``blocked`` for the kernel of ``impact_heads``, ``sdpa`` for that of ``impact_sdpa``, ``auto`` for
            the one that suits the device. They agree up to rounding.
        compile: let torch.compile make the inner loop of ``blocked`` on a CPU; see ``impact_compiled``.

    Returns:
        Impacts, not squared. attn.k and attn.v count real rows: their effect on all query heads that read them.

    Raises:
        ValueError: weights or readout do not fit the inputs, a weight is negative, the screen is no share, the
            inputs are nothing for the backend, or the backend has nothing to compile.
    """
    if screen is not None and not 0 < screen <= 1:
        raise ValueError(f"screen must be in (0, 1], got {screen}")
    if compile and backend == "sdpa":
        raise ValueError("backend: sdpa has nothing to compile; use backend: auto or blocked")
    sdpa = uses_sdpa(inputs, backend)
    if readout is not None and readout.heads.shape[::2] != (inputs.heads, inputs.value_dim):
        raise ValueError(
            f"readout is for {readout.heads.shape[0]} heads of size {readout.heads.shape[2]}, the inputs have "
            f"{inputs.heads} of size {inputs.value_dim}"
        )
    weights = position_weights(weights, inputs.key_mask, inputs.query)
    query = inputs.query.new_zeros(inputs.query.shape[::2], dtype=torch.float64)
    key = query.new_zeros(inputs.key.shape[::2])
    value = query.new_zeros(inputs.value.shape[::2])
    with full_precision(inputs.query.device.type):
        for item, counted in enumerate(weights):
            screened = None if screen is None else Screened.of(inputs, item, counted, readout, screen)
            for group in head_groups(inputs, item, counted, block_bytes):
                kept = None if screened is None else screened.kept(group.index)
                if sdpa:
                    q, k, v = sdpa_squares(group, readout, kept)
                else:
                    q, k, v = group.impact_squares(readout, kept, compiled_changing(group) if compile else None)
                query[item].view(inputs.kv_heads, -1)[group.index] = q.flatten()
                key[item].view(inputs.kv_heads, -1)[group.index] = k
                value[item].view(inputs.kv_heads, -1)[group.index] = v
            if screened is not None:
                query[item], key[item] = screened.filled(query[item], key[item])
    dtype = working_dtype(inputs.query)
    return AttentionScores(query.sqrt().to(dtype), key.sqrt().to(dtype), value.sqrt().to(dtype))


@torch.no_grad()
def attention_output(
    inputs: AttentionInputs, weights: Float[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens heads*value_dim"]:
    """Return the attention output before o_proj that the inputs imply, zero at positions that do not count.

    Where it differs from what the model gave to o_proj, the inputs do not describe the layer (another mask,
    scaling, cap, norm or rotary layout), and so neither would the impacts.

    Args:
        inputs: the captured layer.
        weights: as for ``attention_impact``; only zero or not matters.

    Raises:
        ValueError: the weights do not fit the inputs, or one is negative.
    """
    weights = position_weights(weights, inputs.key_mask, inputs.query)
    batch, tokens, _ = inputs.query.shape
    output = inputs.query.new_zeros(
        batch, tokens, inputs.kv_heads, inputs.heads // inputs.kv_heads, inputs.value_dim, dtype=weights.dtype
    )
    with full_precision(inputs.query.device.type):
        for item, counted in enumerate(weights):
            for group in head_groups(inputs, item, counted):
                for block in group.blocks:
                    attended = torch.stack([group.attend(block, base) for base in group.base_scores(block)], 1)
                    output[item, group.rows[block.start : block.stop], group.index] = attended + group.value_mean
    return output.flatten(2)


@torch.no_grad()
def released_attention_scores(
    inputs: AttentionInputs,
    weights: Float[Tensor, "batch tokens"] | None = None,
    block_bytes: int | None = None,
) -> AttentionScores:
    """Return the attention scores that the paper's released code ranks by. They are not Eq. 14.

    - attn.q: squared change of the attention weights (Eq. 20), summed over positions, when column k of the
      ROTATED queries times column k of the rotated keys is taken from the scores. That is no weight row of the
      model: RoPE spreads a row over two columns. V plays no part.
    - attn.k: the same numbers (the released code has one score for both), summed over the query heads that read the
      key row.
    - attn.v: sum over positions of |attention output|, summed over the query heads that read the value row.

    Args:
        inputs: the captured layer.
        weights: how much each query position counts; None counts the positions of ``inputs.key_mask``, or all.
        block_bytes: as for ``attention_impact``.

    Raises:
        ValueError: the weights do not fit the inputs, or one is negative.
    """
    weights = position_weights(weights, inputs.key_mask, inputs.query)
    query = inputs.query.new_zeros(inputs.query.shape[::2], dtype=torch.float64)
    key = query.new_zeros(inputs.key.shape[::2])
    value = query.new_zeros(inputs.value.shape[::2])
    with full_precision(inputs.query.device.type):
        for item, counted in enumerate(weights):
            for group in head_groups(inputs, item, counted, block_bytes):
                q, v = group.released_sums()
                query[item].view(inputs.kv_heads, -1)[group.index] = q.flatten()
                key[item].view(inputs.kv_heads, -1)[group.index] = q.sum(0)
                value[item].view(inputs.kv_heads, -1)[group.index] = v
    dtype = working_dtype(inputs.query)
    return AttentionScores(query.to(dtype), key.to(dtype), value.to(dtype))


@torch.no_grad()
def ffn_impact(
    hidden: Float[Tensor, "batch tokens intermediate"],
    down: Float[Tensor, "hidden intermediate"] | Float[Tensor, " intermediate"],
    weights: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch intermediate"]:
    """Return the impact of every FFN neuron on each probe, ``||H[:, k]|| ||W_down[:, k]||`` (Eq. 14, 17).

    It is one number for row k of up_proj (fwd.up), column k of down_proj (fwd.down) and row k of gate_proj: zeroing
    any of them removes the same rank-one term from the output, as act(0) = 0.

    Args:
        hidden: H = act(gate) * up, the input of down_proj.
        down: ``down_proj.weight``, or the norms of its columns from ``column_norms``, made once a layer.
        weights: w_i >= 0, how much the squared change at position i counts, 0 on padding; None counts all.

    Raises:
        ValueError: the shapes do not fit together, or a weight is negative.
    """
    if hidden.ndim != 3 or down.ndim not in (1, 2) or down.shape[-1] != hidden.shape[2]:
        raise ValueError(
            "hidden must have shape [batch, tokens, intermediate] and down [hidden, intermediate] or [intermediate], "
            f"got {list(hidden.shape)} and {list(down.shape)}"
        )
    norms = column_norms(down) if down.ndim == 2 else down
    squares = _sum_over_positions(hidden, weights, torch.square)
    return (squares.sqrt() * norms.to(squares)).to(working_dtype(hidden))


@torch.no_grad()
def column_norms(
    down: Float[Tensor, "hidden intermediate"], metric: Float[Tensor, "rank hidden"] | None = None
) -> Float[Tensor, " intermediate"]:
    """Return ``||W_down[:, k]||_G`` for every column k, float64.

    Args:
        down: ``down_proj.weight``.
        metric: rows g with G = sum of g g^T; None for the 2-norm.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if metric is not None:
        if down.ndim != 2 or metric.ndim != 2 or metric.shape[1] != down.shape[0]:
            raise ValueError(f"metric must have shape [rank, {down.shape[0]}], got {list(metric.shape)}")
        dtype = working_dtype(down)
        with full_precision(down.device.type):
            down = metric.to(down.device, dtype) @ down.to(dtype)
    step = max(1, block_size(down.device, None) // (8 * max(1, down.shape[1])))
    squares = sum(rows.double().square().sum(0) for rows in down.split(step))
    return torch.as_tensor(squares, dtype=torch.float64, device=down.device).sqrt()


@torch.no_grad()
def released_ffn_scores(
    up: Float[Tensor, "batch tokens intermediate"], weights: Float[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch intermediate"]:
    """Return the released code's score of fwd.up and fwd.down alike: sum over positions of ``|up_proj(x)|``.

    Args:
        up: output of up_proj.
        weights: how much each position counts, 0 on padding; None counts all.

    Raises:
        ValueError: the shapes do not fit together, or a weight is negative.
    """
    if up.ndim != 3:
        raise ValueError(f"up must have shape [batch, tokens, intermediate], got {list(up.shape)}")
    return _sum_over_positions(up, weights, torch.abs).to(working_dtype(up))


def _sum_over_positions(
    tensor: Float[Tensor, "batch tokens width"],
    weights: Float[Tensor, "batch tokens"] | None,
    function: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch width"]:
    """Return ``sum_i w_i f(x_i)`` for every probe, in float64, over blocks of the counted positions."""
    weights = position_weights(weights, None, tensor)
    total = tensor.new_zeros(tensor.shape[::2], dtype=torch.float64)
    step = max(1, block_size(tensor.device, None) // (8 * tensor.shape[2]))
    for item, counted in enumerate(weights):
        for rows in counted.nonzero().flatten().split(step):
            total[item] += counted[rows].double() @ function(tensor[item, rows].double())
    return total
