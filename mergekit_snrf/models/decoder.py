"""Where a checkpoint (names on disk) keeps its text decoder, and whether two decoders pair neuron by neuron."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import FLOAT_DTYPES, Checkpoint, TensorHeader
from mergekit_snrf.neurons.shape import DecoderShape
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

_SITE_OF_MODULE = {projection.module: name for name, projection in PROJECTIONS.items()}
_WEIGHT = re.compile(
    r"(?P<prefix>(?:.*\.)?layers\.)(?P<layer>0|[1-9][0-9]{0,4})\.(?P<module>"
    + "|".join(re.escape(module) for module in _SITE_OF_MODULE)
    + r")\.weight"
)
_MOE = re.compile(r".*\.layers\.\d+\..*(experts|block_sparse_moe)\..*")
_FUSED = re.compile(r".*\.\d+\..*(qkv_proj|query_key_value|c_attn|wqkv|Wqkv|gate_up_proj|attn\.qkv|dense_h_to_4h)\..*")
_QUANTISED = re.compile(r".*\.self_attn\.q_proj\.(qweight|qzeros|weight_packed|weight_scale.*|SCB|weight\.absmax)")

# Text decoders whose neurons correspond although their model_type is spelled differently.
_SAME_FAMILY = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_omni": "qwen2",
    "qwen3_vl": "qwen3",
    "gemma3": "gemma3",
    "gemma3n": "gemma3n",
}
# Flat configurations of remote code that do not name the decoder inside; its biases and norms do.
_FLAT_REMOTE = {"minicpmv", "minicpmo"}


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a checkpoint.

    Attributes:
        prefix: what precedes the layer number in tensor names, ``language_model.model.layers.``.
        family: the text model type, ``qwen2`` for ``qwen2_5_vl_text``.
    """

    prefix: str
    family: str
    shape: DecoderShape

    def weight_name(self, site: Site) -> str:
        """Return the name on disk of a projection's weight."""
        return f"{self.prefix}{site.layer}.{site.module}.weight"


def site_of(weight_name: str) -> Site:
    """Return the layer and projection of a decoder weight's name.

    Raises:
        SnrfError: the name is not that of one of the five projections.
    """
    match = _WEIGHT.fullmatch(weight_name)
    if match is None:
        raise SnrfError(
            f"{weight_name!r} is not a weight of a text decoder's {', '.join(PROJECTIONS)}; "
            f"expected e.g. model.layers.0.self_attn.k_proj.weight"
        )
    return Site(int(match["layer"]), _SITE_OF_MODULE[match["module"]])


def find_decoder(checkpoint: Checkpoint) -> Decoder:
    """Find the one complete text stack of a checkpoint, from its tensor names and its text configuration.

    Raises:
        SnrfError: there is none, there are several, it is fused, quantised or a mixture of experts, or it
            contradicts the configuration.
    """
    name, tensors = checkpoint.name, checkpoint.tensors
    text = checkpoint.text_config
    try:
        layers, hidden_size = int(text["num_hidden_layers"]), int(text["hidden_size"])
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or hidden_size // heads)
        intermediate_size = int(text["intermediate_size"])
        if min(layers, hidden_size, heads, kv_heads, head_dim, intermediate_size) < 1 or heads % kv_heads:
            raise ValueError
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise SnrfError(
            f"{name}/config.json: does not describe a text decoder with num_hidden_layers, hidden_size, "
            f"num_attention_heads and intermediate_size; SNRF needs a decoder-only text model or a VLM with one"
        ) from None
    if any(_MOE.fullmatch(tensor) for tensor in tensors):
        example = next(tensor for tensor in tensors if _MOE.fullmatch(tensor))
        raise SnrfError(
            f"{name}: is a mixture of experts ({example}); SNRF needs dense decoder layers, experts are not supported"
        )
    stacks = _stacks(tensors)
    complete = complete_stacks(tensors)
    matching = [
        prefix
        for prefix, stack in complete.items()
        if len(stack) == layers and tensors[f"{prefix}0.self_attn.q_proj.weight"].shape[-1:] == (hidden_size,)
    ]
    if len(matching) > 1:
        raise SnrfError(
            f"{name}: several text decoders match the configuration ({', '.join(sorted(matching))}); "
            f"give a checkpoint with one"
        )
    if not matching:
        raise SnrfError(_why_no_decoder(checkpoint, stacks, complete, layers, hidden_size))
    shape = DecoderShape(layers, hidden_size, heads, kv_heads, head_dim, intermediate_size)
    decoder = Decoder(matching[0], _family(checkpoint, text, matching[0]), shape)
    _check_weights(checkpoint, decoder)
    return decoder


def complete_stacks(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return the layers that have all five projections, by prefix; vision towers have no ``mlp.up_proj``."""
    return {prefix: stack for prefix, stack in _stacks(names).items() if _is_complete(stack)}


def _stacks(tensors: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for tensor in tensors:
        match = _WEIGHT.fullmatch(tensor)
        if match is not None:
            stacks[match["prefix"]][int(match["layer"])].add(match["module"])
    return stacks


def _is_complete(stack: Mapping[int, set[str]]) -> bool:
    return sorted(stack) == list(range(len(stack))) and all(len(m) == len(PROJECTIONS) for m in stack.values())


def _why_no_decoder(
    checkpoint: Checkpoint,
    stacks: Mapping[str, Mapping[int, set[str]]],
    complete: Mapping[str, Mapping[int, set[str]]],
    layers: int,
    hidden_size: int,
) -> str:
    name, tensors = checkpoint.name, checkpoint.tensors
    for tensor in tensors:
        if _QUANTISED.fullmatch(tensor):
            return f"{name}: is quantised ({tensor}); merge the unquantised checkpoint and quantise the result"
    if complete:
        # The deepest stack is the decoder, a resampler has a few layers only.
        prefix, stack = max(complete.items(), key=lambda item: len(item[1]))
        first = f"{prefix}0.self_attn.q_proj.weight"
        return (
            f"{name}: config.json says {layers} layers of width {hidden_size}, but the tensors {prefix}* are "
            f"{len(stack)} layers, {first} of shape {list(tensors[first].shape)}; config and weights are of "
            f"different models"
        )
    # An incomplete stack is worth naming only if it is the decoder: vision towers have q, k and v too, but no up_proj.
    partial = {p: s for p, s in stacks.items() if any("mlp.up_proj" in modules for modules in s.values())}
    for tensor in tensors:
        if _FUSED.fullmatch(tensor) and (not partial or tensor.startswith(tuple(partial))):
            return (
                f"{name}: has fused projections ({tensor}); SNRF needs separate q, k, v, up and down weights, "
                f"convert the checkpoint to that layout"
            )
    for prefix, stack in partial.items():
        for layer in range(max(len(stack), layers)):
            missing = sorted(set(_SITE_OF_MODULE) - stack.get(layer, set()))
            if missing:
                return (
                    f"{name}: tensor {prefix}{layer}.{missing[0]}.weight is missing; SNRF needs all five projections "
                    f"in every one of the {layers} layers (complete the download; hybrid decoders are not supported)"
                )
    return (
        f"{name}: no text decoder found, no tensor is called ...layers.N.self_attn.q_proj.weight with "
        f"...layers.N.mlp.up_proj.weight beside it; model_type {checkpoint.model_type!r} is not supported"
    )


def _family(checkpoint: Checkpoint, text: Mapping[str, object], prefix: str) -> str:
    model_type = str(text.get("model_type", "")).removesuffix("_text")
    if model_type in _FLAT_REMOTE:
        if f"{prefix}0.self_attn.q_norm.weight" in checkpoint.tensors:
            return "qwen3"
        return "qwen2" if f"{prefix}0.self_attn.q_proj.bias" in checkpoint.tensors else "llama"
    return _SAME_FAMILY.get(model_type, model_type)


def _check_weights(checkpoint: Checkpoint, decoder: Decoder) -> None:
    for site in decoder.shape.sites():
        tensor = decoder.weight_name(site)
        header = checkpoint.tensors[tensor]
        neurons = decoder.shape.neurons(site.projection)
        expected = (neurons, decoder.shape.hidden_size)
        if site.axis == 1:
            expected = (expected[1], expected[0])
        if header.dtype not in FLOAT_DTYPES:
            raise SnrfError(
                f"{checkpoint.name}: {tensor} is stored as {header.dtype}; SNRF needs "
                f"{', '.join(FLOAT_DTYPES)} weights, use the unquantised checkpoint"
            )
        if header.shape != expected:
            raise SnrfError(
                f"{checkpoint.name}: {tensor} has shape {list(header.shape)}, but config.json says {list(expected)}; "
                f"config and weights are of different models, or the projection is of an unsupported kind"
            )


def pairing_problems(target: Checkpoint, source: Checkpoint, *, any_family: bool = False) -> list[str]:
    """Return why the neurons of two checkpoints do not pair by index, an empty list if they do.

    Args:
        any_family: accept decoders of different families with equal shapes.

    Raises:
        SnrfError: one of them has no usable text decoder.
    """
    mine, theirs = find_decoder(target), find_decoder(source)
    problems = []
    for attribute, what in (
        ("layers", "layers"),
        ("hidden_size", "hidden size"),
        ("heads", "attention heads"),
        ("kv_heads", "key and value heads"),
        ("head_dim", "head dimension"),
        ("intermediate_size", "intermediate size"),
    ):
        a, b = getattr(mine.shape, attribute), getattr(theirs.shape, attribute)
        if a != b:
            projection = {"heads": "attn.q", "kv_heads": "attn.k", "head_dim": "attn.k"}.get(attribute, "fwd.up")
            problems.append(
                f"{what}: the target {target.name} has {a}, the source {source.name} has {b} "
                f"({_example(target, mine, projection)}, {_example(source, theirs, projection)}); "
                f"use a source with the same decoder shape"
            )
    if mine.family != theirs.family and not any_family:
        problems.append(
            f"model type: the target's text decoder is {mine.family!r} ({target.name}/config.json), the source's "
            f"{theirs.family!r} ({source.name}/config.json); neurons of different families have no reason to "
            f"correspond, use a source of the same family, or set allow_family_mismatch: true to pair them by index"
        )
    return problems


def _example(checkpoint: Checkpoint, decoder: Decoder, projection: str) -> str:
    name = decoder.weight_name(Site(0, projection))
    header: TensorHeader = checkpoint.tensors[name]
    return f"{name} {list(header.shape)}"
