"""Edits of whole models: a loaded one in place, and back again bit for bit, or a state dict.

A loaded model is edited neuron by neuron, and only what is overwritten is kept: no second model is ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.files.shown import Shown
from mergekit_snrf.fusion.fuse import Fusion, fuse_neurons, put_neurons
from mergekit_snrf.fusion.threads import Memory, look_ahead
from mergekit_snrf.models.activations import Activation, find_activations
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.live import LiveDecoder, find_live_decoder
from mergekit_snrf.models.moments import Filters, Moments, check_moments, filter_at, moments_of
from mergekit_snrf.models.weights import Weights, bias_name, state_weights, weights_of
from mergekit_snrf.neurons.maskfile import AnyNeurons, mask_of
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import check_fit, every_neuron
from mergekit_snrf.neurons.sites import PROJECTIONS, TOWERS, Site

Source = nn.Module | Mapping[str, Tensor] | Checkpoint | Weights
"""Where weights come from: a loaded model, a state dict, or a checkpoint, of which one tensor at a time is read."""


class Edit(Shown):
    """Neurons of a loaded model that were changed in place; undone by ``undo`` or at the end of a ``with`` block.

    Several edits of one model are undone in reverse order.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[nn.Parameter, int, Tensor, Tensor]] = []
        self._silenced: list[RemovableHandle] = []

    def write(
        self,
        parameter: nn.Parameter,
        axis: int,
        selected: Int[Tensor, " selected"],
        values: Float[Tensor, "selected ..."] | float,
    ) -> None:
        """Overwrite rows (axis 0) or columns (axis 1) of a weight, or elements of a bias, and keep what was there."""
        view = _by_neuron(parameter, axis)
        selected = selected.to(view.device)
        _history(parameter).append(self)
        self._saved.append((parameter, axis, selected, view[selected]))
        view[selected] = values

    def silence(self, activation: nn.Module, selected: Int[Tensor, " selected"]) -> None:
        """Let an activation return 0 for some neurons, the last axis of its output."""

        def zeroed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.index_fill(-1, selected.to(output.device), 0.0)

        self._silenced.append(activation.register_forward_hook(zeroed))

    def undo(self) -> None:
        """Put back every value as it was; a second call changes nothing.

        ``SnrfError``: the model was cast or moved since, or a later edit of the same weights was not undone before.
        """
        while self._silenced:
            self._silenced.pop().remove()
        while self._saved:
            parameter, axis, selected, before = self._saved[-1]
            view = _by_neuron(parameter, axis)
            if view.dtype != before.dtype or view.device != before.device:
                what = f"an edited weight of {before.dtype} on {before.device} is now {view.dtype} on {view.device}"
                raise SnrfError(None, what, "undo an edit before the model is cast or moved")
            history = _history(parameter)
            if history and history[-1] is not self:
                raise SnrfError(None, "a later edit of the same weights is not undone", "undo that one first")
            history.pop()
            view[selected] = before
            self._saved.pop()

    def __repr__(self) -> str:
        """Return the size of the edit."""
        rows = sum(len(selected) for _, _, selected, _ in self._saved)
        silenced = f", {len(self._silenced)} activations" if self._silenced else ""
        return f"<Edit of {len(self._saved)} tensors, {rows} rows and columns{silenced}>"

    def __enter__(self) -> Edit:
        """Return the edit; it is undone at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo the edit."""
        self.undo()


def deactivate(model: nn.Module, neurons: AnyNeurons) -> Edit:
    """Zero the weights and biases of neurons in place (Table 3): rows, or columns for fwd.down.

    Neurons of the vision tower and the projector return 0 instead, at all positions.

    Raises:
        SnrfError: the neurons are not the model's, or its weights are not in memory; nothing was changed.
    """
    whole, where = _of(neurons, towers=True)
    decoder, chosen = _prepared(model, whole.of(*PROJECTIONS), where)
    towers = _towers(model, decoder, whole.of(*TOWERS).nonempty(), where)
    with ExitStack() as undoing:
        edit = undoing.enter_context(Edit())
        for activation, member in towers:
            edit.silence(activation.act, member.nonzero().flatten())
        for site, member in chosen.items():
            module, selected = decoder.module(site), member.nonzero().flatten()
            edit.write(module.weight, site.axis, selected, 0.0)
            if site.axis == 0 and module.bias is not None:
                edit.write(module.bias, 0, selected, 0.0)
        undoing.pop_all()
    return edit


def fuse_model(
    model: nn.Module,
    source: Source,
    neurons: AnyNeurons | None = None,
    fusion: Fusion | Callable[[Site], Fusion] | None = None,
    *,
    source_base: Source | None = None,
    biases: bool = False,
    moments: str | os.PathLike[str] | Moments | None = None,
) -> Edit:
    """Add the masked update to a loaded target in place (Eq. 11).

    In the checkpoint's dtype the weights become those that ``mergekit-yaml`` writes.

    Args:
        model: the target.
        source: of the same decoder shape.
        neurons: S, or the path of a mask; None: all neurons of the five projections.
        fusion: one for all tensors, or by site; None is ``Fusion()``.
        source_base: Delta is taken from it instead of from the target.
        biases: the neurons' biases move, too.
        moments: a moments file of the target, for ``Fusion(update="regmean")``.

    Raises:
        SnrfError: target, source, neurons and moments do not fit together, or a weight is not finite; the model is as
            before.
    """
    whole, where = (None, None) if neurons is None else _of(neurons)
    decoder, chosen = _prepared(model, whole, where)
    filters = None
    if moments is not None:
        found = moments_of(moments)
        check_moments(found, decoder.shape, decoder.model)
        filters = Filters(found)
    changes = _fused(decoder, source, chosen, fusion, source_base, biases, filters)
    with ExitStack() as undoing, closing(changes):
        edit = undoing.enter_context(Edit())
        for site, fused, fused_bias in changes:
            module, selected = decoder.module(site), chosen[site].nonzero().flatten()
            edit.write(module.weight, site.axis, selected, fused)
            if fused_bias is not None:
                edit.write(module.bias, 0, selected, fused_bias)
        undoing.pop_all()
    return edit


def fuse_state_dict(
    target: Mapping[str, Tensor],
    source: Source,
    neurons: AnyNeurons,
    fusion: Fusion | Callable[[Site], Fusion] | None = None,
    *,
    source_base: Source | None = None,
    biases: bool = False,
) -> dict[str, Tensor]:
    """Return the target's state dict with the masked update added (Eq. 11); tensors that do not change are shared.

    Args as ``fuse_model``. Names of target and source may differ, as on disk.

    Raises:
        SnrfError: target, source and neurons do not fit together, or a weight is not finite.
    """
    if not isinstance(target, Mapping):
        raise unexpected("target", target, "a state dict", "call fuse_model for a loaded model")
    weights = state_weights(target)
    result = dict(target)
    chosen = _of(neurons)[0].nonempty()
    with closing(_fused(weights, source, chosen, fusion, source_base, biases)) as changes:
        for site, fused, fused_bias in changes:
            name = weights.name(site)
            result[name] = put_neurons(result[name].clone(), fused, chosen[site], site.axis)
            if fused_bias is not None:
                bias = result[bias_name(name)].clone()
                result[bias_name(name)] = put_neurons(bias, fused_bias, chosen[site], 0)
    return result


def _fused(
    target: Weights,
    source: Source,
    chosen: Mapping[Site, Tensor],
    fusion: Fusion | Callable[[Site], Fusion] | None,
    source_base: Source | None,
    biases: bool,
    filters: Filters | None = None,
) -> Generator[tuple[Site, Tensor, Tensor | None]]:
    """Yield the fused neurons of each site, and of its bias; None where that stays. Fused ahead on the CPU."""
    if fusion is not None and not callable(fusion) and not isinstance(fusion, Fusion):
        raise unexpected("fusion", fusion, "a Fusion, or a function from a Site to one")
    donors = {"source": weights_of(source)}
    if source_base is not None:
        donors["source_base"] = weights_of(source_base)

    def fuse(site: Site) -> tuple[Tensor, Tensor | None]:
        how = Fusion() if fusion is None else fusion if isinstance(fusion, Fusion) else fusion(site)
        weight, name, member = target.weight(site), target.name(site), chosen[site]
        theirs = {role: donor.weight(site).to(weight.device) for role, donor in donors.items()}
        old, new = theirs.get("source_base"), theirs["source"]
        options: Any = {"source_base": old, "site": site, "moments": filter_at(site, how, filters)}
        fused = fuse_neurons(weight, new, member, site.axis, how, name=name, **options).tensor
        bias = target.bias(site) if biases and site.axis == 0 else None
        if bias is None:
            return fused, None
        name = bias_name(name)
        theirs = {role: _bias(donor, site, bias, name, role) for role, donor in donors.items()}
        old, new = theirs.get("source_base"), theirs["source"]
        return fused, fuse_neurons(bias, new, member, 0, how, name=name, source_base=old).tensor

    def memory(site: Site) -> Memory:
        size = target.weight(site).nbytes
        return Memory((len(donors) + 4) * size + (0 if filters is None else filters.bytes(site)), size)

    workers = None if all(target.weight(site).device.type == "cpu" for site in chosen) else 0
    with look_ahead(chosen, fuse, memory, workers=workers) as ahead:
        for site, (fused, fused_bias) in ahead:
            yield site, fused, fused_bias


def _bias(weights: Weights, site: Site, like: Tensor, name: str, role: str) -> Tensor:
    bias = weights.bias(site)
    if bias is None:
        raise SnrfError(name, f"the {role} has no such bias to move it by", "leave out the biases", field="biases")
    return bias.to(like.device)


def _of(neurons: AnyNeurons, *, towers: bool = False) -> tuple[NeuronSet, str | None]:
    """Return neurons, and the file that they are from."""
    mask = mask_of(neurons, towers=towers)
    return mask.neurons, None if isinstance(neurons, NeuronSet) else mask.path


def _towers(
    model: nn.Module, decoder: LiveDecoder, chosen: Mapping[Site, Tensor], where: str | None
) -> list[tuple[Activation, Tensor]]:
    """Return the activations outside of the text decoder with their neurons to deactivate."""
    found = {one.site: one for one in find_activations(model, decoder)} if chosen else {}
    for site, member in chosen.items():
        has = found[site].neurons if site in found else 0
        if has != len(member):
            what = f"tensor {site} of shape [{len(member)}] does not fit {decoder.model}, which has {has} neurons there"
            raise SnrfError(where, what, "use a mask made for this model")
    return [(found[site], member) for site, member in chosen.items()]


def _prepared(model: nn.Module, neurons: NeuronSet | None, where: str | None) -> tuple[LiveDecoder, dict[Site, Tensor]]:
    decoder = find_live_decoder(model)
    chosen = (every_neuron(decoder.shape) if neurons is None else neurons).nonempty()
    check_fit(NeuronSet(chosen), decoder.shape, where=where, model=decoder.model)
    for site in chosen:
        parameter = decoder.module(site).weight
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            what = "not in memory" if parameter.device.type == "meta" else f"stored as {parameter.dtype}"
            raise SnrfError(decoder.model, f"{decoder.name(site)} is {what}", "load it whole and unquantised")
    return decoder, chosen


def _history(parameter: nn.Parameter) -> list[Edit]:
    """Return the edits of a parameter that were not undone, the latest last."""
    history: list[Edit] = parameter.__dict__.setdefault("_snrf_edits", [])
    return history


def _by_neuron(parameter: nn.Parameter, axis: int) -> Tensor:
    return parameter.data if axis == 0 else parameter.data.mT
