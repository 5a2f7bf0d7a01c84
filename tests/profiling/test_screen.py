"""``screen``: which neurons are measured, what the others get, and which selections a screened profile allows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from profiling.brute_force import ATTENTION, Layer, image_layer, norms, text_layer, to_dtype

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.impact.layer import AttentionInputs, Readout, attention_impact
from mergekit_snrf.profiling.impact.screen import Screened
from mergekit_snrf.profiling.measure.meter import Measure
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance, select
from mergekit_snrf.profiling.result.statistics import Statistics, ranks

WINDOWED = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "Llama": lambda: text_layer("Llama", head_dim=32),
    "Qwen2, q/k/v bias": lambda: text_layer("Qwen2"),
    "Qwen3, q_norm and k_norm": lambda: text_layer("Qwen3", head_dim=16),
    "Gemma2, soft-capped, window": lambda: text_layer(
        "Gemma2", 0, **WINDOWED, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "StableLm, partial rotary, bias": lambda: text_layer(
        "StableLm",
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "Qwen2.5-VL, M-RoPE with an image": image_layer,
}


@cache
def family(name: str) -> Layer:
    return FAMILIES[name]()


def estimates(inputs: AttentionInputs, weights: torch.Tensor, readout: Readout | None) -> list[torch.Tensor]:
    """Return the estimates of attn.q and attn.k on every probe: [batch, neurons]."""
    found = [Screened.of(inputs, item, row, readout, 0.5) for item, row in enumerate(weights)]
    return [torch.stack([getattr(one, name).flatten() for one in found]).sqrt() for name in ("query", "key")]


def weakened(layer: Layer, factor: float) -> Layer:
    """Return a layer whose scores every neuron changes less, so that first order is all there is."""
    with torch.no_grad():
        for linear in (layer.attention.q_proj, layer.attention.k_proj):
            linear.weight *= factor
            if linear.bias is not None:
                linear.bias *= factor
    hidden = layer.call[1]["hidden_states"]
    query, key = layer.attention.q_proj(hidden).detach(), layer.attention.k_proj(hidden).detach()
    return replace(layer, inputs=replace(layer.inputs, query=query, key=key))


@pytest.mark.parametrize("site", ["pre_o", "post_o"])
@pytest.mark.parametrize("name", FAMILIES)
def test_small_changes_are_estimated_as_zeroing_the_module_changes_them(name: str, site: str, monkeypatch) -> None:
    """With directions enough for the whole of V there is no chance left in the estimate, only its order."""
    monkeypatch.setattr("mergekit_snrf.profiling.impact.screen.DIRECTIONS", 10**6)
    layer = FAMILIES[name]()
    normed = layer.inputs.query_norm is not None
    if normed:
        # A norm undoes any scale of what it is given; its own weight does not.
        with torch.no_grad():
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                norm.weight *= 1e-2
        layer = replace(
            layer,
            inputs=replace(
                layer.inputs,
                query_norm=layer.attention.q_norm.weight.detach(),
                key_norm=layer.attention.k_norm.weight.detach(),
            ),
        )
    else:
        layer = weakened(layer, 1e-2)
    readout = None
    if site == "post_o":
        readout = Readout.of(layer.attention.o_proj.weight, layer.inputs.heads, layer.inputs.kv_heads)
    weights = layer.counted * torch.rand(layer.counted.shape, generator=torch.Generator().manual_seed(2))
    for projection, estimate in zip(ATTENTION[:2], estimates(layer.inputs, weights, readout), strict=True):
        expected = norms(layer.differences(projection, site), weights)
        torch.testing.assert_close(estimate, expected, rtol=2e-2, atol=1e-3 * float(expected.max()))


@pytest.mark.parametrize("site", ["pre_o", "post_o"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_top_is_exact_and_the_rest_is_below(name: str, site: str) -> None:
    layer = family(name)
    readout = None
    if site == "post_o":
        readout = Readout.of(layer.attention.o_proj.weight, layer.inputs.heads, layer.inputs.kv_heads)
    for dtype in (torch.float64, torch.float32):
        inputs = to_dtype(layer.inputs, dtype)
        exact = attention_impact(inputs, layer.counted, readout)
        screened = attention_impact(inputs, layer.counted, readout, screen=0.5)
        assert torch.equal(screened.value, exact.value)
        for whole, part in ((exact.query, screened.query), (exact.key, screened.key)):
            for true, found in zip(whole, part, strict=True):
                equal = torch.isclose(true, found, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0.0)
                top = ranks(found.float()[None])[0] <= len(found) // 2
                assert bool(equal[top].all())
                assert len(found) / 2 <= int(equal.sum()) < len(found)
                assert found.float()[~equal].max() < found.float()[equal].min()


def test_every_neuron_is_exact_when_all_are_kept() -> None:
    inputs = family("Qwen2, q/k/v bias").inputs
    for one, other in zip(attention_impact(inputs, screen=1.0), attention_impact(inputs), strict=True):
        assert torch.equal(one, other)


def skewed(tokens: int = 300) -> AttentionInputs:
    """Six query heads on two key heads of size 32, whose columns differ in size as a trained model's do."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, tokens, 32 * h, generator=generator) for h in (6, 2, 2))
    query *= torch.randn(192, generator=generator).exp()
    key *= torch.randn(64, generator=generator).exp()
    angle = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(16) / 16)
    angle = torch.cat([angle, angle], dim=-1)[None]
    mask = torch.ones(2, tokens)
    mask[0, :120] = 0
    return AttentionInputs(query, key, value, 32, 32**-0.5 / 4, angle.cos(), angle.sin(), key_mask=mask)


@pytest.mark.parametrize("site", ["pre_o", "post_o"])
def test_the_same_top_tenth_as_without_a_screen(site: str) -> None:
    inputs = skewed()
    readout = None
    if site == "post_o":
        readout = Readout.of(torch.randn(80, 192, generator=torch.Generator().manual_seed(6)), 6, 2)
    exact, screened = attention_impact(inputs, None, readout), attention_impact(inputs, None, readout, screen=0.3)
    for one, other in zip(exact[:2], screened[:2], strict=True):
        tenth = one.shape[1] // 10
        assert torch.equal(ranks(one) <= tenth, ranks(other) <= tenth)
        assert not torch.equal(one, other)


def test_a_neuron_that_moves_attention_off_the_one_key_it_rests_on_is_kept() -> None:
    """Its first-order change is next to nothing, its impact the greatest of all."""
    inputs = skewed()
    query, key = inputs.query.clone() * 0.2, inputs.key.clone()
    query[..., 7], key[..., 7], key[:, 120, 7] = 40.0, 0.0, 40.0
    inputs = replace(inputs, query=query, key=key, cos=None, sin=None, key_mask=None)
    exact = attention_impact(inputs).query[1]
    assert int(exact.argmax()) == 7
    item = Screened.of(inputs, 1, torch.ones(300), None, 0.3)
    assert int((item.query.flatten() > item.query.flatten()[7]).sum()) > 0.3 * 192
    assert int(attention_impact(inputs, screen=0.3).query[1].argmax()) == 7


def test_results_do_not_depend_on_the_rest_of_the_batch() -> None:
    inputs = skewed()
    whole = attention_impact(inputs, screen=0.3)
    alone = replace(inputs, **{name: getattr(inputs, name)[1:] for name in ("query", "key", "value", "key_mask")})
    for one, other in zip(attention_impact(alone, screen=0.3), whole, strict=True):
        assert torch.equal(one[0], other[1])


@pytest.mark.parametrize("factor", [0.0, 1e-6, 30.0, 1e4, 1e18])
def test_scores_of_any_size_stay_finite(factor: float) -> None:
    inputs = skewed(70)
    for extreme in (
        replace(inputs, query=inputs.query * factor, key=inputs.key * min(factor, 1e4)),
        replace(inputs, query_norm=torch.full((32,), min(factor, 1e4)), key_norm=torch.full((32,), min(factor, 1e4))),
        replace(inputs, query=inputs.query * factor, softcap=30.0),
    ):
        for scores in attention_impact(extreme, screen=0.3):
            assert bool(scores.isfinite().all())


def test_a_share_that_is_none_is_refused() -> None:
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="screen must be in"):
            attention_impact(skewed(10), screen=share)


def profile(screen: float | None, side: str = "target") -> Profile:
    """Return the profile of two probes of 20 neurons in each projection."""
    generator = torch.Generator().manual_seed(1)
    sites = {Site(0, name): 20 for name in ("attn.q", "attn.k", "attn.v", "fwd.up")}
    statistics = Statistics(sites)
    statistics.update({site: torch.rand(2, 20, generator=generator) for site in sites})
    measure = Measure(screen=screen).provenance()
    return statistics.profile(ProfileProvenance(side=side, measure=measure))


def test_a_screened_profile_selects_what_it_holds_and_refuses_the_rest() -> None:
    whole, screened = profile(None), profile(0.3)
    for ratio in (0.1, 0.3, {"attn": 0.3, "attn.v": 0.9, "fwd": 0.5}):
        assert select([screened], top_ratio=ratio) == select([whole], top_ratio=ratio)
    for ratio in (0.31, {"attn": 0.1, "attn.k": 0.5, "fwd": 0.1}):
        with pytest.raises(
            SnrfError, match=r"made with screen: 0\.3, so top_ratio 0\.\d+ of attn\.[qk] asks for ranks"
        ):
            select([whole, screened], top_ratio=ratio)
        with pytest.raises(SnrfError, match=r"screen: 0\.3"):
            select([screened], top_ratio=ratio, at_least=0.5)
    with pytest.raises(SnrfError, match=r"estimates that sigma cannot be compared with; select by top_ratio"):
        select([screened], sigma=0.1)
    assert select([whole], sigma=0.1).count()


def test_provenance_speaks_of_a_screen_only_where_there_is_one() -> None:
    assert Measure().provenance() == {"scoring": "exact", "weight": "paper", "site": "pre_o", "tokens": "all"}
    assert Measure(screen=0.3).provenance()["screen"] == 0.3
