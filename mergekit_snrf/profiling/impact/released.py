"""The scores that the paper's released code ranks neurons by, in place of Eq. 14."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.profiling.impact.blocks import Positions, product
from mergekit_snrf.profiling.impact.heads import HeadGroup, Removal, squares
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, working_dtype
from mergekit_snrf.profiling.impact.layer import AttentionScores, GroupSums, sum_over_positions, sums_of


@torch.no_grad()
def released_attention_scores(
    inputs: AttentionInputs,
    weights: Float[Tensor, "batch tokens"] | None = None,
    block_bytes: int | None = None,
    positions: Positions | None = None,
) -> AttentionScores:
    """Return what the paper's released code ranks attention neurons by, which is not Eq. 14; as ``attention_impact``.

    - attn.q: squared change of the attention weights (Eq. 20), summed over positions, when column k of the
      ROTATED queries times column k of the rotated keys is taken from the scores. That differs from a weight row
      of the model, which RoPE spreads over two columns. V has no influence.
    - attn.k: the same numbers, summed over the query heads that read the key row.
    - attn.v: sum over positions of |attention output|, summed over the query heads that read the value row.
    """
    sums = sums_of(inputs, weights, block_bytes, positions, _group_sums)
    return AttentionScores(*(one.to(working_dtype(inputs.query)) for one in sums))


@torch.no_grad()
def released_ffn_scores(
    up: Float[Tensor, "batch tokens intermediate"],
    weights: Float[Tensor, "batch tokens"] | None = None,
    positions: Positions | None = None,
) -> Float[Tensor, "batch intermediate"]:
    """Return the released code's score of fwd.up and fwd.down alike: sum over positions of ``|up_proj(x)|``."""
    if up.ndim != 3:
        raise ValueError(f"up must have shape [batch, tokens, intermediate], got {list(up.shape)}")
    return sum_over_positions(up, weights, positions, torch.abs).to(working_dtype(up))


def _group_sums(group: HeadGroup) -> GroupSums:
    """Return the sums for the columns of the rotated queries, the keys and the values of one group, float64."""
    heads, head_dim = group.query.rotated.shape[1:]
    query = group.values.new_zeros(heads, head_dim, dtype=torch.float64)
    value = query.new_zeros(len(group.values))
    keys = group.key.rotated.permute(1, 2, 0).contiguous()
    columns = [Removal(q[None] * group.scaling, keys) for q in group.query.rotated.permute(1, 2, 0).contiguous()]
    for block in group.blocks:
        weights = group.weights[block.rows]
        for head, base in enumerate(group.base_scores(block)):
            attention = group.softmax(base.clone(), block)
            output = product(attention, group.values[:, block.keys]) + group.value_mean
            value += (weights @ output.abs()).double()
            changed = columns[head].scores(block, base, group.buffer, group.dims_at_once(block))
            query[head] += squares((group.softmax(scores, block).sub_(attention) for scores, _ in changed), weights)
    return query, query.sum(0), value
