"""The exact impact of every attention and FFN neuron of a layer on each probe (Eq. 14), from captured tensors.

Eq. 14 removes a neuron by zeroing its weight row and its bias, and compares the output of the attention before
``o_proj`` (site pre_o) or after it (site post_o), or the output of the FFN after ``down_proj``, in the 2-norm over
the counted positions: ``impact = sqrt(sum_i w_i ||y_i - y'_i||^2)``. Here all neurons of a layer are removed, one
at a time, from what one forward pass captured, without model or hooks; ``heads`` has the derivation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.profiling.impact.blocks import Positions, block_size
from mergekit_snrf.profiling.impact.heads import HeadGroup, head_groups
from mergekit_snrf.profiling.impact.inputs import (
    AttentionInputs,
    Readout,
    full_precision,
    position_weights,
    working_dtype,
)
from mergekit_snrf.profiling.impact.sdpa import Backend, sdpa_squares, uses_sdpa


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
    positions: Positions | None = None,
    backend: Backend = "auto",
) -> AttentionScores:
    """Return the impact of every attn.q, attn.k and attn.v neuron on each probe (Eq. 14), exact up to rounding.

    The score of every attended pair is changed by every neuron and goes through the softmax again. attn.k and attn.v
    count real rows: their effect on all query heads that read them.

    Args:
        inputs: the captured layer; bfloat16 and float16 are computed in float32.
        weights: w_i >= 0, how much the squared change at query position i counts; positions of weight 0 cost
            nothing. None counts the positions of ``inputs.key_mask``, or all.
        readout: measure after o_proj (site post_o); None measures before it (site pre_o).
        block_bytes: size of a block of changed scores. Results agree for all sizes up to rounding.
        positions: those with a weight, found before; then ``weights`` are not checked again.
        backend: ``blocked`` for the kernel of ``heads``, ``sdpa`` for fused attention, ``auto`` for the one that
            suits the device.
    """
    sdpa = uses_sdpa(inputs, backend)
    if readout is not None and readout.heads.shape[::2] != (inputs.heads, inputs.value_dim):
        heads, size = readout.heads.shape[::2]
        found = f"the inputs have {inputs.heads} of size {inputs.value_dim}"
        raise ValueError(f"readout is for {heads} heads of size {size}, {found}")
    of_group = sdpa_squares if sdpa else HeadGroup.impact_squares
    squares = sums_of(inputs, weights, block_bytes, positions, lambda group: of_group(group, readout), fused=sdpa)
    return AttentionScores(*(square.sqrt().to(working_dtype(inputs.query)) for square in squares))


GroupSums = tuple[Float[Tensor, "n head_dim"], Float[Tensor, " head_dim"], Float[Tensor, " value_dim"]]


def sums_of(
    inputs: AttentionInputs,
    weights: Float[Tensor, "batch tokens"] | None,
    block_bytes: int | None,
    positions: Positions | None,
    sums: Callable[[HeadGroup], GroupSums],
    *,
    fused: bool = False,
) -> AttentionScores:
    """Return what ``sums`` gives for the query, key and value neurons of every group of heads, float64."""
    weights = position_weights(weights, inputs.key_mask, inputs.query, trusted=positions is not None)
    positions = positions or Positions(weights)
    query, key, value = (
        projection.new_zeros(projection.shape[::2], dtype=torch.float64)
        for projection in (inputs.query, inputs.key, inputs.value)
    )
    with full_precision(inputs.query.device.type):
        for item, counted in enumerate(weights):
            for group in head_groups(inputs, item, counted, positions, block_bytes, fused=fused):
                q, k, v = sums(group)
                query[item].view(inputs.kv_heads, -1)[group.index] = q.flatten()
                key[item].view(inputs.kv_heads, -1)[group.index] = k
                value[item].view(inputs.kv_heads, -1)[group.index] = v
    return AttentionScores(query, key, value)


@torch.no_grad()
def attention_output(
    inputs: AttentionInputs, weights: Float[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens heads*value_dim"]:
    """Return the attention output before o_proj that the inputs imply, zero where the weights are.

    Where it differs from what the model gave to o_proj, the inputs do not describe the layer, nor would the impacts.
    """
    weights = position_weights(weights, inputs.key_mask, inputs.query)
    positions = Positions(weights)
    batch, tokens, _ = inputs.query.shape
    output = inputs.query.new_zeros(
        batch, tokens, inputs.kv_heads, inputs.heads // inputs.kv_heads, inputs.value_dim, dtype=weights.dtype
    )
    with full_precision(inputs.query.device.type):
        for item, counted in enumerate(weights):
            for group in head_groups(inputs, item, counted, positions):
                for block in group.blocks:
                    attended = torch.stack([group.attend(block, base) for base in group.base_scores(block)], 1)
                    output[item, group.rows[block.rows], group.index] = attended + group.value_mean
    return output.flatten(2)


@torch.no_grad()
def ffn_impact(
    hidden: Float[Tensor, "batch tokens intermediate"],
    down: Float[Tensor, "hidden intermediate"] | Float[Tensor, " intermediate"],
    weights: Float[Tensor, "batch tokens"] | None = None,
    positions: Positions | None = None,
) -> Float[Tensor, "batch intermediate"]:
    """Return the impact of every FFN neuron on each probe, ``||H[:, k]|| ||W_down[:, k]||`` (Eq. 14, 17).

    It is one number for row k of up_proj (fwd.up), column k of down_proj (fwd.down) and row k of gate_proj: zeroing
    any of them removes the same rank-one term from the output, as act(0) = 0.

    Args:
        hidden: H = act(gate) * up, the input of down_proj.
        down: ``down_proj.weight``, or the norms of its columns from ``column_norms``, made once a layer.
        weights, positions: as for ``attention_impact``; None counts all.
    """
    if hidden.ndim != 3 or down.ndim not in (1, 2) or down.shape[-1] != hidden.shape[2]:
        wanted = (
            "hidden must have shape [batch, tokens, intermediate] and down [hidden, intermediate] or [intermediate]"
        )
        raise ValueError(f"{wanted}, got {list(hidden.shape)} and {list(down.shape)}")
    norms = column_norms(down) if down.ndim == 2 else down
    squares = sum_over_positions(hidden, weights, positions, torch.square)
    return (squares.sqrt() * norms.to(squares)).to(working_dtype(hidden))


@torch.no_grad()
def column_norms(down: Float[Tensor, "hidden intermediate"]) -> Float[Tensor, " intermediate"]:
    """Return ``||W_down[:, k]||`` for every column k of ``down_proj.weight``, float64."""
    step = max(1, block_size(down.device, None) // (8 * max(1, down.shape[1])))
    squares = sum(rows.double().square().sum(0) for rows in down.split(step))
    return torch.as_tensor(squares, dtype=torch.float64, device=down.device).sqrt()


def sum_over_positions(
    tensor: Float[Tensor, "batch tokens width"],
    weights: Float[Tensor, "batch tokens"] | None,
    positions: Positions | None,
    function: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch width"]:
    """Return ``sum_i w_i f(x_i)`` for every probe, in float64, over blocks of the counted positions."""
    weights = position_weights(weights, None, tensor, trusted=positions is not None)
    positions = positions or Positions(weights)
    total = tensor.new_zeros(tensor.shape[::2], dtype=torch.float64)
    step = max(1, block_size(tensor.device, None) // (8 * tensor.shape[2]))
    for item, counted in enumerate(weights):
        for rows in positions.rows(item, tensor.device).split(step):
            total[item] += counted[rows].double() @ function(tensor[item, rows].double())
    return total
