"""The exact impact of attn.q and attn.k neurons by torch's fused attention, for devices where that is fast.

Every neuron is a query or key head of its own: the rotated head without what the neuron gives to it. Fused attention
runs over batches of such heads and never forms their scores. It does the work of a whole attention for each neuron,
the product of queries and keys included, which the blocked kernel replaces by two products of columns; on a CPU it is
slower for that. It was tested on CPUs only.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.profiling.impact.heads import HeadGroup, energy
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout
from mergekit_snrf.profiling.impact.sides import Side

Backend = Literal["auto", "blocked", "sdpa"]


def uses_sdpa(inputs: AttentionInputs, backend: Backend) -> bool:
    """Return whether fused attention is asked for: by name, or by ``auto`` on a CUDA device where it applies."""
    if backend == "sdpa" and inputs.softcap is not None:
        raise ValueError("fused attention cannot cap the scores; use backend: auto or blocked")
    return backend == "sdpa" or (backend == "auto" and inputs.query.device.type == "cuda" and inputs.softcap is None)


def sdpa_squares(
    group: HeadGroup, readout: Readout | None
) -> tuple[Float[Tensor, "n head_dim"], Float[Tensor, " head_dim"], Float[Tensor, " value_dim"]]:
    """Return the squared impacts of a group's neurons as ``HeadGroup.impact_squares`` does."""
    heads, head_dim = group.query.rotated.shape[1:]
    neurons = torch.arange(head_dim, device=group.values.device)
    attention = _Attention(group)
    query = group.values.new_zeros(heads, head_dim, dtype=torch.float64)
    key = query.new_zeros(head_dim)
    queries = group.query.rotated.transpose(0, 1)
    outputs = attention(queries[None], attention.key[None, None])[0]
    for head in range(heads):
        for dims in attention.batches(neurons, 1):
            changed = _without(group.query, head, dims, group.partner)
            change = attention(changed[:, None], attention.key[None, None])[:, 0].sub_(outputs[head])
            if readout is not None:
                change = change @ readout.heads[group.index * heads + head].to(change).mT
            query[head, dims] = energy(change, group.weights)
    for dims in attention.batches(neurons, heads):
        changed = _without(group.key, 0, dims, group.partner)[:, attention.keys]
        change = attention(queries[None], changed[:, None]).sub_(outputs)
        if readout is None:
            key[dims] = energy(change, group.weights).sum(-1)
        else:
            joint = change.transpose(1, 2).flatten(2) @ readout.groups[group.index].to(change).mT
            key[dims] = energy(joint, group.weights)
    return query, key, group.value_squares(list(outputs), group.weights, readout)


class _Attention:
    """Fused attention of the counted rows of a group to the keys that any of them attends to."""

    def __init__(self, group: HeadGroup) -> None:
        self.keys = group.keys
        self.key = group.key.rotated[self.keys, 0]
        self._values = group.values[:, self.keys].mT.contiguous()
        self._scaling = group.scaling
        longest = max(len(group.rows), len(self.key))
        self._batch = group.buffer.numel() // (longest * (self.key.shape[1] + len(group.values)))
        # Flash attention has no mask of its own.
        self._mask: dict[str, Any] = {"is_causal": True}
        if group.blocks:
            mask = group.values.new_full((len(group.rows), group.values.shape[1]), -torch.inf)
            for block in group.blocks:
                mask[block.rows, block.keys] = block.bias(group.values)
            self._mask = {"attn_mask": mask[:, self.keys]}

    def __call__(
        self, query: Float[Tensor, "#batch n rows head_dim"], key: Float[Tensor, "#batch #n keys head_dim"]
    ) -> Float[Tensor, "batch n rows value_dim"]:
        shape = torch.broadcast_shapes(query.shape[:2], key.shape[:2])
        query, key, values = (tensor.expand(*shape, -1, -1) for tensor in (query, key, self._values))
        return F.scaled_dot_product_attention(query, key, values, scale=self._scaling, **self._mask)

    def batches(self, neurons: Int[Tensor, " head_dim"], heads: int) -> tuple[Int[Tensor, " dims"], ...]:
        """Split neurons into batches whose heads and outputs are not larger than the group's buffer."""
        return neurons.split(max(1, self._batch // heads))


def _without(
    side: Side, head: int, dims: Int[Tensor, " dims"], partner: Int[Tensor, " head_dim"]
) -> Float[Tensor, "dims tokens head_dim"]:
    """Return a rotated head without each of some neurons."""
    batch = torch.arange(len(dims), device=dims.device)
    changed = side.rotated[:, head].repeat(len(dims), 1, 1)
    changed[batch, :, dims] -= side.direct[:, head, dims].mT
    changed[batch, :, partner[dims]] -= side.crossed[:, head, dims].mT
    return changed if side.growth is None else changed.mul_(side.growth[:, head, dims].mT[..., None])
