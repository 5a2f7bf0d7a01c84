"""The changed scores of a block by compiled loops, where torch.compile works.

With the notation of ``impact_heads``, M_i the maximum of row i of S and ``|Delta_ij| <= REACH``, a row of
``exp(S - M - Delta)`` neither overflows nor vanishes beside what it is divided by. So it needs no maximum of its own:
one loop over a block makes the exponentials and their sums, and the sums divide the product with V in the loop that
makes the energies of the changes.

The two loops are compiled once for blocks of every size. Where a change may be larger, a cap or a norm changes the
scores, or a block is not a multiple of ``LANES`` keys wide, the kernel of ``impact_heads`` takes the block, and it
takes all of them where there is no compiler. Both agree up to rounding.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.profiling.impact.heads import Block, Change, Changing, HeadGroup, Removal
from mergekit_snrf.profiling.impact.products import product

REACH = 40.0
"""Largest change of a score, in powers of two, that is left to the compiled loops."""

LANES = 16
"""Keys at a time: compiled loops over a multiple of them have no remainder, whatever the processor."""

_LOG2_E = math.log2(math.e)

# What the loops are compiled with: sizes that all differ, as equal ones would be taken for one size, and that are as
# large as usual, as large loops are shared out among the threads.
_DIMS, _ROWS, _PARTS, _WIDTH = 15, 31, 17, 48

logger = logging.getLogger(__name__)


def compiled_changing(group: HeadGroup) -> Changing | None:
    """Return a compiled ``HeadGroup.changing``; None where there is none: not a CPU, a norm, a cap."""
    if group.values.device.type != "cpu" or group.softcap is not None:
        return None
    if group.query.growth is not None or group.key.growth is not None:
        return None
    prepared: dict[int, _Prepared] = {}

    def changing(
        block: Block,
        base: Float[Tensor, "rows keys"],
        values: Float[Tensor, "value_dim keys"],
        output: Float[Tensor, "rows value_dim"],
        weights: Float[Tensor, " rows"] | None,
    ) -> Change:
        eager = group.changing(block, base, values, output, weights)
        rows, keys = base.shape
        # Sizes of 1 would be compiled by themselves.
        if keys % LANES or min(rows, keys // LANES, len(values)) < 2:
            return eager
        kernel = _kernel(values.dtype, torch.get_num_threads())
        if kernel.broken:
            return eager
        base = ((base - base.amax(1, keepdim=True)) * _LOG2_E).view(rows, -1, LANES)

        def change(removal: Removal, dims: slice) -> Float[Tensor, "dims ..."]:
            known = prepared.get(id(removal)) or prepared.setdefault(id(removal), _Prepared.of(removal))
            query = known.query[:, dims, block.start : block.stop].contiguous()
            if query.shape[1] > 1 and max(known.reach[dims]) <= REACH:
                key = removal.key[:, dims, block.first : block.last].contiguous()
                found = kernel(base, query, key.view(2, query.shape[1], -1, LANES), values, output, weights)
                if found is not None:
                    return found
            return eager(removal, dims)

        return change

    return changing


class _Prepared(NamedTuple):
    """What all blocks share of a removal: itself, its rows for powers of two, and its largest changes of a score."""

    removal: Removal
    query: Float[Tensor, "terms head_dim rows"]
    reach: list[float]

    @staticmethod
    def of(removal: Removal) -> _Prepared:
        query = removal.query * _LOG2_E
        rows, keys = (torch.maximum(side.amax(2), -side.amin(2)) for side in (query, removal.key))
        return _Prepared(removal, query, (rows * keys).sum(0).nan_to_num_(nan=torch.inf).tolist())


def _powers(
    base: Float[Tensor, "rows parts lanes"],
    query: Float[Tensor, "two dims rows"],
    key: Float[Tensor, "two dims parts lanes"],
) -> tuple[Float[Tensor, "dims rows keys"], Float[Tensor, "dims rows 1"]]:
    """Return ``2^(base - sum over t of outer(query[t], key[t]))`` and its sums over the keys."""
    _check_compiling()
    base, key = base.flatten(-2), key.flatten(-2)
    powers = torch.exp2(base - query[0][:, :, None] * key[0][:, None] - query[1][:, :, None] * key[1][:, None])
    return powers, powers.sum(-1, keepdim=True)


def _energies(
    products: Float[Tensor, "dims rows value_dim"],
    sums: Float[Tensor, "dims rows 1"],
    output: Float[Tensor, "rows value_dim"],
    weights: Float[Tensor, " rows"],
) -> Float[Tensor, " dims"]:
    """Return ``sum_i w_i ||products_i / sums_i - output_i||^2``."""
    _check_compiling()
    return ((products / sums - output).square().sum(-1) * weights).sum(-1)


def _check_compiling() -> None:
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off")


class _Kernel:
    """The compiled loops for one dtype; their first failure is told, and their last call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.broken = False
        start = time.monotonic()
        try:
            self._powers = _compiled(
                _powers, ((_ROWS, _PARTS, LANES), (2, _DIMS, _ROWS), (2, _DIMS, _PARTS, LANES)), dtype
            )
            self._energies = _compiled(
                _energies, ((_DIMS, _ROWS, _WIDTH), (_DIMS, _ROWS, 1), (_ROWS, _WIDTH), (_ROWS,)), dtype
            )
            self._try(dtype)
        except Exception as error:
            self._give_up(error)
        else:
            logger.info("compiled for %s in %.0f s", str(dtype).removeprefix("torch."), time.monotonic() - start)

    def __call__(
        self,
        base: Float[Tensor, "rows parts lanes"],
        query: Float[Tensor, "two dims rows"],
        key: Float[Tensor, "two dims parts lanes"],
        values: Float[Tensor, "value_dim keys"],
        output: Float[Tensor, "rows value_dim"],
        weights: Float[Tensor, " rows"] | None,
    ) -> Float[Tensor, "dims ..."] | None:
        """Return the changes or their energies, None if that failed."""
        if self.broken:
            return None
        try:
            return self._change(base, query, key, values, output, weights)
        except Exception as error:
            self._give_up(error)
            return None

    def _change(
        self, base: Tensor, query: Tensor, key: Tensor, values: Tensor, output: Tensor, weights: Tensor | None
    ) -> Tensor:
        powers, sums = self._powers(base, query, key)
        products = product(powers, values)
        if weights is None:
            return products.div_(sums).sub_(output)
        return self._energies(products, sums, output, weights)[0].double()

    def _try(self, dtype: torch.dtype) -> None:
        """Raise an error if a block of another size comes out wrong."""
        dims, rows, parts = 2, 8, 3
        base = torch.linspace(-3, 0, rows * parts * LANES, dtype=dtype).view(rows, parts, LANES)
        query = torch.linspace(-1, 1, 2 * dims * rows, dtype=dtype).view(2, dims, rows)
        key = torch.linspace(-2, 1, 2 * dims * parts * LANES, dtype=dtype).view(2, dims, parts, LANES)
        values = torch.linspace(-1, 2, 4 * parts * LANES, dtype=dtype).view(4, -1)
        output, weights = torch.linspace(0, 1, rows * 4, dtype=dtype).view(rows, 4), torch.arange(rows).to(dtype)
        scores = base.flatten(1) - torch.einsum("tdr,tdk->drk", query, key.flatten(2))
        change = (scores * math.log(2)).softmax(-1) @ values.mT - output
        for counted, expected in ((None, change), (weights, (change.square().sum(-1) @ weights).double())):
            found = self._change(base, query, key, values, output, counted)
            torch.testing.assert_close(found, expected, rtol=1e3 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)

    def _give_up(self, error: Exception) -> None:
        self.broken = True
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".:") if lines else type(error).__name__
        logger.warning("compile: true has no effect, the measurement goes on without it: %s", reason)


@cache
def _kernel(dtype: torch.dtype, threads: int) -> _Kernel:
    return _Kernel(dtype)


def compile_kernel(dtype: torch.dtype) -> bool:
    """Compile for the present number of threads what ``compile: true`` needs; return whether that worked.

    The first probe does it otherwise. Two graphs are compiled for float32 or float64, whatever the probes.
    """
    return not _kernel(dtype, torch.get_num_threads()).broken


def _compiled(
    function: Callable[..., object], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> Callable[..., Sequence[Tensor]]:
    """Compile for contiguous tensors of all shapes that differ from the given ones in the sizes of a block.

    Raises:
        Exception: whatever torch, the compiler or the system says.
    """
    from torch._inductor.compile_fx import compile_fx

    calls: list[tuple[Callable[..., Sequence[Tensor]], tuple[Tensor | int, ...]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        # A pool of compiling processes would outlive the few files that there are to compile.
        compiled: Any = compile_fx(graph, inputs, config_patches={"compile_threads": 1})

        def call(*args: Tensor | int) -> Any:
            calls.append((compiled, args))
            return compiled(*args)

        return call

    tensors = tuple(torch.ones(shape, dtype=dtype) for shape in shapes)
    sizes: dict[int, tuple[int, int]] = {}
    for place, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            if size in (_DIMS, _ROWS, _PARTS, _WIDTH):
                torch._dynamo.mark_dynamic(tensors[place], axis)
                sizes[size] = place, axis
    torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    (graph, args), *_ = calls
    # The graph takes tensors and sizes in an order of its own. Called by itself it spares the checks of dynamo, which
    # would take a tenth of the time.
    order = [(shapes.index(tuple(arg.shape)), None) if isinstance(arg, Tensor) else sizes[arg] for arg in args]

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        return graph(*[tensors[place] if axis is None else tensors[place].shape[axis] for place, axis in order])

    return call
