"""The update that keeps what it is asked to keep: D F, with F from second moments of the target's inputs.

For one linear layer with input size d and D = W_src - W_tgt the merged weight is ``W_tgt + beta * M_S(D F)`` with

    F = C_r (C_r + keep * C_p + eps * (1 + keep) * I)^-1

C_r and C_p are second moments E[x x^T] of the layer's inputs, scaled to trace d: C_r on what the merge gains
(reasoning), C_p on what it keeps (perception). It is the closed form of

    min over W of ||(W - W_src) X_r||^2 + keep * ||(W - W_tgt) X_p||^2

RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) between a source on one kind of input and a target on another.
Directions that only C_r has pass, directions that both have shrink by 1 / (1 + keep).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float16, Float32, Float64, Int
from torch import Tensor

EPS = 1e-3
"""Ridge of F, relative to the mean eigenvalue of a moment, which is 1."""
# Up to this ratio of a direction's moment to the ridge, float32 changes F by less than 1e-4.
_STEEP = 1e4
# Rows of a factor whose products are summed in float32.
_ROWS = 1024


@dataclass(frozen=True)
class DenseMoment:
    """A second moment as its diagonal and its correlations.

    Attributes:
        scale: sqrt of the diagonal of C.
        correlation: C_ij / (scale_i scale_j), the upper triangle with its diagonal, row by row; 0 where a scale is 0.
    """

    scale: Float32[Tensor, " d"]
    correlation: Float16[Tensor, " triangle"]

    def __post_init__(self) -> None:
        d = len(self.scale)
        wanted, found = [d * (d + 1) // 2], list(self.correlation.shape)
        if found != wanted:
            raise ValueError(f"correlation must have shape {wanted} for {d} inputs, got {found}")

    @property
    def size(self) -> int:
        """Number of inputs, d."""
        return len(self.scale)

    @classmethod
    def of(cls, moment: Float64[Tensor, "d d"]) -> DenseMoment:
        """Return a symmetric matrix in this form, scaled to trace d."""
        moment = scaled(moment)
        scale = moment.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        correlation = (moment * inverse[:, None] * inverse).clamp_(-1, 1)
        correlation = correlation.to(torch.float16)
        return cls(scale.to(torch.float32), torch.cat([values[row:] for row, values in enumerate(correlation)]))

    def matrix(self) -> Float64[Tensor, "d d"]:
        """Return C as a whole matrix."""
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.scale.device)
        # Row by row: indices of the triangle would take four times the memory of the matrix.
        for row, values in enumerate(self.correlation.split([*range(self.size, 0, -1)])):
            matrix[row, row:] = values
        scale = self.scale.to(torch.float64)
        matrix.mul_(scale[:, None]).mul_(scale)
        return matrix.triu(1).mT.add_(matrix)


@dataclass(frozen=True)
class SketchMoment:
    """A second moment as its leading eigenvectors and the mean of the rest, C ~ A A^T + rest * I.

    Attributes:
        factor: A, the k leading eigenvectors times the square roots of their eigenvalues. With trace d no entry
            exceeds sqrt(d), so float16 cannot overflow.
        rest: (d - ||A||_F^2) / d, of A as it is stored.
    """

    factor: Float16[Tensor, "d k"]
    rest: float

    def __post_init__(self) -> None:
        if self.factor.ndim != 2 or self.factor.shape[1] > self.factor.shape[0]:
            raise ValueError(f"factor must have shape [d, k] with k <= d, got {list(self.factor.shape)}")
        if not 0 <= self.rest < float("inf"):
            raise ValueError(f"rest must be finite and not negative, got {self.rest}")

    @property
    def size(self) -> int:
        """Number of inputs, d."""
        return len(self.factor)

    @classmethod
    def of(cls, vectors: Float64[Tensor, "d k"], values: Float64[Tensor, " k"], trace: float) -> SketchMoment:
        """Return eigenvectors and eigenvalues of a moment in this form, scaled to trace d; trace 0 stays zero."""
        d = len(vectors)
        scale = d / trace if trace > 0 else 0.0
        factor = (vectors * (values.clamp_min(0) * scale).sqrt()).to(torch.float16)
        rest = (scale * trace - float(factor.to(torch.float64).square().sum())) / d
        return cls(factor.contiguous(), max(rest, 0.0))


Moment = DenseMoment | SketchMoment


class Filter:
    """F of one input of one layer, applied to differences of weights that read this input.

    ``dense`` is F itself. Of sketches F is ``outside * I + left right^T``: only thin products.
    """

    def __init__(
        self,
        dense: Float32[Tensor, "d d"] | None = None,
        *,
        left: Float32[Tensor, "d k"] | None = None,
        right: Float32[Tensor, "d k"] | None = None,
        outside: float = 0.0,
    ) -> None:
        self._dense, self._left, self._right, self._outside = dense, left, right, outside

    @property
    def size(self) -> int:
        """Number of inputs, d."""
        matrix = self._dense if self._dense is not None else self._left
        assert matrix is not None
        return len(matrix)

    def apply(
        self, delta: Float[Tensor, "rows d"], columns: Bool[Tensor, " d"] | Int[Tensor, " selected"] | None = None
    ) -> Float[Tensor, "rows selected"]:
        """Return D F, or the chosen columns of it, in the dtype of D."""
        if delta.shape[-1] != self.size:
            raise ValueError(f"delta must have shape [rows, {self.size}], got {list(delta.shape)}")
        chosen = slice(None) if columns is None else columns.to(delta.device)
        if self._dense is not None:
            return delta @ self._dense.to(delta)[:, chosen]
        assert self._left is not None
        assert self._right is not None
        inside = delta @ self._left.to(delta)
        return torch.addmm(delta[:, chosen], inside, self._right.to(delta)[chosen].mT, beta=self._outside)


def regmean_filter(gain: Moment, keep: Moment, strength: float, *, eps: float = EPS) -> Filter:
    """Return F of one input, solved in float64.

    Float16 correlations can push small eigenvalues of a dense moment below zero. Where half of the ridge does not
    make the sum positive definite, the ridge is doubled until it does, so that rounding is never amplified.

    Args:
        gain: C_r.
        keep: C_p.
        strength: ``keep`` of the recipe, lambda >= 0; 0 gives almost D, large values almost nothing.
        eps: ridge relative to the mean eigenvalue.

    Raises:
        ValueError: the moments are of different sizes or forms, or a value is out of range.
    """
    if type(gain) is not type(keep) or gain.size != keep.size:
        found = " and ".join(f"{type(one).__name__} of {one.size}" for one in (gain, keep))
        raise ValueError(f"both moments must be of one form and size, got {found}")
    if not (strength >= 0 and eps > 0) or strength == float("inf"):
        raise ValueError(f"strength must be at least 0 and eps above 0, got {strength} and {eps}")
    ridge = eps * (1 + strength)
    if isinstance(gain, DenseMoment) and isinstance(keep, DenseMoment):
        return Filter(_solved(gain.matrix(), keep.matrix().mul_(strength), ridge).to(torch.float32))
    assert isinstance(gain, SketchMoment)
    assert isinstance(keep, SketchMoment)
    return _sketched(gain, keep, strength, ridge)


def _solved(gain: Tensor, kept: Tensor, ridge: float) -> Float64[Tensor, "d d"]:
    """Return gain (gain + kept + ridge I)^-1."""
    total = kept.add_(gain)
    diagonal = total.diagonal()
    diagonal += ridge / 2
    while True:
        if int(torch.linalg.cholesky_ex(total).info) == 0:
            diagonal += ridge / 2
            factor = torch.linalg.cholesky(total)
            return torch.cholesky_solve(gain, factor).mT
        # From ridge / 2 to ridge, which is half of the next one.
        diagonal += ridge / 2
        ridge *= 2


def _sketched(gain: SketchMoment, keep: SketchMoment, strength: float, ridge: float) -> Filter:
    """Return F by block elimination, the inputs to keep first.

    With Z = [sqrt(strength) A_p, A_r], m the ridge and both rests, L L^T = m I + Z^T Z and B = [B_p, B_r] = Z L^-T:

        F = c (I - B B^T) + (A_r L_rr^-T) B_r^T,    c = rest_r / m

    by the Woodbury identity. B has norm below 1 and A_r L_rr^-T at most sqrt(||C_r|| / m), so that float32 is enough
    to apply F; Z (m I + Z^T Z)^-1 Z^T itself would lose the square of that where both moments share a direction.
    What is [k, k] is always float64. What is [d, k] is float32 unless one direction exceeds m by ``_STEEP``.
    """
    ridge += gain.rest + strength * keep.rest
    largest = max(float(one.factor.float().square().sum(0).amax()) * by for one, by in ((gain, 1), (keep, strength)))
    dtype = torch.float32 if largest < _STEEP * ridge else torch.float64
    mine, theirs = gain.factor.to(dtype), keep.factor.to(dtype) * strength**0.5
    outside = gain.rest / ridge
    lower_kept = _cholesky(_product(theirs, theirs), ridge)
    shared = torch.linalg.solve_triangular(lower_kept, _product(theirs, mine), upper=False)
    lower = _cholesky(_product(mine, mine) - shared.mT @ shared, ridge)
    kept, reach = _divided(theirs, lower_kept), _divided(mine, lower)
    passed = torch.addmm(reach, kept, _divided(shared, lower).to(dtype), alpha=-1)
    left = torch.cat([reach.sub_(passed, alpha=outside), kept * -outside], dim=1)
    right = torch.cat([passed, kept], dim=1)
    return Filter(left=left.to(torch.float32), right=right.to(torch.float32), outside=outside)


def _product(a: Float[Tensor, "d k"], b: Float[Tensor, "d k"]) -> Float64[Tensor, "k k"]:
    """Return a^T b, summed in float64: float32 products of numbers that were float16 are nearly exact."""
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for part, other in zip(a.split(_ROWS), b.split(_ROWS), strict=True):
        total += part.mT @ other
    return total


def _divided(matrix: Float[Tensor, "d k"], lower: Float64[Tensor, "k k"]) -> Float[Tensor, "d k"]:
    """Return matrix L^-T; both are contiguous, as LAPACK reads and writes the transpose."""
    return torch.linalg.solve_triangular(lower.to(matrix.dtype), matrix.mT, upper=False).mT


def _cholesky(gram: Float64[Tensor, "k k"], ridge: float) -> Float64[Tensor, "k k"]:
    gram.diagonal().add_(ridge)
    return torch.linalg.cholesky(gram)


def scaled(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Return a moment scaled to trace d; one of trace 0 stays zero."""
    trace = float(moment.diagonal().sum())
    return moment * (len(moment) / trace) if trace > 0 else moment
