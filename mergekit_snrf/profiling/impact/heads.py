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

Cap, mask and softmax then run anew on every block of changed scores, which stays in the cache from its first pass to
the product with V. Where Delta is known to be small, the row maximum of the unchanged scores serves the changed ones
too, and their exponentials are divided by their sums after the product with V. Elsewhere the softmax takes its own row
maximum, so that scores of any size are safe. A constant in a row of scores drops out, so that columns of keys can be
centred, which makes Delta smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.profiling.impact.blocks import QUERY_ROWS, Block, Positions, block_size, laid_out, product
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout, working_dtype
from mergekit_snrf.profiling.impact.sides import Rotary, Side

LARGEST_CHANGE = 15.0
"""Bound of a change of scores up to which the row maximum of the unchanged ones serves."""

LOWEST_SCORE = -72.0
"""Scores so far below the row maximum weigh nothing, LARGEST_CHANGE or not; less underflows, which slows exp down."""

LARGEST_SCORE = 1e6
"""Scores up to which a difference of LOWEST_SCORE keeps its digits in float32."""


class Removal(NamedTuple):
    """Without neuron k the scores are ``growth[k] (S - sum over t of outer(query[t, k], key[t, k]))``.

    ``growth`` broadcasts over rows or over tokens, whichever side the norm is on; None is 1. ``small`` says for every
    neuron whether scores change by at most LARGEST_CHANGE, apart from what a row shares; empty if unknown.
    """

    query: Float[Tensor, "terms head_dim rows"]
    key: Float[Tensor, "terms head_dim tokens"]
    growth: Float[Tensor, "head_dim _ _"] | None = None
    small: Sequence[bool] = ()

    def bounded(self, reach: float) -> Removal:
        """Return it with ``small``, for unchanged scores in [-reach, reach]."""
        key = self.key
        if self.growth is None:
            low, high = key.aminmax(dim=-1, keepdim=True)
            key = key - ((low + high) / 2).nan_to_num(0.0, 0.0, 0.0)
        largest = (self.query.abs().amax(-1) * key.abs().amax(-1)).sum(0)
        if self.growth is not None:
            growth = self.growth.flatten(1).amax(1)
            largest = growth * largest + (growth - 1) * (reach if self.grows_keys else 0.0)
        return Removal(self.query, key, self.growth, (largest <= LARGEST_CHANGE).tolist())

    @property
    def grows_keys(self) -> bool:
        """Whether the growth differs from key to key."""
        return self.growth is not None and self.growth.shape[2] > 1

    def scores(
        self, block: Block, base: Tensor, buffer: Float[Tensor, " elements"], step: int, calm: Tensor | None = None
    ) -> Iterator[tuple[Float[Tensor, "dims rows keys"], bool]]:
        """Yield the scores of a block without each of the neurons, ``step`` neurons at a time, in a buffer.

        They come from the unchanged scores ``base``, or from ``calm`` where that is given and the change is small; the
        second value says which.
        """
        queries = [term.split(step) for term in self.query[:, :, block.rows, None].unbind()]
        keys = [term.split(step) for term in self.key[:, :, None, block.keys].unbind()]
        growths = self._growth_at(block, step)
        for number, (query, key) in enumerate(zip(queries[0], keys[0], strict=True)):
            small = calm is not None and all(self.small[number * step : (number + 1) * step])
            scores = buffer[: len(query) * base.numel()].view(-1, *base.shape)
            torch.addcmul(calm if small and calm is not None else base, query, key, value=-1, out=scores)
            for term in range(1, len(queries)):
                scores.addcmul_(queries[term][number], keys[term][number], value=-1)
            yield scores if growths is None else scores.mul_(growths[number]), small

    def _growth_at(self, block: Block, step: int) -> tuple[Float[Tensor, "dims _ _"], ...] | None:
        if self.growth is None:
            return None
        rows = block.rows if self.growth.shape[1] > 1 else slice(None)
        keys = block.keys if self.growth.shape[2] > 1 else slice(None)
        return self.growth[:, rows, keys].split(step)


class Calm(NamedTuple):
    """Unchanged scores without large negative ones, for neurons whose changes are small.

    ``scores`` are less their row maximum ``top``, except where keys grow, and ``minus`` is less the output of the head.
    """

    scores: Float[Tensor, "rows keys"]
    top: Float[Tensor, "rows 1"]
    minus: Float[Tensor, "rows value_dim"]

    @staticmethod
    def of(base: Float[Tensor, "rows keys"], values: Float[Tensor, "value_dim keys"], grows_keys: bool) -> Calm:
        """Return those of the scores of a head."""
        top = base.amax(-1, keepdim=True)
        scores = (base - top).clamp_(min=LOWEST_SCORE)
        if grows_keys:
            scores += top
        # By the operations that follow a change: without a neuron that changes nothing it is the same to the last bit.
        powers = (scores - top if grows_keys else scores).exp()
        return Calm(scores, top, (product(powers, values) / powers.sum(-1, keepdim=True)).neg_())


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
        unknown = [None] * heads
        for block in self.blocks:
            weights = self.weights[block.rows]
            values = laid_out(self.values[:, block.keys])
            scores = self.base_scores(block)
            outputs = [product(self.softmax(base.clone(), block), values) for base in scores]
            value += self.value_squares(outputs, weights, readout)
            calms: dict[bool, list[Calm]] = {}
            for removal in (without_query[0], without_key[0]):
                if removal.small and not self.masks_late(block) and removal.grows_keys not in calms:
                    calms[removal.grows_keys] = [Calm.of(base, values, removal.grows_keys) for base in scores]
            of_query, of_key = (
                [
                    self._changes(block, values, *head)
                    for head in zip(removals, scores, outputs, calms.get(removals[0].grows_keys, unknown), strict=True)
                ]
                for removals in (without_query, without_key)
            )
            if readout is None:
                query += torch.stack([squares(head, weights) for head in of_query])
                key += sum(squares(head, weights) for head in of_key)
            else:
                factors = readout.heads[self.index * heads : (self.index + 1) * heads].to(values)
                for head, factor in enumerate(factors):
                    query[head] += squares((product(change, factor) for change in of_query[head]), weights)
                factor = readout.groups[self.index].to(values)
                joint = (torch.cat(parts, dim=-1) for parts in zip(*of_key, strict=True))
                key += squares((product(change, factor) for change in joint), weights)
        return query, key, value

    def _changes(
        self,
        block: Block,
        values: Float[Tensor, "value_dim keys"],
        removal: Removal,
        base: Float[Tensor, "rows keys"],
        output: Float[Tensor, "rows value_dim"],
        calm: Calm | None,
    ) -> Iterator[Float[Tensor, "dims rows value_dim"]]:
        """Yield what the output of one head gains without each of its neurons, for some neurons at a time."""
        changed = removal.scores(block, base, self.buffer, self.dims_at_once(block), calm and calm.scores)
        for scores, small in changed:
            if calm is None or not small:
                yield product(self.softmax(scores, block), values).sub_(output)
                continue
            if removal.grows_keys:
                scores -= calm.top
            total = scores.exp_().sum(-1, keepdim=True)
            change = product(scores, values)
            yield torch.addcdiv(calm.minus, change, total, out=change)

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
        return self._bounded(removals)

    def _without_key(self) -> list[Removal]:
        keys = torch.cat([self.key.direct, self.key.crossed], dim=1).permute(1, 2, 0) * self.scaling
        keys = keys.contiguous()
        growth = None if self.key.growth is None else self.key.growth[:, 0].mT.contiguous()[:, None]
        removals = []
        for head in range(self.query.rotated.shape[1]):
            rotated = self.query.rotated[:, head]
            removals.append(Removal(torch.stack([rotated.mT, rotated[:, self.partner].mT]), keys, growth))
        return self._bounded(removals)

    def _bounded(self, removals: list[Removal]) -> list[Removal]:
        # A cap is applied before anything is shared by a row, and a GPU would be waited for.
        if self.softcap is not None or self.values.device.type != "cpu":
            return removals
        query, key = (float(side.rotated.norm(dim=-1).amax()) for side in (self.query, self.key))
        reach = query * key * abs(self.scaling)
        # Beside the largest scores of float32 a row maximum, which is put back where keys grow, absorbs small ones.
        return [one if one.grows_keys and not reach < LARGEST_SCORE else one.bounded(reach) for one in removals]

    def dims_at_once(self, block: Block) -> int:
        """Return how many neurons of a head have changed scores that fit into the buffer, the same for all slices."""
        head_dim = self.query.rotated.shape[2]
        fitting = max(1, self.buffer.numel() // block.hidden.numel())
        return -(-head_dim // -(-head_dim // fitting))

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


def squares(
    changes: Iterable[Float[Tensor, "dims rows width"]], weights: Float[Tensor, " rows"]
) -> Float[Tensor, " neurons"]:
    """Return ``sum_i w_i ||change_i||^2`` of the neurons of all changes, float64."""
    norms = torch.cat([torch.linalg.vector_norm(change, dim=-1) for change in changes])
    return (norms.square_() @ weights).double()


def energy(change: Float[Tensor, "*dims rows width"], weights: Float[Tensor, " rows"]) -> Float[Tensor, "*dims"]:
    """Return ``sum_i w_i ||change_i||^2``, float64."""
    return (torch.linalg.vector_norm(change, dim=-1).square_() @ weights).double()
