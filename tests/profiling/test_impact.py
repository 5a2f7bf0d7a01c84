from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from profiling.brute_force import ATTENTION, Layer, image_layer, norms, text_layer, to_dtype
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergekit_snrf.profiling.impact import blocks as impact_blocks
from mergekit_snrf.profiling.impact.inputs import AttentionInputs, Readout, full_precision
from mergekit_snrf.profiling.impact.layer import (
    AttentionScores,
    attention_impact,
    attention_output,
    column_norms,
    ffn_impact,
)
from mergekit_snrf.profiling.impact.released import released_attention_scores, released_ffn_scores
from mergekit_snrf.profiling.impact.sdpa import Backend

WINDOWED = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = WINDOWED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FAMILIES = {
    "Llama, 2 heads a kv head": lambda: text_layer("Llama"),
    "Llama, multi-query, attention bias": lambda: text_layer(
        "Llama", num_key_value_heads=1, head_dim=16, attention_bias=True
    ),
    "Qwen2, q/k/v bias": lambda: text_layer("Qwen2"),
    "Qwen2, key bias + 400": lambda: text_layer("Qwen2", key_bias=400.0),
    "Qwen3, q_norm and k_norm": lambda: text_layer("Qwen3", head_dim=16),
    "Gemma2, soft-capped, window": lambda: text_layer("Gemma2", 0, **CAPPED),
    "Gemma2, soft-capped": lambda: text_layer("Gemma2", 1, **CAPPED),
    "Gemma3, norms, window": lambda: text_layer("Gemma3Text", 0, **WINDOWED, query_pre_attn_scalar=16),
    "Gemma3, norms": lambda: text_layer("Gemma3Text", 1, **WINDOWED, query_pre_attn_scalar=16),
    "Mistral, window": lambda: text_layer("Mistral", sliding_window=4),
    "StableLm, partial rotary, bias": lambda: text_layer("StableLm", use_qkv_bias=True, rope_parameters=PARTIAL),
    "SmolLM3, layer without RoPE": lambda: text_layer("SmolLM3", 1, no_rope_layers=[1, 0]),
    "Qwen2.5-VL, M-RoPE with an image": image_layer,
}


@cache
def family(name: str) -> Layer:
    return FAMILIES[name]()


@cache
def differences(name: str, projection: str, site: str) -> Tensor:
    return family(name).differences(projection, site)


def backends(layer: Layer) -> list[Backend]:
    return ["blocked"] if layer.inputs.softcap is not None else ["blocked", "sdpa"]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest impact of the layer and projection."""
    return ((actual.double() - expected).abs().max() / expected.max()).item()


def assert_close(actual: AttentionScores, expected: AttentionScores, tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other.double()) <= tolerance


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_neuron_equals_zeroing_it_in_the_real_module(name, backend, record_property):
    layer = family(name)
    if backend == "sdpa" and layer.inputs.softcap is not None:
        pytest.skip("fused attention cannot cap the scores")
    huge = 10 if "400" in name else 1
    o_weight, down = layer.attention.o_proj.weight, layer.mlp.down_proj.weight
    readouts = {"pre_o": None, "post_o": Readout.of(o_weight, layer.inputs.heads, layer.inputs.kv_heads)}
    for site, readout in readouts.items():
        expected = [norms(differences(name, p, site), layer.counted) for p in (*ATTENTION, "up_proj")]
        expected += [norms(differences(name, "down_proj", "post_o"), layer.counted)]
        for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            ffn = ffn_impact(layer.hidden.to(dtype), column_norms(down.to(dtype)), layer.counted)
            attention = attention_impact(to_dtype(layer.inputs, dtype), readout=readout, backend=backend)
            actual = [*attention, ffn, ffn]
            assert all(scores.dtype == dtype and scores.isfinite().all() for scores in actual)
            errors = [error(one, other) for one, other in zip(actual, expected, strict=True)]
            record_property(
                "impact error",
                f"{name:36}{backend:8}{site:8}{str(dtype)[6:]:9}" + "".join(f"{e:10.1e}" for e in errors),
            )
            assert max(errors) <= bar * huge


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_explain_what_the_model_did(name):
    layer = family(name)
    ours, theirs = attention_output(layer.inputs), layer.attended * layer.counted[..., None]
    assert (ours - theirs).abs().max() <= 1e-12 * (10 if "400" in name else 1) * theirs.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_impact_is_accurate_by_itself_where_it_is_not_negligible(name):
    layer = family(name)
    for projection, actual in zip(ATTENTION, attention_impact(layer.inputs), strict=True):
        expected = norms(differences(name, projection, "pre_o"), layer.counted)
        solid = expected > 1e-2 * expected.max()
        assert ((actual - expected).abs() / expected)[solid].max() <= (1e-10 if "400" in name else 1e-12)


@pytest.mark.parametrize(
    "name", ["Llama, 2 heads a kv head", "Gemma3, norms, window", "Qwen2.5-VL, M-RoPE with an image"]
)
@pytest.mark.parametrize("site", ["pre_o", "post_o"])
def test_position_weights_multiply_the_squared_changes(name, site):
    layer = family(name)
    residual = torch.rand(layer.counted.shape, generator=torch.Generator().manual_seed(2)) * layer.counted
    answer = torch.where(torch.arange(layer.counted.shape[1]) >= 8, layer.counted, 0.0)
    readout = None
    if site == "post_o":
        readout = Readout.of(layer.attention.o_proj.weight, layer.inputs.heads, layer.inputs.kv_heads)
    for weights in (residual, answer):
        actual = attention_impact(layer.inputs, weights, readout)
        for projection, scores in zip(ATTENTION, actual, strict=True):
            assert error(scores, norms(differences(name, projection, site), weights)) <= 1e-12
        ffn = ffn_impact(layer.hidden, layer.mlp.down_proj.weight, weights)
        assert error(ffn, norms(differences(name, "up_proj", "post_o"), weights)) <= 1e-12


@pytest.mark.parametrize("name", ["Qwen3, q_norm and k_norm", "Gemma2, soft-capped, window", "Mistral, window"])
def test_a_whole_mask_replaces_causal_window_and_key_mask(name):
    layer = family(name)
    expected = attention_impact(layer.inputs)
    for mask in (layer.mask, layer.mask == 0, layer.mask.to(torch.bfloat16), layer.mask.clamp(min=-torch.inf)):
        inputs = replace(layer.inputs, window=None, key_mask=None, mask=mask)
        assert_close(attention_impact(inputs, layer.counted), expected, 1e-14)


@pytest.mark.parametrize("name", ["Llama, 2 heads a kv head", "Qwen3, q_norm and k_norm", "Gemma2, soft-capped"])
def test_finite_entries_of_an_additive_mask_bias_the_scores(name):
    layer = family(name)
    noise = torch.randn(layer.mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = torch.where(layer.mask == 0, noise, layer.mask)
    args, kwargs = layer.call
    biased = replace(
        layer,
        call=(args, kwargs | {"attention_mask": mask}),
        inputs=replace(layer.inputs, window=None, key_mask=None, mask=mask),
    )
    expected = [norms(biased.differences(projection, "pre_o"), layer.counted) for projection in ATTENTION]
    for backend in backends(layer):
        actual = attention_impact(biased.inputs, layer.counted, backend=backend)
        assert max(error(one, other) for one, other in zip(actual, expected, strict=True)) <= 1e-12


def test_a_mask_that_is_not_causal():
    layer = family("Llama, 2 heads a kv head")
    visible = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(5)) < 0.4
    visible[:, :, range(11), range(11)] = True
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    args, kwargs = layer.call
    scattered = replace(
        layer,
        call=(args, kwargs | {"attention_mask": additive}),
        inputs=replace(layer.inputs, key_mask=None, mask=visible),
    )
    expected = [norms(scattered.differences(p, "pre_o"), torch.ones_like(layer.counted)) for p in ATTENTION]
    for backend in backends(layer):
        actual = attention_impact(scattered.inputs, backend=backend)
        assert max(error(one, other) for one, other in zip(actual, expected, strict=True)) <= 1e-12


def random_inputs(
    tokens: int = 150, batch: int = 2, dtype: torch.dtype = torch.float32, **fields: object
) -> AttentionInputs:
    """Six query heads on two key heads of size 16, half-rotated."""
    generator = torch.Generator().manual_seed(11)
    query, key, value = (torch.randn(batch, tokens, 16 * h, generator=generator, dtype=dtype) for h in (6, 2, 2))
    angle = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(4) / 4)
    angle = torch.cat([angle, angle], dim=-1)[None].to(dtype)
    return AttentionInputs(query, key, value, 16, 0.25, angle.cos(), angle.sin(), **fields)  # type: ignore[arg-type]


def test_results_do_not_depend_on_blocks_threads_or_the_rest_of_the_batch():
    key_mask = torch.ones(2, 70)
    key_mask[0, :21] = 0
    inputs = random_inputs(tokens=70, key_mask=key_mask)
    whole = attention_impact(inputs)
    for block_bytes in (1, 10_000, 100_000_000):
        assert_close(attention_impact(inputs, block_bytes=block_bytes), whole, 2e-6)
    torch.set_num_threads(2)
    try:
        assert_close(attention_impact(inputs), whole, 2e-6)
    finally:
        torch.set_num_threads(1)
    alone = replace(
        inputs,
        key_mask=None,
        cos=inputs.cos[:, 21:],
        sin=inputs.sin[:, 21:],
        **{name: getattr(inputs, name)[:1, 21:] for name in ("query", "key", "value")},
    )
    assert_close(attention_impact(alone), AttentionScores(*(scores[:1] for scores in whole)), 2e-6)


class Operations(TorchDispatchMode):
    """Records the bytes of the largest tensor, the size of all softmaxes, and the shapes of oneDNN's products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.softmaxed = 0
        self.products: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                size = min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())
                self.largest = max(self.largest, size)
        if "softmax" in str(function):
            self.softmaxed += output.numel()
        if "linear_pointwise" in str(function):
            self.products.add((*args[0].shape, *args[1].shape))
        return output


@pytest.mark.parametrize(("backend", "size"), [("blocked", 200_000), ("sdpa", 700_000)])
def test_no_tensor_outgrows_the_block(backend, size):
    inputs = random_inputs(tokens=400, batch=1)
    with Operations() as seen:
        attention_impact(inputs, block_bytes=size, backend=backend)
    # blocked: the keys twice for one head, [2, head_dim, tokens], are below it; sdpa: the mask of one probe is 640 kB.
    # [heads, head_dim, tokens, tokens] is 61 MB.
    assert seen.largest <= size


def test_only_attended_keys_and_counted_rows_are_visited():
    key_mask = (torch.arange(400) >= 200).float()[None]
    inputs = random_inputs(tokens=400, batch=1, key_mask=key_mask)
    pairs = 6 * 2 * 16 * 400 * 400
    for fields, weights, share in (
        ({"key_mask": None}, None, 0.56),
        ({}, None, 0.15),
        ({"window": 16}, None, 0.06),
        ({}, key_mask * (torch.arange(400) >= 384), 0.022),
    ):
        with Operations() as seen:
            attention_impact(replace(inputs, **fields), weights)
        assert seen.softmaxed <= share * pairs


@pytest.mark.skipif(not impact_blocks._onednn_linear(), reason="this torch has no oneDNN product")
def test_probes_of_all_lengths_share_few_shapes_of_products(monkeypatch):
    monkeypatch.setattr(impact_blocks, "_is_intel", lambda: False)
    with Operations() as seen:
        for tokens in range(50, 200, 3):
            answer = (torch.arange(tokens) >= tokens % 37).float()[None]
            attention_impact(random_inputs(tokens=tokens, batch=1), answer)
    # 8, 16 or 32 rows; 13 numbers of keys; one block of 16 dims, or the output itself.
    assert 0 < len(seen.products) <= 3 * 13 * 2
    with Operations() as seen:
        attention_impact(random_inputs(tokens=150, batch=1), (torch.arange(150) >= 41).float()[None])
    assert {shape[-1] for shape in seen.products} == {80, 112, 144}


def test_padding_may_hold_anything():
    key_mask = torch.ones(2, 150)
    key_mask[0, :37] = 0
    key_mask[1, 140:] = 0
    clean = random_inputs(key_mask=key_mask)
    dirt = {
        name: torch.where(key_mask[..., None] != 0, getattr(clean, name), torch.nan)
        for name in ("query", "key", "value")
    }
    dirty = replace(clean, **dirt)
    for function in (attention_impact, released_attention_scores):
        for one, other in zip(function(dirty), function(clean), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(attention_output(dirty), attention_output(clean))
    random = key_mask * torch.rand(2, 150, generator=torch.Generator().manual_seed(3))
    for weights in (None, random, key_mask * (torch.arange(150) >= 100)):
        assert_close(attention_impact(dirty, weights, backend="sdpa"), attention_impact(clean, weights), 2e-6)
    hidden = torch.rand(2, 150, 8)
    spoilt = torch.where(key_mask[..., None] != 0, hidden, torch.nan)
    assert torch.equal(ffn_impact(spoilt, torch.ones(8), key_mask), ffn_impact(hidden, torch.ones(8), key_mask))


def test_rows_that_attend_to_nothing_contribute_nothing():
    key_mask = torch.ones(2, 150)
    key_mask[0, :37] = 0
    inputs = random_inputs(key_mask=key_mask)
    assert_close(attention_impact(inputs, torch.ones(2, 150)), attention_impact(inputs), 2e-6)
    blind = attention_impact(replace(inputs, key_mask=torch.zeros(2, 150)), torch.ones(2, 150))
    assert all((scores == 0).all() for scores in blind)


@pytest.mark.parametrize("factor", [0.0, 1e-6, 30.0, 1e4])
def test_scores_of_any_size_stay_finite(factor):
    norm = torch.full((16,), factor)
    for inputs in (random_inputs(), random_inputs(query_norm=norm, key_norm=norm), random_inputs(softcap=30.0)):
        extreme = replace(inputs, query=inputs.query * factor, key=inputs.key * factor)
        assert all(scores.isfinite().all() for scores in attention_impact(extreme))
        assert all(scores.isfinite().all() for scores in released_attention_scores(extreme))


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("norms", [(), ("query_norm",), ("key_norm",), ("query_norm", "key_norm")])
@pytest.mark.parametrize("product", ["MKL", "oneDNN"])
def test_few_large_neurons_are_exact_beside_small_ones(outlier, norms, product, monkeypatch):
    monkeypatch.setattr(impact_blocks, "_is_intel", lambda: product == "MKL")
    key_mask = torch.ones(2, 150)
    key_mask[0, :37] = 0
    inputs = random_inputs(dtype=torch.float64, key_mask=key_mask, **{name: torch.ones(16) for name in norms})
    inputs.query[:, 60:70, 3] *= outlier
    inputs.key[:, 40:, 21] += outlier
    exact = attention_impact(inputs, backend="sdpa")
    assert_close(attention_impact(inputs, block_bytes=20_000), exact, 1e-12)
    single = {name: getattr(inputs, name).float() for name in ("query", "key", "value", "cos", "sin")}
    assert_close(attention_impact(replace(inputs, **single), block_bytes=20_000), exact, 1e-5 * max(1.0, outlier / 10))


@pytest.mark.parametrize("norms", [(), ("query_norm", "key_norm")])
@pytest.mark.parametrize("factor", [1.0, 1e5])
def test_neurons_that_change_nothing_have_no_impact(factor, norms):
    inputs = random_inputs(**{name: torch.ones(16) for name in norms})
    query, key = inputs.query * factor, inputs.key * factor
    # Dims 9 and 10 are not rotated, so that rows of zeros stay columns of zeros.
    query[..., 9] = key[..., 26] = 0
    scores = attention_impact(replace(inputs, query=query, key=key), block_bytes=20_000)
    # A norm grows by a mean without the neuron, which is rounded in another order.
    for found, all_scores in ((scores.query[:, 9], scores.query), (scores.key[:, 26], scores.key)):
        assert (found <= (1e-5 * all_scores.max() if norms else 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = to_dtype(random_inputs(), dtype)
    actual, expected = attention_impact(half), attention_impact(to_dtype(half, torch.float32))
    assert all(
        torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(actual, expected, strict=True)
    )
    hidden, down = torch.randn(2, 5, 8).to(dtype), torch.randn(6, 8).to(dtype)
    assert torch.equal(ffn_impact(hidden, down), ffn_impact(hidden.float(), down.float()))


@pytest.fixture(params=["torch.set_float32_matmul_precision", "torch.backends.mkldnn.matmul.fp32_precision"])
def reduced_precision(request: pytest.FixtureRequest) -> Iterator[Callable[[], object]]:
    """Let float32 products be short, by either of torch's two switches; yields a reader of the setting."""
    backend = torch.backends.mkldnn.matmul
    if "set_" in request.param:
        torch.set_float32_matmul_precision("medium")
        yield torch.get_float32_matmul_precision
        torch.set_float32_matmul_precision("highest")
    elif not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has one switch only")
    else:
        before, backend.fp32_precision = backend.fp32_precision, "bf16"
        yield lambda: backend.fp32_precision
        backend.fp32_precision = before


def test_reduced_precision_is_put_aside_and_restored(reduced_precision):
    inputs, setting = random_inputs(), reduced_precision()
    expected = to_dtype(inputs, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(attention_impact(inputs), attention_impact(expected), 2e-6)
        with full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_autocast_enabled("cpu")
    assert reduced_precision() == setting


@pytest.mark.parametrize(
    "name", ["Llama, 2 heads a kv head", "Qwen3, q_norm and k_norm", "Qwen2.5-VL, M-RoPE with an image"]
)
def test_released_scores_equal_the_released_formulas(name):
    layer = family(name)
    query, key = layer.rotated
    key = key.repeat_interleave(2, dim=1)
    scores = query @ key.mT * layer.inputs.scaling + layer.mask
    column = torch.einsum("bhid,bhjd->bhdij", query, key) * layer.inputs.scaling
    change = (scores[:, :, None] - column).softmax(-1) - scores.softmax(-1)[:, :, None]
    change = torch.where(layer.counted[:, None, None, :, None] > 0, change.square(), 0.0).sum((-2, -1))
    expected_q = change.flatten(1)
    expected_k = change.unflatten(1, (2, 2)).sum(2).flatten(1)
    attended = (layer.attended.abs() * layer.counted[..., None]).sum(1).unflatten(1, (2, 2, -1)).sum(2).flatten(1)
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        actual = released_attention_scores(to_dtype(layer.inputs, dtype))
        for one, other in zip(actual, (expected_q, expected_k, attended), strict=True):
            assert error(one, other) <= bar
    up = torch.randn(2, 11, 24, dtype=torch.float64)
    weights = torch.ones(2, 11).index_fill(1, torch.arange(3), 0.0)
    torch.testing.assert_close(released_ffn_scores(up, weights), up[:, 3:].abs().sum(1))


def test_an_interleaved_rotary_layout_is_recognised_as_foreign():
    glm = text_layer("Glm", head_dim=8, rope_parameters=PARTIAL)
    assert (attention_output(glm.inputs) - glm.attended * glm.counted[..., None]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": torch.zeros(2, 96)}, "query, key and value must have shape"),
        ({"value": torch.zeros(2, 9, 32)}, r"must have shape \[batch, tokens, .*\[2, 9, 32\]"),
        ({"head_dim": 15}, "head_dim 15 does not divide"),
        ({"key": torch.zeros(2, 10, 64)}, "4 key heads do not divide 6 query heads"),
        ({"sin": None}, "cos and sin must be given together"),
        ({"sin": torch.zeros(1, 10, 6)}, "cos and sin must have shape"),
        (
            {"cos": torch.zeros(1, 10, 18), "sin": torch.zeros(1, 10, 18)},
            "rotary_dim must be even and at most head_dim",
        ),
        ({"query_norm": torch.zeros(96)}, r"query_norm must have shape \[16\], got \[96\]"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"window": 0}, "window must be positive"),
        ({"key_mask": torch.ones(10, 2)}, "key_mask must have shape"),
        ({"mask": torch.ones(2, 10, 10)}, "mask must have shape"),
        ({"mask": torch.ones(2, 1, 10, 10), "window": 3}, "leave window and key_mask out"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(random_inputs(tokens=10), **fields)


def test_arguments_that_do_not_fit_the_inputs_are_refused():
    inputs = random_inputs(tokens=10)
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 10\], got \[10\]"):
        attention_impact(inputs, torch.ones(10))
    with pytest.raises(ValueError, match="not negative"):
        attention_output(inputs, -torch.ones(2, 10))
    with pytest.raises(ValueError, match="readout is for 4 heads of size 16"):
        attention_impact(inputs, readout=Readout.of(torch.ones(8, 64), 4, 2))
    with pytest.raises(ValueError, match="block_bytes must be positive"):
        attention_impact(inputs, block_bytes=0)
    with pytest.raises(ValueError, match="o_proj weight must have shape"):
        Readout.of(torch.ones(8, 64), 5, 2)
    with pytest.raises(ValueError, match=r"got \[2, 3, 5\] and \[8, 4\]"):
        ffn_impact(torch.ones(2, 3, 5), torch.ones(8, 4))
    with pytest.raises(ValueError, match="up must have shape"):
        released_ffn_scores(torch.ones(2, 3))
