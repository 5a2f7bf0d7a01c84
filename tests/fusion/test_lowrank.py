from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_rows import certified_rows
from numpy.typing import NDArray
from torch import Tensor

from mergekit_snrf.fusion.lowrank import (
    certified_subspace,
    frobenius_norm,
    gram,
)

examples = settings(max_examples=40)

Array = NDArray[np.float64]
SHAPES = [(48, 32), (32, 48), (32, 32), (7, 300), (300, 7), (1, 9), (9, 1)]
DTYPES = [torch.float32, torch.float64]


def factors(rows: int, columns: int, spectrum: str) -> tuple[Array, Array, Array]:
    """Return random singular vectors and the named singular values, the largest first."""
    generator = np.random.default_rng(rows * 1000 + columns)
    side = min(rows, columns)
    left, _ = np.linalg.qr(generator.standard_normal((rows, side)))
    right, _ = np.linalg.qr(generator.standard_normal((columns, side)))
    index = np.arange(1, side + 1)
    values = {
        "power law": index**-0.5,
        "steep": 10.0 ** -np.minimum(index, 12),
        "flat": np.ones(side),
        "tied": np.where(index <= 8, 1.0, 0.5),
        "low rank": np.where(index <= 5, 1.0 / index, 0.0),
        "low rank and noise": np.where(index <= 5, 1.0 / index, 1e-3 * (1 + 1.0 / index)),
        "zero": np.zeros(side),
    }[spectrum]
    return left, values, right.T


def with_spectrum(rows: int, columns: int, spectrum: str) -> Array:
    left, values, right = factors(rows, columns, spectrum)
    return (left * values) @ right


GAPPED = ["power law", "low rank", "low rank and noise", "zero"]


def truncated(matrix: Array, rank: int) -> Array:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def ranks(shape: tuple[int, int]) -> list[int]:
    side = min(shape)
    return sorted({rank for rank in (1, 2, 3, 5, side - 1, side) if 1 <= rank <= side})


def all_rows(matrix: Tensor, rank: int) -> Array:
    return certified_rows(matrix, rank, torch.arange(len(matrix)))[0].double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", GAPPED)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_truncation_equals_numpys_svd(spectrum: str, shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    matrix = torch.from_numpy(with_spectrum(*shape, spectrum) * scale).to(dtype)
    exact = matrix.double().numpy()
    before = matrix.clone()
    for rank in ranks(shape):
        if spectrum.startswith("low rank") and 5 < rank < min(shape) and dtype == torch.float32:
            # The singular values below the fifth are those of float32 rounding, all of one size.
            continue
        error = np.linalg.norm(all_rows(matrix, rank) - truncated(exact, rank))
        assert error <= (1e-6 if dtype == torch.float32 else 1e-10) * np.linalg.norm(exact)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", ["flat", "steep"])
@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_truncation_keeps_as_much_energy_as_any(spectrum: str, shape: tuple[int, int], scale: float) -> None:
    matrix = torch.from_numpy(with_spectrum(*shape, spectrum) * scale).float()
    exact = matrix.double().numpy() / scale
    values = np.linalg.svd(exact, compute_uv=False)
    for rank in ranks(shape):
        result = all_rows(matrix, rank) / scale
        # Where singular values are equal the truncation is not unique, but what it keeps is, and that it projects.
        assert np.linalg.norm(exact - result) ** 2 == pytest.approx((values[rank:] ** 2).sum(), abs=1e-6, rel=1e-5)
        assert abs((result * (exact - result)).sum()) <= 1e-6
        assert np.linalg.matrix_rank(result, tol=1e-5) <= rank


@examples
@given(data=st.data())
def test_small_matrices_of_any_rank(data: st.DataObject) -> None:
    rows, columns = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(values, dtype=torch.float64).reshape(rows, columns)
    rank = data.draw(st.integers(1, min(matrix.shape)))
    result = all_rows(matrix, rank)
    singular = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert np.isfinite(result).all()
    assert np.linalg.norm(matrix.numpy() - result) ** 2 == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-9)
    assert np.linalg.matrix_rank(result, tol=1e-6) <= rank
    some = data.draw(st.lists(st.integers(0, rows - 1), max_size=4))
    selected = certified_rows(matrix, rank, torch.tensor(some, dtype=torch.int64))[0]
    np.testing.assert_allclose(selected.numpy(), result[some], atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)], ids=str)
def test_selected_columns_are_rows_of_the_transposed_view(shape: tuple[int, int]) -> None:
    matrix = torch.from_numpy(with_spectrum(*shape, "power law"))
    columns = torch.tensor([3, 0, 31])
    expected = truncated(matrix.numpy(), 4)[:, columns.numpy()].T
    np.testing.assert_allclose(certified_rows(matrix.mT, 4, columns)[0].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(20_000, 40), (40, 20_000), (5, 5), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_gram_of_the_shorter_side(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = matrix.double().numpy()
    expected = exact @ exact.T if shape[0] <= shape[1] else exact.T @ exact
    result = gram(matrix)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-14 * np.linalg.norm(exact) ** 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12)], ids=str)
def test_basis_spans_the_dominant_singular_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.from_numpy(with_spectrum(*shape, "power law")).to(dtype)
    subspace = certified_subspace(matrix, 3)
    basis, axis = subspace.basis, subspace.axis
    left, _, right = np.linalg.svd(matrix.double().numpy())
    expected = left[:, :3] if shape[0] <= shape[1] else right[:3].T
    assert (axis, basis.dtype, basis.shape) == (0 if shape[0] <= shape[1] else 1, dtype, (12, 3))
    found = basis.double().numpy()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=tolerance)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=tolerance)


@pytest.mark.parametrize("rank", [-1, 0, 4, 100])
def test_ranks_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 3\] for shape \[3, 5\], got {rank}"):
        certified_subspace(torch.zeros(3, 5), rank)


def test_a_tolerance_of_zero_is_no_error() -> None:
    certificate = certified_subspace(torch.randn(600, 700, generator=torch.Generator().manual_seed(0)), 4, tolerance=0)
    assert certificate.certificate.deficit <= 1e-6


def test_one_nonzero_row_and_one_huge_column() -> None:
    matrix = torch.zeros(20, 30)
    matrix[7] = torch.linspace(-1, 1, 30)
    assert np.linalg.norm(all_rows(matrix, 2) - matrix.numpy()) <= 1e-6
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    matrix[:, 4] *= 1e6
    error = np.linalg.norm(all_rows(matrix, 1) - truncated(matrix.double().numpy(), 1))
    assert error <= 1e-6 * float(matrix.norm())


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)], ids=str)
def test_the_gap_of_small_matrices_is_exact(shape: tuple[int, int]) -> None:
    left, values, right = factors(*shape, "power law")
    certificate = certified_subspace(torch.from_numpy((left * values) @ right), 5).certificate
    assert certificate.gap == pytest.approx(1 - values[5] / values[4], abs=1e-12)
    assert certificate.captured == pytest.approx((values[:5] ** 2).sum() / (values**2).sum(), abs=1e-12)
    assert not certificate.degenerate


@pytest.mark.parametrize("side", [20, 600])
def test_trivial_certificates(side: int) -> None:
    zero = certified_subspace(torch.zeros(side, side + 1), 3).certificate
    assert (zero.method, zero.norm, zero.est, zero.degenerate) == ("zero", 0.0, 0.0, False)
    matrix = torch.randn(side, side + 1, generator=torch.Generator().manual_seed(2))
    full = certified_subspace(matrix, side).certificate
    assert (full.method, full.captured, full.est, full.degenerate) == ("full", 1.0, 0.0, False)
    assert full.norm == pytest.approx(float(matrix.double().norm()), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [20, 600])
def test_matrices_that_are_not_finite(side: int, bad: float) -> None:
    matrix = torch.zeros(side, side)
    matrix[3, 4] = bad
    with pytest.raises(ValueError, match=rf"a matrix of shape \[{side}, {side}\] must be finite"):
        certified_subspace(matrix, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_frobenius_norm(dtype: torch.dtype, scale: float) -> None:
    matrix = torch.randn(500, 700, generator=torch.Generator().manual_seed(5)).to(dtype) * scale
    expected = np.linalg.norm(matrix.double().numpy() / scale) * scale
    assert frobenius_norm(matrix) == pytest.approx(expected, rel=1e-12)
    assert frobenius_norm(matrix.mT) == pytest.approx(expected, rel=1e-12)
    assert frobenius_norm(torch.zeros(3, 4, dtype=dtype)) == 0.0
