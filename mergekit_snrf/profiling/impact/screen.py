"""An estimate of the impact of attn.q and attn.k neurons, to tell which ones are worth the exact kernel.

Notation as in ``impact_heads``. Where the change D_ij of the scores is small, the attention output changes by
``dY_i = sum_j A_ij D_ij (V_j - Y_i)``. The changes of all neurons of a head are products of a factor of the row and one
of the key, so the sums over j are a few large products, with no softmax of changed scores at all:

- attn.q: D_ij = s (q_ik cos_i[k] k~_jk + q_ik cross_i[k] k~_j,partner(k))
- attn.k: D_ij = s (q~_ik k_jk cos_j[k] + q~_i,partner(k) k_jk cross_j[k])
- with a norm: D_ij = growth D_ij + (1 - growth) S_ij; with a cap c: D_ij (1 - tanh^2(S_ij / c)) in place of D_ij

A few fixed random directions stand for the columns of V, or of what o_proj makes of them: in every block of rows the
squared length of a change is estimated from its squared products with some of them.

Where attention rests on one key, only a change of the scores that is not small moves it away, and no derivative tells.
So a tenth of the places is for the neurons that change the scores of a row most, whatever their estimate is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.profiling.impact.heads import Block, HeadGroup, Kept, head_groups
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout
from mergekit_snrf.profiling.impact.products import product

SCREEN_ROWS = 64
"""Query positions of a block: the products have no factor for the neuron, so larger blocks stay in the cache."""

COLUMNS, DIRECTIONS = 2, 16
"""Random directions of a block at least, and of a whole probe about."""

SPAN_SHARE = 0.1
"""Share of the kept neurons that is kept for the span of their changes of the scores."""

RUN = 4
"""The number of kept neurons of a head is a multiple of it, so that products have few shapes."""

# Squares that differ by this factor have roots that differ in float32.
_BELOW = 1 - 2.0**-20


@dataclass(frozen=True)
class Screened:
    """Estimated squared impacts on one probe, float64, and which neurons are to be measured."""

    query: Float[Tensor, "heads head_dim"]
    key: Float[Tensor, "kv_heads head_dim"]
    kept_query: Bool[Tensor, "heads head_dim"]
    kept_key: Bool[Tensor, "kv_heads head_dim"]

    @classmethod
    def of(
        cls,
        inputs: AttentionInputs,
        item: int,
        weights: Float[Tensor, " tokens"],
        readout: Readout | None,
        share: float,
    ) -> Screened:
        """Estimate the impacts on one probe and keep the top share of attn.q and of attn.k.

        Args:
            inputs: the captured layer.
            item: index of the probe in the batch.
            weights: w_i of the probe.
            readout: as for ``attention_impact``.
            share: in (0, 1]; a neuron that it cuts in two is kept.
        """
        query = weights.new_zeros(2, inputs.heads, inputs.head_dim, dtype=torch.float64)
        key = query.new_zeros(2, inputs.kv_heads, inputs.head_dim)
        for group in head_groups(inputs, item, weights, block_rows=SCREEN_ROWS):
            q, k = _estimates(group, readout)
            query.unflatten(1, (inputs.kv_heads, -1))[:, group.index] = q
            key[:, group.index] = k
        return cls(query[0], key[0], _kept(query[0], query[1], share), _kept(key[0], key[1], share))

    def kept(self, index: int) -> Kept:
        """Return which neurons of the group of key head ``index`` are to be measured."""
        per_group = len(self.query) // len(self.key)
        heads = self.kept_query[index * per_group : (index + 1) * per_group]
        return Kept([head.nonzero().flatten() for head in heads], self.kept_key[index].nonzero().flatten())

    def filled(
        self, query: Float[Tensor, " neurons_q"], key: Float[Tensor, " neurons_k"]
    ) -> tuple[Float[Tensor, " neurons_q"], Float[Tensor, " neurons_k"]]:
        """Return measured squared impacts, with estimates for the neurons that were not measured.

        An estimate is clipped below the least measured square: no neuron that was not measured ranks before one that
        was, unless the impacts of both are zero.
        """
        return (
            _filled(query, self.query.flatten(), self.kept_query.flatten()),
            _filled(key, self.key.flatten(), self.kept_key.flatten()),
        )


def _kept(
    squares: Float[Tensor, "heads head_dim"], spans: Float[Tensor, "heads head_dim"], share: float
) -> Bool[Tensor, "heads head_dim"]:
    """Return which neurons to keep: a tenth by span, the others by estimate, in runs of the order in their head."""
    count = math.ceil(Fraction(str(share)) * squares.numel())
    far = torch.zeros(squares.numel(), dtype=torch.bool, device=squares.device)
    far[_order(spans.flatten())[: math.ceil(count * SPAN_SHARE)]] = True
    wanted = torch.where(far.view(squares.shape), torch.inf, squares)
    order = _order(wanted)
    run = math.gcd(RUN, squares.shape[1])
    best = wanted.gather(1, order)[:, ::run]
    chosen = torch.zeros(best.numel(), dtype=torch.bool, device=squares.device)
    chosen[_order(best.flatten())[: -(-count // run)]] = True
    chosen = chosen.view(best.shape).repeat_interleave(run, dim=1)
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _order(numbers: Tensor) -> Tensor:
    return numbers.argsort(dim=-1, descending=True, stable=True)


def _filled(
    measured: Float[Tensor, " neurons"], estimates: Float[Tensor, " neurons"], kept: Bool[Tensor, " neurons"]
) -> Float[Tensor, " neurons"]:
    return torch.where(kept, measured, torch.minimum(estimates, measured[kept].min() * _BELOW))


def _estimates(
    group: HeadGroup, readout: Readout | None
) -> tuple[Float[Tensor, "two n head_dim"], Float[Tensor, "two head_dim"]]:
    """Return the estimated squared impacts of a group's attn.q and attn.k neurons, and the squared spans of Delta.

    A span is the greatest difference of the changes of a row's scores; its square is summed like that of an impact.
    """
    heads, head_dim = group.query.rotated.shape[1:]
    query = group.values.new_zeros(2, heads, head_dim, dtype=torch.float64)
    key = query.new_zeros(2, head_dim)
    factors = _factors(group)
    for number, block in enumerate(group.blocks):
        weights = group.weights[block.start : block.stop]
        keys = slice(block.first, block.last)
        directions = _directions(group, readout, number)
        block_factors = factors[:, keys].contiguous()
        query_spans, key_spans = _spans(group, block, block_factors)
        query[1] += _energy(query_spans, weights)
        key[1] += _energy(key_spans, weights)
        joint: Tensor | None = None
        for head, base in enumerate(group.base_scores(block)):
            columns = directions[head % len(directions)] @ group.values[:, keys]
            change_q, change_k = _changes(group, block, head, base, columns, block_factors)
            query[0, head] += _energy(change_q, weights)
            if readout is None:
                key[0] += _energy(change_k, weights)
            else:
                joint = change_k if joint is None else joint.add_(change_k)
        if joint is not None:
            key[0] += _energy(joint, weights)
    # What is too large to be told apart is kept.
    return query.nan_to_num_(nan=torch.inf), key.nan_to_num_(nan=torch.inf)


def _energy(
    change: Float[Tensor, "columns rows *head_dim"], weights: Float[Tensor, " rows"]
) -> Float[Tensor, "*head_dim"]:
    return torch.tensordot(weights, change.square_().sum(0), dims=1).double()


def _spans(
    group: HeadGroup, block: Block, factors: Float[Tensor, "factors keys"]
) -> tuple[Float[Tensor, "1 rows n head_dim"], Float[Tensor, "n rows head_dim"]]:
    """Return how much the changes of a row's scores by each attn.q and attn.k neuron can differ, without a norm."""
    head_dim, partner = group.query.rotated.shape[2], group.partner
    rows = slice(block.start, block.stop)
    rotated = group.key.rotated[block.first : block.last, 0]
    width = rotated.amax(0) - rotated.amin(0)
    widths = factors.amax(1) - factors.amin(1)
    direct, crossed, query = (
        side[rows].abs() * group.scaling for side in (group.query.direct, group.query.crossed, group.query.rotated)
    )
    spans_q = direct * width + crossed * width[partner]
    spans_k = query * widths[:head_dim] + query[..., partner] * widths[head_dim : 2 * head_dim]
    return spans_q[None], spans_k.transpose(0, 1)


def _directions(group: HeadGroup, readout: Readout | None, block: int) -> Float[Tensor, "heads columns value_dim"]:
    """Return a block's random directions: one set for all heads, or with a readout one for each, of what o_proj makes.

    Blocks take turns through the rows of a random rotation, so that the whole of it is seen in a long probe.
    """
    heads, value_dim = group.query.rotated.shape[1], len(group.values)
    factor = None if readout is None else readout.groups[group.index].to(group.values)
    size = value_dim if factor is None else len(factor)
    columns = max(COLUMNS, min(size, DIRECTIONS // len(group.blocks)))
    turn = torch.arange(block * columns, (block + 1) * columns) % size
    directions = (_rotation(size)[turn] * (size / columns) ** 0.5).to(group.values)
    if factor is None:
        return directions[None]
    return (directions @ factor).unflatten(1, (heads, value_dim)).transpose(0, 1)


@lru_cache(maxsize=8)
def _rotation(size: int) -> Float[Tensor, "size size"]:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def _factors(group: HeadGroup) -> Float[Tensor, "factors tokens"]:
    """Return the factors of the keys: direct, crossed, and those two and one more that the growth of a norm adds."""
    parts = [group.key.direct[:, 0], group.key.crossed[:, 0]]
    if group.key.growth is not None:
        growth = group.key.growth[:, 0]
        parts += [parts[0] * growth, parts[1] * growth, growth - 1]
    return torch.cat(parts, dim=-1).mT.contiguous()


def _changes(
    group: HeadGroup,
    block: Block,
    head: int,
    base: Float[Tensor, "rows keys"],
    columns: Float[Tensor, "columns keys"],
    factors: Float[Tensor, "factors keys"],
) -> tuple[Float[Tensor, "columns rows head_dim"], Float[Tensor, "columns rows head_dim"]]:
    """Return the first-order change of the output of one head without each attn.q and each attn.k neuron.

    columns: the values in the random directions.
    """
    rows = slice(block.start, block.stop)
    attention = group.softmax(base.clone(), block)
    output = (columns @ attention.mT)[..., None]
    slope = attention if group.softcap is None else attention * (1 - (base / group.softcap).tanh().square())

    def pulled(weights: Tensor, factors: Tensor) -> Tensor:
        """Return ``sum_j weights_ij factor_j (V_j - Y_i)`` for every factor: [columns, rows, factors]."""
        stack = weights.new_empty(1 + len(columns), *weights.shape)
        stack[0] = weights
        torch.mul(weights, columns[:, None], out=stack[1:])
        sums = product(stack, factors)
        return torch.addcmul(sums[1:], output, sums[:1], value=-1)

    head_dim, partner = group.query.rotated.shape[2], group.partner
    grown = group.key.growth is not None
    pulls = pulled(slope, factors[: (4 if grown else 2) * head_dim]).split(head_dim, dim=-1)
    rotated = pulls[0] + pulls[1].index_select(-1, partner)
    direct, crossed = (side[rows, head] * group.scaling for side in (group.query.direct, group.query.crossed))
    change_q = (direct * rotated).addcmul_(crossed, rotated.index_select(-1, partner))
    query = group.query.rotated[rows, head] * group.scaling
    change_k = (query * pulls[-2]).addcmul_(query[:, partner], pulls[-1])
    if grown or group.query.growth is not None:
        scored = slope * base.masked_fill(block.hidden, 0.0)
        if group.query.growth is not None:
            growth = group.query.growth[rows, head]
            change_q = growth * change_q - (growth - 1) * pulled(scored, torch.ones_like(factors[:1]))
        if grown:
            change_k -= pulled(scored, factors[4 * head_dim :])
    return change_q, change_k
