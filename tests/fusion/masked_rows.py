"""The product of the factors, as the fusion forms it."""

from __future__ import annotations

from torch import Tensor

from mergekit_snrf.fusion.lowrank import Certificate, certified_factors


def certified_rows(matrix: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Certificate]:
    """Return the selected rows of the truncated SVD, and its certificate."""
    left, right, certificate = certified_factors(matrix, rank, rows)
    return (right if left is None else left @ right), certificate
