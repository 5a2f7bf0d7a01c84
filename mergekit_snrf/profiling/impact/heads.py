"""The attention of one group of heads, computed again and again with one neuron missing, in blocks.

Notation: i is a query position, j a key position, k a dim of a head of size d, s the scaling, ``~`` means after
RoPE. RoPE of a projection x in the half-split layout is ``x~[m] = x[m] cos[m] + (x cross)[partner[m]]``, where
partner swaps the halves and ``cross[k] = +-sin[partner[k]]``. So zeroing column k takes ``x[k] cos[k]`` from x~[k]
and ``x[k] cross[k]`` from x~[partner[k]], and every score changes by two products of columns:

- attn.q: Delta_ij = s (q_ik cos_i[k] k~_jk + q_ik cross_i[k] k~_j,partner(k))
- attn.k: Delta_ij = s (q~_ik k_jk cos_j[k] + q~_i,partner(k) k_jk cross_j[k])

The scores without the neuron are ``growth (S - Delta)``. The growth is 1 unless q_norm or k_norm follows the
projection: then its RMS loses x_k as well, and the other columns grow by
``sqrt((ms + eps) / (ms - x_k^2 / d + eps))``, ms = mean(x^2): one factor a row (attn.q) or a column (attn.k) of the
scores. q, k and ``~`` above are after the norm and its weight, x is before them.

Cap, mask and softmax then run anew on every block of changed scores. The softmax takes its own row maximum, so
that scores of any size are safe, and a block stays in the cache from its first pass to the product with V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.profiling.impact.blocks import QUERY_ROWS, Block, Positions, block_size, product
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout, working_dtype


class Rotary(NamedTuple):
    """RoPE of one probe as ``x~ = x cos + (x cross)[partner]``."""

    cos: Float[Tensor, "#tokens 1 head_dim"]
    cross: Float[Tensor, "#tokens 1 head_dim"]
    partner: Int[Tensor, " head_dim"]

    @staticmethod
    def of(cos: Tensor | None, sin: Tensor | None, item: int, head_dim: int, like: Tensor) -> Rotary:
        """Return the RoPE of probe ``item`` from cos and sin as in ``AttentionInputs``, None for no rotation."""
        partner = torch.arange(head_dim, device=like.device)
        if cos is None or sin is None:
            one = like.new_ones(1, 1, head_dim)
            return Rotary(one, torch.zeros_like(one), partner)
        half = cos.shape[-1] // 2
        partner[: 2 * half] = partner[: 2 * half].roll(half)
        cos, sin = (table[item % len(table)].to(like)[:, None] for table in (cos, sin))
        cross = torch.cat([sin[..., half:], -sin[..., :half]], dim=-1)
        rest = head_dim - 2 * half
        return Rotary(F.pad(cos, (0, rest), value=1.0), F.pad(cross, (0, rest)), partner)

    def at(self, rows: Int[Tensor, " rows"]) -> Rotary:
        """Return the RoPE of some positions."""
        return self if len(self.cos) == 1 else Rotary(self.cos[rows], self.cross[rows], self.partner)


class Side(NamedTuple):
    """Heads of queries or keys: what norm and RoPE make of them, and what zeroing a column takes away."""

    rotated: Float[Tensor, "tokens heads head_dim"]
    direct: Float[Tensor, "tokens heads head_dim"]
    crossed: Float[Tensor, "tokens heads head_dim"]
    growth: Float[Tensor, "tokens heads head_dim"] | None

    @staticmethod
    def of(
        raw: Float[Tensor, "tokens heads head_dim"],
        norm: Float[Tensor, " head_dim"] | None,
        eps: float,
        rotary: Rotary,
    ) -> Side:
        """Apply the RMS norm, if there is one, and RoPE to the heads of a raw projection."""
        growth = None
        if norm is not None:
            squares = raw.square()
            # Sums of all squares but one, from both ends: a difference would cancel where one column dominates.
            before = F.pad(squares.cumsum(-1)[..., :-1], (1, 0))
            after = F.pad(squares.flip(-1).cumsum(-1)[..., :-1], (1, 0)).flip(-1)
            mean = squares.mean(-1, keepdim=True)
            growth = ((mean + eps) / ((before + after) / raw.shape[-1] + eps)).sqrt()
            raw = raw * (mean + eps).rsqrt() * norm.to(raw)
        direct, crossed = raw * rotary.cos, raw * rotary.cross
        return Side(direct + crossed[..., rotary.partner], direct, crossed, growth)


class Removal(NamedTuple):
    """Without neuron k the scores are ``growth[k] (S - sum over t of outer(query[t, k], key[t, k]))``.

    ``growth`` broadcasts over rows or over tokens, whichever side the norm is on; None is 1.
    """

    query: Float[Tensor, "terms head_dim rows"]
    key: Float[Tensor, "terms head_dim tokens"]
    growth: Float[Tensor, "head_dim _ _"] | None = None

    def growth_at(self, dims: slice, block: Block) -> Float[Tensor, "dims _ _"] | None:
        """Return the growth within a block."""
        if self.growth is None:
            return None
        rows = block.rows if self.growth.shape[1] > 1 else slice(None)
        keys = block.keys if self.growth.shape[2] > 1 else slice(None)
        return self.growth[dims, rows, keys]


@dataclass(frozen=True)
class HeadGroup:
    """The query heads that read one key head, for one probe.

    Attributes:
        index: the key head.
        rows: positions of the counted query rows, with ``weights`` w_i, in ``blocks``.
        keys: the range of the keys that any row attends to.
        query: n query heads at the counted rows.
        key: the key head at all tokens.
        values: the value head less its mean, transposed. A' and A both sum to 1, so the mean drops out of
            every impact, and does not cost digits.
        buffer: where blocks of changed scores are made.
    """

    index: int
    rows: Int[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    blocks: list[Block]
    keys: slice
    scaling: float
    softcap: float | None
    query: Side
    key: Side
    partner: Int[Tensor, " head_dim"]
    values: Float[Tensor, "value_dim tokens"]
    value_mean: Float[Tensor, " value_dim"]
    buffer: Float[Tensor, " elements"]

    def impact_squares(
        self, readout: Readout | None
    ) -> tuple[Float[Tensor, "n head_dim"], Float[Tensor, " head_dim"], Float[Tensor, " value_dim"]]:
        """Return the squared impacts of the group's attn.q, attn.k and attn.v neurons, float64."""
        heads, head_dim = self.query.rotated.shape[1:]
        query = self.values.new_zeros(heads, head_dim, dtype=torch.float64)
        key, value = query.new_zeros(head_dim), query.new_zeros(len(self.values))
        without_query, without_key = self._without_query(), self._without_key()
        for block in self.blocks:
            weights = self.weights[block.rows]
            values = self.values[:, block.keys].contiguous()
            scores = self.base_scores(block)
            outputs = [product(self.softmax(base.clone(), block), values) for base in scores]
            value += self.value_squares(outputs, weights, readout)
            for dims in self.dim_slices(block):
                changes = []
                for head, (base, output) in enumerate(zip(scores, outputs, strict=True)):
                    change = product(self.changed(block, base, without_query[head], dims), values).sub_(output)
                    if readout is not None:
                        change = product(change, readout.heads[self.index * heads + head].to(change))
                    query[head, dims] += energy(change, weights)
                for head, (base, output) in enumerate(zip(scores, outputs, strict=True)):
                    change = product(self.changed(block, base, without_key[head], dims), values).sub_(output)
                    changes.append(change if readout is not None else energy(change, weights))
                if readout is not None:
                    joint = product(torch.cat(changes, dim=-1), readout.groups[self.index].to(self.values))
                    changes = [energy(joint, weights)]
                for change in changes:
                    key[dims] += change
        return query, key, value

    def base_scores(self, block: Block) -> list[Float[Tensor, "rows keys"]]:
        """Return S of every head, masked already unless a cap or a growth comes first."""
        rows, keys = block.rows, block.keys
        bias = None if self.masks_late(block) else block.bias(self.values)
        scores = []
        for head in range(self.query.rotated.shape[1]):
            base = (self.query.rotated[rows, head] * self.scaling) @ self.key.rotated[keys, 0].mT
            scores.append(base if bias is None else base + bias)
        return scores

    def attend(self, block: Block, base: Float[Tensor, "rows keys"]) -> Float[Tensor, "rows value_dim"]:
        """Return the attention output of one head, less the mean value."""
        return product(self.softmax(base.clone(), block), self.values[:, block.keys])

    def _without_query(self) -> list[Removal]:
        keys = torch.cat([self.key.rotated, self.key.rotated[..., self.partner]], dim=1).permute(1, 2, 0).contiguous()
        removals = []
        for head in range(self.query.rotated.shape[1]):
            terms = torch.stack([self.query.direct[:, head].mT, self.query.crossed[:, head].mT]) * self.scaling
            growth = None if self.query.growth is None else self.query.growth[:, head].mT.contiguous()[:, :, None]
            removals.append(Removal(terms, keys, growth))
        return removals

    def _without_key(self) -> list[Removal]:
        keys = torch.cat([self.key.direct, self.key.crossed], dim=1).permute(1, 2, 0) * self.scaling
        keys = keys.contiguous()
        growth = None if self.key.growth is None else self.key.growth[:, 0].mT.contiguous()[:, None]
        removals = []
        for head in range(self.query.rotated.shape[1]):
            rotated = self.query.rotated[:, head]
            removals.append(Removal(torch.stack([rotated.mT, rotated[:, self.partner].mT]), keys, growth))
        return removals

    def dim_slices(self, block: Block) -> list[slice]:
        """Split the neurons of a head into slices whose changed scores fit into the buffer."""
        head_dim = self.query.rotated.shape[2]
        fitting = max(1, self.buffer.numel() // block.hidden.numel())
        step = -(-head_dim // -(-head_dim // fitting))
        return [slice(start, min(start + step, head_dim)) for start in range(0, head_dim, step)]

    def masks_late(self, block: Block) -> bool:
        """Return whether a cap or a growth is applied to the changed scores before the mask."""
        grows = self.query.growth is not None or self.key.growth is not None
        return self.softcap is not None or (grows and block.extra is not None)

    def softmax(self, scores: Float[Tensor, "*dims rows keys"], block: Block) -> Float[Tensor, "*dims rows keys"]:
        """Return the attention weights that follow from scores, in their place."""
        if self.softcap is not None:
            # tanh(x) = e / (e + 2) with e = exp(2x) - 1: within 3 ulp, and twice as fast as torch.tanh on a CPU.
            excess = scores.mul_(2 / self.softcap).clamp_(max=40.0).expm1_()
            excess.div_(excess + 2).mul_(self.softcap)
        if self.masks_late(block):
            scores.add_(block.bias(scores))
        return torch.softmax(scores, dim=-1, out=scores)

    def changed(
        self, block: Block, base: Float[Tensor, "rows keys"], removal: Removal, dims: slice
    ) -> Float[Tensor, "dims rows keys"]:
        """Return the attention weights without each of the neurons ``dims``, in the buffer."""
        query = removal.query[:, dims, block.rows, None]
        key = removal.key[:, dims, None, block.keys]
        scores = self.buffer[: query.shape[1] * base.numel()].view(-1, *base.shape)
        torch.addcmul(base, query[0], key[0], value=-1, out=scores)
        for term in range(1, len(query)):
            scores.addcmul_(query[term], key[term], value=-1)
        growth = removal.growth_at(dims, block)
        if growth is not None:
            scores.mul_(growth)
        return self.softmax(scores, block)

    def value_squares(
        self, outputs: list[Float[Tensor, "rows value_dim"]], weights: Float[Tensor, " rows"], readout: Readout | None
    ) -> Float[Tensor, " value_dim"]:
        """Return the squared norm of what each value row feeds into the outputs of its heads."""
        fed = torch.stack(outputs, dim=-1) + self.value_mean[:, None]
        if readout is not None:
            fed = torch.einsum("rvn,vmn->rvm", fed, readout.columns[self.index].to(fed))
        return (weights @ fed.square().sum(-1)).double()


def head_groups(
    inputs: AttentionInputs,
    item: int,
    weights: Float[Tensor, " tokens"],
    positions: Positions,
    block_bytes: int | None = None,
    *,
    fused: bool = False,
) -> Iterator[HeadGroup]:
    """Yield the groups of heads of probe ``item``; rows that do not count or attend to nothing are left out.

    ``fused``: for fused attention, which takes all rows in one block, or none where the mask is causal.
    """
    dtype = working_dtype(inputs.query)
    tokens, head_dim, kv_heads = len(weights), inputs.head_dim, inputs.kv_heads
    elements = max(tokens, block_size(inputs.query.device, block_bytes) // dtype.itemsize)
    size = tokens if fused else min(QUERY_ROWS, 1 << ((elements // tokens).bit_length() - 1))
    attended = positions.attended(inputs, item, size)
    if not attended.spans:
        return
    blocks = [] if fused and attended.causal else attended.blocks(inputs, item)
    rows, seen = attended.rows, attended.seen
    weights = weights[rows].to(dtype)
    buffer = weights.new_empty(max([elements, *(block.hidden.numel() for block in blocks)]))
    rotary = Rotary.of(inputs.cos, inputs.sin, item, head_dim, weights)
    rotary_rows = rotary.at(rows)
    for index in range(kv_heads):
        query, key, value = (
            projection[item].unflatten(-1, (kv_heads, -1))[:, index].to(dtype)
            for projection in (inputs.query, inputs.key, inputs.value)
        )
        # Padding may hold anything, NaN included, and 0 * NaN would spread it.
        key, value = (torch.where(seen[:, None], side, 0.0) for side in (key, value))
        mean = value.sum(0) / seen.sum()
        yield HeadGroup(
            index=index,
            rows=rows,
            weights=weights,
            blocks=blocks,
            keys=attended.keys,
            scaling=inputs.scaling,
            softcap=inputs.softcap,
            query=Side.of(query[rows].unflatten(-1, (-1, head_dim)), inputs.query_norm, inputs.norm_eps, rotary_rows),
            key=Side.of(key[:, None], inputs.key_norm, inputs.norm_eps, rotary),
            partner=rotary.partner,
            values=(value - mean).mT.contiguous(),
            value_mean=mean,
            buffer=buffer,
        )


def energy(change: Float[Tensor, "*dims rows width"], weights: Float[Tensor, " rows"]) -> Float[Tensor, "*dims"]:
    """Return ``sum_i w_i ||change_i||^2``, float64."""
    return (change.square().sum(-1) @ weights).double()
