"""The analyses from Python: they give what the commands write, and notebooks show it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load, make_source, make_target
from click.testing import CliRunner
from made_profiles import impact_profile
from pair import Pair, write_recipe

import mergekit_snrf as snrf
from mergekit_snrf.cli.snrf import main

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "board" / "notebook.ipynb"

# Scores that only depend on the weights.
EVALUATION = """
def scores(model, processor):
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    up, key = (next(t for n, t in weights.items() if n.endswith(end)) for end in ("up_proj.weight", "k_proj.weight"))
    return {"gain": (up.flatten()[:40] > 0).float().tolist(), "<keep>": (key.flatten()[:40] > 0).float().tolist()}

scores.roles = {"gain": "gain", "<keep>": "keep"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    make_target(path / "target", "llama", "hub")
    make_source(path / "source", "llama")
    make_source(path / "base", "llama", seed=5)
    pair = Pair(path, path / "target", path / "source", path / "mask.safetensors", snrf.NeuronSet({}))
    write_recipe(path / "snrf.yml", pair.recipe())
    (path / "evaluation.py").write_text(EVALUATION)
    make = ["mask", "random", "--model", path / "target", "--ratio", "0.4", path / "mask.safetensors"]
    assert CliRunner().invoke(main, list(map(str, make))).exit_code == 0
    mask = snrf.load_mask(path / "mask.safetensors")
    for name in ("a", "b"):
        # The strongest neuron of one is the weakest of the other.
        ranks = {
            site: torch.arange(1.0, 1 + len(one)).flip(0 if name == "a" else ()) for site, one in mask.neurons.items()
        }
        flat = impact_profile({site: 1 / rank for site, rank in ranks.items()})
        sites = {site: replace(one, max_rank=ranks[site] / one.neurons) for site, one in flat.sites.items()}
        snrf.write_profile(path / f"{name}.profile", replace(flat, sites=sites))
    return path


def written(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*map(str, words), "--quiet", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def as_json(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.model_dump_json())
    return found


def test_comparison_is_that_of_the_command(folder: Path) -> None:
    recipe, evaluation = folder / "snrf.yml", f"{folder / 'evaluation.py'}:scores"
    words = ("--rows", "random,least,linear,base", "--linear-betas", "0.5,1", "--draws", 2, "--base", folder / "base")
    expected = written("compare", recipe, "--eval", evaluation, *words, "--profile", folder / "a.profile")
    options: dict[str, Any] = {"rows": ["random", "least", "linear", "base"], "linear_betas": [1, 0.5], "draws": 2}
    options["base"] = folder / "base"
    study = snrf.compare(recipe, eval=evaluation, profile=snrf.read_profile(folder / "a.profile"), **options)
    assert as_json(study) == expected

    # The content of a recipe, a function as the evaluation, and a path.
    scope: dict[str, Any] = {"__name__": "here"}
    exec(EVALUATION, scope)
    content = yaml.safe_load(recipe.read_text())
    again = snrf.compare(content, eval=scope["scores"], profile=[folder / "a.profile"], **options)
    assert again.evaluation == "here:scores"
    assert again.settings["recipe"] == content
    assert (again.conditions, again.contrasts, again.verdict) == (study.conditions, study.contrasts, study.verdict)
    left_out = snrf.compare(content, eval=scope["scores"], linear_betas=[1], draws=1).notes
    assert [one.partition(", which")[0] for one in left_out] == [
        "Left out: the least important neurons", "Left out: the common base as source and FRANK", "Left out: RegMean",
    ]  # fmt: skip

    frame = study.to_frame()
    assert len(frame) == sum(len(one.metrics) for one in study.conditions)
    row = frame[(frame["condition"] == "random neurons") & (frame["metric"] == "gain")].iloc[0]
    (condition,) = [one for one in study.conditions if one.name == "random neurons"]
    (contrast,) = [one for one in study.contrasts if (one.right, one.metric) == ("random neurons", "gain")]
    assert condition.metrics["gain"].change is not None
    assert row["change_low"] == condition.metrics["gain"].change.low
    assert (row["mean"], row["claim_minus_it"]) == (
        condition.metrics["gain"].mean.estimate,
        contrast.difference.estimate,
    )


def test_sweep_is_that_of_the_command(folder: Path) -> None:
    recipe, evaluation = folder / "snrf.yml", f"{folder / 'evaluation.py'}:scores"
    words = ("--set", "beta=1e-1,1", "--set", "rank=2", "--linear-betas", "0.5", "--keep-drop", 100)
    expected = written("sweep", recipe, "--eval", evaluation, *words)
    options: dict[str, Any] = {"linear_betas": 0.5, "keep_drop": 100}
    file = folder / "sweep.json"
    done = snrf.sweep(recipe, evaluation, {"beta": [1.0, 0.1], "rank": 2}, json=file, **options)
    assert as_json(done) == expected == json.loads(file.read_text())
    assert yaml.safe_load((folder / "snrf.best.yml").read_text()) == done.recipe
    assert done.study is not None
    assert done.to_frame().equals(done.study.to_frame())
    assert done.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    with pytest.raises(snrf.SnrfError, match="json: cannot tell whether a function is still the same"):
        snrf.sweep(recipe, lambda model, processor: {"gain": [1.0]}, {"beta": 1}, json=file)


def test_ablation_is_that_of_the_command(folder: Path) -> None:
    target, path, evaluation = folder / "target", folder / "mask.safetensors", f"{folder / 'evaluation.py'}:scores"
    expected = written("ablate", target, "--mask", path, "--eval", evaluation, "--profile", folder / "a.profile")
    mask = snrf.load_mask(path)
    study = snrf.ablate(str(target), mask, evaluation, profile=folder / "a.profile")
    assert as_json(study) == expected
    of_set = as_json(snrf.ablate(target, mask.neurons, evaluation, profile=snrf.read_profile(folder / "a.profile")))
    assert of_set == expected | {"mask": None, "mask_sha256": None}


def test_overlap_is_that_of_the_command(folder: Path) -> None:
    a, b = folder / "a.profile", folder / "b.profile"
    expected = written("overlap", a, b, "--top-ratio", "0.6", "--curve")
    found = snrf.overlap(snrf.read_profile(a), b, top_ratio=0.6, curve=True)
    assert as_json(found) == expected
    frame = found.to_frame()
    assert frame["shared"].sum() == sum(site["shared"] for site in expected["sites"]) > 0
    # A neuron of both frames is one that both profiles select.
    of_both = (snrf.select([a], top_ratio=0.6).to_frame(), snrf.select([b], top_ratio=0.6).to_frame())
    assert len(of_both[0].merge(of_both[1])) == frame["shared"].sum()
    assert {name: found.plot(name).get_axes() != [] for name in ("overlap", "curve", "layers")}
    three = snrf.overlap(a, b, a)
    assert len(three.to_frame()) == 3 * len(frame)
    assert three.plot("layers-3").get_axes()


def test_paths_in_place_of_masks_and_profiles(folder: Path) -> None:
    path = folder / "mask.safetensors"
    target, source, mask = load(folder / "target"), load(folder / "source"), snrf.load_mask(path)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    changed = []
    for neurons in (str(path), path, mask, mask.neurons):
        with snrf.fuse_model(target, source, neurons) as edit:
            changed.append({name: tensor.clone() for name, tensor in target.state_dict().items()})
            assert "20 tensors" in edit._repr_html_() or "tensors" in edit._repr_html_()
    assert any(not torch.equal(changed[0][name], tensor) for name, tensor in before.items())
    assert all(torch.equal(one[name], tensor) for one in changed for name, tensor in changed[0].items())
    with snrf.deactivate(target, path):
        assert any(not torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items())
    snrf.write_mask(folder / "again.safetensors", mask)
    again = snrf.load_mask(folder / "again.safetensors")
    assert (again.neurons, again.provenance) == (mask.neurons, mask.provenance)
    profile = snrf.read_profile(folder / "a.profile")
    assert snrf.select(profile, top_ratio=0.1) == snrf.select([folder / "a.profile"], top_ratio=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: snrf.fuse_model("target", "source"), "model: must be a loaded model, got str"),
        (lambda m: snrf.fuse_model(m, 3), "source: must be a loaded model, a state dict or open_checkpoint.path., got"),
        (lambda m: snrf.fuse_model(m, m, 3), "neurons: must be a Mask, a NeuronSet or the path of a mask, got int"),
        (lambda m: snrf.fuse_model(m, m, fusion=0.5), "fusion: must be a Fusion, or a function from a Site to one"),
        (lambda m: snrf.fuse_model(m, m, moments=3), "moments: must be the path of a moments file, got int"),
        (lambda m: snrf.fuse_state_dict(m, m, "mask"), "target: must be a state dict, got"),
        (lambda m: snrf.load_mask(None), "path: must be a path, or hf://owner/repo@revision/path, got NoneType"),
        (lambda m: snrf.select(3, top_ratio=0.1), "profiles: must be profiles or their paths, got int"),
        (lambda m: snrf.select([3], top_ratio=0.1), "profile: must be a Profile, or the path of one, got int"),
        (lambda m: snrf.Selection.of(top_ration=0.1), "unknown key 'top_ration'; did you mean 'top_ratio'"),
        (lambda m: snrf.profile("source", []), "model: must be a loaded model, got str"),
        (lambda m: snrf.profile(m, ["3 + 4"]), "batches: must be what a processor or tokenizer returns, got str"),
        (lambda m: snrf.compare(3, eval="e.py:f"), "recipe: must be the path of a recipe, or its content as a mapping"),
        (lambda m: snrf.compare("a.yml", eval="e.py:f", drawz=1), "unknown key 'drawz'; did you mean 'draws'"),
        (lambda m: snrf.compare("a.yml", eval="e.py:f", draws=0), "draws: must be at least 1, got 0"),
        (lambda m: snrf.compare("a.yml", eval="e.py:f", rows=["x"]), "rows: 'x' is not a row; rows are random"),
        (
            lambda m: snrf.compare("a.yml", eval="e.py:f", task="x"),
            "task: has an effect on samples of evaluation tools",
        ),
        (lambda m: snrf.compare("a", "b", eval="e", from_samples=True), "eval: has an effect on a recipe only"),
        (lambda m: snrf.compare("a", {}, from_samples=True), "places: must be the folder of a run, got dict"),
        (lambda m: snrf.sweep(3, "e.py:f", {}), "recipe: must be the path of a recipe, or its content as a mapping"),
        (lambda m: snrf.compare("a.yml"), "eval: is missing; name what the models are asked"),
        (lambda m: snrf.compare("a.yml", "e.py:f"), "expected one recipe, got 2"),
        (lambda m: snrf.sweep("a.yml", "e.py:f", {}, keep_drop=-1), "keep_drop: must be at least 0.0, got -1"),
        (lambda m: snrf.ablate("target", 3, "e.py:f"), "target: "),
        (lambda m: snrf.overlap("a.profile"), "an overlap needs at least two profiles, got 1"),
    ],
)
def test_wrong_arguments_are_answered_in_a_sentence(folder: Path, call: Any, message: str) -> None:
    with pytest.raises(snrf.SnrfError, match=f"^{message}") as found:
        call(load(folder / "source"))
    assert "\n" not in str(found.value)


def test_wrong_evaluations_and_masks(folder: Path) -> None:
    with pytest.raises(snrf.SnrfError, match=r"^eval: must be a function of a model and its processor"):
        snrf.ablate(folder / "target", folder / "mask.safetensors", 3)  # type: ignore[arg-type]
    with pytest.raises(snrf.SnrfError, match=r"^mask: must be a Mask, a NeuronSet or the path of a mask, got int"):
        snrf.ablate(folder / "target", 3, "e.py:f")  # type: ignore[arg-type]
    mask = snrf.load_mask(folder / "mask.safetensors")
    with pytest.raises(snrf.SnrfError, match=r"^neurons: must be a NeuronSet, got Mask; use .neurons"):
        mask.neurons & mask  # type: ignore[operator]
    with pytest.raises(snrf.SnrfError, match=r"^figure: 'layer' is not a figure of it; did you mean 'layers'"):
        mask.plot("layer")


def test_what_notebooks_show_is_short_and_escaped(folder: Path) -> None:
    mask, profile = snrf.load_mask(folder / "mask.safetensors"), snrf.read_profile(folder / "a.profile")
    evil = "<script>alert(1)</script>"
    named = snrf.Mask(mask.neurons, mask.provenance.model_copy(update={"operation": evil}), f"/home/me/{evil}")
    overlap = snrf.overlap(profile, folder / "b.profile").model_copy(update={"names": (evil, "\u202eb")})
    study = snrf.ablate(folder / "target", mask, f"{folder / 'evaluation.py'}:scores", draws=1)
    checkpoint = snrf.open_checkpoint(str(folder / "target"))
    for one in (mask, named, mask.neurons, profile, overlap, study, checkpoint):
        assert len(repr(one)) < 200
        assert "/home/me" not in repr(one)
        assert repr(one).isprintable()
        html = one._repr_html_()
        assert "<script" not in html
        assert "\u202e" not in html
        # Every element is closed, and there is nothing but these.
        assert set(re.findall(r"<(\w+)", html)) <= {"div", "p", "b", "table", "tr", "th", "td", "details", "summary"}
        for tag in ("div", "p", "table", "td", "details"):
            assert html.count(f"<{tag}>") + html.count(f"<{tag} ") == html.count(f"</{tag}>")
    assert "&lt;script&gt;" in named._repr_html_()
    assert "&lt;keep&gt;" in study._repr_html_()
    assert str(mask.neurons.count()) in repr(mask)
    frame = profile.to_frame()
    assert len(frame) == sum(one.neurons for one in profile.sites.values())
    assert len(frame.merge(mask.to_frame())) == mask.neurons.count()
    assert profile.plot().get_axes()


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = snrf.load_mask(folder / "mask.safetensors")
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call, package in ((mask.to_frame, "pandas"), (mask.plot, "matplotlib")):
        with pytest.raises(snrf.SnrfError, match=rf"need the package {package}.*mergekit-snrf\[analysis\]"):
            call()


def test_public_names_alone_and_a_light_import() -> None:
    program = (
        "import sys, mergekit_snrf as snrf; print(*dir(snrf)); assert not {'torch', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert all(hasattr(snrf, name) for name in names)
    assert names == dir(snrf)
    assert {"compare", "overlap", "ablate", "sweep", "fuse_model", "Mask", "__version__"} <= set(names)
    assert not {"import_module", "TYPE_CHECKING", "Any", "evidence", "errors", "_PUBLIC"} & set(names)


def test_the_notebook_runs_and_its_outputs_can_be_shared() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    content = NOTEBOOK.read_text()
    assert len(content) < 300_000
    assert not re.search(r"/(home|tmp|root|work|usr)/", content)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kinds = [kinds_of(cell) for cell in notebook.cells]
    assert sum("image/png" in kind for kind in kinds) >= 3
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert [kinds_of(cell) for cell in notebook.cells] == kinds


def kinds_of(cell: Any) -> list[str]:
    """What a cell shows; without the streams of libraries."""
    return sorted({kind for output in cell.get("outputs", []) for kind in output.get("data", {})})
