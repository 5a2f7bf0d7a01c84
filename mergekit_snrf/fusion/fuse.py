"""Shared Neuron Low-Rank Fusion of one tensor (Eq. 9-11) and its variants. Knows no mergekit and no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.lowrank import Certificate, frobenius_norm
from mergekit_snrf.fusion.updates import Update, dropped, low_rank, matched, working_dtype
from mergekit_snrf.neurons.sets import Site

Order = Literal["svd-then-mask", "mask-then-svd"]
ORDERS: tuple[str, ...] = get_args(Order)
UpdateKind = Literal["low-rank", "dare"]
UPDATES: tuple[str, ...] = get_args(UpdateKind)
Norm = Literal["none", "match"]
NORMS: tuple[str, ...] = get_args(Norm)
# Elements that are converted at a time.
_PANEL = 2**20


@dataclass(frozen=True)
class Fusion:
    """How strongly, at which rank and in which variant a tensor is fused.

    Attributes:
        beta: strength of the update, in [0, 1] (Eq. 11).
        rank: rank r of the update; 0 means full rank. With ``energy`` the largest rank that is taken, 0: no limit.
        order: ``svd-then-mask`` is Eq. 10 then Eq. 11; ``mask-then-svd`` truncates the masked difference, the
            order that the bound of Appendix B is proved for.
        update: ``low-rank``, or ``dare``: M_S(Delta) with elements dropped at random; rank and order have no part
            in it.
        drop_rate: share of the elements that DARE drops, in [0, 1).
        seed: of DARE's draw, in [0, 2**32).
        rescale: whether DARE multiplies what is kept by 1 / (1 - drop_rate).
        norm: ``match`` rescales the update to ||M_S(Delta)||_F.
        energy: the rank is the smallest that captures this share of ||Delta||_F^2 (``mask-then-svd``: of
            ||M_S(Delta)||_F^2), in [0, 1); 0 means that ``rank`` is the rank.

    Raises:
        SnrfError: a value is out of range, or values exclude each other.
    """

    beta: float = 0.5
    rank: int = 4
    order: str = "svd-then-mask"
    update: str = "low-rank"
    drop_rate: float = 0.5
    seed: int = 0
    rescale: bool = True
    norm: str = "none"
    energy: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise SnrfError(f"beta must be in [0, 1] (Eq. 11), got {self.beta}")
        if self.rank < 0:
            raise SnrfError(f"rank must be 0 (full rank) or positive, got {self.rank}")
        for name, value, known in (
            ("order", self.order, ORDERS),
            ("update", self.update, UPDATES),
            ("norm", self.norm, NORMS),
        ):
            if value not in known:
                raise SnrfError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0.0 <= self.drop_rate < 1.0:
            raise SnrfError(f"drop_rate must be in [0, 1), got {self.drop_rate}")
        if not 0 <= self.seed < 2**32:
            raise SnrfError(f"seed must be in [0, 2**32), got {self.seed}")
        if not 0.0 <= self.energy < 1.0:
            raise SnrfError(f"energy must be in [0, 1), 1 being rank: 0, got {self.energy}")
        if self.update == "dare" and self.energy:
            raise SnrfError(
                "energy chooses the rank of a low-rank update, which update: dare is not; remove one of them"
            )

    def check_rank(self, name: str, shape: tuple[int, ...]) -> None:
        """Check the rank against a weight's shape.

        With ``energy`` the rank is a limit only, and DARE has none: then any fits.

        Raises:
            SnrfError: the rank exceeds the smaller side.
        """
        if self.update == "low-rank" and not self.energy and self.rank > min(shape):
            raise SnrfError(
                f"{name}: rank {self.rank} exceeds the smaller side of shape {list(shape)}; use at most "
                f"{min(shape)}, or rank: 0 for the full-rank update"
            )


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
    fusion: Fusion,
    *,
    name: str = "weight",
    source_base: Float[Tensor, "rows columns"] | None = None,
    site: Site | None = None,
) -> Update:
    """Return M_S(Delta_r) of Eq. 9-11, or the variant of it that ``fusion`` says, without the factor beta.

    Args:
        target: W_tgt, any floating dtype; the maths is done in float32 (float64 where a tensor is float64).
        source: W_src, same shape.
        neurons: S, one entry for every row (axis 0) or column (axis 1).
        axis: the axis of the weight that counts neurons.
        name: the tensor's name, for messages.
        source_base: Delta = W_src - W_source_base in place of W_src - W_tgt.
        site: the tensor's layer and projection; DARE draws by them.

    Raises:
        SnrfError: the shapes differ, the mask's length does not fit, the rank exceeds the smaller side, or a weight
            is NaN or infinite.
        ValueError: DARE without ``site``.
    """
    _check_shapes(name, target, source, source_base, dimensions=2)
    if len(neurons) != target.shape[axis]:
        raise SnrfError(
            f"{name}: the mask has {len(neurons)} neurons, but axis {axis} of shape {list(target.shape)} has "
            f"{target.shape[axis]}; use a mask of this model"
        )
    fusion.check_rank(name, tuple(target.shape))
    delta = _delta(name, target, source, source_base)
    by_neuron = delta if axis == 0 else delta.mT
    selected = neurons.to(delta.device).nonzero().flatten()
    if fusion.update == "low-rank":
        update = low_rank(
            by_neuron, selected, fusion.rank, mask_first=fusion.order == "mask-then-svd", energy=fusion.energy
        )
    elif site is None:
        raise ValueError(f"{name}: update 'dare' draws by layer and projection; pass site")
    else:
        update = dropped(by_neuron, selected, fusion.drop_rate, fusion.seed, site, rescale=fusion.rescale)
    return matched(update, by_neuron) if fusion.norm == "match" else update


def _check_shapes(name: str, target: Tensor, source: Tensor, source_base: Tensor | None, *, dimensions: int) -> None:
    if target.shape != source.shape or target.ndim != dimensions:
        raise SnrfError(
            f"{name}: target has shape {list(target.shape)} and source {list(source.shape)}; SNRF needs two "
            f"{'matrices' if dimensions == 2 else 'vectors'} of one shape"
        )
    if source_base is not None and source_base.shape != source.shape:
        raise SnrfError(
            f"{name}: source has shape {list(source.shape)} and source_base {list(source_base.shape)}; give the model "
            f"that the source was trained from"
        )


def _delta(name: str, target: Tensor, source: Tensor, source_base: Tensor | None) -> Tensor:
    """Return W_src - W_tgt, or W_src - W_source_base, in the working dtype; the only whole copy that is made."""
    base = target if source_base is None else source_base
    dtype = working_dtype(target, source, base)
    delta = torch.empty(target.shape, dtype=dtype, device=target.device)
    finite = True
    step = max(1, _PANEL // max(1, target[:1].numel()))
    for start in range(0, len(target), step):
        panel = slice(start, start + step)
        torch.sub(source[panel].to(dtype), base[panel].to(dtype), out=delta[panel])
        finite = finite and _is_finite(delta[panel]) and (source_base is None or _is_finite(target[panel]))
    if finite:
        return delta
    for which, tensor in (("target", target), ("source", source), ("source_base", source_base)):
        if tensor is not None and not _is_finite(tensor):
            raise SnrfError(
                f"{name}: the {which}'s tensor of shape {list(target.shape)} holds NaN or infinite weights; the "
                f"checkpoint is damaged, get it again or leave these neurons out of the mask"
            )
    other = "target" if source_base is None else "source_base"
    raise SnrfError(f"{name}: the difference of source and {other} overflows {dtype}; check both")


def _is_finite(tensor: Tensor) -> bool:
    # Both ends are NaN where one element is.
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def fuse(
    target: Float[Tensor, "rows columns"],
    source: Float[Tensor, "rows columns"],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    *,
    name: str = "weight",
    source_base: Float[Tensor, "rows columns"] | None = None,
    site: Site | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return W_tgt + beta * M_S(Delta_r) (Eq. 11) as a new tensor in the target's dtype; args as ``masked_update``.

    Neurons outside the mask are bit-identical to the target's.

    Raises:
        SnrfError: as ``masked_update``, or the result overflows the dtype.
        ValueError: as ``masked_update``.

    >>> import torch
    >>> target, source = torch.zeros(3, 2), torch.ones(3, 2)
    >>> fuse(target, source, torch.tensor([True, False, False]), 0, Fusion(beta=0.5, rank=1))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000],
            [0.0000, 0.0000]])
    """
    return fuse_and_report(target, source, neurons, axis, fusion, name=name, source_base=source_base, site=site)[0]


def fuse_and_report(
    target: Float[Tensor, "rows columns"],
    source: Float[Tensor, "rows columns"],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    *,
    name: str = "weight",
    source_base: Float[Tensor, "rows columns"] | None = None,
    site: Site | None = None,
) -> tuple[Float[Tensor, "rows columns"], Certificate | None, Rounding]:
    """Return the result of ``fuse``, the certificate of the truncation, and what rounding leaves of the update.

    The certificate is None where nothing was truncated. Raises as ``fuse``.
    """
    update = masked_update(target, source, neurons, axis, fusion, name=name, source_base=source_base, site=site)
    result = target.clone()
    rounding = _add(result if axis == 0 else result.mT, update.selected, update.rows() * fusion.beta, name)
    return result, update.certificate, rounding


def fuse_bias(
    target: Float[Tensor, " neurons"],
    source: Float[Tensor, " neurons"],
    neurons: Bool[Tensor, " neurons"],
    fusion: Fusion,
    *,
    name: str = "bias",
    source_base: Float[Tensor, " neurons"] | None = None,
) -> Float[Tensor, " neurons"]:
    """Return b_tgt + beta * M_S(b_src - b_tgt), the bias of the masked row neurons, as a new tensor.

    A vector has no rank: the whole difference is taken, whatever the variant. Args and dtypes as ``masked_update``.

    Raises:
        SnrfError: as ``fuse``.

    >>> import torch
    >>> fuse_bias(torch.zeros(2), torch.ones(2), torch.tensor([True, False]), Fusion(beta=0.5))
    tensor([0.5000, 0.0000])
    """
    return fuse_bias_and_report(target, source, neurons, fusion, name=name, source_base=source_base)[0]


def fuse_bias_and_report(
    target: Float[Tensor, " neurons"],
    source: Float[Tensor, " neurons"],
    neurons: Bool[Tensor, " neurons"],
    fusion: Fusion,
    *,
    name: str = "bias",
    source_base: Float[Tensor, " neurons"] | None = None,
) -> tuple[Float[Tensor, " neurons"], Rounding]:
    """Return the result of ``fuse_bias``, and what rounding leaves of the update. Raises as it does."""
    _check_shapes(name, target, source, source_base, dimensions=1)
    if len(neurons) != len(target):
        raise SnrfError(
            f"{name}: the mask has {len(neurons)} neurons, but the bias has {len(target)}; use a mask of this model"
        )
    delta = _delta(name, target, source, source_base)
    selected = neurons.to(delta.device).nonzero().flatten()
    result = target.clone()
    rounding = _add(result.unsqueeze(1), selected, delta[selected].unsqueeze(1) * fusion.beta, name)
    return result, rounding


def _add(by_neuron: Tensor, selected: Tensor, step: Tensor, name: str) -> Rounding:
    """Add ``step`` to the selected rows, in place, rounding once."""
    before = by_neuron[selected]
    exact = before.to(step.dtype) + step
    fused = exact.to(by_neuron.dtype)
    if not _is_finite(fused):
        raise SnrfError(
            f"{name}: the fused weights overflow {by_neuron.dtype}; merge in a wider dtype or with a lower beta"
        )
    by_neuron[selected] = fused
    return Rounding(
        update=frobenius_norm(step) if step.numel() else 0.0,
        lost=frobenius_norm(fused.to(step.dtype) - exact) if step.numel() else 0.0,
        weights=step.numel(),
        changed=int((fused != before).sum()),
    )
