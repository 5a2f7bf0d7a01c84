"""Merges with ``update: regmean`` against float64 numpy, whose F comes from the moments file itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import INTERMEDIATE, LAYERS, SOURCE_OF, WIDTH, example_inputs, load, make_source, make_target, read
from made_moments import FilterOracle, sizes_of, write_random_moments
from outputs import done, run
from pair import (
    MODULES,
    Pair,
    assert_same,
    make_neurons,
    make_pair,
    merge,
    plan,
    problem,
    refused,
    source_name,
    target_name,
)
from peft import PeftModel
from torch import Tensor

from mergekit_snrf.models.moments import read_moments
from mergekit_snrf.neurons.sites import Site

SITES = [Site(layer, projection) for layer in range(LAYERS) for projection in MODULES]
SIZES = sizes_of(LAYERS, WIDTH, INTERMEDIATE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Float32, so that what the merge rounds does not hide what it computes; with moments of three forms."""
    pair = make_pair(tmp_path_factory.mktemp("pair"), dtype=torch.float32, source_dtype=torch.float32)
    make_source(pair.folder / "source_base", "llama", dtype=torch.float32, seed=9)
    write_random_moments(pair.folder / "dense.safetensors", SIZES)
    write_random_moments(pair.folder / "few.safetensors", SIZES, tokens=WIDTH // 2)
    write_random_moments(pair.folder / "sketch.safetensors", SIZES, sketches={"attn": 16, "up": WIDTH, "down": 24})
    return pair


def recipe_of(pair: Pair, file: str = "dense", /, **parameters: Any) -> dict[str, Any]:
    """All neurons, at full rank and the defaults of regmean; `parameters` are added, and None removes one."""
    top = {"masks": None, "update": "regmean", "moments": str(pair.folder / f"{file}.safetensors"), **parameters}
    return pair.recipe(parameters=top, source={"beta": None, "rank": None})


def expected(
    pair: Pair,
    site: Site,
    oracle: FilterOracle,
    keep: float,
    *,
    beta: float = 1.0,
    rank: int = 0,
    masked: bool = False,
    base: dict[str, Tensor] | None = None,
) -> np.ndarray:
    """W_tgt + beta * M_S(trunc_r(D F)) of one tensor."""
    module, axis, count = MODULES[site.projection]
    target = read(pair.target)[target_name(site)].double().numpy()
    source = read(pair.source)[source_name(site)].double().numpy()
    under = target if base is None else base[source_name(site)].double().numpy()
    update = (source - under) @ oracle.of(site.layer, module, keep)
    if rank:
        left, values, right = np.linalg.svd(update, full_matrices=False)
        update = (left[:, :rank] * values[:rank]) @ right[:rank]
    chosen = np.ones(count, bool)
    if masked:
        chosen = pair.neurons[site].numpy() if site in pair.neurons else np.zeros(count, bool)
    return target + beta * update * (chosen[:, None] if axis == 0 else chosen)


def assert_merged(pair: Pair, merged: dict[str, Tensor], file: Path, keep: Any = 3.0, **options: Any) -> None:
    """Every projection is as numpy says, and everything else is the target's."""
    oracle, before = FilterOracle(file), read(pair.target)
    for site in SITES:
        strength = keep(site) if callable(keep) else keep
        found = merged.pop(target_name(site)).double().numpy()
        np.testing.assert_allclose(found, expected(pair, site, oracle, strength, **options), rtol=2e-4, atol=2e-5)
        before.pop(target_name(site))
    assert_same(merged, before)


def gradient(site: Site) -> float:
    return {0: 1.0, 1: 5.5, 2: 10.0}[site.layer]


@pytest.mark.parametrize(
    ("moments", "recipe", "options"),
    [
        ("dense", {}, {}),
        ("few", {"keep": 1}, {"keep": 1.0}),
        ("sketch", {"keep": 3, "beta": 0.5}, {"keep": 3.0, "beta": 0.5}),
        ("dense", {"keep": 0}, {"keep": 0.0}),
        ("dense", {"masks": True, "keep": 30}, {"masked": True, "keep": 30.0}),
        ("sketch", {"masks": True}, {"masked": True}),
        ("dense", {"rank": 5}, {"rank": 5}),
        ("sketch", {"rank": 5, "masks": True}, {"rank": 5, "masked": True}),
        ("dense", {"keep": [1, 10]}, {"keep": gradient}),
        (
            "dense",
            {"keep": [{"filter": "down_proj", "value": 0.5}, {"value": 8}]},
            {"keep": lambda site: 0.5 if site.projection == "fwd.down" else 8.0},
        ),
        ("dense", {"source_base": True, "keep": 2}, {"base": True, "keep": 2.0}),
    ],
)  # fmt: skip
def test_merge_is_that_of_numpy(
    moments: str, recipe: dict[str, Any], options: dict[str, Any], pair: Pair, tmp_path: Path
) -> None:
    paths = {"masks": str(pair.mask), "source_base": str(pair.folder / "source_base")}
    recipe = {name: paths[name] if value is True else value for name, value in recipe.items()}
    if options.pop("base", False):
        options["base"] = read(pair.folder / "source_base")
    merged = merge(recipe_of(pair, moments, **recipe), tmp_path / "merged")
    assert_merged(pair, merged, pair.folder / f"{moments}.safetensors", **options)


@pytest.mark.parametrize("moments", ["dense", "sketch"])
@pytest.mark.parametrize("parameters", [{}, {"masks": True, "keep": [0.5, 8]}, {"rank": 3}])
def test_patch_is_the_merge_to_the_bit(moments: str, parameters: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    recipe = recipe_of(pair, moments, **{k: str(pair.mask) if v is True else v for k, v in parameters.items()})
    out = done("patch", recipe, tmp_path / "patch", "--workers", "3")
    assert_same(read(out), merge(recipe, tmp_path / "merged"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_adapter_is_the_merge_of_its_rank(family: str, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", family, "hub", dtype=torch.float32)
    source = make_source(tmp_path / "source", SOURCE_OF[family], dtype=torch.float32)
    write_random_moments(tmp_path / "dense.safetensors", SIZES, sketches={"down": 20})
    pair = Pair(tmp_path, target, source, tmp_path / "none", make_neurons())
    recipe = recipe_of(pair, rank=8)
    merged = merge(recipe, tmp_path / "merged")
    out = done("lora", recipe, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load(target), out)
    unloaded = adapted.merge_and_unload()
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    loaded = load(tmp_path / "merged")
    for name, tensor in unloaded.state_dict().items():
        torch.testing.assert_close(tensor, loaded.state_dict()[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        inputs = example_inputs(target)
        torch.testing.assert_close(unloaded(**inputs).logits, loaded(**inputs).logits, rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(tensor, read(target)[name]) for name, tensor in merged.items())


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    write_random_moments(tmp_path / "dense.safetensors", SIZES)
    merged, oracle = merge(recipe_of(pair), tmp_path / "merged"), FilterOracle(tmp_path / "dense.safetensors")
    for site in SITES:
        exact = expected(pair, site, oracle, 3.0)
        found = merged[target_name(site)]
        assert found.dtype == torch.bfloat16
        # Half a unit in the last place of eight bits, and a little for what is near the middle.
        np.testing.assert_allclose(found.double().numpy(), exact, rtol=2**-8 * 1.01, atol=2e-5)


def test_plan_says_what_is_read_and_reads_no_moment(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_snrf.models.moments.Moments.moment", lambda *a: pytest.fail("a moment was read"))
    draft = plan(recipe_of(pair, keep=[1, 10]))
    assert (draft.problems, draft.warnings) == ([], [])
    found = draft.finish()
    assert len(found.edits) == len(SITES)
    assert {edit.fusion.keep for edit in found.edits} == {1.0, 5.5, 10.0}
    assert {(edit.fusion.beta, edit.fusion.rank) for edit in found.edits} == {(1.0, 0)}
    assert all(bool(edit.member.all()) for edit in found.edits)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"moments": None}, "moments"),
        ({"moments": "absent.safetensors"}, None),
        ({"keep": -1}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"keep": "auto"}, "keep"),
        ({"drop_rate": 0.2}, "drop_rate"),
        ({"rescale": False}, "rescale"),
        ({"seed": 3}, "seed"),
        ({"biases": True}, "biases"),
        ({"update": "dare", "keep": None, "masks": True}, "moments"),
        ({"update": None, "masks": True, "moments": None, "keep": 3}, "keep"),
        ({"update": None, "keep": None, "moments": None}, "masks"),
        ({"rank": WIDTH + 1}, "rank"),
    ],
)
def test_mistakes_in_a_recipe(parameters: dict[str, Any], field: str | None, pair: Pair) -> None:
    masks = {"masks": str(pair.mask)} if parameters.get("masks") else {}
    found = problem(recipe_of(pair, **{**parameters, **masks}))
    assert field is None or field in str(found.field), found


@pytest.mark.parametrize(
    ("sizes", "own", "named"),
    [
        (sizes_of(LAYERS - 1, WIDTH, INTERMEDIATE), {}, "layers"),
        (sizes_of(LAYERS + 1, WIDTH, INTERMEDIATE), {}, "layers"),
        (sizes_of(LAYERS, WIDTH // 2, INTERMEDIATE), {}, "layers.0.attn"),
        (sizes_of(LAYERS, WIDTH, INTERMEDIATE + 1), {}, "layers.0.down"),
        (SIZES, {"keep": []}, "without probes to keep"),
    ],
)
def test_moments_of_another_model_stop_the_merge_before_the_first_byte(
    sizes: Any, own: dict[str, Any], named: str, pair: Pair, tmp_path: Path
) -> None:
    other = write_random_moments(tmp_path / "other.safetensors", sizes, **own)
    recipe = recipe_of(pair, moments=str(other))
    found = problem(recipe)
    assert str(other) in str(found.where)
    assert named in str(found)
    (line,) = refused(recipe, tmp_path / "merged")
    assert named in line
    assert run("patch", recipe, tmp_path / "patched").exit_code == 1
    assert not (tmp_path / "patched").exists()


def test_moments_of_other_weights_are_a_warning(pair: Pair, tmp_path: Path) -> None:
    other = write_random_moments(
        tmp_path / "other.safetensors", SIZES, model={"path": "org/other", "config_sha256": "0" * 64}
    )
    recipe = recipe_of(pair, moments=str(other))
    draft = plan(recipe)
    assert draft.problems == []
    (warning,) = draft.warnings
    assert "org/other" in warning


def test_damaged_values_stop_a_patch_and_leave_nothing(pair: Pair, tmp_path: Path) -> None:
    other = write_random_moments(tmp_path / "other.safetensors", SIZES)
    found = read_moments(other)
    raw = bytearray(other.read_bytes())
    # The data end with the last correlations, of the widest input; all bits set are NaN.
    raw[-100:] = b"\xff" * 100
    other.write_bytes(raw)
    assert not found.sketches
    recipe = recipe_of(pair, moments=str(other))
    result = run("patch", recipe, tmp_path / "patched")
    assert result.exit_code == 1
    assert "NaN" in result.output
    assert not (tmp_path / "patched").exists()
