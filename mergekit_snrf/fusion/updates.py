"""Delta of one tensor (Eq. 9), made row by row, and the update of its masked neurons, truncated (Eq. 10) or thinned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.lowrank import Certificate, certified_factors
from mergekit_snrf.fusion.threads import check_not_stopped
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

# Elements that are read and converted, and random numbers that are drawn, at a time.
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
        part = delta[panel].copy_(source[panel]).sub_(theirs)
        finite = finite and is_finite(part) and (source_base is None or is_finite(ours))
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


@dataclass(frozen=True)
class Update:
    """M_S(Delta_r) of one tensor: the ``selected`` neurons only, one a row, as ``left @ right``.

    ``left`` None stands for the identity. ``certificate`` is None where nothing was truncated.
    """

    selected: Int[Tensor, " selected"]
    left: Float[Tensor, "selected rank"] | None
    right: Float[Tensor, "rank length"]
    certificate: Certificate | None = None

    def rows(self, panel: slice = slice(None), axis: int = 0) -> Float[Tensor, "rows columns"]:
        """Return the update of the selected neurons: some of its rows, or of a weight's rows where they are columns."""
        left, right = self.left, self.right
        if axis == 1:
            return right[:, panel].mT if left is None else right[:, panel].mT @ left.mT
        return right[panel] if left is None else left[panel] @ right


def low_rank(
    delta: Float[Tensor, "neurons length"], selected: Int[Tensor, " selected"], rank: int, *, mask_first: bool = False
) -> Update:
    """Return the selected rows of the rank-r truncated SVD of ``delta`` (Eq. 10; 0: full rank).

    With ``mask_first`` the selected rows are truncated, and not ``delta`` (Appendix B).
    """
    whole = delta[selected] if mask_first else delta
    side = min(whole.shape)
    if side == 0 or len(selected) == 0:
        return Update(selected, None, delta[selected])
    if rank == 0 or rank >= side:
        return Update(selected, None, whole if mask_first else delta[selected])
    rows = torch.arange(len(whole), device=whole.device) if mask_first else selected
    return Update(selected, *certified_factors(whole, rank, rows))


def dropped(
    delta: Float[Tensor, "neurons length"],
    selected: Int[Tensor, " selected"],
    drop_rate: float,
    seed: int,
    site: Site,
    *,
    rescale: bool = True,
) -> Update:
    """Return the selected rows with a random share of their elements set to zero (DARE), the rest times 1 / (1 - p).

    The draw depends on ``seed``, layer, projection and the number of selected rows only: rows in ascending order, from
    numpy's legacy MT19937 generator, the one whose stream numpy guarantees never to change.
    """
    generator = np.random.RandomState([seed, site.layer, list(PROJECTIONS).index(site.projection)])
    rows = delta[selected]
    for part in rows.split(max(1, _PANEL // max(1, rows.shape[1]))):
        kept = generator.random_sample(tuple(part.shape)) >= drop_rate
        part.mul_(torch.from_numpy(kept).to(part.device))
    return Update(selected, None, rows / (1 - drop_rate) if rescale else rows)
