"""The text decoder of a checkpoint, found by the names on disk, and whether two decoders pair neuron by neuron."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.shards import FLOAT_DTYPES, TensorHeader
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

_UNMERGED = re.compile(r".*\.(lora_[AB]|base_layer)\..*")
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")

# Text decoders whose neurons correspond although their model_type is spelled differently.
_SAME_FAMILY = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_omni": "qwen2",
    "qwen3_vl": "qwen3",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
# Flat configurations that do not name the decoder; its biases and norms show the family.
_UNNAMED = {"llava", "minicpmv", "minicpmo"}


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a checkpoint.

    ``prefix`` is what precedes the layer number in tensor names, ``language_model.model.layers.``; ``family`` the text
    model type, ``qwen2`` for ``qwen2_5_vl_text``.
    """

    prefix: str
    family: str
    shape: DecoderShape

    def weight_name(self, site: Site) -> str:
        """Return the name on disk of a projection's weight."""
        return f"{self.prefix}{site.layer}.{site.module}.weight"


def find_decoder(checkpoint: Checkpoint) -> Decoder:
    """Return the one complete text stack of a checkpoint, found by its tensor names and its text configuration.

    ``SnrfError``: there is none or several, it is not supported, or it contradicts the configuration.
    """
    name, tensors, text = checkpoint.name, checkpoint.tensors, checkpoint.text_config
    try:
        shape = DecoderShape.of(text)
    except ValueError:
        what = f"does not describe a text decoder with {', '.join(_SIZES)}"
        remedy = "use a decoder-only text model, or a vision-language model with one"
        raise SnrfError(f"{name}/config.json", what, remedy) from None
    expert = next(filter(_MOE.fullmatch, tensors), None)
    if expert is not None:
        raise SnrfError(name, f"is a mixture of experts ({expert})", "use a model with dense layers")
    fitting = [
        prefix
        for prefix, stack in complete_stacks(tensors).items()
        if len(stack) == shape.layers and _query(tensors, prefix).shape[-1:] == (shape.hidden_size,)
    ]
    matching = main_stacks(tensors, fitting)
    if len(matching) > 1:
        what = f"several text decoders match the configuration ({', '.join(sorted(matching))})"
        raise SnrfError(name, what, "use a checkpoint with one")
    if not matching:
        raise _no_decoder(checkpoint, shape)
    decoder = Decoder(matching[0], _family(checkpoint, text, matching[0]), shape)
    _check_weights(checkpoint, decoder)
    return decoder


def complete_stacks(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return the layers by prefix where all have five projections; vision towers have no ``mlp.up_proj``."""
    return {
        prefix: stack
        for prefix, stack in _stacks(names).items()
        if sorted(stack) == list(range(len(stack))) and all(len(m) == len(PROJECTIONS) for m in stack.values())
    }


def main_stacks(names: Collection[str], prefixes: Sequence[str]) -> list[str]:
    """Return those of several stacks that embeddings and a final norm belong to, unlike a resampler's; else all."""
    own = ("embed_tokens.weight", "norm.weight")
    main = [prefix for prefix in prefixes if all(prefix.removesuffix("layers.") + name in names for name in own)]
    return main or list(prefixes)


def _stacks(tensors: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for tensor in tensors:
        match = _WEIGHT.fullmatch(tensor)
        if match is not None:
            stacks[match["prefix"]][int(match["layer"])].add(match["module"])
    return stacks


def _query(tensors: Mapping[str, TensorHeader], prefix: str) -> TensorHeader:
    return tensors[f"{prefix}0.self_attn.q_proj.weight"]


def _described(checkpoint: Checkpoint) -> str:
    """Return who says what the shape is: the file, or transformers' defaults for what it leaves out."""
    left_out = [key for key in _SIZES if key not in checkpoint.written_text_config]
    if not left_out:
        return "config.json says"
    return f"config.json leaves out {', '.join(left_out)}, of which transformers' default is"


def _no_decoder(checkpoint: Checkpoint, shape: DecoderShape) -> SnrfError:
    """Return why no stack is the decoder; the first reason that holds."""
    name, tensors = checkpoint.name, checkpoint.tensors
    complete = complete_stacks(tensors)
    for pattern, what, remedy in (
        (_UNMERGED, "has an adapter that is not merged", "merge it into its base (PEFT: merge_and_unload)"),
        (_QUANTISED, "is quantised", "merge the unquantised checkpoint and quantise the result"),
    ):
        example = next(filter(pattern.fullmatch, tensors), None)
        if example is not None:
            return SnrfError(name, f"{what} ({example})", remedy)
    if complete:
        # The deepest stack is the decoder; a resampler has a few layers only.
        prefix, stack = max(complete.items(), key=lambda item: len(item[1]))
        what = (
            f"{_described(checkpoint)} {shape.layers} layers of width {shape.hidden_size}, but the tensors {prefix}* "
            f"are {len(stack)} layers, {prefix}0.self_attn.q_proj.weight of shape {list(_query(tensors, prefix).shape)}"
        )
        return SnrfError(name, what, "config and weights are of different models")
    # An incomplete stack matters only if it is the decoder: vision towers have q, k and v too, but no up_proj.
    partial = {p: s for p, s in _stacks(tensors).items() if any("mlp.up_proj" in modules for modules in s.values())}
    for tensor in filter(_FUSED.fullmatch, tensors):
        if not partial or tensor.startswith(tuple(partial)):
            remedy = "convert the checkpoint to separate q, k, v, up and down weights"
            return SnrfError(name, f"has fused projections ({tensor})", remedy)
    for prefix, stack in partial.items():
        for layer in range(max(len(stack), shape.layers)):
            missing = sorted(set(_SITE_OF_MODULE) - stack.get(layer, set()))
            if missing:
                what = f"tensor {prefix}{layer}.{missing[0]}.weight is missing, but all {shape.layers} layers need five"
                return SnrfError(name, what, "complete the download; hybrid decoders are not supported")
    what = "no text decoder found, no ...layers.N.self_attn.q_proj.weight with ...layers.N.mlp.up_proj.weight beside it"
    return SnrfError(name, what, f"model_type {checkpoint.model_type!r} is not supported")


def _family(checkpoint: Checkpoint, text: Mapping[str, object], prefix: str) -> str:
    model_type = str(text.get("model_type", "")).removesuffix("_text")
    if model_type in _UNNAMED:
        if f"{prefix}0.self_attn.q_norm.weight" in checkpoint.tensors:
            return "qwen3"
        return "qwen2" if f"{prefix}0.self_attn.q_proj.bias" in checkpoint.tensors else "llama"
    return _SAME_FAMILY.get(model_type, model_type)


def _check_weights(checkpoint: Checkpoint, decoder: Decoder) -> None:
    for site in decoder.shape.sites():
        tensor = decoder.weight_name(site)
        header = checkpoint.tensors[tensor]
        expected = (decoder.shape.neurons(site.projection), decoder.shape.hidden_size)[:: -1 if site.axis else 1]
        if header.dtype not in FLOAT_DTYPES:
            what = f"{tensor} is stored as {header.dtype}, not as {', '.join(FLOAT_DTYPES)}"
            raise SnrfError(checkpoint.name, what, "use the unquantised checkpoint")
        if header.shape != expected:
            what = f"{tensor} has shape {list(header.shape)}, but {_described(checkpoint)} {list(expected)}"
            remedy = "config and weights are of different models, or the projection is of an unsupported kind"
            raise SnrfError(checkpoint.name, what, remedy)


_COMPARED = (
    ("layers", "layers", "fwd.up"),
    ("hidden_size", "hidden size", "fwd.up"),
    ("heads", "attention heads", "attn.q"),
    ("kv_heads", "key and value heads", "attn.k"),
    ("head_dim", "head dimension", "attn.k"),
    ("intermediate_size", "intermediate size", "fwd.up"),
)


def pairing_problems(target: Checkpoint, source: Checkpoint, *, any_family: bool = False) -> list[SnrfError]:
    """Return why the neurons of two checkpoints do not pair by index, an empty list if they do.

    ``any_family`` accepts decoders of different families with equal shapes.
    """
    mine, theirs = find_decoder(target), find_decoder(source)

    def example(checkpoint: Checkpoint, decoder: Decoder, projection: str) -> str:
        name = decoder.weight_name(Site(0, projection))
        return f"{name} {list(checkpoint.tensors[name].shape)}"

    problems = [
        SnrfError(
            None,
            f"{what}: the target {target.name} has {getattr(mine.shape, attribute)}, the source {source.name} has "
            f"{getattr(theirs.shape, attribute)} ({example(target, mine, projection)}, "
            f"{example(source, theirs, projection)})",
            "use a source with the same decoder shape",
        )
        for attribute, what, projection in _COMPARED
        if getattr(mine.shape, attribute) != getattr(theirs.shape, attribute)
    ]
    if mine.family != theirs.family and not any_family:
        what = (
            f"the target's text decoder is {mine.family!r} ({target.name}/config.json), the source's "
            f"{theirs.family!r} ({source.name}/config.json), and neurons of different families do not correspond"
        )
        remedy = "use a source of the same family, or set it to true to pair them by index"
        problems.append(SnrfError(None, what, remedy, field="any_family"))
    return problems
