"""The certificate of the rank-r update against float64 singular values, on sides that go through block Lanczos."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_rows import certified_rows
from numpy.typing import NDArray

from mergekit_snrf.fusion.lowrank import Certificate, certified_subspace, frobenius_norm

Array = NDArray[np.float64]
RANKS = (4, 16, 64)
SHAPES = {"tall": (760, 600), "wide": (600, 760)}


def rotate(vectors: Array, generator: np.random.Generator) -> Array:
    """Return the rows after a random orthogonal transform: signs, Hartley transform and permutation, twice."""
    length = vectors.shape[1]
    for _ in range(2):
        spectrum = np.fft.fft(vectors * generator.choice([-1.0, 1.0], length))
        vectors = (spectrum.real - spectrum.imag)[:, generator.permutation(length)] / math.sqrt(length)
    return vectors


@dataclass(frozen=True)
class Truth:
    """A float32 matrix, and what float64 says of it."""

    matrix: torch.Tensor
    left: Array
    values: Array
    right: Array

    def update(self, rank: int, rows: Array) -> Array:
        return (self.left[rows, :rank] * self.values[:rank]) @ self.right[:rank]


def of_values(rows: int, columns: int, values: Array, dtype: torch.dtype = torch.float32, seed: int = 0) -> Truth:
    """Return a matrix of the given singular values."""
    generator = np.random.default_rng(seed)
    left = rotate(np.eye(len(values), rows), generator).T
    right = rotate(np.eye(len(values), columns), generator)
    return Truth(torch.from_numpy((left * values) @ right).to(dtype), left, values, right)


def of_matrix(matrix: Array) -> Truth:
    single = torch.from_numpy(matrix).float()
    return Truth(single, *np.linalg.svd(single.double().numpy(), full_matrices=False))


def power(side: int) -> Array:
    return np.arange(1, side + 1) ** -0.5


SPECTRA = [
    "power law", "flat Gaussian", "exactly rank 12", "rank 12 and noise", "rank-deficient", "pairs", "norm 1e-20",
    "norm 1e18", "one nonzero row", "outlier column", "outlier row", "steep", "zero",
]  # fmt: skip


@cache
def truth(spectrum: str, shape: str) -> Truth:
    rows, columns = SHAPES[shape]
    side = min(rows, columns)
    index, law = np.arange(1, side + 1), power(side)
    gaussian = np.random.default_rng(7).standard_normal((rows, columns))
    if spectrum == "flat Gaussian":
        return of_matrix(gaussian)
    if spectrum == "one nonzero row":
        return of_matrix(np.where(np.arange(rows)[:, None] == 5, gaussian, 0.0))
    if spectrum == "outlier column":
        return of_matrix(np.where(np.arange(columns) == 5, 1e4 * gaussian, gaussian))
    if spectrum == "outlier row":
        return of_matrix(np.where(np.arange(rows)[:, None] == 5, 1e4 * gaussian, gaussian))
    return of_values(
        rows,
        columns,
        {
            "power law": law,
            "exactly rank 12": np.where(index <= 12, law, 0.0),
            "rank 12 and noise": np.where(index <= 12, law, 1e-3 * law),
            "rank-deficient": np.where(index <= side // 2, law, 0.0),
            # Values 2 and 3 are equal, 4 and 5, and so on: every even rank splits a pair.
            "pairs": law[index // 2],
            "norm 1e-20": 1e-20 * law / np.linalg.norm(law),
            "norm 1e18": 1e18 * law / np.linalg.norm(law),
            "steep": index**-2.0,
            "zero": np.zeros(side),
        }[spectrum],
    )


def masks(rows: int) -> list[Array]:
    """Return all rows, a random tenth, and a few, the last two without the row that one spectrum is about."""
    some = np.random.default_rng(1).permutation(np.delete(np.arange(rows), 5))
    return [np.arange(rows), np.sort(some[: rows // 10]), np.array([0, 1, 2, 7])]


def deficit(known: Truth, rank: int, basis: torch.Tensor, axis: int) -> float:
    """Return the energy that the subspace lacks, relative to the optimum."""
    directions, _ = np.linalg.qr(basis.double().numpy())
    exact = known.matrix.double().numpy() / known.values[0]
    kept = np.linalg.norm(exact @ directions if axis == 1 else directions.T @ exact) ** 2
    return 1 - float(kept / ((known.values[:rank] / known.values[0]) ** 2).sum())


@dataclass(frozen=True)
class Outcome:
    rank: int
    certificate: Certificate
    error: float
    deficit: float


@cache
def outcomes(spectrum: str, shape: str) -> list[Outcome]:
    known = truth(spectrum, shape)
    found = []
    for rank in RANKS:
        subspace = certified_subspace(known.matrix, rank)
        lacks = deficit(known, rank, subspace.basis, subspace.axis) if known.values[0] else 0.0
        for rows in masks(len(known.matrix)):
            update, certificate = certified_rows(known.matrix, rank, torch.from_numpy(rows))
            expected = known.update(rank, rows)
            size = float(np.linalg.norm(expected))
            if size <= 1e-6 * known.values[0]:
                # The mask holds nothing of the update but rounding.
                size = float(known.values[0])
            error = float(np.linalg.norm(update.double().numpy() - expected))
            found.append(Outcome(rank, certificate, error / size if size else error, lacks))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_masked_update_meets_the_bar(spectrum: str, shape: str) -> None:
    for outcome in outcomes(spectrum, shape):
        assert outcome.deficit <= 1e-6
        assert outcome.certificate.degenerate == (spectrum == "pairs")
        if not outcome.certificate.degenerate:
            assert outcome.error <= 1e-3
            assert outcome.certificate.est <= 1e-3


def test_certificates_are_honest() -> None:
    everything = [outcome for spectrum in SPECTRA for shape in SHAPES for outcome in outcomes(spectrum, shape)]
    unique = [outcome for outcome in everything if not outcome.certificate.degenerate]
    covered = [outcome.error <= outcome.certificate.est for outcome in unique if outcome.error > 0]
    assert len(covered) > 150
    assert np.mean(covered) >= 0.9
    assert all(outcome.error <= 5 * outcome.certificate.est + 1e-6 for outcome in unique)
    for outcome in everything:
        assert outcome.certificate.deficit is not None
        assert outcome.deficit <= outcome.certificate.deficit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_figures_of_the_certificate(spectrum: str, shape: str) -> None:
    known = truth(spectrum, shape)
    size = float(np.linalg.norm(known.values))
    for outcome in outcomes(spectrum, shape):
        rank, certificate = outcome.rank, outcome.certificate
        assert json.loads(json.dumps(asdict(certificate))) == asdict(certificate)
        assert certificate.norm == pytest.approx(size, rel=1e-7)
        if spectrum == "zero":
            assert (certificate.method, certificate.passes) == ("zero", 0)
            continue
        assert certificate.captured == pytest.approx(float(np.linalg.norm(known.values[:rank]) / size) ** 2, rel=2e-6)
        assert certificate.method in ("lanczos", "lanczos+float64")
        assert 1 <= certificate.passes <= 90
        assert certificate.gap is not None
        assert 0 <= certificate.gap <= 1


@pytest.mark.parametrize("spectrum", ["power law", "flat Gaussian"])
def test_the_gap_is_right_where_the_next_value_is_close(spectrum: str) -> None:
    known = truth(spectrum, "tall")
    for rank in RANKS:
        gap = certified_subspace(known.matrix, rank).certificate.gap
        assert gap == pytest.approx(1 - known.values[rank] / known.values[rank - 1], rel=0.02)


@pytest.mark.parametrize("shape", [(30, 24), (24, 30)], ids=str)
@pytest.mark.parametrize("spectrum", ["power law", "gaussian", "deficient", "one row", "tiny", "huge"])
def test_every_rank_of_small_matrices(spectrum: str, shape: tuple[int, int]) -> None:
    gaussian = np.random.default_rng(3).standard_normal(shape)
    law = power(24)
    known = {
        "power law": lambda: of_values(*shape, law),
        "gaussian": lambda: of_matrix(gaussian),
        "deficient": lambda: of_values(*shape, np.where(np.arange(24) < 9, law, 0.0)),
        "one row": lambda: of_matrix(np.where(np.arange(shape[0])[:, None] == 2, gaussian, 0.0)),
        "tiny": lambda: of_values(*shape, 1e-20 * law),
        "huge": lambda: of_values(*shape, 1e18 * law),
    }[spectrum]()
    rows = np.array([0, 2, 11])
    for rank in range(1, 25):
        update, certificate = certified_rows(known.matrix, rank, torch.from_numpy(rows))
        expected = known.update(rank, rows)
        assert np.linalg.norm(update.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)
        assert certificate.method == ("full" if rank == 24 else "gram")
        assert not certificate.degenerate
        assert certificate.est <= 1e-3


@settings(max_examples=15)
@given(
    side=st.integers(513, 620),
    longer=st.integers(0, 300),
    wide=st.booleans(),
    rank=st.integers(1, 90),
    decay=st.floats(0.1, 3.0),
    exponent=st.integers(-25, 15),
    cut=st.integers(1, 620),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_power_law(
    side: int, longer: int, wide: bool, rank: int, decay: float, exponent: int, cut: int, seed: int
) -> None:
    index = np.arange(1, side + 1)
    values = np.where(index <= cut, index**-decay, 0.0) * 10.0**exponent
    shape = (side, side + longer) if wide else (side + longer, side)
    known = of_values(*shape, values, seed=seed)
    rows = masks(shape[0])[1]
    update, certificate = certified_rows(known.matrix, rank, torch.from_numpy(rows))
    expected = known.update(rank, rows)
    assert not certificate.degenerate
    assert np.linalg.norm(update.double().numpy() - expected) <= 1e-3 * np.linalg.norm(expected)
    subspace = certified_subspace(known.matrix, rank)
    assert deficit(known, rank, subspace.basis, subspace.axis) <= 1e-6


@pytest.mark.parametrize("copies", [20, 40, 600])
@pytest.mark.parametrize("rank", RANKS)
def test_ties_and_more_copies_than_a_block_can_find(copies: int, rank: int) -> None:
    index = np.arange(1, 601)
    values = np.where(index <= copies, 1.0, 0.6 * power(600))
    known = of_values(700, 600, values)
    subspace = certified_subspace(known.matrix, rank)
    assert subspace.certificate.degenerate == (rank < copies)
    assert deficit(known, rank, subspace.basis, subspace.axis) <= 1e-6
    assert subspace.certificate.captured == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum(), rel=2e-6)
    if rank >= copies > 32:
        assert subspace.certificate.method == "lanczos+gram"


def test_near_ties_are_separated() -> None:
    for relative in (1e-2, 1e-3, 1e-4):
        values = power(600)
        values[16:] *= values[15] * (1 - relative) / values[16]
        known = of_values(900, 600, values)
        update, certificate = certified_rows(known.matrix, 16, torch.arange(900))
        expected = known.update(16, np.arange(900))
        assert not certificate.degenerate
        assert np.linalg.norm(update.double().numpy() - expected) <= 1e-3 * np.linalg.norm(expected)
        assert certificate.gap == pytest.approx(relative, rel=0.1)


def test_float32_goes_on_in_float64_where_an_outlier_is_not_wanted() -> None:
    known = truth("outlier row", "tall")
    rows = torch.from_numpy(masks(760)[1])
    everywhere = certified_subspace(known.matrix, 16).certificate
    wanted = certified_subspace(known.matrix, 16, rows=rows).certificate
    assert wanted.method == "lanczos+float64"
    assert wanted.passes > everywhere.passes
    assert wanted.est <= 5e-4


@pytest.mark.parametrize("shape", [(760, 600), (600, 760)], ids=str)
def test_float64_is_as_exact_as_the_tolerance_asks(shape: tuple[int, int]) -> None:
    known = of_values(*shape, 1e-200 * power(600), torch.float64)
    rows = torch.from_numpy(masks(shape[0])[1])
    for tolerance in (1e-3, 1e-6, 1e-9):
        subspace = certified_subspace(known.matrix, 16, rows=rows, tolerance=tolerance)
        basis = subspace.basis.numpy()
        matrix = known.matrix.numpy()
        update = matrix[rows] @ basis @ basis.T if subspace.axis == 1 else basis[rows] @ (basis.T @ matrix)
        expected = known.update(16, rows.numpy())
        assert np.linalg.norm((update - expected) * 1e200) <= tolerance * np.linalg.norm(expected * 1e200)
        assert (subspace.basis.dtype, subspace.certificate.method) == (torch.float64, "lanczos")
        assert subspace.certificate.est <= tolerance


def test_memory_layout_changes_nothing_but_rounding() -> None:
    known = truth("power law", "wide")
    rows = torch.arange(0, 600, 9)
    update, certificate = certified_rows(known.matrix, 16, rows)
    view, of_view = certified_rows(known.matrix.mT.contiguous().mT, 16, rows)
    padded = torch.empty(600, 900)[:, :760].copy_(known.matrix)
    assert float((view - update).norm()) <= 1e-4 * float(update.norm())
    assert float((certified_rows(padded, 16, rows)[0] - update).norm()) <= 1e-4 * float(update.norm())
    assert of_view.norm == pytest.approx(certificate.norm, rel=1e-12)


@pytest.mark.parametrize("spectrum", ["power law", "outlier row"])
def test_equal_runs_are_equal_bit_for_bit(spectrum: str) -> None:
    known = truth(spectrum, "tall")
    rows = torch.from_numpy(masks(760)[1])
    state = torch.get_rng_state()
    first, certificate = certified_rows(known.matrix, 16, rows)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, same = certified_rows(known.matrix.clone(), 16, rows)
    torch.set_rng_state(state)
    assert torch.equal(first, again)
    assert certificate == same


def test_threads_and_seeds_agree() -> None:
    known = truth("power law", "tall")
    first = certified_subspace(known.matrix, 16, seed=0).basis
    other = certified_subspace(known.matrix, 16, seed=1).basis
    assert not torch.equal(first, other)
    assert float((first @ first.mT - other @ other.mT).norm()) <= 1e-3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = certified_subspace(known.matrix, 16).basis
        torch.set_num_threads(2)
        two = certified_subspace(known.matrix, 16).basis
    finally:
        torch.set_num_threads(threads)
    assert float((one @ one.mT - two @ two.mT).norm()) <= 1e-5


def test_the_certificate_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "mergekit_snrf.fusion.lowrank"):
        certificate = certified_subspace(torch.eye(20, 30), 3).certificate
    assert str(certificate) in caplog.text


def test_the_norm_of_seventy_million_elements_keeps_its_digits() -> None:
    tenth = torch.tensor(0.1)
    assert frobenius_norm(tenth.expand(7_000, 10_000)) == pytest.approx(float(tenth) * math.sqrt(7e7), rel=1e-12)


def rise_of_memory(rank: int) -> tuple[float, str]:
    """Return by how many MB the peak of this process rises above Delta."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    certified_subspace(torch.eye(700, 600), 4)
    matrix = torch.empty(5120, 3072).normal_(generator=torch.Generator().manual_seed(0))
    matrix *= torch.arange(1, 3073) ** -0.5
    before = resident("VmRSS")
    method = certified_subspace(matrix, rank).certificate.method
    return resident("VmHWM") - before, method


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_extra_memory_is_less_than_half_of_the_matrix() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rise, method = pool.submit(rise_of_memory, 64).result()
    assert method == "lanczos"
    assert rise <= 0.5 * 5120 * 3072 * 4 / 2**20
