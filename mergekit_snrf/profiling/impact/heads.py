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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout, working_dtype
from mergekit_snrf.profiling.impact.products import key_step, product

QUERY_ROWS = 32
"""Query positions of a block: fewer make small products, more visit too many keys beyond the diagonal."""

CPU_BLOCK_BYTES = 2**20
"""Default size of a block of changed scores on a CPU: about what the cache of one core holds."""

ACCELERATOR_BLOCK_BYTES = 2**26
"""Default size of a block of changed scores on other devices, which want fewer and larger kernels."""


_SCREENED_DIMS = 32
# The most neurons at a time where a screen has left some of a head.


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


class Block(NamedTuple):
    """Counted query rows start:stop and the range first:last of the keys that any of them attends to."""

    start: int
    stop: int
    first: int
    last: int
    hidden: Bool[Tensor, "rows keys"]
    extra: Float[Tensor, "rows keys"] | None

    def bias(self, like: Tensor) -> Float[Tensor, "rows keys"]:
        """Return what the mask adds to the scores."""
        bias = like.new_zeros(self.hidden.shape) if self.extra is None else self.extra.to(like)
        return bias.masked_fill(self.hidden, -torch.inf)


class Removal(NamedTuple):
    """Without neuron k the scores are ``growth[k] (S - sum over t of outer(query[t, k], key[t, k]))``.

    ``growth`` broadcasts over rows or over tokens, whichever side the norm is on; None is 1.
    """

    query: Float[Tensor, "terms head_dim rows"]
    key: Float[Tensor, "terms head_dim tokens"]
    growth: Float[Tensor, "head_dim _ _"] | None = None

    def only(self, dims: Int[Tensor, " kept"] | None) -> Removal:
        """Return the removals of some neurons; None is all."""
        if dims is None:
            return self
        growth = None if self.growth is None else self.growth[dims]
        return Removal(self.query[:, dims], self.key[:, dims], growth)

    def growth_at(self, dims: slice, block: Block) -> Float[Tensor, "dims _ _"] | None:
        """Return the growth within a block."""
        if self.growth is None:
            return None
        rows = slice(block.start, block.stop) if self.growth.shape[1] > 1 else slice(None)
        keys = slice(block.first, block.last) if self.growth.shape[2] > 1 else slice(None)
        return self.growth[dims, rows, keys]


Change = Callable[[Removal, slice], Float[Tensor, "dims ..."]]
"""What the output of one head in one block changes by without each of some neurons, or the energy of that."""

Changing = Callable[[Block, Tensor, Tensor, Tensor, Tensor | None], Change]
"""Makes it from block, scores [rows, keys], values [value_dim, keys], output [rows, value_dim] and, for the energy,
weights [rows]."""


class Kept(NamedTuple):
    """Which neurons of a group of heads are measured."""

    query: list[Int[Tensor, " kept"]]
    key: Int[Tensor, " kept"]


@dataclass(frozen=True)
class HeadGroup:
    """The query heads that read one key head, for one probe.

    Attributes:
        index: the key head.
        rows: positions of the counted query rows.
        weights: w_i of the counted rows.
        blocks: the counted rows in blocks.
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
    scaling: float
    softcap: float | None
    query: Side
    key: Side
    partner: Int[Tensor, " head_dim"]
    values: Float[Tensor, "value_dim tokens"]
    value_mean: Float[Tensor, " value_dim"]
    buffer: Float[Tensor, " elements"]

    def impact_squares(
        self, readout: Readout | None, kept: Kept | None = None, changing: Changing | None = None
    ) -> tuple[Float[Tensor, "n head_dim"], Float[Tensor, " head_dim"], Float[Tensor, " value_dim"]]:
        """Return the squared impacts of the group's attn.q, attn.k and attn.v neurons, float64.

        attn.q and attn.k neurons that are not ``kept`` are not measured and get 0; None measures all. ``changing``
        takes the place of the group's own.
        """
        heads, head_dim = self.query.rotated.shape[1:]
        value = self.values.new_zeros(self.values.shape[0], dtype=torch.float64)
        dims_q = [None] * heads if kept is None else kept.query
        dims_k = None if kept is None else kept.key
        without_q = [removal.only(dims) for removal, dims in zip(self._without_query(), dims_q, strict=True)]
        without_k = [removal.only(dims_k) for removal in self._without_key()]
        squares_q = [value.new_zeros(removal.query.shape[1]) for removal in without_q]
        squares_k = value.new_zeros(without_k[0].query.shape[1])
        for block in self.blocks:
            weights = self.weights[block.start : block.stop]
            values = self.values[:, block.first : block.last].contiguous()
            scores = self.base_scores(block)
            outputs = [product(self.softmax(base.clone(), block), values) for base in scores]
            value += self.value_squares(outputs, weights, readout)
            counted = weights if readout is None else None
            changes_of = [
                (changing or self.changing)(block, base, values, output, counted)
                for base, output in zip(scores, outputs, strict=True)
            ]
            for head, change_of in enumerate(changes_of):
                for span in self._dim_slices(block, len(squares_q[head])):
                    change = change_of(without_q[head], span)
                    if readout is not None:
                        change = energy(product(change, readout.heads[self.index * heads + head].to(change)), weights)
                    squares_q[head][span] += change
            for span in self._dim_slices(block, len(squares_k)):
                changes = [change_of(removal, span) for change_of, removal in zip(changes_of, without_k, strict=True)]
                if readout is not None:
                    joint = product(torch.cat(changes, dim=-1), readout.groups[self.index].to(self.values))
                    changes = [energy(joint, weights)]
                for change in changes:
                    squares_k[span] += change
        if kept is None:
            return torch.stack(squares_q), squares_k, value
        query = value.new_zeros(heads, head_dim)
        for row, dims, squares in zip(query, kept.query, squares_q, strict=True):
            row[dims] = squares
        return query, value.new_zeros(head_dim).index_copy(0, kept.key, squares_k), value

    def changing(
        self,
        block: Block,
        base: Float[Tensor, "rows keys"],
        values: Float[Tensor, "value_dim keys"],
        output: Float[Tensor, "rows value_dim"],
        weights: Float[Tensor, " rows"] | None,
    ) -> Change:
        """Return what makes the changes of the output of one head, or with weights their energy."""

        def change(removal: Removal, dims: slice) -> Float[Tensor, "dims ..."]:
            found = product(self._changed(block, base, removal, dims), values).sub_(output)
            return found if weights is None else energy(found, weights)

        return change

    def released_sums(self) -> tuple[Float[Tensor, "n head_dim"], Float[Tensor, " value_dim"]]:
        """Return the released code's sums for the columns of the rotated queries and for the values, float64."""
        heads, head_dim = self.query.rotated.shape[1:]
        query = self.values.new_zeros(heads, head_dim, dtype=torch.float64)
        value = query.new_zeros(self.values.shape[0])
        keys = self.key.rotated.permute(1, 2, 0).contiguous()
        columns = [Removal(q[None] * self.scaling, keys) for q in self.query.rotated.permute(1, 2, 0).contiguous()]
        for block in self.blocks:
            weights = self.weights[block.start : block.stop]
            for head, base in enumerate(self.base_scores(block)):
                attention = self.softmax(base.clone(), block)
                output = product(attention, self.values[:, block.first : block.last]) + self.value_mean
                value += (weights @ output.abs()).double()
                for dims in self._dim_slices(block, head_dim):
                    changed = self._changed(block, base, columns[head], dims)
                    query[head, dims] += energy(changed.sub_(attention), weights)
        return query, value

    def base_scores(self, block: Block) -> list[Float[Tensor, "rows keys"]]:
        """Return S of every head, masked already where nothing stands between Delta and the mask."""
        rows, keys = slice(block.start, block.stop), slice(block.first, block.last)
        bias = None if self.masks_late(block) else block.bias(self.values)
        scores = []
        for head in range(self.query.rotated.shape[1]):
            base = (self.query.rotated[rows, head] * self.scaling) @ self.key.rotated[keys, 0].mT
            scores.append(base if bias is None else base + bias)
        return scores

    def attend(self, block: Block, base: Float[Tensor, "rows keys"]) -> Float[Tensor, "rows value_dim"]:
        """Return the attention output of one head, less the mean value."""
        return product(self.softmax(base.clone(), block), self.values[:, block.first : block.last])

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

    def _dim_slices(self, block: Block, count: int) -> list[slice]:
        """Split neurons into slices whose changed scores fit into the buffer."""
        fitting = max(1, self.buffer.numel() // block.hidden.numel())
        if count == self.query.rotated.shape[2]:
            step = -(-count // -(-count // fitting))
            return [slice(start, min(start + step, count)) for start in range(0, count, step)]
        # Numbers of neurons that a screen keeps are irregular; these sizes give products of few shapes.
        limit = min(fitting, _SCREENED_DIMS)
        step = -(-count // max(1, -(-count // limit)))
        step = max(1, min(-(-step // 4) * 4, fitting))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def masks_late(self, block: Block) -> bool:
        """Return whether a cap or a growth stands between the changed scores and the mask."""
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

    def _changed(
        self, block: Block, base: Float[Tensor, "rows keys"], removal: Removal, dims: slice
    ) -> Float[Tensor, "dims rows keys"]:
        """Return the attention weights without each of the neurons ``dims``, in the buffer."""
        query = removal.query[:, dims, block.start : block.stop, None]
        key = removal.key[:, dims, None, block.first : block.last]
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
    block_bytes: int | None = None,
    block_rows: int = QUERY_ROWS,
) -> Iterator[HeadGroup]:
    """Yield the groups of heads of one probe.

    Args:
        inputs: the captured layer.
        item: index of the probe in the batch.
        weights: w_i of the probe; rows of weight 0, and rows that attend to nothing, are left out.
        block_bytes: size of a block of changed scores.
        block_rows: the most query positions of a block.
    """
    dtype = working_dtype(inputs.query)
    tokens, head_dim, kv_heads = len(weights), inputs.head_dim, inputs.kv_heads
    elements = max(tokens, block_size(inputs.query.device, block_bytes) // dtype.itemsize)
    rows, blocks, seen = _row_blocks(
        inputs, item, weights, min(block_rows, 1 << ((elements // tokens).bit_length() - 1))
    )
    if not blocks:
        return
    weights = weights[rows].to(dtype)
    buffer = weights.new_empty(max(elements, max(block.hidden.numel() for block in blocks)))
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
            scaling=inputs.scaling,
            softcap=inputs.softcap,
            query=Side.of(query[rows].unflatten(-1, (-1, head_dim)), inputs.query_norm, inputs.norm_eps, rotary_rows),
            key=Side.of(key[:, None], inputs.key_norm, inputs.norm_eps, rotary),
            partner=rotary.partner,
            values=(value - mean).mT.contiguous(),
            value_mean=mean,
            buffer=buffer,
        )


def block_size(device: torch.device, block_bytes: int | None) -> int:
    """Return the bytes of a block: ``block_bytes``, or the default of the device.

    Raises:
        ValueError: ``block_bytes`` is not positive.
    """
    if block_bytes is None:
        return CPU_BLOCK_BYTES if device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    return block_bytes


def energy(change: Float[Tensor, "dims rows width"], weights: Float[Tensor, " rows"]) -> Float[Tensor, " dims"]:
    """Return ``sum_i w_i ||change_i||^2``, float64."""
    return (change.square().sum(-1) @ weights).double()


def _row_blocks(
    inputs: AttentionInputs, item: int, weights: Float[Tensor, " tokens"], size: int
) -> tuple[Int[Tensor, " rows"], list[Block], Bool[Tensor, " tokens"]]:
    """Return the counted rows, their blocks, and which keys any of them attends to."""
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
