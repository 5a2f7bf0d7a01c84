"""The dominant singular subspace of a weight difference (Eq. 10)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK_BYTES = 32 * 2**20


def gram(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "side side"]:
    """Return the float64 Gram matrix of the shorter side, A A^T or A^T A.

    Accumulated over blocks, so that no float64 copy of the whole matrix exists.
    """
    rows, columns = matrix.shape
    wide = rows <= columns
    side, length = min(rows, columns), max(rows, columns)
    step = max(1, _BLOCK_BYTES // (8 * side))
    total = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for start in range(0, length, step):
        if wide:
            block = matrix[:, start : start + step].to(torch.float64)
            total.addmm_(block, block.mT)
        else:
            block = matrix[start : start + step].to(torch.float64)
            total.addmm_(block.mT, block)
    return total


def dominant_subspace(matrix: Float[Tensor, "rows columns"], rank: int) -> tuple[Float[Tensor, "side rank"], int]:
    """Return an orthonormal basis of the dominant singular subspace of ``matrix``, on its shorter side.

    From the eigenvectors of the float64 Gram matrix: exact to float64 rounding for the dominant part, and
    several times faster than an SVD. The truncated SVD (Eq. 10) is then a projection, U U^T A or A V V^T.

    Args:
        matrix: finite.
        rank: in [1, min(rows, columns)].

    Returns:
        The basis in the dtype of ``matrix``, and the axis it spans: 0 for U (rows), 1 for V (columns).

    Raises:
        ValueError: ``rank`` is out of range.
    """
    rows, columns = matrix.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank must be in [1, {min(rows, columns)}] for shape {[rows, columns]}, got {rank}")
    # The scale keeps squares of tiny and of huge differences inside the range of floating point.
    scale = matrix.abs().amax()
    if scale == 0:
        scale = torch.ones_like(scale)
    _, vectors = torch.linalg.eigh(gram(matrix / scale))
    return vectors[:, -rank:].to(matrix.dtype), 0 if rows <= columns else 1


def truncated_rows(
    matrix: Float[Tensor, "rows columns"],
    rank: int,
    rows: Float[Tensor, " selected"],
) -> Float[Tensor, "selected columns"]:
    """Return the selected rows of the rank-r truncated SVD of ``matrix`` (Eq. 10), without forming the others.

    Args:
        matrix: finite, any orientation; pass a transposed view to select columns.
        rank: in [1, min(rows, columns)]; at the upper end the rows are returned unchanged.
        rows: int64 indices.
    """
    if rank == min(matrix.shape):
        return matrix[rows]
    basis, axis = dominant_subspace(matrix, rank)
    if axis == 1:
        return (matrix[rows] @ basis) @ basis.mT
    return basis[rows] @ (basis.mT @ matrix)
