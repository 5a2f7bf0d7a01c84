"""Shared Neuron Low-Rank Fusion of one tensor (Eq. 9-11). Pure torch: knows no mergekit and no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.lowrank import Certificate, certified_factors, frobenius_norm

Order = Literal["svd-then-mask", "mask-then-svd"]
ORDERS: tuple[str, ...] = get_args(Order)
# Elements that are converted at a time.
_PANEL = 2**20


@dataclass(frozen=True)
class Fusion:
    """How strongly and at which rank a tensor is fused.

    Attributes:
        beta: strength of the update, in [0, 1] (Eq. 11).
        rank: rank r of the update; 0 means full rank.
        order: ``svd-then-mask`` is Eq. 10 then Eq. 11; ``mask-then-svd`` truncates the masked difference, the
            order that the bound of Appendix B is proved for.

    Raises:
        SnrfError: a value is out of range.
    """

    beta: float = 0.5
    rank: int = 4
    order: str = "svd-then-mask"

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise SnrfError(f"beta must be in [0, 1] (Eq. 11), got {self.beta}")
        if self.rank < 0:
            raise SnrfError(f"rank must be 0 (full rank) or positive, got {self.rank}")
        if self.order not in ORDERS:
            raise SnrfError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def check_rank(self, name: str, shape: tuple[int, ...]) -> None:
        """Check the rank against a weight's shape.

        Raises:
            SnrfError: the rank exceeds the smaller side.
        """
        if self.rank > min(shape):
            raise SnrfError(
                f"{name}: rank {self.rank} exceeds the smaller side of shape {list(shape)}; use at most "
                f"{min(shape)}, or rank: 0 for the full-rank update"
            )


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the maths: float32, or float64 where a tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass(frozen=True)
class Update:
    """M_S(Delta_r) of one tensor: the selected neurons only, one a row, as ``left @ right``.

    Attributes:
        selected: the indices of the neurons.
        left: None stands for the identity: the rows are ``right`` itself.
        certificate: how good the truncation is; None where nothing was truncated.
    """

    selected: Int[Tensor, " selected"]
    left: Float[Tensor, "selected rank"] | None
    right: Float[Tensor, "rank length"]
    certificate: Certificate | None = None

    def rows(self) -> Float[Tensor, "selected length"]:
        """Return the update of the selected neurons."""
        return self.right if self.left is None else self.left @ self.right


@dataclass(frozen=True)
class Rounding:
    """What the target's dtype leaves of an update.

    Attributes:
        update: ||beta * M_S(Delta_r)||_F.
        lost: ||rounded result - exact result||_F.
        weights: number of weights in the masked neurons.
        changed: how many of them differ from the target's.
    """

    update: float
    lost: float
    weights: int
    changed: int


def masked_update(
    target: Float[Tensor, "rows columns"],
    source: Float[Tensor, "rows columns"],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    rank: int,
    order: str = "svd-then-mask",
    *,
    name: str = "weight",
) -> Update:
    """Return M_S(Delta_r) of Eq. 9-11.

    Args:
        target: W_tgt, any floating dtype; the maths is done in float32 (float64 for float64).
        source: W_src, same shape.
        neurons: S, one entry for every row (axis 0) or column (axis 1).
        axis: the axis of the weight that counts neurons.
        rank: 0 for full rank, else at most the smaller side.
        order: see ``Fusion``.
        name: the tensor's name, for messages.

    Raises:
        SnrfError: the shapes differ, the mask's length does not fit, or a weight is NaN or infinite.
    """
    if target.shape != source.shape or target.ndim != 2:
        raise SnrfError(
            f"{name}: target has shape {list(target.shape)} and source {list(source.shape)}; SNRF needs two "
            f"matrices of one shape"
        )
    if len(neurons) != target.shape[axis]:
        raise SnrfError(
            f"{name}: the mask has {len(neurons)} neurons, but axis {axis} of shape {list(target.shape)} has "
            f"{target.shape[axis]}; use a mask of this model"
        )
    delta, finite = _difference(target, source)
    if not finite:
        which = "target" if not torch.isfinite(target).all() else "source"
        if torch.isfinite(target).all() and torch.isfinite(source).all():
            raise SnrfError(f"{name}: the difference of source and target overflows {delta.dtype}; check both")
        raise SnrfError(
            f"{name}: the {which}'s tensor of shape {list(target.shape)} holds NaN or infinite weights; the checkpoint "
            f"is damaged, get it again or leave these neurons out of the mask"
        )
    by_neuron = delta if axis == 0 else delta.mT
    selected = neurons.to(delta.device).nonzero().flatten()
    if rank == 0 or rank == min(by_neuron.shape):
        return Update(selected, None, by_neuron[selected])
    if order == "svd-then-mask":
        return Update(selected, *certified_factors(by_neuron, rank, selected))
    masked = by_neuron[selected]
    if rank >= min(masked.shape):
        return Update(selected, None, masked)
    return Update(selected, *certified_factors(masked, rank, torch.arange(len(masked), device=masked.device)))


def _difference(target: Tensor, source: Tensor) -> tuple[Tensor, bool]:
    """Return source - target in the working dtype, and whether it is finite; the only whole copy that is made."""
    dtype = working_dtype(target, source)
    delta = torch.empty(target.shape, dtype=dtype, device=target.device)
    finite = True
    step = max(1, _PANEL // max(1, target.shape[1]))
    for start in range(0, len(target), step):
        panel = slice(start, start + step)
        torch.sub(source[panel].to(dtype), target[panel].to(dtype), out=delta[panel])
        finite = finite and bool(torch.isfinite(delta[panel]).all())
    return delta, finite


def fuse(
    target: Float[Tensor, "rows columns"],
    source: Float[Tensor, "rows columns"],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    *,
    name: str = "weight",
) -> Float[Tensor, "rows columns"]:
    """Return W_tgt + beta * M_S(Delta_r) (Eq. 11) as a new tensor in the target's dtype.

    Neurons outside the mask are bit-identical to the target's.

    Raises:
        SnrfError: as ``masked_update``, or the rank exceeds the smaller side, or the result overflows the dtype.

    >>> import torch
    >>> target, source = torch.zeros(3, 2), torch.ones(3, 2)
    >>> fuse(target, source, torch.tensor([True, False, False]), 0, Fusion(beta=0.5, rank=1))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000],
            [0.0000, 0.0000]])
    """
    return fuse_and_report(target, source, neurons, axis, fusion, name=name)[0]


def fuse_and_report(
    target: Float[Tensor, "rows columns"],
    source: Float[Tensor, "rows columns"],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    *,
    name: str = "weight",
) -> tuple[Float[Tensor, "rows columns"], Certificate | None, Rounding]:
    """Return the result of ``fuse``, the certificate of the truncation, and what rounding leaves of the update.

    Raises:
        SnrfError: as ``fuse``.
    """
    if target.ndim == 2:
        fusion.check_rank(name, tuple(target.shape))
    update = masked_update(target, source, neurons, axis, fusion.rank, fusion.order, name=name)
    result = target.clone()
    by_neuron = result if axis == 0 else result.mT
    before = by_neuron[update.selected]
    step = update.rows() * fusion.beta
    exact = before.to(step.dtype) + step
    fused = exact.to(target.dtype)
    if not torch.isfinite(fused).all():
        raise SnrfError(
            f"{name}: the fused weights overflow {target.dtype}; merge in a wider dtype or with a lower beta"
        )
    by_neuron[update.selected] = fused
    rounding = Rounding(
        update=frobenius_norm(step) if step.numel() else 0.0,
        lost=frobenius_norm(fused.to(step.dtype) - exact) if step.numel() else 0.0,
        weights=step.numel(),
        changed=int((fused != before).sum()),
    )
    return result, update.certificate, rounding
