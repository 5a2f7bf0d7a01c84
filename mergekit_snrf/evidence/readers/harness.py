"""Samples of lmms-eval and lm-evaluation-harness (``--log_samples``): one JSON object a line, one file a task and run.

A sample has an entry a metric, which is a number or an object that the task's own aggregation reads. The names of the
metrics are those that the run's ``results`` file sums up. A task with several filters has every ``doc_id`` once a
filter: a sample names its filter, or the n-th time that a ``doc_id`` occurs is that of the n-th filter.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, first_line, printable
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.readers.base import (
    MAX_METRICS,
    MAX_NAME,
    MAX_SAMPLES,
    Found,
    Task,
    UnknownMetricError,
)
from mergekit_snrf.evidence.readers.scores import Value, items_of
from mergekit_snrf.files.reading import load_json, open_regular

_MAX_FILE_BYTES = 2_000_000_000
_MAX_LINE_BYTES = 20_000_000
_AGAIN = "run the evaluation again with --log_samples"
_TIME = re.compile(r"\d{8}_\d{6}|\d{4}-\d\d-\d\dT[\d.-]+")
_SPREAD = re.compile(r"_stderr(_\w+)?$")


@dataclass(frozen=True)
class Harness:
    """Reads one of both tools: ``samples`` has the groups ``run`` and ``task``, ``summary`` names a run's results."""

    name: str
    samples: re.Pattern[str]
    summary: Callable[[str], str]
    remedy: str = _AGAIN

    def find(self, files: Sequence[Path]) -> dict[str, Found]:
        """Return the newest file of every task, by the time in its name, then by its name."""
        of_task: dict[str, list[tuple[list[str], str, Path]]] = defaultdict(list)
        for file in files:
            match = self.samples.fullmatch(file.name)
            if match is not None and match["run"] != "checkpoint":
                of_task[printable(match["task"])].append((_TIME.findall(match["run"])[:1], file.name, file))
        return {task: _newest(task, [path for *_, path in sorted(runs)]) for task, runs in of_task.items()}

    def wrote(self, file: Path) -> bool:
        """Return whether a file is a run's results."""
        return fnmatch(file.name, self.summary("*"))

    def read(self, task: str, paths: Sequence[Path]) -> Task:
        """Return the items of every metric and filter; one that is not understood is left out."""
        match = self.samples.fullmatch(paths[0].name)
        assert match is not None
        summary = _Summary.read(paths[0].with_name(self.summary(match["run"])), match["task"])
        values: dict[str, list[Value]] = defaultdict(list)
        evidence = {}
        samples = list(_filtered(paths[0], summary))
        several = len({sample.filter for sample in samples}) > 1
        for sample in samples:
            evidence[sample.key] = sample.evidence
            for metric, value in sample.values.items():
                name = printable(f"{metric},{sample.filter}") if several else metric
                values[name].append(Value(sample.key, value, f"{printable(paths[0].name)}, line {sample.line}"))
        if len(values) > MAX_METRICS:
            what = f"has {len(values)} metrics, more than the limit of {MAX_METRICS}"
            raise SnrfError(paths[0], what, "give a file of samples")
        items: dict[str, Items] = {}
        left_out = {}
        for name, of_metric in values.items():
            metric = name.rpartition(",")[0] if several else name
            try:
                if summary.higher_is_better.get(metric) is False:
                    raise UnknownMetricError("of which less is better")
                items[name] = items_of(metric, of_metric, summary.aggregations.get(metric))
            except UnknownMetricError as reason:
                left_out[name] = str(reason)
        return Task(items, left_out, evidence)


def _newest(task: str, paths: Sequence[Path]) -> Found:
    """Return the last of the files, of which there may be several in one folder."""
    places = sorted({path.parent for path in paths})
    if len(places) > 1:
        what = f"holds samples of {task} in several folders ({places[0].name} and {places[1].name})"
        raise SnrfError(os.path.commonpath(places), what, "give one of them")
    several = f"{len(paths)} runs of {task}; the newest by its name counts, {printable(paths[-1].name)}"
    return Found(paths[-1:], several if len(paths) > 1 else "")


@dataclass(frozen=True)
class _Summary:
    """What a run's results say of a task: its metrics, filters, and how each metric is summed up."""

    metrics: frozenset[str]
    filters: tuple[str, ...]
    aggregations: Mapping[str, str]
    higher_is_better: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, task: str) -> _Summary:
        content = load_json(path) if os.path.isfile(path) else {}
        names = [name.partition(",") for name in _inside(content, "results", task) if "," in name]
        names = [name for name in names if not _SPREAD.search(name[0])]
        listed = _inside(content, "configs", task).get("metric_list")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        sums = {entry.get("metric"): entry.get("aggregation") for entry in entries}
        return cls(
            frozenset(metric for metric, _, _ in names),
            tuple(dict.fromkeys(kind for _, _, kind in names)),
            {metric: how for metric, how in sums.items() if isinstance(metric, str) and isinstance(how, str)},
            _inside(content, "higher_is_better", task),
        )


def _inside(content: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class _Sample:
    """One line of a file: ``key`` pairs it, ``evidence`` is its hash and target."""

    key: str
    filter: str
    evidence: tuple[str | None, ...]
    line: int
    values: Mapping[str, Any]


def _filtered(path: Path, summary: _Summary) -> Iterator[_Sample]:
    """Return the samples of a file with the names of their filters, each once a filter."""
    seen: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for number, content, place in _lines(path):
        key = printable(json.dumps(content["doc_id"]))
        lines, named = seen[key], content.get("filter")
        if isinstance(named, str) and len(named) <= MAX_NAME:
            kind = named
        else:
            kind = summary.filters[len(lines)] if len(lines) < len(summary.filters) else "none"
        if kind in lines:
            what = f"doc_id {key} is also that of line {lines[kind]}"
            remedy = "give a file of one run, with its results file, which names the filters, beside it"
            raise SnrfError(place, what, remedy)
        lines[kind] = number
        yield _sample(content, key, kind, number, place, summary)
    if not seen:
        raise SnrfError(path, "has no samples", _AGAIN)
    counts = {key: len(lines) for key, lines in seen.items()}
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[fewest] != counts[most]:
        what = f"doc_id {fewest} occurs {counts[fewest]} times and doc_id {most} {counts[most]} times"
        raise SnrfError(path, what, "give a file of one run that ended")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    with open_regular(path, remedy=_AGAIN) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_BYTES:
            raise SnrfError(path, f"has {size} bytes, more than the limit of {_MAX_FILE_BYTES}", "give fewer samples")
        for number in range(1, MAX_SAMPLES + 2):
            line = file.readline(_MAX_LINE_BYTES + 1)
            if not line:
                break
            place = f"{path}, line {number}"
            if len(line) > _MAX_LINE_BYTES:
                raise SnrfError(place, f"has more than {_MAX_LINE_BYTES} bytes", _AGAIN)
            if number > MAX_SAMPLES:
                raise SnrfError(place, f"the file has more than {MAX_SAMPLES} samples", "give fewer samples")
            if line.strip():
                yield number, _content(line, place), place


def _content(line: bytes, place: str) -> dict[str, Any]:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SnrfError(place, f"not JSON ({first_line(error)})", _AGAIN) from None
    if not isinstance(content, dict) or type(content.get("doc_id")) not in (int, str):
        raise SnrfError(place, "is not a sample, which has a doc_id", "give files of --log_samples")
    if len(str(content["doc_id"])) > MAX_NAME:
        raise SnrfError(
            place, f"the doc_id has {len(str(content['doc_id']))} characters", "give files of --log_samples"
        )
    return content


def _sample(content: dict[str, Any], key: str, kind: str, number: int, place: str, summary: _Summary) -> _Sample:
    listed = content.get("metrics")
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        known: Any = listed
    else:
        # Without a results file, what can be a score is a metric.
        known = summary.metrics or {name for name, value in content.items() if name != "doc_id" and _may_score(value)}
    values = {name: value for name, value in content.items() if name in known}
    for name in values:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise SnrfError(place, f"{name[:40]!r} is not a name of a metric", "give files of --log_samples")
    target = content.get("target")
    evidence = (content.get("doc_hash"), str(target) if isinstance(target, int | float) else target)
    return _Sample(key, kind, tuple(one if isinstance(one, str) else None for one in evidence), number, values)


def _may_score(value: Any) -> bool:
    if isinstance(value, dict):
        return bool({"score", "true_false", "parsed_pred"} & value.keys())
    return isinstance(value, int | float)


LMMS_EVAL = Harness(
    "lmms-eval",
    re.compile(r"(?!samples_)(?P<run>.*?)_samples_(?P<task>.+)\.jsonl"),
    "{}_results.json".format,
)
"""lmms-eval 0.3 to 0.7: ``{output_path}/{model}/{date}_samples_{task}.jsonl`` beside ``{date}_results.json``."""

LM_EVAL = Harness(
    "lm-evaluation-harness",
    re.compile(r"samples_(?P<task>.+)_(?P<run>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl"),
    "results_{}.json".format,
)
"""lm-evaluation-harness 0.4: ``{output_path}/{model}/samples_{task}_{date}.jsonl`` beside ``results_{date}.json``."""
