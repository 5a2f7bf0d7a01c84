"""The activations of a loaded model's MLPs: in the text decoder, the vision tower, and the projector between them.

An MLP is a module with linear layers and one activation as direct children: ``down(act(gate(x)) * up(x))`` or
``fc2(act(fc1(x)))``. Outside of the text decoder, those in the layers of a list are the vision tower's, others the
projector's: LLaVA's ``multi_modal_projector``, Qwen-VL's ``merger``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mergekit_snrf.models.live import LiveDecoder
from mergekit_snrf.neurons.sites import TOWERS, Site

DECODER, VISION, PROJECTOR = MODULES = ("decoder", "vision", "projector")
"""Where activations are."""

_STEMS = {DECODER: "text.layers", VISION: "vision.layers", PROJECTOR: "projector"}
_CLASSES = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class Activation:
    """The activation of one MLP.

    Attributes:
        module: of ``MODULES``.
        layer: its number among those of the module, in the model's order.
        path: the name of ``act`` inside the model.
        neurons: size of the last axis of what ``act`` returns.
    """

    module: str
    layer: int
    path: str
    act: nn.Module = field(repr=False)
    neurons: int

    @property
    def site(self) -> Site:
        """The place of its neurons in masks: of the text decoder, the rows of up_proj."""
        return Site(self.layer, dict(zip(MODULES, ("fwd.up", *TOWERS), strict=True))[self.module])

    @property
    def key(self) -> str:
        """The beginning of its keys in files: ``text.layers.14``, ``vision.layers.3``, ``projector.0``."""
        return activation_key(self.module, self.layer)


def activation_key(module: str, layer: int) -> str:
    """Return the beginning of the keys of an activation in files."""
    return f"{_STEMS[module]}.{layer}"


def find_activations(model: nn.Module, decoder: LiveDecoder) -> list[Activation]:
    """Return the activations of all MLPs of a loaded model.

    ``SnrfError``: the activation of an MLP of the text decoder is not a module, or one is not elementwise.
    """
    found = []
    for number, layer in enumerate(decoder.layers):
        path = f"{decoder.path}.{number}.mlp"
        act = _activation(layer.get_submodule("mlp"))
        if act is None:
            raise decoder.unsupported(f"the activation of {path} is not a module")
        mlp = layer.get_submodule("mlp")
        found.append(Activation(DECODER, number, f"{path}.{act}", mlp.get_submodule(act), _width(mlp)))
    counts = dict.fromkeys((VISION, PROJECTOR), 0)
    for path, mlp in model.named_modules():
        if path.startswith(f"{decoder.path}."):
            continue
        act = _activation(mlp)
        if act is not None:
            module = VISION if _in_layer(model, path) else PROJECTOR
            found.append(Activation(module, counts[module], f"{path}.{act}", mlp.get_submodule(act), _width(mlp)))
            counts[module] += 1
    for one in found:
        if not _elementwise(one):
            what = f"the activation {one.path}, {type(one.act).__name__}, is not elementwise"
            raise decoder.unsupported(f"{what}, so no neuron has an activation of its own")
    if len({id(one.act) for one in found}) < len(found):
        raise decoder.unsupported("several layers share one activation module")
    return found


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (child for child in module.children() if isinstance(child, nn.Linear))


def _activation(module: nn.Module) -> str | None:
    """Return the name of the activation of an MLP; None: the module is not an MLP."""
    names = [
        name
        for name, child in module.named_children()
        if not isinstance(child, nn.Linear)
        and (name.startswith("act") or type(child).__module__ in _CLASSES)
        and not isinstance(child, nn.MultiheadAttention)
    ]
    return names[0] if len(names) == 1 and len(list(_linears(module))) > 1 else None


def _width(mlp: nn.Module) -> int:
    return next(_linears(mlp)).out_features


def _in_layer(model: nn.Module, path: str) -> bool:
    """Tell whether an MLP is a part of an entry of a list of layers; Qwen3-VL's mergers are such entries themselves."""
    parts = path.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) - 1))
    return any(isinstance(model.get_submodule(prefix), nn.ModuleList) for prefix in above)


def _elementwise(activation: Activation) -> bool:
    """Try whether a change of one neuron changes that neuron alone."""
    like = next(activation.act.parameters(), torch.empty(0))
    if like.device.type == "meta":
        return True
    trial = torch.linspace(-2, 2, activation.neurons, dtype=like.dtype, device=like.device).expand(1, 2, -1).clone()
    with torch.no_grad():
        first: Tensor = activation.act(trial)
        trial[..., 0] = 3.0
        second: Tensor = activation.act(trial)
    return first.shape == trial.shape and torch.equal(first[..., 1:], second[..., 1:])
