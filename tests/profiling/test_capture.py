from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import brute_force
import pytest
import torch
import transformers
from checkpoints import SOURCE_OF, SOURCES, example_inputs, load
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.neurons.sets import PROJECTIONS, Site
from mergekit_snrf.profiling.impact.layer import attention_output
from mergekit_snrf.profiling.measure.capture import CapturedLayer, mixed_sections, run_layers
from mergekit_snrf.profiling.measure.meter import Measure, Meter

MODELS = [("target", family) for family in SOURCE_OF] + [("source", family) for family in SOURCES]
EAGER = [("source", "gemma2"), ("source", "llama"), ("target", "gemma3"), ("target", "qwen2_5_vl")]


@dataclass(frozen=True)
class Batch:
    """Probes with the attributes of the profiler's own batches."""

    inputs: dict[str, Any]
    numbers: tuple[int, ...] = (0,)
    answer_mask: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor:
        return self.inputs["attention_mask"]


def left_padded(vocabulary: int = 200) -> Batch:
    """Two text probes of 9 and 14 tokens."""
    ids = torch.randint(5, vocabulary, (2, 14), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    answer = mask.bool() & (torch.arange(14) >= 11)
    return Batch({"input_ids": ids, "attention_mask": mask}, (4, 7), answer)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def captured(model: nn.Module, batch: Batch) -> list[CapturedLayer]:
    layers: list[CapturedLayer] = []
    decoder = find_live_decoder(model)
    run_layers(decoder, lambda: model(**batch.inputs, use_cache=False), batch.attention_mask, layers.append)
    return layers


@pytest.mark.parametrize(
    ("case", "attention"),
    [*((case, "default") for case in MODELS), *((case, "eager") for case in EAGER)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_captured_tensors_give_the_attention_output_of_every_family(case, attention, folder_of):
    folder = folder_of(*case)
    options = {} if attention == "default" else {"attn_implementation": attention}
    model = load(folder, dtype=torch.float32, **options)
    decoder = find_live_decoder(model, find_decoder(open_checkpoint(str(folder))).shape)
    assert "vision" not in decoder.path
    for batch in (Batch(example_inputs(folder)), left_padded()):
        for layer in captured(model, batch):
            real = batch.attention_mask != 0
            implied = attention_output(layer.attention, real.float())[real]
            assert torch.allclose(implied, layer.attended[real], rtol=1e-4, atol=2e-5), (layer.index, case)


def oracle(model: nn.Module, batch: Batch, index: int) -> brute_force.Layer:
    decoder = model.get_submodule(find_live_decoder(model).path.removesuffix(".layers"))
    return brute_force.capture(decoder, index, lambda: model(**batch.inputs, use_cache=False), batch.attention_mask)


def float64(folder: Path) -> nn.Module:
    model = load(folder, dtype=torch.float64)
    # Sharper attention than random weights give, so that the softmax does not hide an error.
    with torch.no_grad():
        for layer in find_live_decoder(model).layers:
            layer.self_attn.q_proj.weight.mul_(2)
    return model


EXACT = [
    ("source", "llama", "text"),
    ("source", "qwen3", "text"),
    ("source", "gemma2", "text"),
    ("source", "gemma3", "text"),
    ("target", "qwen2_5_vl", "image"),
    ("target", "gemma3", "image"),
    ("target", "qwen3_vl", "image"),
]


@pytest.mark.parametrize(("kind", "family", "probe"), EXACT, ids=lambda value: value)
def test_impacts_are_those_of_zeroed_modules(kind, family, probe, folder_of):
    folder = folder_of(kind, family)
    model = float64(folder)
    batch = left_padded() if probe == "text" else Batch(example_inputs(folder))
    with brute_force.KeepFloat64():
        impacts = Meter(model).impacts(batch)
    # The layers of the gemmas differ: a sliding window in one, full attention in the last.
    for index in {0, 2} if family.startswith("gemma") else {1}:
        layer = oracle(model, batch, index)
        for name, projection in PROJECTIONS.items():
            expected = brute_force.norms(layer.differences(projection.module.split(".")[1], "pre_o"), layer.counted)
            found = impacts[Site(index, "fwd.up" if name == "fwd.down" else name)]
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 * float(expected.max())), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_site_weight_and_tokens_are_those_of_zeroed_modules(family, folder_of):
    model = float64(folder_of("source", family))
    batch = left_padded()
    layer = oracle(model, batch, 1)
    streams: list[Tensor] = []
    handle = (
        find_live_decoder(model)
        .layers[1]
        .register_forward_hook(
            lambda module, args, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    with brute_force.KeepFloat64(), torch.no_grad():
        model(**batch.inputs, use_cache=False)
    handle.remove()
    by_stream = torch.where(batch.attention_mask != 0, 1 / streams[0].square().mean(-1), 0.0)
    cases = [
        (Measure(site="post_o"), "post_o", layer.counted),
        (Measure(weight="residual"), "pre_o", by_stream),
        (Measure(tokens="answer"), "pre_o", batch.answer_mask.double()),
        (Measure(site="post_o", weight="residual", tokens="answer"), "post_o", by_stream * batch.answer_mask),
    ]
    differences = {
        (name, site): layer.differences(projection.module.split(".")[1], site)
        for name, projection in PROJECTIONS.items()
        if name != "fwd.down"
        for site in ("pre_o", "post_o")
    }
    for measure, site, weights in cases:
        with brute_force.KeepFloat64():
            impacts = Meter(model, measure).impacts(batch)
        for name in ("attn.q", "attn.k", "attn.v", "fwd.up"):
            expected = brute_force.norms(differences[name, site], weights)
            found = impacts[Site(1, name)]
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 * float(expected.max())), (measure, name)


def test_released_scores_are_sums_over_what_the_modules_give(folder_of):
    model = load(folder_of("source", "llama"), dtype=torch.float64)
    batch = left_padded()
    with brute_force.KeepFloat64():
        impacts = Meter(model, Measure(scoring="released")).impacts(batch)
        layers = captured(model, batch)
    real = (batch.attention_mask != 0)[..., None]
    outputs: list[Tensor] = []
    decoder = find_live_decoder(model)
    handle = decoder.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
    with brute_force.KeepFloat64(), torch.no_grad():
        model(**batch.inputs, use_cache=False)
    handle.remove()
    assert torch.allclose(impacts[Site(2, "fwd.up")], (outputs[0].abs() * real).sum(1), rtol=1e-12)
    shape = decoder.shape
    sums = (layers[2].attended.abs() * real).sum(1).view(2, shape.kv_heads, shape.repeats, shape.head_dim).sum(2)
    assert torch.allclose(impacts[Site(2, "attn.v")], sums.flatten(1), rtol=1e-12)


def test_half_precision_models_give_float32_impacts(folder_of):
    folder = folder_of("source", "qwen3")
    half = Meter(load(folder, dtype=torch.bfloat16)).impacts(left_padded())
    full = Meter(load(folder, dtype=torch.float32)).impacts(left_padded())
    for site, impacts in half.items():
        assert impacts.dtype == torch.float32
        relative = (impacts - full[site]).norm() / full[site].norm()
        assert float(relative) < 0.05, site


def test_image_tokens_of_gemma3_see_each_other_in_both_directions(folder_of):
    """Without the real mask the impacts would be those of another model."""
    folder = folder_of("target", "gemma3")
    model = load(folder, dtype=torch.float32)
    layer = captured(model, Batch(example_inputs(folder)))[0]
    mask = layer.attention.mask
    assert mask is not None
    later = torch.ones_like(mask[0, 0]).triu(1)
    assert bool((mask[0, 0] & later).any())
    causal = replace(layer.attention, mask=None, window=model.config.text_config.sliding_window)
    assert not torch.allclose(attention_output(causal), layer.attended, rtol=1e-2, atol=1e-2)


def test_offloaded_weights_are_fetched(folder_of):
    accelerate = pytest.importorskip("accelerate")
    folder = folder_of("source", "qwen3")
    plain = Meter(load(folder, dtype=torch.float32), Measure(site="post_o")).impacts(left_padded())
    model = accelerate.cpu_offload(load(folder, dtype=torch.float32), execution_device="cpu")
    assert find_live_decoder(model).layers[0].mlp.down_proj.weight.device.type == "meta"
    offloaded = Meter(model, Measure(site="post_o")).impacts(left_padded())
    assert all(torch.equal(offloaded[site], impacts) for site, impacts in plain.items())


def test_layers_are_freed_one_by_one(folder_of):
    model = load(folder_of("source", "llama"), dtype=torch.float32)
    batch = left_padded()
    alive: list[Any] = []

    def visit(layer: CapturedLayer) -> None:
        assert [reference() for reference in alive] == [None] * len(alive)
        alive.extend(weakref.ref(tensor) for tensor in (layer.attention.query, layer.attended, layer.hidden))

    decoder = find_live_decoder(model)
    run_layers(decoder, lambda: model(**batch.inputs, use_cache=False), batch.attention_mask, visit)
    assert len(alive) == 9


def test_hooks_and_training_mode_are_as_before_whatever_happens(folder_of):
    model = load(folder_of("source", "llama"), dtype=torch.float32).train()
    find_live_decoder(model).layers[0].eval()
    modes = [module.training for module in model.modules()]
    meter = Meter(model)
    meter.impacts(left_padded())
    assert (hooks(model), [module.training for module in model.modules()]) == (0, modes)
    with pytest.raises(IndexError):
        meter.impacts(left_padded(vocabulary=10**6))
    assert (hooks(model), model.training) == (0, True)

    def stop(layer: CapturedLayer) -> None:
        raise KeyboardInterrupt

    batch = left_padded()
    with pytest.raises(KeyboardInterrupt):
        run_layers(meter.decoder, lambda: model(**batch.inputs), batch.attention_mask, stop)
    assert hooks(model) == 0


@pytest.mark.parametrize("projection", ["attn.q", "attn.k", "attn.v", "fwd.up"])
def test_nan_is_named_by_layer_projection_and_probe(projection, folder_of):
    model = load(folder_of("source", "llama"), dtype=torch.float32)
    ids = left_padded()
    with torch.no_grad():
        linear = find_live_decoder(model).layers[1].get_submodule(PROJECTIONS[projection].module)
        linear.weight[3] = torch.nan
    with pytest.raises(SnrfError, match=rf"layer 1, {re.escape(projection)} gives NaN or infinite values on probe 4;"):
        Meter(model).impacts(ids)
    assert hooks(model) == 0


def test_nan_on_one_probe_names_that_probe(folder_of):
    model = load(folder_of("source", "llama"), dtype=torch.float32)
    batch = left_padded()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(batch.inputs["input_ids"][1, 9])] = torch.inf
    with pytest.raises(SnrfError, match=r"layer 0, attn\.q gives NaN or infinite values on probe 7; check the weights"):
        Meter(model).impacts(batch)


def test_probe_without_a_counted_token_is_refused(folder_of):
    model = load(folder_of("source", "llama"), dtype=torch.float32)
    batch = left_padded()
    batch.answer_mask[1] = False
    with pytest.raises(SnrfError, match="probe 7 has no token that counts with 'answer'"):
        Meter(model, Measure(tokens="answer")).impacts(batch)


SIZES = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def test_interleaved_rotary_layout_is_refused():
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, pad_token_id=0)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    with pytest.raises(SnrfError, match=r"CohereForCausalLM: the attention of model\.layers\.0 does not follow"):
        Meter(model).impacts(left_padded())


def test_norm_over_all_heads_is_refused():
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES, pad_token_id=0)).eval()
    with pytest.raises(SnrfError, match=r"self_attn\.q_norm: Olmo2RMSNorm with a weight of shape \[32\] is not an RMS"):
        Meter(model).impacts(left_padded())


def test_model_without_a_decoder_is_refused():
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(SnrfError, match="CLIPVisionModel: no text decoder found in the loaded model"):
        find_live_decoder(model)


def test_two_decoders_are_told_apart_by_the_shape(folder_of):
    model = load(folder_of("source", "llama"))
    shape = find_live_decoder(model).shape
    both = nn.ModuleDict({"one": model, "other": transformers.LlamaModel(transformers.LlamaConfig(**SIZES))})
    with pytest.raises(SnrfError, match=r"several text decoders .*one\.model\.layers \(3 layers of width 64\), other"):
        find_live_decoder(both)
    assert find_live_decoder(both, shape).path == "one.model.layers"
    with pytest.raises(SnrfError, match=r"the loaded decoder model\.layers is .* but the checkpoint's is"):
        find_live_decoder(model, replace(shape, intermediate_size=5))


def test_layer_that_does_not_run_is_an_error(folder_of):
    model = load(folder_of("source", "llama"))
    decoder = find_live_decoder(model)
    with pytest.raises(SnrfError, match=r"model\.layers\.0: did not run in the forward pass"):
        run_layers(decoder, lambda: None, torch.ones(1, 1), lambda layer: None)
    assert hooks(model) == 0


def test_sections_of_older_mrope_are_mixed_by_axis():
    axes, sections = torch.randn(3, 2, 5, 16), [2, 3, 3]
    axis = [0, 0, 1, 1, 1, 2, 2, 2] * 2
    expected = torch.stack([axes[axis[dim], :, :, dim] for dim in range(16)], dim=-1)
    assert torch.equal(mixed_sections(axes, sections), expected)
