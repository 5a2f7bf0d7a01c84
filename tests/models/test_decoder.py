from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import Decoder, find_decoder, pairing_problems
from mergekit_snrf.models.shards import TensorHeader
from mergekit_snrf.neurons.shape import DecoderShape
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

TEXT = {
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
SHAPE = DecoderShape(layers=3, hidden_size=16, heads=4, kv_heads=2, head_dim=4, intermediate_size=24)
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")

Headers = dict[str, TensorHeader]


def headers(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Headers:
    return {name: TensorHeader(dtype, shape, "model.safetensors") for name, shape in shapes.items()}


def stack(prefix: str = "model.layers.", shape: DecoderShape = SHAPE, dtype: str = "BF16") -> Headers:
    """Return the headers of a whole text decoder, o_proj, gate_proj and norms included."""
    attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width, inner = shape.hidden_size, shape.intermediate_size
    layer = {
        "self_attn.q_proj.weight": (attention, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, attention),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
    }
    return headers({f"{prefix}{n}.{name}": s for n in range(shape.layers) for name, s in layer.items()}, dtype)


def vision_tower(prefix: str = "vision_tower.encoder.layers.", layers: int = 3, width: int = 16) -> Headers:
    """Return the headers of a SigLIP-like tower: q, k and v of its own, but fc1 and fc2 for an FFN."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    return headers({f"{prefix}{n}.{name}.weight": (width, width) for n in range(layers) for name in names})


def checkpoint(tensors: Headers, config: Mapping[str, Any] = TEXT, name: str = "model") -> Checkpoint:
    return Checkpoint(name, None, tensors, config, json.dumps(config).encode())


def error_of(tensors: Headers, config: Mapping[str, Any] = TEXT) -> str:
    with pytest.raises(SnrfError) as caught:
        find_decoder(checkpoint(tensors, config))
    assert str(caught.value.where) in ("model", "model/config.json")
    return str(caught.value)


VISUAL = headers({f"visual.blocks.{n}.attn.qkv.weight": (48, 16) for n in range(3)})


@pytest.mark.parametrize(
    "prefix",
    [
        "layers.",
        "model.layers.",
        "language_model.model.layers.",
        "model.language_model.layers.",
        "model.text_model.layers.",
        "llm.model.layers.",
    ],
)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_decoders_of_every_layout(prefix, dtype):
    others = headers({"lm_head.weight": (9, 16), "mm.layers.0.weight": (1,)})
    tensors = {**vision_tower(), **VISUAL, **others, **stack(prefix, dtype=dtype)}
    decoder = find_decoder(checkpoint(tensors))
    assert decoder == Decoder(prefix, "qwen2", SHAPE)
    for site in SHAPE.sites():
        name = decoder.weight_name(site)
        header = tensors[name]
        assert header.shape[site.axis] == SHAPE.neurons(site.projection)


def test_sites_are_every_layer_and_projection():
    assert SHAPE.sites() == [Site(layer, name) for layer in range(3) for name in PROJECTIONS]
    assert [SHAPE.neurons(name) for name in ("attn.q", "attn.k", "attn.v", "fwd.up", "fwd.down")] == [16, 8, 8, 24, 24]
    assert SHAPE.repeats == 2


def test_a_vision_tower_of_the_decoders_depth_and_width_is_ignored():
    siglip = vision_tower("vision_tower.vision_model.encoder.layers.", SHAPE.layers, SHAPE.hidden_size)
    assert find_decoder(checkpoint({**siglip, **stack("llm.model.layers.")})).prefix == "llm.model.layers."
    assert "no text decoder found" in error_of(siglip)


@pytest.mark.parametrize("first", [True, False])
def test_the_config_tells_a_resampler_from_the_decoder(first):
    for resampler in (replace(SHAPE, layers=2), replace(SHAPE, hidden_size=32)):
        perceiver = stack("model.connector.perceiver_resampler.layers.", resampler)
        both = {**perceiver, **stack()} if first else {**stack(), **perceiver}
        assert find_decoder(checkpoint(both)).prefix == "model.layers."


def test_of_two_equal_stacks_the_one_with_embeddings_and_norm_is_the_decoder():
    both = {**stack("model.resampler.layers."), **stack("model.text_model.layers.")}
    assert "several text decoders" in error_of(both)
    both |= headers({"model.text_model.embed_tokens.weight": (9, 16), "model.resampler.norm.weight": (16,)})
    assert "several text decoders" in error_of(both)
    both |= headers({"model.text_model.norm.weight": (16,)})
    assert find_decoder(checkpoint(both)).prefix == "model.text_model.layers."


FUSED = {
    "phi3": ("model.layers.", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "internlm2": ("language_model.model.layers.", "attention.wqkv", "attention.wo", "feed_forward.w1"),
    "falcon": ("transformer.h.", "self_attention.query_key_value"),
    "gpt2": ("transformer.h.", "attn.c_attn"),
    "glm4": ("model.layers.", "mlp.gate_up_proj", *MODULES[:3], "mlp.down_proj"),
    "fused qkv": ("model.layers.", "self_attn.qkv_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@pytest.mark.parametrize(("prefix", "modules"), [(one[0], one[1:]) for one in FUSED.values()], ids=FUSED)
def test_fused_decoders_are_refused(prefix, modules):
    fused = headers({f"{prefix}{n}.{name}.weight": (4, 4) for n in range(3) for name in modules})
    assert f"fused projections ({prefix}0.{modules[0]}.weight)" in error_of({**vision_tower(), **fused})


ATTENTION = {name: header for name, header in stack().items() if ".mlp." not in name}
UNQUANTISED = {name: header for name, header in stack().items() if not name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    ("tensors", "kind", "example"),
    [
        (stack(), "experts", "model.layers.1.mlp.experts.0.up_proj.weight"),
        (ATTENTION, "experts", "model.layers.1.mlp.experts.gate_up_proj"),
        (ATTENTION, "experts", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        (stack(), "experts", "language_model.model.layers.1.block_sparse_moe.gate.weight"),
        (UNQUANTISED, "quantised", "model.layers.0.self_attn.q_proj.qweight"),
        (UNQUANTISED, "quantised", "model.layers.0.self_attn.q_proj.weight_packed"),
        (UNQUANTISED, "quantised", "model.layers.0.self_attn.q_proj.weight_scale"),
        (stack(shape=replace(SHAPE, hidden_size=1)), "quantised", "model.layers.0.self_attn.q_proj.weight.absmax"),
        ({}, "not merged", "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"),
        ({}, "not merged", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_other_kinds_of_decoders_are_refused(tensors, kind, example):
    assert f"{kind} ({example})" in error_of({**tensors, **headers({example: (4, 4)})})


@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E4M3", "F8_E5M2", "I32", "BOOL", "C64", "torch.float8_e4m3fn"])
def test_weights_of_unusable_dtypes_are_refused_by_name(dtype):
    for module in MODULES:
        name = f"model.layers.1.{module}.weight"
        tensors = stack()
        message = error_of({**tensors, name: replace(tensors[name], dtype=dtype)})
        assert f"{name} is stored as {dtype}, not as F16, BF16, F32, F64" in message


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_missing_tensor_is_named(layer, module):
    name = f"model.layers.{layer}.{module}.weight"
    tensors = {**vision_tower(), **VISUAL, **stack()}
    del tensors[name]
    assert f"tensor {name} is missing" in error_of(tensors)


@pytest.mark.parametrize("spelling", [None, "00", "\u0660", "0x0", "-0", "100000"])
def test_a_missing_layer_is_named_and_layer_numbers_are_plain(spelling):
    tensors = {name.replace("layers.0.", f"layers.{spelling}."): header for name, header in stack().items()}
    if spelling is None:
        tensors = {name: header for name, header in tensors.items() if "layers.None." not in name}
    assert "tensor model.layers.0.mlp.down_proj.weight is missing" in error_of(tensors)


def test_a_missing_last_layer_contradicts_the_config():
    tensors = stack(shape=replace(SHAPE, layers=2))
    perceiver = stack("model.perceiver.layers.", replace(SHAPE, layers=1, hidden_size=8))
    message = error_of({**perceiver, **tensors})
    assert "config.json says 3 layers of width 16, but the tensors model.layers.* are 2 layers" in message


@pytest.mark.parametrize("shape", [(), (16,), (8,), (16, 8), (2, 16, 16)])
@pytest.mark.parametrize("module", MODULES)
def test_weights_of_another_shape_are_named(module, shape):
    name = f"model.layers.0.{module}.weight"
    tensors = stack()
    message = error_of({**tensors, name: replace(tensors[name], shape=shape)})
    assert f"{name} " in message
    assert str(list(shape)) in message


@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        ("num_attention_heads", 8, "self_attn.k_proj", [4, 16]),
        ("num_key_value_heads", 4, "self_attn.k_proj", [16, 16]),
        ("num_key_value_heads", None, "self_attn.k_proj", [16, 16]),
        ("head_dim", 8, "self_attn.q_proj", [32, 16]),
        ("intermediate_size", 25, "mlp.up_proj", [25, 16]),
    ],
)
def test_a_config_that_contradicts_the_shapes(key, value, name, expected):
    config = {**TEXT, "model_type": "unheard_of", key: value}
    assert f"model.layers.0.{name}.weight has shape " in error_of(stack(), config)
    assert f"but config.json says {expected}" in error_of(stack(), config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", value) for value in (None, "three", 0, -3, [3], float("inf"), float("nan"))),
        *(("hidden_size", value) for value in (None, {})),
        *(("num_attention_heads", value) for value in (0, None)),
        *(("num_key_value_heads", value) for value in (3, -1, 8)),
        ("head_dim", "wide"),
        ("intermediate_size", [24, 24, 24]),
        *((key, ...) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")),
    ],
    ids=str,
)
def test_configs_without_a_text_decoder(key, value):
    config = {**TEXT, "model_type": "unheard_of", key: value}
    if value is ...:
        del config[key], config["model_type"]
    assert error_of(stack(), config).startswith("model/config.json: does not describe a text decoder with ")


@pytest.mark.parametrize("layers", [9999, 10**6, 10**30])
def test_absurd_depths_are_refused_at_once(layers):
    config = {**TEXT, "model_type": "unheard_of", "num_hidden_layers": layers}
    assert f"config.json says {layers} layers" in error_of(stack(), config)


def test_defaults_of_transformers_are_not_what_config_json_says():
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    message = error_of(stack(), {"model_type": "llava", "text_config": {**text, "model_type": "llama"}})
    assert "config.json leaves out num_hidden_layers, of which transformers' default is 32 layers" in message


def test_checkpoints_without_a_decoder():
    assert "model: no text decoder found" in error_of({}, {**TEXT, "model_type": "unheard_of"})


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (TEXT, "qwen2"),
        ({**TEXT, "model_type": "qwen3", "head_dim": 4}, "qwen3"),
        ({**TEXT, "model_type": "llama"}, "llama"),
        ({**TEXT, "model_type": "qwen2_vl"}, "qwen2"),
        ({**TEXT, "model_type": "qwen2_5_vl"}, "qwen2"),
        ({"model_type": "qwen2_5_vl", "text_config": {**TEXT, "model_type": "qwen2_5_vl_text"}}, "qwen2"),
        ({"model_type": "qwen3_vl", "text_config": {**TEXT, "model_type": "qwen3_vl_text", "head_dim": 4}}, "qwen3"),
        ({"model_type": "llava", "text_config": {**TEXT, "model_type": "llama"}}, "llama"),
        ({"model_type": "idefics3", "text_config": {**TEXT, "model_type": "llama"}}, "llama"),
        ({"model_type": "internvl_chat", "llm_config": TEXT}, "qwen2"),
        ({"model_type": "gemma3", "text_config": {**TEXT, "model_type": "gemma3_text", "head_dim": 4}}, "gemma3"),
        ({**TEXT, "model_type": "unheard_of_text"}, "unheard_of"),
        ({**TEXT, "model_type": "minicpmv"}, "llama"),
        ({**TEXT, "model_type": "llava_llama", "mm_vision_tower": "clip"}, "llama"),
        ({**TEXT, "model_type": "llava_mistral"}, "mistral"),
        ({**TEXT, "model_type": "llava_qwen"}, "qwen2"),
        ({**TEXT, "model_type": "llava", "mm_vision_tower": "clip"}, "llama"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_families(config, family):
    assert find_decoder(checkpoint(stack(), config)) == Decoder("model.layers.", family, SHAPE)


def test_families_of_flat_remote_code_show_in_biases_and_norms():
    config = {**TEXT, "model_type": "minicpmv"}
    first = "llm.model.layers.0.self_attn."
    plain = stack("llm.model.layers.")
    assert find_decoder(checkpoint(plain, config)).family == "llama"
    biased = {**plain, **headers({f"{first}q_proj.bias": (16,)})}
    assert find_decoder(checkpoint(biased, config)).family == "qwen2"
    assert find_decoder(checkpoint({**plain, **headers({f"{first}q_norm.weight": (4,)})}, config)).family == "qwen3"


def model(name: str, model_type: str = "unheard_of", **changes: int) -> Checkpoint:
    shape = replace(SHAPE, **changes)
    config = {
        "model_type": model_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    return checkpoint(stack(f"{name}.layers.", shape), config, name)


def test_equal_decoders_pair_whatever_surrounds_them():
    target = model("target")
    vlm = replace(target, tensors={**vision_tower(), **target.tensors, **headers({"lm_head.weight": (99, 16)})})
    assert pairing_problems(vlm, model("source")) == []


def problems_of(target: Checkpoint, source: Checkpoint) -> list[str]:
    return [problem.field or str(problem).partition(":")[0] for problem in pairing_problems(target, source)]


@pytest.mark.parametrize(
    ("attribute", "value", "what", "example"),
    [
        ("layers", 4, "layers", "mlp.up_proj.weight [24, 16]"),
        ("hidden_size", 32, "hidden size", "up_proj.weight [24, 32]"),
        ("heads", 8, "attention heads", "q_proj.weight [32, 16]"),
        ("kv_heads", 4, "key and value heads", "k_proj.weight [16, 16]"),
        ("head_dim", 8, "head dimension", "k_proj.weight [16, 16]"),
        ("intermediate_size", 25, "intermediate size", "[25, 16]"),
    ],
)
def test_decoders_of_different_shapes_do_not_pair(attribute, value, what, example):
    (problem,) = map(str, pairing_problems(model("target"), model("source", **{attribute: value})))
    was = getattr(SHAPE, attribute)
    assert problem.startswith(f"{what}: the target target has {was}, the source source has {value} (target.layers.0.")
    assert example in problem


def test_head_layouts_of_equal_weights_do_not_pair():
    # 4 heads of 4 and 2 of them repeated, or 2 heads of 8 and one of them repeated: the same shapes of all weights.
    target, source = model("target"), model("source", heads=2, kv_heads=1, head_dim=8)
    shapes = [[header.shape for header in side.tensors.values()] for side in (target, source)]
    assert shapes[0] == shapes[1]
    assert problems_of(target, source) == ["attention heads", "key and value heads", "head dimension"]
    source = model("source", "llama", layers=2, intermediate_size=9)
    assert problems_of(model("target", "qwen2"), source) == ["layers", "intermediate size", "any_family"]


def test_families_pair_only_on_request():
    target, source = model("target", "qwen2"), model("source", "llama")
    (problem,) = map(str, pairing_problems(target, source))
    assert "'qwen2' (target/config.json), the source's 'llama' (source/config" in problem
    assert pairing_problems(target, source, any_family=True) == []
    assert pairing_problems(target, model("source", "llama", layers=2), any_family=True) != []


def test_a_source_without_a_decoder_is_named():
    source = replace(model("source"), tensors=vision_tower())
    with pytest.raises(SnrfError, match=r"^source: no text decoder found"):
        pairing_problems(model("target"), source)
