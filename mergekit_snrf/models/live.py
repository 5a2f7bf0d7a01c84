"""The text decoder of a loaded model: where it is, its weights, and how logits are made of its stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_OF_HALF = 0.05
_MODULES = (*(projection.module for projection in PROJECTIONS.values()), "self_attn.o_proj")


@dataclass(frozen=True)
class LiveDecoder:
    """The text decoder of a loaded model, and its weights (``models.weights.Weights``).

    ``model`` is the model's name, for messages; ``path`` the module list's inside it, ``model.language_model.layers``.
    """

    model: str
    path: str
    layers: tuple[nn.Module, ...] = field(repr=False)
    shape: DecoderShape

    def unsupported(self, what: str, *place: object) -> SnrfError:
        """Return the error of a model whose ``place``, a layer and a module of it, is of an unknown kind."""
        where = ".".join(map(str, (f"{self.model}: {self.path}", *place))) if place else self.model
        return SnrfError(where, what, "the model is not supported")

    def module(self, site: Site) -> Any:
        """Return the ``nn.Linear`` of a projection; raise ``SnrfError`` if there is no such layer."""
        if site.layer >= self.shape.layers:
            what = f"has no layer {site.layer}, {self.path} has {self.shape.layers}"
            raise SnrfError(self.model, what, "use a mask of this model")
        return self.layers[site.layer].get_submodule(site.module)

    def name(self, site: Site) -> str:
        """Return the name of a projection's weight."""
        return f"{self.path}.{site.layer}.{site.module}.weight"

    def weight(self, site: Site) -> Float[Tensor, "rows columns"]:
        """Return a projection's weight."""
        return weight_of(self.module(site))

    def bias(self, site: Site) -> Float[Tensor, " rows"] | None:
        """Return a projection's bias; None if it has none."""
        module = self.module(site)
        return None if module.bias is None else weight_of(module, "bias")


def find_live_decoder(model: nn.Module, shape: DecoderShape | None = None, *, name: str | None = None) -> LiveDecoder:
    """Find the list of text decoder layers in a loaded model; a vision tower is never taken for it.

    ``SnrfError``: there is none, there are several, or it is not of ``shape``, which the checkpoint's headers gave.
    """
    if not isinstance(model, nn.Module):
        raise unexpected("model", model, "a loaded model", "load it with from_pretrained")
    name = name or str(getattr(getattr(model, "config", None), "name_or_path", "")) or type(model).__name__
    stacks = [
        (path, tuple(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_decoder_layer, module))
    ]
    if len(stacks) > 1:
        text = _text_config(model)
        size = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
        size = (shape.layers, shape.hidden_size) if shape else size
        stacks = [(path, layers) for path, layers in stacks if (len(layers), _width(layers[0])) == size] or stacks
    if len(stacks) > 1:
        # The stack with embeddings and a final norm is the decoder; a resampler's has neither.
        stacks = [(path, layers) for path, layers in stacks if _is_main(model, path)] or stacks
    if len(stacks) != 1:
        found = ", ".join(f"{path} ({len(layers)} layers of width {_width(layers[0])})" for path, layers in stacks)
        what = f"several text decoders found ({found})" if stacks else "no text decoder found"
        remedy = f"use a model with one list of layers with {', '.join(_MODULES)}"
        raise SnrfError(name, f"{what} in the loaded model", remedy)
    path, layers = stacks[0]
    live = LiveDecoder(name, path, layers, _live_shape(name, path, layers))
    if shape is not None and live.shape != shape:
        what = f"the loaded decoder {path} is {live.shape}, but the checkpoint's is {shape}"
        raise SnrfError(name, what, "load the model as it is on disk")
    return live


def weight_of(module: Any, name: str = "weight") -> Tensor:
    """Return a module's weight or bias, also when accelerate keeps it elsewhere until the module runs."""
    parameter: Tensor = getattr(module, name)
    if parameter.device.type == "meta":
        from accelerate.utils import align_module_device

        with align_module_device(module):
            parameter = getattr(module, name).detach().clone()
    if not parameter.is_floating_point():
        raise SnrfError(None, f"a {name} is stored as {parameter.dtype}", "load the model without quantisation")
    return parameter.detach()


def _is_decoder_layer(layer: nn.Module) -> bool:
    try:
        return all(hasattr(layer.get_submodule(name), "weight") for name in _MODULES)
    except AttributeError:
        return False


def _is_main(model: nn.Module, path: str) -> bool:
    above = model.get_submodule(path.rpartition(".")[0])
    return hasattr(above, "embed_tokens") and hasattr(above, "norm")


def _width(layer: nn.Module) -> int:
    return _features(layer, "attn.q")[0]


def _features(layer: nn.Module, projection: str) -> tuple[int, int]:
    """Return the width that a projection reads and the one that it writes."""
    linear: Any = layer.get_submodule(PROJECTIONS[projection].module)
    return int(linear.in_features), int(linear.out_features)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _live_shape(name: str, path: str, layers: tuple[nn.Module, ...]) -> DecoderShape:
    attention: Any = layers[0].get_submodule("self_attn")
    head_dim = getattr(attention, "head_dim", None) or getattr(getattr(attention, "config", None), "head_dim", None)
    if not isinstance(head_dim, int):
        raise SnrfError(name, f"{path}.0.self_attn has no head_dim", "the model is not supported")
    shapes = {
        DecoderShape(
            layers=len(layers),
            hidden_size=_width(layer),
            heads=_features(layer, "attn.q")[1] // head_dim,
            kv_heads=_features(layer, "attn.k")[1] // head_dim,
            head_dim=head_dim,
            intermediate_size=_features(layer, "fwd.up")[1],
        )
        for layer in layers
    }
    if len(shapes) > 1:
        raise SnrfError(name, f"the layers of {path} have different shapes ({shapes})", "the model is not supported")
    return shapes.pop()


@dataclass(frozen=True)
class LiveHead:
    """The last modules of a model.

    Attributes:
        model: the model's name, for messages.
        softcap: c of ``c * tanh(logits / c)``, or None.
    """

    model: str
    norm: nn.Module = field(repr=False)
    head: nn.Module = field(repr=False)
    softcap: float | None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have a logit."""
        return int(self.head.out_features)  # type: ignore[arg-type]

    @property
    def weights(self) -> int:
        """Number of weights of the head."""
        return self.vocabulary * int(self.head.in_features)  # type: ignore[arg-type]

    def logits(self, stream: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Return the logits of the stream after a layer, float64 for a float64 model, else float32."""
        logits: Tensor = self.head(self.norm(stream))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def check(self, stream: Float[Tensor, "tokens hidden"], logits: Float[Tensor, "tokens vocabulary"]) -> None:
        """Raise ``SnrfError`` if the model's own logits are not those of its last stream."""
        expected = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not bool(expected.isfinite().all()):
            raise SnrfError(self.model, "its logits are NaN or infinite", "load the model in float32", field="dtype")
        error = (self.logits(stream).to(expected) - expected).norm() / expected.norm()
        if not float(error) <= _TOLERANCE.get(logits.dtype, _TOLERANCE_OF_HALF):
            what = f"its logits do not follow from its final norm and head (relative error {float(error):.2g})"
            raise SnrfError(self.model, what, "the model is not supported")


def find_live_head(model: nn.Module, decoder: LiveDecoder) -> LiveHead:
    """Return what the model puts behind its text decoder. ``SnrfError``: there is no final norm or no head."""
    above = decoder.path.rpartition(".")[0]
    norm = getattr(model.get_submodule(above), "norm", None)
    head: Any = None
    while head is None:
        holder: Any = model.get_submodule(above)
        head = holder.get_output_embeddings() if hasattr(holder, "get_output_embeddings") else None
        if not above:
            break
        above = above.rpartition(".")[0]
    if norm is None or not isinstance(getattr(head, "out_features", None), int):
        what = "has no final norm and linear head behind its text decoder"
        raise SnrfError(decoder.model, what, "use a model that generates text")
    return LiveHead(decoder.model, norm, head, getattr(_text_config(model), "final_logit_softcapping", None))
