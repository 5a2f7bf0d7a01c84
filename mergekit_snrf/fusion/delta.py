"""Delta of one tensor, Eq. 9, made row by row from weights in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.threads import check_not_stopped

# Elements that are read and converted at a time.
_PANEL = 2**20


class Matrix(Protocol):
    """A tensor, or one in a file of which rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of a tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""

    @property
    def device(self) -> torch.device:
        """As of a tensor."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return a range of rows."""


def working_dtype(*matrices: Matrix) -> torch.dtype:
    """Return the dtype of the maths: float32, or float64 where a tensor is float64."""
    return torch.float64 if any(matrix.dtype == torch.float64 for matrix in matrices) else torch.float32


def difference(
    name: str,
    target: Matrix,
    source: Matrix,
    source_base: Matrix | None,
    see: Callable[[slice, Tensor], None] = lambda rows, of_target: None,
) -> Tensor:
    """Return W_src - W_tgt, or W_src - W_source_base, in the working dtype; the only whole copy that is made.

    Args:
        see: gets every panel of the target's rows.
    """
    other = target if source_base is None else source_base
    dtype = working_dtype(target, source, other)
    delta = torch.empty(tuple(target.shape), dtype=dtype, device=target.device)
    finite = True
    for panel in panels(target.shape):
        check_not_stopped()
        ours = target[panel]
        theirs = ours if source_base is None else source_base[panel]
        torch.sub(source[panel].to(dtype), theirs.to(dtype), out=delta[panel])
        finite = finite and is_finite(delta[panel]) and (source_base is None or is_finite(ours))
        see(panel, ours)
    if finite:
        return delta
    for which, matrix in (("target", target), ("source", source), ("source_base", source_base)):
        if matrix is not None and not all(is_finite(matrix[panel]) for panel in panels(target.shape)):
            what = f"the {which}'s tensor of shape {list(target.shape)} holds NaN or infinite weights"
            remedy = "the checkpoint is damaged; download it again, or remove these neurons from the mask"
            raise SnrfError(name, what, remedy)
    base = "target" if source_base is None else "source_base"
    raise SnrfError(name, f"the difference of source and {base} overflows {dtype}", "check both checkpoints")


def panels(shape: tuple[int, ...]) -> Iterator[slice]:
    """Return ranges of the rows of a matrix, each of which fits into a processor's cache or so."""
    step = max(1, _PANEL // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    # Both ends are NaN where one element is.
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())
