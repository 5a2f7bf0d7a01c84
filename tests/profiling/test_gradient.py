"""``weight: gradient``: how much the final states of real models feel a change at each position."""

from __future__ import annotations

from typing import Any

import brute_force
import pytest
import torch
from checkpoints import example_inputs, load
from profiling.test_capture import Batch, hooks, left_padded, oracle
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.neurons.sets import PROJECTIONS, Site
from mergekit_snrf.profiling.measure.gradient import ATTENTION, FFN, layer_gradients
from mergekit_snrf.profiling.measure.meter import Measure, Meter


@pytest.fixture
def model_of(folder_of: Any) -> Any:
    def make(kind: str, family: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Batch]:
        folder = folder_of(kind, family)
        batch = left_padded() if kind == "source" else Batch(example_inputs(folder))
        return load(folder, dtype=dtype), batch

    return make


def states(model: nn.Module, batch: Batch) -> Tensor:
    """Return the final states: what the decoder's own model, which holds its layers, gives."""
    seen: list[Any] = []
    module = model.get_submodule(find_live_decoder(model).path.removesuffix(".layers").removesuffix("layers"))
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    try:
        with brute_force.KeepFloat64(), torch.no_grad():
            model(**batch.inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def slopes(model: nn.Module, batch: Batch, module: nn.Module, probe: int, position: int) -> Tensor:
    """Return the derivative of <E, final states> by each element that a module gives, by central differences."""
    counted = batch.attention_mask != 0
    cotangent = torch.zeros(*counted.shape, model.config.get_text_config().hidden_size, dtype=torch.float64)
    for row, positions in zip(cotangent, counted, strict=True):
        drawn = torch.randn(int(positions.sum()), row.shape[1], generator=torch.Generator().manual_seed(0))
        row[positions] = drawn.double()

    def value(element: int, step: float) -> float:
        def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[probe, position, element] += step
            return output

        handle = module.register_forward_hook(push)
        found = float((states(model, batch) * cotangent).sum())
        handle.remove()
        return found

    return torch.tensor([(value(e, 1e-4) - value(e, -1e-4)) / 2e-4 for e in range(cotangent.shape[2])])


CASES = [
    ("source", "llama"),
    ("target", "qwen3_vl"),
    ("target", "gemma3"),
]


def gradients_of(model: nn.Module, batch: Batch, counted: Tensor | None = None) -> Any:
    with brute_force.KeepFloat64():
        return layer_gradients(
            model,
            find_live_decoder(model),
            lambda: model(**batch.inputs, use_cache=False),
            batch.attention_mask != 0 if counted is None else counted,
        )


@pytest.mark.parametrize(("kind", "family"), CASES, ids=lambda value: value)
def test_gradients_are_those_of_central_differences(kind, family, model_of):
    model, batch = model_of(kind, family)
    layers = gradients_of(model, batch)
    decoder = find_live_decoder(model)
    assert len(layers) == len(decoder.layers)
    probe, position = len(batch.attention_mask) - 1, batch.attention_mask.shape[1] - 4
    for index in (0, len(layers) - 1) if kind == "source" else (0,):
        for name, found in ((ATTENTION, layers[index].attention), (FFN, layers[index].ffn)):
            slope = slopes(model, batch, decoder.layers[index].get_submodule(name), probe, position)
            expected = float(slope.square().mean())
            assert float(found[probe, position]) == pytest.approx(expected, rel=1e-4), (index, name)


def test_impacts_are_those_of_zeroed_modules_in_the_weight_of_the_gradient(model_of):
    model, batch = model_of("source", "llama")
    layer, gradient = oracle(model, batch, 1), gradients_of(model, batch)[1]
    for site in ("pre_o", "post_o"):
        with brute_force.KeepFloat64():
            impacts = Meter(model, Measure(weight="gradient", site=site)).impacts(batch)
        for name in ("attn.q", "attn.k", "attn.v", "fwd.up"):
            differences = layer.differences(PROJECTIONS[name].module.split(".")[1], site)
            weights = gradient.ffn if name == "fwd.up" else gradient.attention
            expected = brute_force.norms(differences, torch.where(batch.attention_mask != 0, weights, 0.0))
            found = impacts[Site(1, name)]
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 * float(expected.max())), (site, name)


def test_a_probe_has_the_same_gradient_alone_and_in_company(model_of):
    model, batch = model_of("source", "qwen3")
    both = gradients_of(model, batch)
    alone = gradients_of(model, Batch({name: value[:1, 5:] for name, value in batch.inputs.items()}))
    for one, other in zip(both, alone, strict=True):
        torch.testing.assert_close(one.attention[:1, 5:], other.attention, rtol=1e-6, atol=0)
        torch.testing.assert_close(one.ffn[:1, 5:], other.ffn, rtol=1e-6, atol=0)
        assert bool((one.attention[0, :5] == 0).all())


def test_only_states_that_count_are_felt(model_of):
    model, batch = model_of("source", "llama")
    first = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    first[:, 9] = True
    for layer in gradients_of(model, batch, first):
        # Attention is causal: what comes after a state cannot change it.
        assert bool((layer.ffn[:, 10:] == 0).all())
        assert bool((layer.ffn[:, 9] > 0).all())


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_the_model_is_left_as_it_was(outer, model_of):
    model, batch = model_of("target", "llava", torch.float32)
    model.train()
    frozen = next(model.parameters()).requires_grad_(False)
    # The vision tower of transformers puts hooks of its own on itself in its first forward pass.
    Meter(model).impacts(batch)
    before = hooks(model)
    with outer():
        Meter(model, Measure(weight="gradient")).impacts(batch)
    assert (hooks(model), model.training) == (before, True)
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_below_the_decoder_is_differentiated(model_of):
    model, batch = model_of("target", "llava", torch.float32)
    below: list[bool] = []
    tower = model.get_submodule("model.vision_tower")
    handle = tower.register_forward_hook(lambda module, args, output: below.append(output[0].requires_grad))
    Meter(model, Measure(weight="gradient")).impacts(batch)
    handle.remove()
    assert below
    assert not any(below)


def test_weights_that_are_nan_blame_the_projection_not_the_gradient(model_of):
    model, batch = model_of("source", "llama", torch.float32)
    with torch.no_grad():
        find_live_decoder(model).layers[2].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(SnrfError, match=r"layer 2, fwd\.up gives NaN or infinite values on probe 4;"):
        Meter(model, Measure(weight="gradient")).impacts(batch)
    assert hooks(model) == 0


def test_a_gradient_that_overflows_is_named(model_of):
    model, batch = model_of("source", "llama", torch.float32)
    layer = find_live_decoder(model).layers[2].mlp.down_proj
    handle = layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * torch.inf,))
    with pytest.raises(SnrfError, match=r"the gradient at layer [01] is NaN or infinite on probe 4; load the model in"):
        Meter(model, Measure(weight="gradient")).impacts(batch)
    handle.remove()


def test_a_model_that_hides_its_states_is_refused(model_of):
    model, batch = model_of("source", "llama", torch.float32)

    def hide(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.detach()
        return output

    model.model.register_forward_hook(hide)
    with pytest.raises(SnrfError, match="has no final states to differentiate"):
        Meter(model, Measure(weight="gradient")).impacts(batch)
