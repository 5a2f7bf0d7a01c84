"""``snrf ablate`` as a user runs it, on the board pair."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checkpoints import make_target
from click.testing import CliRunner, Result
from made_profiles import impact_profile
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.evidence.results import Study, read_result
from mergekit_snrf.models import loading
from mergekit_snrf.neurons.maskfile import ModelProvenance, read_mask, write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import ProfileProvenance, write_profile

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
    impacts = {
        Site(layer, name): torch.from_numpy(np.random.default_rng(layer).random(size).astype(np.float32))
        for layer in (1, 2)
        for name, size in {**SIZES, **sizes}.items()
    }
    provenance = ProfileProvenance(model=ModelProvenance(path="other", config_sha256=config_sha256))
    write_profile(path, impact_profile(impacts, provenance=provenance))
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["ablate", *map(str, arguments)])


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


def test_the_command_reports_what_a_model_zeroed_by_hand_scores(
    mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"examples/board/evaluation.py:board?n={N}"
    profile = a_profile(tmp_path / "profile.safetensors")
    arguments = ("examples/board/target", "--mask", mask, "--eval", reference, "--profile", profile, "--draws", "2")
    options = ("--seed", "3", "--dtype", "float32", "--device", "cpu", "--json", tmp_path / "study.json", "--quiet")
    monkeypatch.chdir(ROOT)
    done = run(*arguments, *options)
    assert (done.exit_code, done.stderr) == (0, "")
    study = read_result(tmp_path / "study.json")
    assert isinstance(study, Study)
    neurons = read_mask(mask).neurons
    by_name = {condition.name: condition for condition in study.conditions}
    random = [scores_by_hand(neurons.random(seed)) for seed in (3, 4)]
    impact = {site: np.random.default_rng(site.layer).random(len(member)) for site, member in neurons.items()}
    ranks = {site: torch.from_numpy(impact[site].argsort().argsort()) for site in neurons}
    least = NeuronSet({site: ranks[site] < int(member.sum()) for site, member in neurons.items()})
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
    assert (study.kind, study.model, study.evaluation) == ("ablation", "examples/board/target", reference)
    assert (study.seed, study.settings["dtype"]) == (3, "float32")
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
    out = tmp_path / "s.json"
    done = run(BOARD / "target", "--mask", mask, "--eval", BOARD / "exact_match.yml", "--draws", "1", "--json", out)
    assert done.exit_code == 0, done.output
    assert "Left out: the least important neurons, which need the option profile" in done.stdout
    assert "calc in %, 64 items" in done.stdout
    names = [condition["name"] for condition in json.loads(out.read_text())["conditions"]]
    assert names == ["as it is", "masked neurons", "random neurons"]


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keys: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_model", fail)


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
        ([target, "--mask", mask, "--eval", good, "--json", tmp_path / "no" / "s.json"], "s.json: cannot be written"),
    ]
    for arguments, message in cases:
        result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
        assert (result.exit_code, result.stdout) == (1, ""), (arguments, result.output, result.exception)
        assert result.stderr.startswith("Error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    "words",
    [
        ["ablate", BOARD / "target", "--mask", "{mask}", "--eval", f"{BOARD / 'evaluation.py'}:board"],
        ["compare", BOARD / "snrf.yml", "--eval", f"{BOARD / 'evaluation.py'}:board"],
    ],
)
def test_a_profile_of_another_model_is_refused_in_the_same_words(words: list[Any], mask: Path, tmp_path: Path) -> None:
    profile = a_profile(tmp_path / "profile.safetensors", config_sha256="0" * 64)
    arguments = [str(word).format(mask=mask) for word in (*words, "--profile", profile)]
    result = CliRunner().invoke(main, arguments)
    start = f"Error: {profile}: is the profile of another model than {BOARD / 'target'} (other); "
    assert (result.exit_code, result.stdout, result.stderr[: len(start)]) == (1, "", start)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    "words",
    [
        ["ablate", "no/model", "--mask", "no", "--eval", "no"],
        ["compare", "no.yml", "--eval", "no"],
        ["overlap", "no", "no"],
        ["amplify", "no/model", "--neuron", "fwd.up.L0.N0", "--probes", "no.jsonl"],
    ],
)
def test_where_the_json_goes_is_checked_first_and_in_the_same_words(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "no" / "s.json"
    result = CliRunner().invoke(main, [*words, "--json", str(place)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {place}: cannot be written (")


EVALUATIONS = """
import sys
def fine(model, processor): return {"R": [1.0, 0.0]}
def leaves(model, processor): sys.exit(3)
"""


@pytest.fixture
def evaluations(tmp_path: Path) -> Path:
    path = tmp_path / "evaluations.py"
    path.write_text(EVALUATIONS)
    return path


def test_an_evaluation_that_ends_the_program_is_named(mask: Path, evaluations: Path) -> None:
    done = run(BOARD / "target", "--mask", mask, "--eval", f"{evaluations}:leaves", "--quiet")
    message = f"Error: {evaluations}:leaves: fails with SystemExit: 3; -vv shows where\n"
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", message)


def test_a_model_with_weights_that_are_not_finite_is_refused(mask: Path, evaluations: Path, tmp_path: Path) -> None:
    shutil.copytree(BOARD / "target", tmp_path / "model")
    shard = next((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    tensors[name][3, 5] = float("-inf")
    save_file(tensors, shard, metadata={"format": "pt"})
    done = run(tmp_path / "model", "--mask", mask, "--eval", f"{evaluations}:fine", "--quiet")
    assert (done.exit_code, done.stdout) == (1, "")
    weight = "weight model.language_model.layers.1.mlp.up_proj.weight has NaN or infinite values in "
    assert done.stderr.startswith(f"Error: {tmp_path / 'model'}: {weight}")
    assert done.stderr.count("\n") == 1


def test_quiet_is_quiet_on_data_that_was_never_read(
    mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "e.yml").write_text(
        "metrics: {calc: {data: rows.jsonl, template: '{q}', answer: a}}\nmax_new_tokens: 2\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "calc :", "a": "1"}\n')
    command = [BOARD / "target", "--mask", mask, "--eval", tmp_path / "e.yml", "--draws", "1"]
    # An earlier --quiet in this process switched them off.
    datasets.enable_progress_bars()
    for options, silent in ((), False), (("--quiet",), True):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache{silent}")
        done = run(*command, *options)
        assert done.exit_code == 0, done.output
        assert (done.stderr == "") == silent
        assert ("Generating train split" in done.stderr) == (not silent)
