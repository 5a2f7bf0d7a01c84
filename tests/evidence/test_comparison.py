"""The merges of `snrf compare` against mergekit's own folders and float64 numpy, its table against hand and numpy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import INTERMEDIATE, LAYERS, WIDTH, load, make_source, make_target, read
from click.testing import CliRunner
from made_moments import FilterOracle, sizes_of, write_random_moments
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from pair import Pair, write_recipe
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.compare import CLAIM, TARGET, Controls, comparison_rows
from mergekit_snrf.evidence.controls import Merge
from mergekit_snrf.evidence.evaluation import Evaluation
from mergekit_snrf.evidence.options import ComparisonOptions
from mergekit_snrf.evidence.recipes import OpenedRecipe, open_base, open_recipe
from mergekit_snrf.evidence.study import Row, Setup, run_study
from mergekit_snrf.merge import install
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.moments import read_moments
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site

# What a neuron is, written down here: the oracle does not take it from the package.
MODULES = {
    "attn.q": ("self_attn.q_proj", 0),
    "attn.k": ("self_attn.k_proj", 0),
    "attn.v": ("self_attn.v_proj", 0),
    "fwd.up": ("mlp.up_proj", 0),
    "fwd.down": ("mlp.down_proj", 1),
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # top-level parameters, the source's parameters, the recipe's other entries
    "plain": ({}, {}, {}),
    "biases": ({"biases": True}, {}, {}),
    "filters": (
        {"biases": True},
        {
            "beta": [
                {"filter": "k_proj.bias", "value": 0},
                {"filter": "q_proj.weight", "value": 0},
                {"filter": "mlp", "value": [0.2, 1]},
                {"value": 0.7},
            ]
        },
        {},
    ),
    "source_base": ({"source_base": "base"}, {"rank": 0}, {}),
    "dare": ({"update": "dare", "seed": 5}, {"rank": None, "drop_rate": 0.3}, {}),
    "order": ({"order": "mask-then-svd"}, {}, {}),
    "dtype": ({}, {}, {"dtype": "float32"}),
    "regmean": ({"update": "regmean", "masks": None}, {"beta": None, "rank": None, "keep": 2.0}, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with biases, its source, their base, and a mask of a third of the neurons that leaves out one site."""
    folder = tmp_path_factory.mktemp("models")
    make_target(folder / "target", "qwen2_5_vl", "hub")
    make_source(folder / "source", "qwen2")
    make_source(folder / "base", "qwen2", seed=7)
    shape = find_decoder(open_checkpoint(str(folder / "target"))).shape
    generator = torch.Generator().manual_seed(3)
    members = {s: torch.rand(shape.neurons(s.projection), generator=generator) < 1 / 3 for s in shape.sites()}
    members[Site(1, "attn.v")][:] = False
    write_mask(folder / "mask.safetensors", NeuronSet(members))
    write_random_moments(folder / "moments.safetensors", sizes_of(LAYERS, WIDTH, INTERMEDIATE))
    return folder


def recipe(folder: Path, variant: str = "plain", **changes: Any) -> dict[str, Any]:
    top, source, other = copy.deepcopy(VARIANTS[variant])
    if "source_base" in top:
        top["source_base"] = str(folder / "base")
    if top.get("update") == "regmean":
        top["moments"] = str(folder / "moments.safetensors")
    pair = Pair(folder, folder / "target", folder / "source", folder / "mask.safetensors", NeuronSet({}))
    return pair.recipe(parameters=top, source={"beta": 0.7, "rank": 3, **source, **changes}, **other)


def opened(folder: Path, variant: str = "plain", **changes: Any) -> OpenedRecipe:
    return open_recipe(MergeConfiguration.model_validate(recipe(folder, variant, **changes)), MergeOptions(), None)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_by(merge: Any, model: Any) -> dict[str, Tensor]:
    """The weights while the merge is applied; that they are put back is checked on the way."""
    before = weights(model)
    with merge(model):
        after = weights(model)
    assert_same(weights(model), before)
    return after


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)
    ]
    assert not different


def arrays(folder: Path, site: Site) -> np.ndarray:
    """A projection of a checkpoint, one neuron a row, in float64."""
    module, axis = MODULES[site.projection]
    tensors = read(folder)
    (name,) = [n for n in tensors if n.endswith(f"layers.{site.layer}.{module}.weight") and "visual" not in n]
    array = tensors[name].double().numpy()
    return array if axis == 0 else array.T


def live(state: dict[str, Tensor], site: Site) -> np.ndarray:
    module, axis = MODULES[site.projection]
    (name,) = [n for n in state if n.endswith(f"layers.{site.layer}.{module}.weight") and "visual" not in n]
    array = state[name].double().numpy()
    return array if axis == 0 else array.T


def rows_of(folder: Path, model: Any, variant: str = "plain", **options: Any) -> dict[str, Row]:
    return {row.name: row for row in comparison_rows(opened(folder, variant).merge, model, controls(**options))}


def controls(**options: Any) -> Controls:
    needed = {name: options.pop(name) for name in ("least", "base", "moments", "frank") if name in options}
    return Controls(ComparisonOptions(**options), **needed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_claim_is_the_folder_that_mergekit_yaml_writes(variant: str, folder: Path, tmp_path: Path) -> None:
    install()
    path = write_recipe(tmp_path / "snrf.yml", recipe(folder, variant))
    result = CliRunner().invoke(mergekit_yaml, [str(path), str(tmp_path / "merged"), "--quiet"])
    assert result.exit_code == 0, result.output
    found = opened(folder, variant)
    target = load(folder / "target", dtype=found.dtype)
    merged = weights(load(tmp_path / "merged"))
    assert_same(changed_by(found.merge, target), merged)
    changed = {name for name, tensor in weights(target).items() if not torch.equal(tensor, merged[name])}
    if variant == "filters":
        assert any(name.endswith("q_proj.bias") for name in changed)
        assert not any(name.endswith(("k_proj.bias", "q_proj.weight")) for name in changed)
    else:
        assert any(name.endswith(".bias") for name in changed) == (variant == "biases")


def test_a_recipe_of_a_narrower_dtype_rounds_the_models_as_they_are_read(folder: Path, tmp_path: Path) -> None:
    install()
    make_target(tmp_path / "target", "qwen2_5_vl", "hub", dtype=torch.float32)
    make_source(tmp_path / "source", "qwen2", dtype=torch.float32)
    changed = recipe(folder, "biases") | {"dtype": "bfloat16", "base_model": str(tmp_path / "target")}
    changed["models"][0]["model"] = str(tmp_path / "source")
    path = write_recipe(tmp_path / "snrf.yml", changed)
    result = CliRunner().invoke(mergekit_yaml, [str(path), str(tmp_path / "merged"), "--quiet"])
    assert result.exit_code == 0, result.output
    found = open_recipe(MergeConfiguration.model_validate(changed), MergeOptions(), None)
    assert found.dtype == "bfloat16"
    model = load(tmp_path / "target", dtype=torch.bfloat16)
    assert_same(changed_by(found.merge, model), weights(load(tmp_path / "merged")))
    base = open_base(str(tmp_path / "source"), found, MergeOptions())
    assert base.weight(Site(0, "attn.k")).dtype == torch.bfloat16
    assert open_base(str(folder / "base"), opened(folder), MergeOptions()).weight(Site(0, "attn.k")).dtype == (
        torch.bfloat16
    )


def test_an_out_dtype_that_the_comparison_does_not_make_is_said(folder: Path) -> None:
    changed = recipe(folder) | {"dtype": "float32", "out_dtype": "bfloat16"}
    found = open_recipe(MergeConfiguration.model_validate(changed), MergeOptions(), None)
    assert found.dtype == "float32"
    assert "out_dtype bfloat16 rounds the merged folder once more; the comparison is made in float32" in found.warnings


def test_linear_rows_are_the_linear_merge(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    before = weights(model)
    rows = rows_of(folder, model, rows=["linear"], linear_betas=(0.25, 1.0))
    assert [row.strength for row in rows.values() if row.strength is not None] == [0.25, 1.0]
    for beta in (0.25, 1.0):
        row = rows[f"linear, beta {beta:g}"]
        (merge,) = row.draws
        after = changed_by(merge, model)
        touched = set()
        for layer in range(len({site.layer for site in merge.neurons})):
            for projection, (module, _) in MODULES.items():
                site = Site(layer, projection)
                target, source = arrays(folder / "target", site), arrays(folder / "source", site)
                np.testing.assert_allclose(live(after, site), target + beta * (source - target), rtol=0, atol=1e-6)
                touched |= {n for n in after if n.endswith(f"language_model.layers.{layer}.{module}.weight")}
        assert {name for name in after if not torch.equal(after[name], before[name])} == touched
        assert row.neurons == sum(len(live(after, site)) for site in merge.neurons)


def test_linear_moves_all_biases_where_the_recipe_moves_any(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    (merge,) = rows_of(folder, model, "biases", rows=["linear"], linear_betas=(0.5,))["linear, beta 0.5"].draws
    after = changed_by(merge, model)
    target, source = read(folder / "target"), read(folder / "source")
    names = [name for name in source if name.endswith("_proj.bias")]
    assert names
    for name in names:
        (mine,) = [n for n in target if n.endswith(name) and "visual" not in n]
        (found,) = [n for n in after if n.endswith(f"language_model.{name.removeprefix('model.')}")]
        torch.testing.assert_close(after[found], (target[mine].float() + source[name].float()) / 2)


def test_random_rows_move_the_neurons_of_their_seeds_only(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    before = weights(model)
    merge = opened(folder).merge
    row = rows_of(folder, model, rows=["random"], draws=2, seed=2**32 - 1)["random neurons"]
    assert row.settings["seeds"] == [2**32 - 1, 0]
    for drawn, seed in zip(row.draws, (2**32 - 1, 0), strict=True):
        assert drawn.neurons == merge.neurons.random(seed)
        after = changed_by(drawn, model)
        for site, member in merge.neurons.random(seed).items():
            differ = (live(after, site) != live(before, site)).any(axis=1)
            assert differ.tolist() == member.tolist()


def test_equal_norm_rows_have_the_norm_of_the_claim_at_every_site(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    before = weights(model)
    rows = rows_of(folder, model, rows=["random", "equal-norm"], draws=2)
    claim = changed_by(rows[CLAIM].draws[0], model)
    row = rows["random neurons, equal norm"]
    above = 0
    for scaled, plain in zip(row.draws, rows["random neurons"].draws, strict=True):
        after, unscaled = changed_by(scaled, model), changed_by(plain, model)
        assert scaled.neurons == plain.neurons
        for site in plain.neurons:
            wanted = np.linalg.norm(live(claim, site) - live(before, site))
            step, other = live(after, site) - live(before, site), live(unscaled, site) - live(before, site)
            assert np.linalg.norm(step) == pytest.approx(wanted, rel=1e-4)
            factor = wanted / np.linalg.norm(other)
            np.testing.assert_allclose(step, factor * other, atol=1e-5)
            above += 0.7 * factor > 1
    assert row.settings["sites_above_beta_1"] == above
    assert row.settings["beta"][0] < 0.7 < row.settings["beta"][1]


def test_dare_rows_drop_elements_and_rescale_the_rest(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    row = rows_of(folder, model, rows=["dare"], draws=2, drop_rate=0.75)["DARE, drop rate 0.75"]
    kept = []
    for drawn in row.draws:
        after = changed_by(drawn, model)
        for site, member in opened(folder).merge.neurons.items():
            target, source = arrays(folder / "target", site), arrays(folder / "source", site)
            step = (live(after, site) - target)[member.numpy()]
            full = 0.7 / 0.25 * (source - target)[member.numpy()]
            stays = np.abs(step - full) < 1e-5
            assert (stays | (step == 0)).all()
            kept.append(stays.mean())
    assert np.mean(kept) == pytest.approx(0.25, abs=0.01)
    first, second = (changed_by(drawn, model) for drawn in row.draws)
    assert not np.array_equal(live(first, Site(0, "fwd.up")), live(second, Site(0, "fwd.up")))


@pytest.mark.parametrize("variant", ["plain", "source_base"])
def test_base_row_moves_the_same_neurons_towards_the_base(variant: str, folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    found = opened(folder, variant, rank=0)
    base = open_base(str(folder / "base"), found, MergeOptions())
    rows = {row.name: row for row in comparison_rows(found.merge, model, controls(rows=["base"], base=base))}
    after = changed_by(rows["base as source"].draws[0], model)
    for site, member in found.merge.neurons.items():
        target, other = arrays(folder / "target", site), arrays(folder / "base", site)
        expected = target + 0.7 * (other - target) * member.numpy()[:, None]
        np.testing.assert_allclose(live(after, site), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["biases", "source_base"])
def test_frank_rows_move_each_layer_by_its_strength(variant: str, folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    strengths = [0.9, 0.2, 0.5]
    rows = rows_of(folder, model, variant, rows=["frank"], frank=strengths)
    assert list(rows) == [TARGET, CLAIM, "FRANK", "FRANK, all neurons"]
    neurons = opened(folder, variant).merge.neurons
    for name, masked in (("FRANK", True), ("FRANK, all neurons", False)):
        after = changed_by(rows[name].draws[0], model)
        for site, member in neurons.items():
            target, source = arrays(folder / "target", site), arrays(folder / "source", site)
            moved = member.numpy()[:, None] if masked else 1
            expected = target + strengths[site.layer] * (source - target) * moved
            np.testing.assert_allclose(live(after, site), expected, rtol=0, atol=1e-6)
        moved_biases = [
            n for n, one in after.items() if n.endswith("bias") and not torch.equal(one, model.state_dict()[n])
        ]
        assert bool(moved_biases) == (variant == "biases")


def test_regmean_rows_are_numpys_at_every_keep(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    base = open_base(str(folder / "base"), opened(folder), MergeOptions())
    oracle = FilterOracle(folder / "moments.safetensors")
    moments = read_moments(folder / "moments.safetensors")
    rows = rows_of(folder, model, rows=["regmean", "base"], base=base, moments=moments, keeps=(0.5, 4.0))
    expected = [f"{name}, keep {keep}" for name in ("regmean", "regmean from base") for keep in ("4", "0.5")]
    assert list(rows) == [TARGET, CLAIM, *expected]
    for name, source in (("regmean, keep 0.5", "source"), ("regmean from base, keep 4", "base")):
        after = changed_by(rows[name].draws[0], model)
        for site in opened(folder).merge.shape.sites():
            module, axis = MODULES[site.projection]
            target, other = (arrays(folder / one, site) for one in ("target", source))
            delta = other - target if axis == 0 else (other - target).T
            update = delta @ oracle.of(site.layer, module, rows[name].strength or 0.0)
            np.testing.assert_allclose(live(after, site), target + (update if axis == 0 else update.T), atol=2e-6)


def test_a_regmean_recipe_is_a_point_of_its_curve(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    base = open_base(str(folder / "base"), opened(folder), MergeOptions())
    rows = rows_of(folder, model, "regmean", base=base, draws=1, linear_betas=(1.0,), keeps=(1.0, 2.0))
    assert list(rows) == [
        TARGET, "regmean, keep 2", "linear, beta 1", "regmean, keep 1", "regmean from base, keep 2",
        "regmean from base, keep 1", "DARE, drop rate 0.5",
    ]  # fmt: skip
    assert (rows["regmean, keep 2"].role, rows["regmean, keep 2"].strength) == ("claim", 2.0)
    norms = opened(folder, "regmean").merge.norms(model)
    before, after = weights(model), changed_by(rows["regmean, keep 2"].draws[0], model)
    for site, norm in norms.items():
        assert norm == pytest.approx(np.linalg.norm(live(after, site) - live(before, site)), rel=1e-4)


def test_rows_are_left_out_for_want_of_what_they_need(folder: Path) -> None:
    model = load(folder / "target")
    least = opened(folder).merge.neurons.random(11)
    assert list(rows_of(folder, model, rows=["least", "base"])) == [TARGET, CLAIM]
    rows = rows_of(folder, model, rows=["least"], least=least)
    assert rows["least important neurons"].draws[0].neurons == least


def test_a_base_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    make_source(tmp_path / "other", "qwen2", decoder={"intermediate_size": 80})
    with pytest.raises(SnrfError, match=r"base: .*intermediate size"):
        open_base(str(tmp_path / "other"), opened(folder), MergeOptions())
    make_source(tmp_path / "llama", "llama")
    with pytest.raises(SnrfError, match=r"base: .*family"):
        open_base(str(tmp_path / "llama"), opened(folder), MergeOptions())


def test_an_overflow_leaves_the_model_as_it_was(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float16)
    before = weights(model)
    merge = opened(folder).merge
    last = list(merge.fusions)[-1]
    scaled = Merge(**{**vars(merge), "betas": {site: 1e9 if site == last else 1.0 for site in merge.fusions}})
    with pytest.raises(SnrfError, match=r"dtype: the fused weights overflow torch.float16; use float32"):
        scaled(model)
    assert_same(weights(model), before)


def probe(model: Any, processor: Any) -> dict[str, list[float]]:
    """Scores that tell the models apart: how far the weights are from zero."""
    total = float(sum(tensor.double().abs().sum() for name, tensor in model.state_dict().items() if "layers" in name))
    return {"R": [total, total + 1], "P": [1.0, 0.0]}


def test_compare_asks_every_row_and_restores_the_target(folder: Path) -> None:
    model = load(folder / "target", dtype=torch.float32)
    before = weights(model)
    of_rows = controls(rows=["random", "linear"], draws=2, linear_betas=(0.5,))
    rows = comparison_rows(opened(folder).merge, model, of_rows)
    setup = Setup("comparison", "T", "probe", "m", settings={"x": 1})
    study = run_study(setup, rows, model, None, Evaluation("probe", probe, {"P": "keep"}))
    assert_same(weights(model), before)
    by_name = {condition.name: condition for condition in study.conditions}
    assert list(by_name) == [TARGET, CLAIM, "random neurons", "linear, beta 0.5", "linear at equal P"]
    assert (study.model, study.mask, study.evaluation, study.settings["x"]) == ("T", "m", "probe", 1)
    assert study.roles == {"R": "gain", "P": "keep"}
    assert by_name["random neurons"].draws == 2
    for row in rows:
        expected = []
        for draw in row.draws or (None,):
            if draw is not None:
                draw(model)
            expected.append(np.mean(probe(model, None)["R"]))
            model.load_state_dict(before)
        assert by_name[row.name].metrics["R"].mean.estimate == pytest.approx(np.mean(expected), rel=1e-12)
        assert len(by_name[row.name].settings.get("means", {}).get("R", [0])) == max(1, len(row.draws))
    assert {contrast.right for contrast in study.contrasts} == {"random neurons", "linear at equal P"}
