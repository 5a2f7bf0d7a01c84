"""Evaluations found by their references, and what they return held against what they must."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.evaluation import Evaluation, Items, evaluate, load_evaluation

SCRIPT = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Scale:
    by: "float"

    def __call__(self, model, processor):
        return {"R": [self.by]}

def plain(model, processor, *, n=2, value=1.0):
    return {"R": [value] * n}

plain.roles = {"P": "keep"}
scaled = Scale(0.5)
class space:
    inner = scaled
number = 3
wrong = lambda model: {}
strange = lambda model, processor: {"R": [1]}
strange.roles = {"R": "lose"}

import mergekit_snrf

@mergekit_snrf.evaluation(roles={"P": "keep"})
def marked(model, processor, *, n=1):
    return {"R": [1.0] * n, "P": [0.5] * n}
"""
BOARD = Path(__file__).parents[2] / "examples" / "board"
MODEL = torch.nn.Linear(1, 1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_scores.py"
    path.write_text(SCRIPT)
    return path


def scores(reference: str) -> tuple[float, ...]:
    return evaluate(load_evaluation(reference), MODEL, None)["R"].scores


def test_a_callable_in_a_file_with_arguments(script: Path) -> None:
    found = {"plain": (1.0, 1.0), "scaled": (0.5,), "space.inner": (0.5,)}
    found |= {"plain?n=3": (1.0, 1.0, 1.0), "plain?n=1&value=0.25": (0.25,)}
    for reference, expected in found.items():
        assert scores(f"{script}:{reference}") == expected
    assert load_evaluation(f"{script}:plain?n=3").name == f"{script}:plain?n=3"


def test_a_callable_in_a_module(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = script.parent / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    script.rename(package / "my_scores.py")
    monkeypatch.syspath_prepend(script.parent)
    assert scores("my_package.my_scores:plain?n=1") == (1.0,)


def test_an_entry_point(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.rename(script.parent / "my_entry.py")
    metadata = script.parent / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mergekit_snrf.evaluations]\nmine = my_entry:plain\n")
    monkeypatch.syspath_prepend(script.parent)
    assert scores("mine") == (1.0, 1.0)
    assert scores("mine?n=1") == (1.0,)
    with pytest.raises(SnrfError, match=r"^yours: is neither .* entry point of the group .* \(mine\)"):
        load_evaluation("yours")


def test_roles_are_the_callables_and_set_by_a_decorator(script: Path) -> None:
    for reference in (f"{script}:plain", f"{script}:plain?n=1", f"{script}:marked?n=2"):
        evaluation = load_evaluation(reference)
        assert (evaluation.role("P"), evaluation.role("R")) == ("keep", "gain")
    assert scores(reference) == (1.0, 1.0)
    with pytest.raises(SnrfError, match=r"roles must map metrics to 'gain' or 'keep', got \{'R': 'lose'\}"):
        mergekit_snrf.evaluation(roles={"R": "lose"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("missing.py:plain", r"^missing\.py:plain: there is no file missing\.py"),
        ("missing.yml", r"^missing\.yml: cannot be read \(No such file"),
        ("no_such_module_here:plain", r"cannot be imported \(ModuleNotFoundError: No module named"),
        ("unheard-of", r"is neither a \.yml file, nor .*, nor an entry point"),
        ("{script}:absent", r"has no attribute 'absent'; there is .*plain"),
        ("{script}:number", r"is int, not callable"),
        ("{script}:wrong", r"cannot be called with a model and its processor"),
        ("{script}:plain?m=1", r"cannot be called .*unexpected keyword argument 'm'"),
        ("{script}:plain?n", r"'n' is not key=value&key=value"),
        ("{script}:strange", r"roles must map metrics to 'gain' or 'keep', got {'R': 'lose'}"),
        ("{broken}:plain", r"broken\.py:plain: cannot be imported \(SyntaxError"),
    ],
)
def test_references_that_lead_nowhere(reference: str, message: str, script: Path) -> None:
    broken = script.parent / "broken.py"
    broken.write_text("def (:\n")
    with pytest.raises(SnrfError, match=message) as caught:
        load_evaluation(reference.format(script=script, broken=broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "field"),
    [
        (None, None),
        ({}, None),
        ([1.0], None),
        ({1: [1.0]}, None),
        ({"R": 0.5}, "metric 'R'"),
        ({"R": "1"}, "metric 'R'"),
        ({"R": ["right"]}, "metric 'R'"),
        ({"R": []}, "metric 'R' scores"),
        ({"R": [1.0, math.nan]}, "metric 'R' scores"),
        ({"R": [math.inf]}, "metric 'R' scores"),
    ],
)
def test_returned_values_that_are_no_scores(returned: Any, field: str | None) -> None:
    with pytest.raises(SnrfError) as caught:
        evaluate(returns(returned), MODEL, None)
    assert (caught.value.where, caught.value.field) == ("mine", field)


def returns(value: Any) -> Evaluation:
    return Evaluation("mine", lambda model, processor: value)


def test_arrays_and_tensors_are_scores() -> None:
    found = evaluate(returns({"a": np.array([True, False]), "b": torch.tensor([0.5, 1.0])}), MODEL, None)
    assert (found["a"].scores, found["b"].scores) == ((1.0, 0.0), (0.5, 1.0))


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"R": [1.0, 0.0], "P": [1.0]}, None),
        ({"R": [1.0]}, "metric 'R'"),
        ({"R": Items((1.0, 0.0), ids=("b", "a"))}, "metric 'R'"),
        ({"R": Items((1.0, 0.0), ids=("a", "b"), groups=("x", "y"))}, "metric 'R'"),
    ],
)
def test_two_models_must_be_asked_the_same(other: Any, field: str | None) -> None:
    first = {"R": Items((0.0, 1.0), ids=("a", "b"))}
    with pytest.raises(SnrfError) as caught:
        evaluate(returns(other), MODEL, None, like=first)
    assert (caught.value.where, caught.value.field) == ("mine", field)
    assert evaluate(returns({"R": Items((1.0, 1.0), ids=("a", "b"))}), MODEL, None, like=first)["R"].mean == 1.0


def test_an_evaluation_that_fails_is_named_and_keeps_its_cause() -> None:
    with pytest.raises(SnrfError, match=r"^mine: fails with KeyError: 'answer'") as caught:
        evaluate(Evaluation("mine", lambda model, processor: {}["answer"]), MODEL, None)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(SnrfError) as caught:
        evaluate(Evaluation("mine", lambda model, processor: {"R": Items(())}), MODEL, None)
    assert (caught.value.where, caught.value.field) == ("mine", "scores")


def test_models_are_asked_in_eval_mode_without_gradients() -> None:
    model = torch.nn.Dropout().train()
    seen = []

    def look(model: Any, processor: Any) -> Any:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"R": [1.0]}

    evaluate(Evaluation("mine", look), model, None)
    assert seen == [(False, False)]


def test_items_check_their_lengths_and_average_over_tasks() -> None:
    with pytest.raises(SnrfError, match="malformed: has 1 entries for 2 scores"):
        Items((1.0, 0.0), malformed=(True,))
    grouped = Items((1.0, 0.0, 0.0, 0.0), malformed=(False, True, True, True), groups=("a", "b", "b", "b"))
    assert (grouped.mean, grouped.malformed_rate) == (0.5, 0.5)
    assert (Items((1.0, 0.0, 0.0, 0.0)).mean, Items((1.0,)).malformed_rate) == (0.25, None)
