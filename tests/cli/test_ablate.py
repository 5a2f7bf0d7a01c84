"""``snrf ablate`` as a user runs it, on the board pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_target
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText, AutoProcessor

from mergekit_snrf.analysis import evaluation
from mergekit_snrf.analysis.results import Study, read_result
from mergekit_snrf.cli.snrf import main
from mergekit_snrf.maskfile import ModelProvenance, read_mask, write_mask
from mergekit_snrf.neurons import NeuronSet, Site
from mergekit_snrf.profilefile import EDGES, Profile, ProfileProvenance, SiteProfile, write_profile

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "examples" / "board"
MODULES = {"attn.k": "self_attn.k_proj", "fwd.down": "mlp.down_proj"}
SIZES = {"attn.k": 64, "fwd.down": 384}
N = 30


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough neurons of two projections that the target loses something."""
    members = {Site(layer, name): torch.arange(size) % 3 == 0 for layer in (1, 2) for name, size in SIZES.items()}
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    write_mask(path, NeuronSet(members))
    return path


def a_profile(path: Path, config_sha256: str | None = None, **sizes: int) -> Path:
    sites = {}
    for layer in (1, 2):
        for name, size in {**SIZES, **sizes}.items():
            impact = torch.from_numpy(np.random.default_rng(layer).random(size).astype(np.float32))
            hits = torch.zeros(size, len(EDGES), dtype=torch.int32)
            hits[:, -1] = 1
            sites[Site(layer, name)] = SiteProfile(impact, torch.ones(size), impact, hits)
    provenance = ProfileProvenance(model=ModelProvenance(path="other", config_sha256=config_sha256))
    write_profile(path, Profile(sites, 1, provenance))
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).parent / "snrf"), "ablate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def scores_by_hand(mask: NeuronSet) -> tuple[float, float]:
    """R and P of the target whose weights are zeroed one by one, scored by the example's own script."""
    sys.path.append(str(BOARD))
    from board_scores import evaluate

    model = AutoModelForImageTextToText.from_pretrained(BOARD / "target", dtype=torch.float32).eval()
    with torch.no_grad():
        for neuron in mask.neurons():
            layer = model.model.language_model.layers[neuron.site.layer]
            weight = layer.get_submodule(MODULES[neuron.site.projection]).weight
            if neuron.site.projection == "fwd.down":
                weight[:, neuron.index] = 0
            else:
                weight[neuron.index] = 0
    result = evaluate(model, AutoProcessor.from_pretrained(BOARD / "target"), N)
    return result.reasoning / 100, result.perception / 100


def test_the_command_reports_what_a_model_zeroed_by_hand_scores(mask: Path, tmp_path: Path) -> None:
    reference = f"examples/board/evaluation.py:board?n={N}"
    profile = a_profile(tmp_path / "profile.safetensors")
    arguments = ("examples/board/target", "--mask", mask, "--eval", reference, "--profile", profile, "--draws", "2")
    options = ("--seed", "3", "--dtype", "float32", "--device", "cpu", "--json", tmp_path / "study.json", "--quiet")
    done = run(*arguments, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    study = read_result(tmp_path / "study.json")
    assert isinstance(study, Study)
    neurons = read_mask(mask).neurons
    by_name = {condition.name: condition for condition in study.conditions}
    random = [scores_by_hand(neurons.random(seed)) for seed in (3, 4)]
    impact = {site: np.random.default_rng(site.layer).random(len(member)) for site, member in neurons.items()}
    least = NeuronSet(
        {
            site: torch.from_numpy(impact[site].argsort().argsort() < int(member.sum()))
            for site, member in neurons.items()
        }
    )
    expected = {
        "as it is": scores_by_hand(NeuronSet({})),
        "masked neurons": scores_by_hand(neurons),
        "random neurons": tuple(np.mean(random, axis=0)),
        "least important neurons": scores_by_hand(least),
    }
    for name, values in expected.items():
        found = [by_name[name].metrics[metric].mean.estimate for metric in ("R", "P")]
        assert found == pytest.approx(values), name
    assert expected["masked neurons"] != expected["as it is"]
    assert (study.items, study.roles) == ({"R": 2 * N, "P": 3 * N}, {"R": "gain", "P": "keep"})
    assert (study.kind, study.model, study.evaluation, study.seed) == (
        "ablation",
        "examples/board/target",
        reference,
        3,
    )
    assert study.settings["dtype"] == "float32"
    assert by_name["as it is"].metrics["R"].malformed is not None
    assert by_name["as it is"].metrics["P"].malformed is None
    # The table shows the study's numbers, and the verdict stands below it.
    for condition in study.conditions:
        for value in condition.metrics.values():
            assert f"{100 * value.mean.estimate:.1f} [{100 * value.mean.low:.1f}, " in done.stdout
    assert all(sentence in done.stdout for sentence in study.verdict)
    assert len(study.verdict) >= 6
    assert "--profile" not in done.stdout


def test_the_built_in_evaluation_runs_without_a_profile(mask: Path, tmp_path: Path) -> None:
    done = run(
        BOARD / "target",
        "--mask",
        mask,
        "--eval",
        BOARD / "exact_match.yml",
        "--draws",
        "1",
        "--json",
        tmp_path / "s.json",
    )
    assert done.returncode == 0, done.stderr
    assert "The least important neurons were left out: they need --profile" in done.stdout
    assert "calc in %, 64 items" in done.stdout
    names = [condition["name"] for condition in json.loads((tmp_path / "s.json").read_text())["conditions"]]
    assert names == ["as it is", "masked neurons", "random neurons"]


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keys: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluation, "load_model", fail)


@pytest.mark.usefixtures("never_loaded")
def test_errors_come_before_the_model_is_loaded(mask: Path, tmp_path: Path) -> None:
    target, good = str(BOARD / "target"), f"{BOARD / 'evaluation.py'}:board"
    other = make_target(tmp_path / "other", "llava_next", "hub")
    empty = tmp_path / "empty.safetensors"
    write_mask(empty, NeuronSet({Site(0, "attn.k"): torch.zeros(64).bool()}))
    wrong = a_profile(tmp_path / "wrong.safetensors", **{"attn.k": 60})
    cases: list[tuple[list[Any], str]] = [
        ([target, "--mask", mask, "--eval", "none.yml"], "none.yml: cannot be read"),
        ([target, "--mask", mask, "--eval", f"{BOARD / 'evaluation.py'}:bored"], "has no attribute 'bored'; there is"),
        ([target, "--mask", mask, "--eval", f"{good}?m=1"], "cannot be called with a model and its processor"),
        ([target, "--mask", tmp_path / "none", "--eval", good], "none"),
        ([target, "--mask", empty, "--eval", good], "has no neurons"),
        ([other, "--mask", mask, "--eval", good], "use a mask made for this model"),
        ([tmp_path / "nowhere", "--mask", mask, "--eval", good], "nowhere"),
        ([target, "--mask", mask, "--eval", good, "--profile", mask], "snrf-profile"),
        ([target, "--mask", mask, "--eval", good, "--profile", wrong], "has 60 neurons at layers.1.attn.k"),
        ([target, "--mask", mask, "--eval", good, "--json", tmp_path / "no" / "s.json"], "there is no such folder"),
    ]
    for arguments, message in cases:
        result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
        assert (result.exit_code, result.stdout) == (1, ""), (arguments, result.output, result.exception)
        assert result.stderr.startswith("Error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_profile_of_another_model_is_warned_of(
    mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class ReachedError(Exception):
        pass

    def stop(*arguments: Any, **keys: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(evaluation, "load_model", stop)
    profile = a_profile(tmp_path / "profile.safetensors", config_sha256="0" * 64)
    arguments = [BOARD / "target", "--mask", mask, "--eval", f"{BOARD / 'evaluation.py'}:board", "--profile", profile]
    result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
    assert result.exit_code == 1
    assert "is the profile of another model than" in result.output
