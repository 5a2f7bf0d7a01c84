"""Samples as lmms-eval writes them, made by hand: every kind of value, and anything a file may hold."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.compare_samples import compare_runs
from mergekit_snrf.evidence.results import Study, read_result, write_result

DATE = "20260102_030405"
MME_PICTURE = {"category": "OCR", "question_id": "1"}


def sample(number: int, **metrics: Any) -> dict[str, Any]:
    """A line of --log_samples, without what the command does not read."""
    return {
        "doc_id": number,
        "target": f"answer {number}",
        "filtered_resps": ["an answer"],
        "doc_hash": f"{number:064x}",
        "input": "a question",
        "input_media": [{"type": "image", "score": 1.0}],
        "token_counts": [{"output_tokens": 3}],
        **metrics,
    }


def write(folder: Path, task: str, samples: list[dict[str, Any]], date: str = DATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {name for one in samples for name in one.keys() - sample(0).keys()}
    summary = folder / f"{date}_results.json"
    content = json.loads(summary.read_text()) if summary.exists() else {"results": {}}
    content["results"][task] = {"alias": task, **{f"{name},none": 0.0 for name in metrics}}
    summary.write_text(json.dumps(content))
    path = folder / f"{date}_samples_{task}.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples))
    return path


def means(study: Study, metric: str) -> list[float]:
    return [condition.metrics[metric].mean.estimate for condition in study.conditions]


def run(tmp_path: Path, task: str, *values: list[dict[str, Any]], **options: Any) -> tuple[Study, list[str]]:
    """Compare models of which each has its metrics by sample, in a folder a model as lmms-eval makes it."""
    folders = []
    for index, metrics in enumerate(values):
        write(tmp_path / f"m{index}" / "org__model", task, [sample(n, **m) for n, m in enumerate(metrics)])
        folders.append(tmp_path / f"m{index}")
    return compare_runs(folders, **options)


def test_numbers_are_paired_and_compared(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tables = (generator.random((3, 40)) < [[0.3], [0.8], [0.6]]).astype(float)
    study, skipped = run(tmp_path, "scienceqa_img", *[[{"exact_match": value} for value in row] for row in tables])
    metric = "scienceqa_img/exact_match"
    assert skipped == []
    assert [(c.name, c.role) for c in study.conditions] == [("m0", "reference"), ("m1", "claim"), ("m2", "control")]
    assert means(study, metric) == pytest.approx(tables.mean(axis=1))
    index = generator.integers(0, 40, (5000, 40))
    changes = tables[1][index].mean(axis=1) - tables[0][index].mean(axis=1)
    change = study.conditions[1].metrics[metric].change
    assert change is not None
    assert (change.low, change.high) == pytest.approx(tuple(np.quantile(changes, [0.025, 0.975])), abs=0.03)
    assert [(c.left, c.right) for c in study.contrasts] == [("m1", "m2")]
    assert study.items == {metric: 40}
    assert study.verdict[0].startswith(f"m1 raises {metric} by ")
    write_result(tmp_path / "study.json", study)
    assert read_result(tmp_path / "study.json") == study


def pair(tmp_path: Path, first: list[dict[str, Any]], other: list[dict[str, Any]] | None = None) -> list[Path]:
    """The folders a and b, with these samples of a task t."""
    for name, samples in (("a", first), ("b", first if other is None else other)):
        write(tmp_path / name, "t", samples)
    return [tmp_path / "a", tmp_path / "b"]


def test_order_of_the_lines_does_not_count(tmp_path: Path) -> None:
    lines = [sample(number, exact_match=score) for number, score in enumerate([0.0, 1.0, 1.0, 0.0, 1.0])]
    study, _ = compare_runs(pair(tmp_path, lines, lines[::-1]))
    change = study.conditions[1].metrics["t/exact_match"].change
    assert change is not None
    assert (change.low, change.high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("metric", "first", "other"),
    [
        # A picture with a single question.
        ("mme_perception_score", *[[{"mme_perception_score": {**MME_PICTURE, "score": 1.0}, "x": 1.0}]] * 2),
        # Not of the same samples.
        ("m", [{"m": 1.0, "x": 1.0}, {"x": 1.0}], [{"x": 1.0}, {"m": 1.0, "x": 1.0}]),
    ],
)
def test_metrics_that_are_left_out(metric: str, first: Any, other: Any, tmp_path: Path) -> None:
    study, (skipped,) = run(tmp_path, "t", first, other)
    assert list(study.items) == ["t/x"]
    assert skipped.startswith(f"Left out: t/{metric}, ")


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (0.25, 0.25),
        ({"question_id": "1", "true_false": True, "prediction": "x"}, 1.0),
        ({"question_id": "1", "true_false": False, "answer": "x", "prediction": "x"}, 0.0),
        ({"id": "v", "answer": "A", "pred": ["..."], "score": ["1"]}, 1.0),
        ({"id": "v", "answer": "A", "pred": ["..."], "score": ["0"]}, 0.0),
        ({"id": "v", "question_type": "multiple-choice", "answer": "A", "parsed_pred": ["A"]}, 1.0),
        ({"id": "v", "question_type": "multiple-choice", "answer": "A", "parsed_pred": ["B"]}, 0.0),
        ({"id": "v", "question_type": "multiple-choice", "answer": "A", "parsed_pred": "A"}, 1.0),
        ({"id": "v", "subject": "Art", "answer": "C", "parsed_pred": "C"}, 1.0),
        ({"id": "v", "subject": "Art", "answer": "C", "parsed_pred": "D"}, 0.0),
        ({"question_type": "open", "answer": "1,024.004", "parsed_pred": [["about", 1024.0]]}, 1.0),
        ({"question_type": "open", "answer": "7", "parsed_pred": [["7 apples", 8.0]]}, 0.0),
        ({"question_type": "open", "answer": "Newton", "parsed_pred": ["by newton's law"]}, 1.0),
        ({"question_type": "open", "answer": ["x", "oak"], "parsed_pred": [["an oak"]]}, 1.0),
        ({"question_type": "open", "answer": "x", "parsed_pred": [["axe"]]}, 0.0),
        ({"question_type": "open", "answer": "x", "parsed_pred": [["x axis"]]}, 1.0),
    ],
)
def test_values_that_are_understood(value: Any, score: float, tmp_path: Path) -> None:
    study, skipped = run(tmp_path, "t", [{"m": value}, {"m": 0.0}], [{"m": value}, {"m": 0.0}])
    assert skipped == []
    assert means(study, "t/m") == [score / 2, score / 2]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("0.5", "is str, not a number"),
        (None, "is NoneType, not a number"),
        ([1.0], "is list, not a number"),
        (float("nan"), "not finite or too large"),
        (10**400, "not finite or too large"),
        ({"prediction": "x", "category": "y"}, r"an object without a score that is understood (it has prediction, "),
        ({"score": ["1", "0"]}, "an object without a score"),
        ({"answer": ["A", "B"], "parsed_pred": ["A", "C"]}, "several answers at once"),
        ({"answer": "A", "parsed_pred": [None]}, "neither text nor a number"),
    ],
)
def test_values_that_are_not_understood_are_left_out_with_the_reason(value: Any, reason: str, tmp_path: Path) -> None:
    lines = [{"m": 1.0, "n": 1.0}, {"m": value, "n": 1.0}]
    study, (skipped,) = run(tmp_path, "t", lines, lines)
    assert list(study.items) == ["t/n"]
    assert skipped.startswith(f"Left out: t/m, whose value in {DATE}_samples_t.jsonl, line 2 ")
    assert reason in skipped


def test_unpaired_samples_are_counted(tmp_path: Path) -> None:
    lines = [sample(number, m=1.0) for number in range(10)]
    for other, text in (
        (lines[:7], r"of the 10 samples of t, 3 are in one only, and 0 .*\(id 7\)"),
        ([one | {"doc_hash": "f" * 64} if one["doc_id"] in (2, 5) else one for one in lines], "0 are .*, and 2 have"),
        ([one | {"target": "other"} for one in lines], "0 are in one only, and 10 have the same id"),
    ):
        with pytest.raises(SnrfError, match=text) as caught:
            compare_runs(pair(tmp_path, lines, other))
        assert caught.value.where == "a and b"
    assert compare_runs(pair(tmp_path, lines, [{"doc_id": one["doc_id"], "m": one["m"]} for one in lines]))[1] == []


def test_tasks_metrics_and_roles_are_chosen(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "one", [sample(0, m=1.0, n=1.0)])
        write(tmp_path / name, "two", [sample(0, m=1.0)])
    write(tmp_path / "b", "three", [sample(0, m=1.0)])
    folders = [tmp_path / "a", tmp_path / "b"]
    assert compare_runs(folders)[1] == ["Left out: three; a: has no samples of three; evaluate all models on it"]
    study, _ = compare_runs(folders, tasks=["one", "two"], metrics=["m"], keep=["two/m"])
    assert study.roles == {"one/m": "gain", "two/m": "keep"}
    assert list(compare_runs(folders, tasks=["one"], metrics=["one/n"])[0].items) == ["one/n"]
    for options, field in (
        ({"tasks": ["one", "four"]}, "task"),
        ({"tasks": ["one"], "metrics": ["x"]}, "metric"),
        ({"tasks": ["one"], "keep": ["x"]}, "keep"),
    ):
        with pytest.raises(SnrfError) as caught:
            compare_runs(folders, **options)
        assert caught.value.field == field


@pytest.mark.parametrize("older", ["20251231_235959", "zz_20251231_235959", "latest"])
def test_the_newest_of_several_runs_counts_and_is_named(older: str, tmp_path: Path) -> None:
    write(tmp_path / "a", "t", [sample(0, m=1.0)], "20260102_000000")
    write(tmp_path / "a", "t", [sample(0, m=0.0)], older)
    write(tmp_path / "a", "t", [sample(0, m=2.0)], "checkpoint")
    write(tmp_path / "b", "t", [sample(0, m=0.5)])
    study, notes = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert means(study, "t/m") == [1.0, 0.5]
    assert notes == ["a has 2 runs of t; the newest by its name counts, 20260102_000000_samples_t.jsonl."]
    assert study.settings["files"]["a"] == [str(tmp_path / "a" / "20260102_000000_samples_t.jsonl")]


def test_a_task_of_one_metric_is_kept_by_its_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "one", [sample(0, m=1.0, other="text")])
        write(tmp_path / name, "two", [sample(0, m=1.0, n=1.0)])
        write(tmp_path / name, "m", [sample(0, x=1.0)])
    folders = [tmp_path / "a", tmp_path / "b"]

    def kept(*keep: str, metrics: Sequence[str] = ()) -> set[str]:
        roles = compare_runs(folders, keep=keep, metrics=metrics)[0].roles
        return {name for name, role in roles.items() if role == "keep"}

    assert kept("one") == {"one/m"}
    assert kept("one", "two/n") == {"one/m", "two/n"}
    assert kept("two", metrics=["n"]) == {"two/n"}
    # A name of a metric is that of the metric in every task, as before.
    assert kept("m") == {"one/m", "two/m"}
    with pytest.raises(SnrfError, match=r"^keep: two has 2 metrics; name one of two/m, two/n$"):
        kept("two")
    with pytest.raises(SnrfError, match=r"^keep: 'three' does not exist; there is m, m/x, n, one/m, two/m, two/n, x$"):
        kept("three")


def test_folders_of_one_name_are_named_by_as_few_parts_as_are_needed(tmp_path: Path) -> None:
    places = [tmp_path / "target" / "run" / "out", tmp_path / "merged" / "run" / "out"]
    for place in places:
        write(place, "t", [sample(0, m=1.0)])
    study, _ = compare_runs(places)
    assert [condition.name for condition in study.conditions] == ["target/run/out", "merged/run/out"]
    with pytest.raises(SnrfError, match="is given twice"):
        compare_runs([places[0], places[0] / ".." / "out"])


def test_folders_that_are_none(tmp_path: Path) -> None:
    for name in ("a/x", "a/y", "b"):
        write(tmp_path / name, "t", [sample(0, m=1.0)])
    (tmp_path / "empty").mkdir()
    for folders, text in (
        (["b"], "needs two folders or more"),
        (["b", "b"], "is given twice"),
        (["b", "none"], "is not a folder"),
        (["b", "empty"], r"has no results of lmms-eval, lm-evaluation-harness, VLMEvalKit; .*need --log_samples"),
        (["b", "a"], "holds samples of t in several folders .x and y.; give one of them"),
    ):
        with pytest.raises(SnrfError, match=text):
            compare_runs([tmp_path / folder for folder in folders])
    study, _ = compare_runs([tmp_path / "a" / "x", tmp_path / "a" / "y"])
    assert [condition.name for condition in study.conditions] == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{", "line 2: not JSON"),
        (b"\xff\xfe", "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"[]", "line 2: is not a sample, which has a doc_id"),
        (b'{"doc_id": true}', "line 2: is not a sample, which has a doc_id"),
        (b'{"doc_id": 0}', "line 2: doc_id 0 is also that of line 1"),
        (b'{"doc_id": 1, "metrics": ["a\\u202eb"], "a\\u202eb": 1}', r"line 2: 'a\\u202eb' is not a name of a metric"),
        (b'{"doc_id": "' + b"x" * 300 + b'"}', "line 2: the doc_id has 300 characters"),
    ],
)
def test_damaged_lines_are_named(line: bytes, text: str, tmp_path: Path) -> None:
    folders = pair(tmp_path, [sample(0, m=1.0)])
    (path,) = folders[0].glob("*.jsonl")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(SnrfError, match=text) as error:
        compare_runs(folders)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [sample(number, m=1.0) for number in range(3)]
    for name in ("a", "b"):
        write(tmp_path / name, "t", lines)
    folders = [tmp_path / "a", tmp_path / "b"]
    for limit, value, text in (
        ("harness._MAX_FILE_BYTES", 10, "bytes, more than the limit of 10"),
        ("harness._MAX_LINE_BYTES", 50, "line 1: has more than 50 bytes"),
        ("harness.MAX_SAMPLES", 2, "line 3: the file has more than 2 samples"),
        ("harness.MAX_METRICS", 0, "has 1 metrics, more than the limit of 0"),
        ("base._MAX_FILES", 0, "has more than 0 files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"mergekit_snrf.evidence.readers.{limit}", value)
            with pytest.raises(SnrfError, match=text):
                compare_runs(folders)
    with monkeypatch.context() as patch:
        patch.setattr("mergekit_snrf.evidence.readers.harness.MAX_SAMPLES", 3)
        compare_runs(folders)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    folders = pair(tmp_path, [sample(0, m=1.0)])
    for folder in folders:
        os.mkfifo(folder / f"{DATE}_samples_u.jsonl")
    (note,) = compare_runs(folders)[1]
    assert note.startswith(f"Left out: u; {folders[0]}/{DATE}_samples_u.jsonl: is not a regular file")


KEYS = st.sampled_from(["score", "true_false", "answer", "parsed_pred", "question_type", "category", "question_id"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["1", "A", "open"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
METRICS = st.dictionaries(
    st.sampled_from(["m", "mme_perception_score", "pope_recall", "doc_hash", "target"]) | st.text(max_size=3), JSON
)


def compared(contents: list[bytes]) -> None:
    """Compare two models' files: a study that can be written and read, or one sentence."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(index)) for index in range(len(contents))]
        for place, content in zip(folders, contents, strict=True):
            place.mkdir()
            (place / f"{DATE}_samples_t.jsonl").write_bytes(content)
        try:
            study, skipped = compare_runs(folders)
        except SnrfError as error:
            sentence = str(error)
        else:
            sentence = ""
            write_result(Path(folder, "study.json"), study)
            assert read_result(Path(folder, "study.json")) == study
            assert all(text.encode() for text in (*skipped, *study.verdict))
        assert len(sentence.encode().splitlines()) <= 1


@settings(max_examples=30)
@given(st.lists(st.tuples(METRICS, METRICS), min_size=1, max_size=3), st.booleans())
@example([({"m": 1e308}, {"m": -1e308})] * 2, False)
@example([({"m": {"\ud800": 1}}, {"m": {"score": float("inf")}})], True)
@example([({"mme_perception_score": {"category": "\ud800", "question_id": "", "score": 1}},) * 2], False)
def test_any_metric_is_compared_left_out_or_refused(pairs: list[tuple[Any, Any]], reverse: bool) -> None:
    numbered = [
        [json.dumps({**side, "doc_id": number // (1 + reverse)}) for number, side in enumerate(sides)]
        for sides in zip(*pairs, strict=True)
    ]
    compared(["\n".join(lines).encode() for lines in numbered])


@settings(max_examples=30)
@given(st.binary(max_size=200), st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_in_one_sentence(a: bytes, b: bytes) -> None:
    compared([a, b])
