"""Fused attention: the same impacts as the blocked kernel and as zeroed modules. Only CPU kernels are run here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import load, make_source
from profiling.brute_force import ATTENTION, Layer, image_layer, norms, text_layer, to_dtype
from profiling.test_capture import left_padded
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.impact import sdpa as impact_sdpa
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout
from mergekit_snrf.profiling.impact.layer import attention_impact
from mergekit_snrf.profiling.measure.meter import Meter

WINDOWED = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "Llama": lambda: text_layer("Llama"),
    "Qwen2, key bias + 400": lambda: text_layer("Qwen2", key_bias=400.0),
    "Qwen3, q_norm and k_norm": lambda: text_layer("Qwen3", head_dim=16),
    "Gemma3, norms, window": lambda: text_layer("Gemma3Text", 0, **WINDOWED, query_pre_attn_scalar=16),
    "Mistral, window": lambda: text_layer("Mistral", sliding_window=4),
    "SmolLM3, layer without RoPE": lambda: text_layer("SmolLM3", 1, no_rope_layers=[1, 0]),
    "Qwen2.5-VL, M-RoPE with an image": image_layer,
}


@cache
def family(name: str) -> Layer:
    return FAMILIES[name]()


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_neuron_equals_zeroing_it_in_the_real_module(name: str) -> None:
    layer = family(name)
    huge = 10 if "400" in name else 1
    readouts = {
        "pre_o": None,
        "post_o": Readout.of(layer.attention.o_proj.weight, layer.inputs.heads, layer.inputs.kv_heads),
    }
    for site, readout in readouts.items():
        expected = [norms(layer.differences(p, site), layer.counted) for p in ATTENTION]
        for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            actual = attention_impact(to_dtype(layer.inputs, dtype), readout=readout, backend="sdpa")
            for one, other in zip(actual, expected, strict=True):
                assert one.dtype == dtype
                assert error(one, other) <= bar * huge


def test_a_mask_of_any_shape_is_that_of_the_model() -> None:
    layer = family("Llama")
    noise = torch.randn(layer.mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scattered = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(5)) < 0.4
    scattered[:, :, range(11), range(11)] = True
    for mask in (torch.where(layer.mask == 0, noise, layer.mask), scattered):
        inputs = replace(layer.inputs, window=None, key_mask=None, mask=mask)
        for one, other in zip(
            attention_impact(inputs, layer.counted, backend="sdpa"),
            attention_impact(inputs, layer.counted, backend="blocked"),
            strict=True,
        ):
            assert error(one, other) <= 1e-12


def inputs_of(tokens: int = 150, **fields: object) -> AttentionInputs:
    generator = torch.Generator().manual_seed(11)
    query, key, value = (torch.randn(2, tokens, 16 * h, generator=generator) for h in (6, 2, 2))
    angle = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(8) / 8)
    angle = torch.cat([angle, angle], dim=-1)[None]
    return AttentionInputs(query, key, value, 16, 0.25, angle.cos(), angle.sin(), **fields)  # type: ignore[arg-type]


def test_padding_and_weights_give_what_the_blocked_kernel_gives() -> None:
    key_mask = torch.ones(2, 150)
    key_mask[0, :37] = 0
    key_mask[1, 140:] = 0
    weights = key_mask * torch.rand(2, 150, generator=torch.Generator().manual_seed(3))
    answer = key_mask * (torch.arange(150) >= 100)
    inputs = inputs_of(key_mask=key_mask)
    dirt = {
        name: torch.where(key_mask[..., None] != 0, getattr(inputs, name), torch.nan)
        for name in ("query", "key", "value")
    }
    for counted in (None, weights, answer):
        expected = attention_impact(inputs, counted, backend="blocked")
        actual = attention_impact(replace(inputs, **dirt), counted, backend="sdpa")
        for one, other in zip(actual, expected, strict=True):
            assert error(one, other) <= 2e-6


def test_probes_without_holes_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes none."""
    seen: list[dict[str, object]] = []
    real = functional.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    padded = torch.ones(2, 40)
    padded[0, :7] = 0
    padded[1, 30:] = 0
    attention_impact(inputs_of(40, key_mask=padded), backend="sdpa")
    assert seen
    assert all(call.get("is_causal") and "attn_mask" not in call for call in seen)
    seen.clear()
    attention_impact(inputs_of(40, window=8), backend="sdpa")
    assert all("attn_mask" in call for call in seen)


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return output


def test_no_tensor_outgrows_the_block() -> None:
    inputs = inputs_of(400)
    with Largest() as seen:
        attention_impact(inputs, block_bytes=700_000, backend="sdpa")
    # The mask of one probe is 640 kB; the scores of all neurons would be 61 MB a probe.
    assert seen.bytes <= 700_000


def test_the_backend_follows_the_device_and_the_cap() -> None:
    inputs = inputs_of(5)
    on_cuda = replace(inputs, softcap=None)
    object.__setattr__(on_cuda, "query", _OnCuda())
    capped = replace(inputs, softcap=30.0)
    assert not impact_sdpa.uses_sdpa(inputs, "auto")
    assert impact_sdpa.uses_sdpa(on_cuda, "auto")
    assert not impact_sdpa.uses_sdpa(on_cuda, "blocked")
    assert impact_sdpa.uses_sdpa(inputs, "sdpa")
    object.__setattr__(on_cuda, "softcap", 30.0)
    assert not impact_sdpa.uses_sdpa(on_cuda, "auto")
    with pytest.raises(ValueError, match="cannot cap the scores"):
        attention_impact(capped, backend="sdpa")


def test_a_model_that_caps_its_scores_is_told_apart(tmp_path: Path) -> None:
    model = load(make_source(tmp_path / "gemma2", "gemma2"), dtype=torch.float32)
    with pytest.raises(SnrfError, match="backend: caps its attention scores"):
        Meter(model, backend="sdpa").impacts(left_padded())


class _OnCuda:
    device = torch.device("cuda")
