"""Shared Neuron Low-Rank Fusion of one tensor (Eq. 9-11) and its variants. Pure tensors: no mergekit, no files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.lowrank import Certificate, frobenius_norm
from mergekit_snrf.fusion.regmean import Filter
from mergekit_snrf.fusion.threads import check_not_stopped
from mergekit_snrf.fusion.updates import Matrix, Update, difference, dropped, is_finite, low_rank, panels
from mergekit_snrf.neurons.sites import Site

ORDERS = ("svd-then-mask", "mask-then-svd")
UPDATES = ("low-rank", "dare", "regmean")
# Rows to which a filter is applied at a time.
_ROWS = 512


@dataclass(frozen=True)
class Setting:
    """What a field of ``Fusion`` means and which values it takes; documentation and recipes are made from it.

    ``of_regmean`` is another default, of ``update: regmean``. Values lie in [least, most], or in [least, below).
    ``by_tensor``: tensors of one merge may differ in it.
    """

    default: Any
    meaning: str
    of_regmean: Any = None
    least: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    by_tensor: bool = False

    def accepts(self, value: Any) -> bool:
        """Return whether a value is in range; NaN is not."""
        if self.choices:
            return value in self.choices
        low = self.least is None or value >= self.least
        return low and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    @property
    def range(self) -> str:
        """The values in words, empty where every value of the type is one."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.least is None:
            return ""
        if self.below is not None:
            return f"in [{self.least:g}, {self.below:.10g})"
        return f"at least {self.least:g}" if self.most is None else f"in [{self.least:g}, {self.most:g}]"


def _setting(default: Any, meaning: str, **limits: Any) -> Any:
    known = Setting(default, meaning, **limits)
    return field(default=default if known.of_regmean is None else None, metadata={"setting": known})


@dataclass(frozen=True)
class Fusion:
    """How strongly, at which rank and in which variant a tensor is fused; a value out of range is an error."""

    beta: float = _setting(0.5, "strength of the update (Eq. 11)", of_regmean=1.0, least=0, most=1, by_tensor=True)
    rank: int = _setting(4, "rank of the update (Eq. 10); 0: full rank", of_regmean=0, least=0, by_tensor=True)
    order: str = _setting(
        ORDERS[0], "truncate before or after the neurons are chosen (Appendix B: after)", choices=ORDERS
    )
    update: str = _setting(
        UPDATES[0],
        "dare drops elements at random instead of truncating; regmean keeps what the moments say",
        choices=UPDATES,
    )
    drop_rate: float = _setting(0.5, "share of the elements that dare drops", least=0, below=1, by_tensor=True)
    seed: int = _setting(0, "of dare's draw", least=0, below=2**32)
    rescale: bool = _setting(True, "dare multiplies what it keeps by 1 / (1 - drop_rate)")
    keep: float = _setting(
        3.0, "how strongly regmean holds the target to its probes to keep", least=0, below=1e9, by_tensor=True
    )

    def __post_init__(self) -> None:
        for name, setting in settings().items():
            if getattr(self, name) is None:
                usual = setting.of_regmean if self.update == "regmean" else setting.default
                object.__setattr__(self, name, usual)
            value = getattr(self, name)
            if not setting.accepts(value):
                shown = repr(value) if isinstance(value, str) else value
                raise SnrfError(None, f"must be {setting.range}, got {shown}", field=name)

    def of_bias(self) -> Fusion:
        """Return how the bias beside a weight is fused: at the same strength and, having no rank, as a whole."""
        return Fusion(beta=self.beta, rank=0)

    def check_rank(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ``SnrfError`` if the rank exceeds the smaller side of a weight's shape; only DARE has none."""
        if self.update != "dare" and self.rank > min(shape):
            what = f"{self.rank} exceeds the smaller side of shape {list(shape)}"
            raise SnrfError(name, what, f"use at most {min(shape)}, or 0 for the full-rank update", field="rank")


def settings() -> dict[str, Setting]:
    """Return what every field of ``Fusion`` means and which values it takes."""
    return {entry.name: entry.metadata["setting"] for entry in fields(Fusion)}


@dataclass(frozen=True)
class Rounding:
    """What the target's dtype leaves of an update ||beta * M_S(Delta_r)||_F: what is lost, ||rounded - exact||_F.

    Of the ``weights`` in the masked neurons so many are ``changed``, differ from the target's.
    """

    update: float
    lost: float
    weights: int
    changed: int


class Fused(NamedTuple):
    """A fused tensor, the certificate of its truncation (None: not truncated), and what rounding left of the update."""

    tensor: Tensor
    certificate: Certificate | None
    rounding: Rounding


def masked_update(
    target: Float[Matrix, "rows columns"],
    source: Float[Matrix, "rows columns"],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    *,
    name: str = "weight",
    source_base: Float[Matrix, "rows columns"] | None = None,
    site: Site | None = None,
    moments: Filter | None = None,
    see: Callable[[slice, Tensor], None] = lambda rows, of_target: None,
) -> Update:
    """Return M_S(Delta_r) of Eq. 9-11, or the variant of it that ``fusion`` says, without the factor beta.

    Args:
        target: W_tgt, any floating dtype; the maths is done in float32 (float64 where a tensor is float64). Of this
            and the other weights each row is read once.
        source: W_src, same shape.
        neurons: S, one entry for every row (axis 0) or column (axis 1).
        axis: the axis of the weight that counts neurons.
        name: the tensor's name, for messages.
        source_base: Delta = W_src - W_source_base in place of W_src - W_tgt.
        site: the tensor's layer and projection; DARE draws by them.
        moments: F of the tensor's input, for ``update: regmean``.
        see: gets every panel of the target's rows.

    Raises:
        SnrfError: the shapes differ, the mask's length does not fit, the rank exceeds the smaller side, or a weight
            is NaN or infinite.
        ValueError: DARE without ``site``, or regmean without ``moments`` of its size.
    """
    _check(name, (target, source, source_base), neurons, axis, fusion)
    delta = difference(name, target, source, source_base, see)
    by_neuron = delta if axis == 0 else delta.mT
    selected = neurons.to(delta.device).nonzero().flatten()
    if fusion.update == "regmean":
        if moments is None:
            raise ValueError(f"{name}: update 'regmean' needs the moments of the tensor's input")
        return _filtered(delta, selected, axis, fusion, moments)
    if fusion.update == "low-rank":
        return low_rank(by_neuron, selected, fusion.rank, mask_first=fusion.order == "mask-then-svd")
    if site is None:
        raise ValueError(f"{name}: update 'dare' draws by layer and projection; pass site")
    return dropped(by_neuron, selected, fusion.drop_rate, fusion.seed, site, rescale=fusion.rescale)


def _filtered(delta: Tensor, selected: Tensor, axis: int, fusion: Fusion, moments: Filter) -> Update:
    """Return M_S(D F), or its truncation."""
    if fusion.rank:
        whole = moments.apply(delta) if axis == 0 else moments.apply(delta).mT
        return low_rank(whole, selected, fusion.rank, mask_first=fusion.order == "mask-then-svd")
    if axis == 1 and len(selected) < moments.size:
        return Update(selected, None, moments.apply(delta, selected).mT)
    rows = delta[selected] if axis == 0 and len(selected) < len(delta) else delta
    for part in rows.split(_ROWS):
        check_not_stopped()
        part.copy_(moments.apply(part))
    return Update(selected, None, rows if axis == 0 else rows.mT)


def _check(
    name: str, weights: tuple[Matrix, Matrix, Matrix | None], neurons: Tensor, axis: int, fusion: Fusion
) -> None:
    target, source, source_base = weights
    if target.shape != source.shape or len(target.shape) != 2:
        what = f"target has shape {list(target.shape)} and source {list(source.shape)}"
        raise SnrfError(name, what, "SNRF needs two tensors of one shape")
    if source_base is not None and source_base.shape != source.shape:
        what = f"source has shape {list(source.shape)} and source_base {list(source_base.shape)}"
        raise SnrfError(name, what, "use the model that the source was trained from")
    if len(neurons) != target.shape[axis]:
        of = f"axis {axis} of shape {list(target.shape)} has {target.shape[axis]}"
        raise SnrfError(name, f"the mask has {len(neurons)} neurons, but {of}", "use a mask of this model")
    fusion.check_rank(name, tuple(target.shape))


def fuse(
    target: Float[Tensor, "rows ..."],
    source: Float[Tensor, "rows ..."],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    **options: Any,
) -> Fused:
    """Return W_tgt + beta * M_S(Delta_r) (Eq. 11) as a new tensor in the target's dtype.

    Arguments, options and errors as ``masked_update``; it is also an error if the result overflows the dtype. A bias,
    whose axis is 0, is a matrix of one column and is fused as ``Fusion.of_bias`` says. Neurons outside the mask are
    bit-identical to the target's.

    >>> import torch
    >>> target, source = torch.zeros(3, 2), torch.ones(3, 2)
    >>> fuse(target, source, torch.tensor([True, False, False]), 0, Fusion(beta=0.5, rank=1)).tensor
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000],
            [0.0000, 0.0000]])
    """
    fused = fuse_neurons(target, source, neurons, axis, fusion, **options)
    return fused._replace(tensor=put_neurons(target.clone(), fused.tensor, neurons, axis))


def put_neurons(
    weight: Float[Tensor, "rows ..."],
    values: Float[Tensor, "selected ..."],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
) -> Float[Tensor, "rows ..."]:
    """Write the neurons of a set into a weight or bias, in place, and return it; all neurons are the weight itself."""
    if len(values) == len(neurons):
        return values if axis == 0 else values.mT
    (weight if axis == 0 else weight.mT)[neurons.to(weight.device)] = values
    return weight


def fuse_neurons(
    target: Float[Matrix, "rows ..."],
    source: Float[Matrix, "rows ..."],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
    fusion: Fusion,
    *,
    name: str = "weight",
    source_base: Float[Matrix, "rows ..."] | None = None,
    **options: Any,
) -> Fused:
    """Return what ``fuse`` does, but of the tensor the selected neurons alone: [selected, ...].

    No more than Delta and these neurons are in memory at once.
    """
    if len(target.shape) == 1:
        own, other = target[:].unsqueeze(1), source[:].unsqueeze(1)
        base = None if source_base is None else source_base[:].unsqueeze(1)
        fused = fuse_neurons(own, other, neurons, 0, fusion.of_bias(), name=name, source_base=base)
        return fused._replace(tensor=fused.tensor.squeeze(1))
    member = neurons.to(target.device)
    count = int(member.sum())
    size = (*target.shape[:1], count) if axis == 1 else (count, *target.shape[1:])
    # Neurons that are columns stay columns in memory: what reads and writes them goes along the rows.
    before = torch.empty(size, dtype=target.dtype, device=target.device)
    places = member.cumsum(0)

    def keep(panel: slice, rows: Tensor) -> None:
        if count == len(member):
            before[panel] = rows
        elif axis == 1:
            before[panel] = rows[:, member]
        elif len(chosen := rows[member[panel]]):
            end = int(places[panel][-1])
            before[end - len(chosen) : end] = chosen

    options |= {"name": name, "source_base": source_base, "see": keep}
    update = masked_update(target, source, neurons, axis, fusion, **options)
    rounding = _add(before, update, axis, fusion.beta, name)
    return Fused(before if axis == 0 else before.mT, update.certificate, rounding)


def _add(weights: Tensor, update: Update, axis: int, beta: float, name: str) -> Rounding:
    """Add beta times the update to the selected neurons in place, rounding once; a panel of rows at a time."""
    changed, norms, losses = 0, [0.0], [0.0]
    for panel in panels(weights.shape):
        before = weights[panel]
        step = update.rows(panel, axis) * beta
        exact = step + before
        fused = exact.to(before.dtype)
        if not is_finite(fused):
            what = f"the fused weights overflow {before.dtype}"
            raise SnrfError(name, what, "merge in a wider dtype or with a lower beta")
        changed += int((fused != before).sum())
        weights[panel] = fused
        if step.numel():
            norms.append(frobenius_norm(step))
            losses.append(frobenius_norm(exact.sub_(fused)))
    return Rounding(math.hypot(*norms), math.hypot(*losses), weights.numel(), changed)
