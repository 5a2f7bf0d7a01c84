"""`snrf compare` as users run it: the board pair against its merged folder, and refusals before a model is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_source
from click.testing import CliRunner, Result
from made_profiles import impact_profile
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.evidence.evaluation import evaluate, load_evaluation
from mergekit_snrf.evidence.results import Study, read_result
from mergekit_snrf.merge import install
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.maskfile import read_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site
from mergekit_snrf.profiling.result.profilefile import write_profile

ROOT = Path(__file__).resolve().parents[2]
BOARD = ROOT / "examples" / "board"
EVAL = f"{BOARD / 'evaluation.py'}:board?n=6&batch_size=6"


def profile_of(neurons: NeuronSet, path: Path, missing: int = 0) -> Path:
    """A profile in which a neuron's impact is its index."""
    impacts = {site: torch.arange(len(member) - missing) for site, member in neurons.items()}
    write_profile(path, impact_profile(impacts))
    return path


def test_the_table_on_the_board_pair(tmp_path: Path) -> None:
    mask = read_mask(ROOT / "neuron_masks" / "board.safetensors")
    profile = profile_of(mask.neurons, tmp_path / "board.profile.safetensors")
    out = tmp_path / "study.json"
    words = (
        "compare", BOARD / "snrf.yml", "--eval", EVAL, "--base", BOARD / "base", "--profile", profile,
        "--draws", "2", "--seed", "4", "--linear-betas", "0.5,1.0", "--rival", BOARD / "regmean.yml", "--json", out,
    )  # fmt: skip
    command = [Path(sys.executable).with_name("snrf"), *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    study = read_result(out)
    assert isinstance(study, Study)
    rows = {condition.name: condition for condition in study.conditions}
    assert list(rows) == [
        "target", "SNRF", "random neurons", "random neurons, equal norm", "least important neurons",
        "linear, beta 0.5", "linear, beta 1", "linear at equal P", "DARE, drop rate 0.5", "FRANK",
        "FRANK, all neurons", "base as source", "recipe regmean",
    ]  # fmt: skip
    assert [
        (rows[name].role, rows[name].neurons, rows[name].draws) for name in ("target", "SNRF", "random neurons")
    ] == [
        ("reference", 0, 1),
        ("claim", mask.neurons.count(), 1),
        ("control", mask.neurons.count(), 2),
    ]
    assert rows["random neurons"].settings["seeds"] == [4, 5]
    assert rows["recipe regmean"].settings["update"] == ["regmean"]
    assert study.items == {"R": 12, "P": 18}
    assert study.roles == {"R": "gain", "P": "keep"}
    for name in rows:
        assert f"\n{name}" in result.stdout
        assert name in result.stderr or name in ("target", "linear at equal P")
    assert all(sentence in result.stdout for sentence in study.verdict)
    assert "too narrow" in result.stdout

    install()
    merged = CliRunner().invoke(mergekit_yaml, [str(BOARD / "snrf.yml"), str(tmp_path / "merged"), "--quiet"])
    assert merged.exit_code == 0, merged.output
    for name, folder in (("SNRF", tmp_path / "merged"), ("target", BOARD / "target")):
        scores = evaluate(load_evaluation(EVAL), *load_model(ModelRef(model=str(folder), device="cpu"), images=None))
        for metric, items in scores.items():
            assert rows[name].metrics[metric].mean.estimate == pytest.approx(items.mean)
            assert rows[name].metrics[metric].malformed == items.malformed_rate


def test_samples_of_lmms_eval(tmp_path: Path) -> None:
    for name, right in (("before", 10), ("after", 30)):
        (tmp_path / name).mkdir()
        lines = [{"doc_id": n, "exact_match": float(n < right), "other": "x"} for n in range(40)]
        path = tmp_path / name / "20260101_000000_samples_scienceqa_img.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "study.json"
    result = compare("--from", tmp_path / "before", tmp_path / "after", "--json", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"^before +25\.0 \[", result.stdout, re.MULTILINE)
    assert re.search(r"^after +75\.0 \[.*\+50\.0 \[", result.stdout, re.MULTILINE)
    assert "after raises scienceqa_img/exact_match by 50.0 [" in result.stdout
    study = read_result(out)
    assert isinstance(study, Study)
    assert study.kind == "comparison"
    assert study.roles == {"scienceqa_img/exact_match": "gain"}
    older = tmp_path / "after" / "20251231_000000_samples_scienceqa_img.jsonl"
    older.write_text((tmp_path / "before" / "20260101_000000_samples_scienceqa_img.jsonl").read_text())
    words = ("--from", tmp_path / "before", tmp_path / "after", "--keep", "scienceqa_img", "--quiet")
    again = compare(*words, "--json", out)
    assert (again.exit_code, again.stderr) == (0, "")
    note = (
        "after has 2 runs of scienceqa_img; the newest by its name counts, 20260101_000000_samples_scienceqa_img.jsonl."
    )
    assert again.stdout.endswith(f"\n{note}\n")
    kept = read_result(out)
    assert isinstance(kept, Study)
    assert kept.roles == {"scienceqa_img/exact_match": "keep"}
    assert kept.conditions == study.conditions
    message = refused("--from", tmp_path / "before", tmp_path)
    assert message.startswith(f"{tmp_path}: holds samples of scienceqa_img in several folders")


def compare(*words: str | Path) -> Result:
    return CliRunner().invoke(snrf, ["compare", *map(str, words)])


def refused(*words: str | Path) -> str:
    result = compare(*words)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("Error: ").strip()


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mergekit_snrf.models.loading.load_model", load)


@pytest.mark.usefixtures("no_model")
def test_everything_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    recipe = BOARD / "snrf.yml"
    mask = read_mask(ROOT / "neuron_masks" / "board.safetensors")
    short = profile_of(mask.neurons, tmp_path / "short.safetensors", missing=1)
    partial = profile_of(
        NeuronSet({Site(0, "attn.k"): mask.neurons[Site(0, "attn.k")]}), tmp_path / "partial.safetensors"
    )
    other = make_source(tmp_path / "other", "llama")
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(recipe.read_text().replace("beta: 1.0", "betta: 1.0").replace("rank: 16", "rank: -1"))
    for words, text in (
        ((recipe,), "--eval: is missing"),
        ((recipe, recipe, "--eval", EVAL), "expected one recipe, got 2"),
        ((tmp_path / "none.yml", "--eval", EVAL), f"{tmp_path}/none.yml: cannot be read"),
        ((wrong, "--eval", EVAL), "the merge cannot run, there are "),
        ((recipe, "--eval", "none.py:f"), "none.py:f: there is no file none.py"),
        (
            (recipe, "--eval", EVAL, "--rows", "linear,other"),
            "--rows: 'other' is not a row; rows are",
        ),
        ((recipe, "--eval", EVAL, "--linear-betas", "0.5,x"), "--linear-betas: '0.5,x' is not a list of numbers"),
        ((recipe, "--eval", EVAL, "--linear-betas", "0,1"), "--linear-betas: '0,1' has a number that is not above 0"),
        ((recipe, "--eval", EVAL, "--profile", short), f"{short}: has "),
        ((recipe, "--eval", EVAL, "--profile", partial), f"{partial}: has 0 neurons at"),
        ((recipe, "--eval", EVAL, "--base", tmp_path / "none"), f"{tmp_path}/none"),
        ((recipe, "--eval", EVAL, "--base", other), f"{other}: --base: does not fit in place of the source: "),
        ((recipe, "--eval", EVAL, "--json", tmp_path / "none" / "x"), f"{tmp_path}/none/x: cannot be written"),
        ((recipe, "--eval", EVAL, "--keep", "P"), "--keep: has an effect on samples of evaluation tools only"),
        ((tmp_path, tmp_path, "--from", "--draws", "2"), "--draws: has an effect on a recipe only"),
    ):
        message = refused(*words)
        assert message.startswith(text), message
    with pytest.raises(AssertionError, match="a model was loaded"):
        CliRunner().invoke(snrf, ["compare", str(recipe), "--eval", EVAL], catch_exceptions=False)


def test_rows_that_lack_something_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = f"{BOARD / 'evaluation.py'}:board?n=2"
    load = load_evaluation

    def without_roles(reference: str) -> Any:
        return type(load(reference))(reference, load(reference).function)

    monkeypatch.setattr("mergekit_snrf.evidence.comparison.load_evaluation", without_roles)
    words = ["compare", str(BOARD / "snrf.yml"), "--eval", gains, "--quiet", "--linear-betas", "1.0", "--draws", "1"]
    result = CliRunner().invoke(snrf, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Left out: ") == 4
    assert "Left out: the least important neurons, which need the option profile" in result.stdout
    assert "Left out: the common base as source and FRANK, which need the option base" in result.stdout
    assert "Left out: RegMean, which needs the option moments" in result.stdout
    assert "Left out: linear at equal perception, which needs a metric of the role keep" in result.stdout
    assert "linear, beta 1" in result.stdout
    for row, needed in (("least", "profile"), ("base", "base"), ("regmean", "moments")):
        result = CliRunner().invoke(snrf, [*words, "--rows", row])
        assert result.exit_code == 1
        assert f"--rows: the row {row} needs the option {needed}" in result.output
