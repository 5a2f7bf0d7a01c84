"""The dominant singular subspace of a weight difference (Eq. 10), with a certificate of how good it is.

The truncated SVD is a projection, Delta V V^T or U U^T Delta: only the shorter side's vectors are needed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.fusion.threads import check_not_stopped

logger = logging.getLogger(__name__)

_DENSE_SIDE = 512  # Up to it the Gram matrix is about as fast as Lanczos, and exact.
# Elements converted to float64 at a time: they stay in a processor's cache.
_PANEL, _CHUNK = 2**19, 1024
# Vectors of a Lanczos block: wider ones need fewer passes and more work.
_WIDTH = 16
# Lanczos vectors before a restart: more save no passes on flat spectra, and cost memory.
_VECTORS = 256
# Energy that a subspace may lack, relative to the optimum.
_ENERGY = 1e-6


@dataclass(frozen=True)
class Certificate:
    """How good a dominant subspace is; ``dataclasses.asdict`` makes JSON of it.

    Attributes:
        method: ``gram``, ``lanczos``, ``lanczos+float64``, ``lanczos+gram``, ``zero`` or ``full`` (nothing to do).
        passes: how often Delta was read.
        norm: ||Delta||_F.
        captured: ||Delta_r||_F^2 / ||Delta||_F^2.
        est: estimated relative error of the update and of its wanted rows; usually 5 to 100 times the true one.
        deficit: by how much ``captured`` misses the optimum, relatively, at most; None if unknown.
        gap: 1 - sigma_{r+1} / sigma_r, estimated; None if unknown.
        degenerate: sigma_r = sigma_{r+1} within rounding: the update is not unique, only its energy means something.
        rank: r.
    """

    method: str
    passes: int
    norm: float
    captured: float
    est: float
    deficit: float | None
    gap: float | None
    degenerate: bool
    rank: int = 0


@dataclass(frozen=True)
class Subspace:
    """A dominant singular subspace: orthonormal columns that span axis 0 (U) or axis 1 (V) of the matrix."""

    basis: Float[Tensor, "side rank"]
    axis: int
    certificate: Certificate


@dataclass(frozen=True)
class _Problem:
    """A = scale * matrix, the axis of its shorter side, and what is wanted."""

    matrix: Tensor
    axis: int
    rank: int
    norm: float
    scale: float
    tolerance: float
    rows: Tensor | None


@dataclass(frozen=True)
class _Solution:
    """Leading vectors (rows). Stalled: more passes in this arithmetic are of no use."""

    vectors: Tensor
    certificate: Certificate
    converged: bool
    stalled: bool


def frobenius_norm(matrix: Float[Tensor, "rows columns"]) -> float:
    """Return ||matrix||_F, summed in float64 (a flat float32 sum of 7e7 squares is .3 % off); NaN and inf pass."""
    by_row = matrix if matrix.stride(-1) == 1 else matrix.mT
    scale = 1.0  # No square of a float32 number is out of float64's range.
    if matrix.dtype == torch.float64:
        scale = _scale(float(torch.stack(torch.aminmax(by_row)).abs().amax()), matrix.dtype)
    total = matrix.new_zeros((), dtype=torch.float64)
    for part in by_row.split(max(1, _PANEL // 4 // by_row.shape[1])):
        flat = part.to(torch.float64).flatten() * scale
        total += torch.dot(flat, flat)
    return math.sqrt(float(total)) / scale


def gram(matrix: Float[Tensor, "rows columns"], *, scale: float = 1.0) -> Float[Tensor, "side side"]:
    """Return the float64 Gram matrix of the shorter side of A = scale * matrix, A A^T or A^T A."""
    tall = _tall(matrix)
    total = matrix.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for part in tall.split(max(1, len(total) // 4, _PANEL // 4 // len(total))):
        check_not_stopped()
        block = part.to(torch.float64, copy=True).mul_(scale)
        total.addmm_(block.mT, block)
    return total


def certified_subspace(
    matrix: Float[Tensor, "rows columns"],
    rank: int,
    *,
    rows: Int[Tensor, " selected"] | None = None,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> Subspace:
    """Return the dominant singular subspace of ``matrix`` on its shorter side, with its certificate.

    Up to a side of 512 from the float64 Gram matrix; beyond, by block Lanczos in extra memory of at most half of the
    matrix (or 16 MB), going on in float64 where float32 cannot separate the singular values. The Gram matrix is the
    last resort. Devices and thread counts agree within ``tolerance``, equal ones bit for bit.

    Args:
        matrix: finite, float32 or float64, any orientation and scale.
        rank: in [1, min(rows, columns)].
        rows: int64, the rows of the update that are wanted.
        seed: of the start block, drawn on the CPU.
        tolerance: relative error of the update; Lanczos stops where ``est`` is half of it.

    Raises:
        ValueError: ``rank`` is out of range, or the matrix is not finite.
    """
    shape, side, axis = list(matrix.shape), min(matrix.shape), 0 if matrix.shape[0] <= matrix.shape[1] else 1
    if not 1 <= rank <= side:
        raise ValueError(f"rank must be in [1, {side}] for shape {shape}, got {rank}")
    norm = frobenius_norm(matrix)
    if not math.isfinite(norm):
        raise ValueError(f"a matrix of shape {shape} must be finite, but its Frobenius norm is {norm}")
    if norm == 0 or rank == side:
        basis = torch.eye(side, rank, dtype=matrix.dtype, device=matrix.device)
        return Subspace(basis, axis, Certificate("full" if norm else "zero", 0, norm, 1.0, 0.0, 0.0, None, False, rank))

    problem = _Problem(matrix, axis, rank, norm, _scale(norm, matrix.dtype), tolerance, rows)
    solution, method, passes = None, "", 0
    if side > _DENSE_SIDE:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(_WIDTH, side, generator=generator, dtype=torch.float64)
        solution = _lanczos(problem, start.to(matrix.device, matrix.dtype), generator)
        if solution:
            method, passes = "lanczos", solution.certificate.passes
        if solution and solution.stalled and matrix.dtype != torch.float64:
            solution = _lanczos(problem, solution.vectors.to(torch.float64), generator)
            method, passes = "lanczos+float64", passes + (solution.certificate.passes if solution else 0)
    if solution is None or not solution.converged:
        method, solution = "lanczos+gram" if passes else "gram", _dense(problem)
        passes += 1
    certificate = replace(solution.certificate, method=method, passes=passes, rank=rank)
    logger.debug("%s, rank %d: %s", shape, rank, certificate)
    return Subspace(solution.vectors[:rank].mT.to(matrix.dtype), axis, certificate)


def certified_factors(
    matrix: Float[Tensor, "rows columns"], rank: int, rows: Int[Tensor, " selected"]
) -> tuple[Float[Tensor, "selected rank"] | None, Float[Tensor, "rank columns"], Certificate]:
    """Return the selected rows of the rank-r truncated SVD of ``matrix`` (Eq. 10) as ``left @ right``.

    Arguments and errors as ``certified_subspace``; the other rows are not formed. A transposed view selects columns.
    ``left`` is None where nothing is truncated: the rows are ``right`` itself.
    """
    subspace = certified_subspace(matrix, rank, rows=rows)
    basis, certificate = subspace.basis, subspace.certificate
    if certificate.method == "full":
        return None, matrix[rows], certificate
    if subspace.axis == 0:
        return basis[rows], basis.mT @ matrix, certificate
    parts = rows.split(max(1, _PANEL // matrix.shape[1]))
    return torch.cat([matrix[part] @ basis for part in parts]), basis.mT, certificate


def _tall(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix


def _scale(size: float, dtype: torch.dtype) -> float:
    """Return the power of two that brings ``size`` near 1: scaling by it rounds nothing."""
    limit = 120 if dtype == torch.float32 else 1000
    return math.ldexp(1.0, max(-limit, min(limit, -math.frexp(size)[1])))


def _judge(
    problem: _Problem, vectors: Tensor, values: Tensor, residuals: Tensor, passes: int, shares: Tensor | None
) -> _Solution:
    """Judge Ritz vectors w by their values (all, descending) and residuals ||A^T A w - value w||.

    ``shares``: ||w||^2 (axis 0) or ||A w||^2 of the r + 1 leading ones in the wanted rows.
    """
    rank, values = problem.rank, values.clamp_min(0)
    kept, below, eps = values[:rank], values[rank], torch.finfo(problem.matrix.dtype).eps
    # A vector that leans by an angle towards another changes the update by angle^2 (own + other energy).
    whole, wanted, change = kept.sum(), kept.sum(), kept + below
    if shares is not None and problem.axis == 0:
        wanted, change = (kept * shares[:rank]).sum(), kept * shares[rank] + below * shares[:rank]
    elif shares is not None:
        wanted, change = shares[:rank].sum(), shares[:rank] + shares[rank]
    # Rows that hold rounding only have no error of their own.
    seen = bool(wanted > (16 * eps) ** 2 * whole)

    def errors(rho: Tensor) -> tuple[float, float]:
        # Large angles count twice: the value, too, is then too low.
        squares = torch.where(kept > below, rho / (kept - below), 2.0).clamp_max(2.0).square()
        of_all = float((squares * (kept + below)).sum() / whole)
        return of_all, math.sqrt(max(of_all, float((squares * change).sum() / wanted) if seen else 0.0))

    # What rounding leaves of residuals, unseen; measured on many spectra.
    floor = 6 * torch.finfo(vectors.dtype).eps * (values + values[0] / 16)
    rho = torch.hypot(residuals, floor)
    lacking, est = errors(rho[:rank])
    # Quadratic residual bound up to the best gap, linear from there: a tie at r costs no energy.
    room, sums = values[:-1] - values[1:] - rho[1:], rho.cumsum(0)
    quadratic = torch.where(room > 0, rho.square().cumsum(0)[:-1] / room, math.inf)
    bounds = torch.cat([quadratic + (sums[rank - 1] - sums[:-1]).clamp_min(0), sums[rank - 1 : rank]])
    deficit = min(float(bounds.amin() / whole), lacking) + eps
    # Values that still move can look like a tie.
    settled = bool((rho[:rank] <= problem.tolerance * kept).all())
    degenerate = settled and errors(eps * kept)[1] >= problem.tolerance
    captured = min(1.0, float(whole) / (problem.norm * problem.scale) ** 2)
    gap = 1 - math.sqrt(float(below / kept[-1].clamp_min(1e-300)))
    known = deficit if deficit < 1 else None
    certificate = Certificate("", passes, problem.norm, captured, est + 4 * eps, known, gap, degenerate)
    converged = deficit < _ENERGY and (est < 0.5 * problem.tolerance or degenerate)
    stalled = not converged and deficit < 10 * _ENERGY and errors(floor[:rank])[1] > 0.5 * est
    return _Solution(vectors, certificate, converged, stalled)


def _dense(problem: _Problem) -> _Solution:
    """Solve through the float64 Gram matrix."""
    total = gram(problem.matrix, scale=problem.scale)
    values, vectors = torch.linalg.eigh(total.mT, out=(total.new_empty(0), total.mT))  # In place.
    values, leading = values.flip(0).cpu(), vectors[:, -problem.rank :].mT.flip(0)
    residuals = values[0] * len(values) * torch.finfo(torch.float64).eps
    return _judge(problem, leading, values, residuals.expand(len(values)), 1, None)


def _lanczos(problem: _Problem, start: Tensor, generator: torch.Generator) -> _Solution | None:
    """Run block Lanczos on A^T A in the dtype of ``start``. None where memory is too little."""
    tall, rank, scale, dtype = _tall(problem.matrix), problem.rank, problem.scale, start.dtype
    (length, side), width = tall.shape, len(start)
    keep, most_passes = rank + 32, max(32, side // 16)
    # Half of float32, less what a thick restart copies and two blocks in work.
    memory = max(2 * length * side, 2**24) // ((length + side) * dtype.itemsize) - keep - 2 * width
    room = min(max(_VECTORS, 2 * keep), side // 2, memory)
    if room < keep + max(64, width):
        return None
    vectors, images = start.new_empty(room, side), start.new_empty(room, length)
    projected = torch.zeros(room, room, dtype=torch.float64)
    count, done, check, largest = 0, 0, rank + 1, 0.0
    before: tuple[int, float] | None = None
    block, _ = _orthonormal(start, vectors[:0], 0.0, generator)
    for passes in range(1, most_passes + 1):
        check_not_stopped()
        new = slice(count, count + width)
        count = new.stop
        vectors[new] = block
        applied = _apply(tall, block * scale, images[new], scale)
        largest = max(largest, float(applied.norm(dim=1).amax()))
        block, coupling = _orthonormal(applied, vectors[:count], torch.finfo(dtype).eps * largest, generator)
        full = count + width > room
        if count < check and not full and passes < most_passes:
            continue
        # V^T (A^T A V) in float32 would drown small values; (A V)^T (A V) in float64 does not.
        projected[done:count] = 0
        for image, others in zip(images[done:count].split(_CHUNK, 1), images[:count].split(_CHUNK, 1), strict=True):
            projected[done:count, :count] += (image.to(torch.float64) @ others.to(torch.float64).mT).cpu()
        done = count
        values, mixing = torch.linalg.eigh(projected[:count, :count])
        values, mixing = values.flip(0), mixing.flip(1)
        residuals = (coupling.to("cpu", torch.float64) @ mixing[-width:]).norm(dim=0)
        leading = mixing[:, :keep].to(tall.device, dtype).mT
        shares = None
        if problem.rows is not None:
            source, shares = vectors if problem.axis == 0 else images, torch.zeros(rank + 1, dtype=torch.float64)
            for part in problem.rows.split(_CHUNK):
                seen = leading[: rank + 1] @ source[:count, part]
                shares += seen.to(torch.float64).square().sum(1).cpu()
        solution = _judge(problem, leading, values, residuals, passes, shares)
        if solution.converged or solution.stalled or passes == most_passes:
            break
        now = count, _distance(solution.certificate, problem.tolerance)
        check, before = _next_check(before, now), now
        if full:
            vectors[:keep] = leading @ vectors[:count]
            images[:keep] = leading @ images[:count]
            projected[:keep, :keep] = values[:keep].diag()
            count = done = keep
            check, before = keep, None
    # A block finds at most its width of copies of one singular value: there may be more.
    first, last = values[: max(0, rank - width + 1)], values[width - 1 : rank]
    sure = not bool(((first - last < 1e-5 * first) & (first - values[rank] > 1e-5 * first)).any())
    found = leading[: rank + 16] @ vectors[:count]
    return replace(solution, vectors=found, converged=solution.converged and sure, stalled=solution.stalled and sure)


def _distance(certificate: Certificate, tolerance: float) -> float:
    """Return the logarithm of how many times too large the estimate or the deficit is."""
    deficit = 1.0 if certificate.deficit is None else certificate.deficit
    return math.inf if tolerance == 0 else math.log(max(certificate.est / (0.5 * tolerance), deficit / _ENERGY))


def _next_check(before: tuple[int, float] | None, now: tuple[int, float]) -> int:
    """Return the number of vectors at which to look again, from two pairs of a number and its ``_distance``."""
    count, distance = now
    step = 0.1 * count
    if before is not None and before[1] > distance > 0:
        # Convergence speeds up: aim short.
        step = max(step, min(0.6 * distance * (count - before[0]) / (before[1] - distance), 0.5 * count))
    return math.ceil(count + step)


def _apply(tall: Tensor, block: Tensor, images: Tensor, scale: float) -> Tensor:
    """Return scale * block A^T A and write block A^T to ``images``; a panel of rows is read once for both."""
    by_row, same = tall.stride(-1) == 1, tall.dtype == block.dtype
    step = len(tall) if same and not by_row else max(1, (1 + same) * _PANEL // tall.shape[1])
    applied, columns = torch.zeros_like(block), block.mT.contiguous()
    for begin in range(0, len(tall), step):
        part = tall[begin : begin + step].to(block.dtype)
        image = (part @ columns).mT if by_row else block @ part.mT
        images[:, begin : begin + step] = image
        applied.addmm_(image, part, alpha=scale)
    return applied


def _orthonormal(block: Tensor, basis: Tensor, floor: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the block made orthonormal, also to ``basis``, and its coordinates; rows below ``floor`` become random."""
    for _ in range(2):
        block = block - (block @ basis.mT) @ basis
    columns, coupling = torch.linalg.qr(block.mT)
    exhausted = coupling.diagonal().abs() <= floor
    if exhausted.any():
        fresh = torch.randn(len(columns), int(exhausted.sum()), generator=generator, dtype=torch.float64)
        columns[:, exhausted] = fresh.to(columns) / math.sqrt(len(columns))
    # The QR amplifies what rounding left along the basis in nearly exhausted rows.
    rows = columns.mT
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    return torch.linalg.qr(rows.mT).Q.mT, coupling
