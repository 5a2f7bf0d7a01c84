"""Per-sample results of lmms-eval (``--log_samples``), compared between models.

lmms-eval writes ``{output_path}/{model}/{date}_samples_{task}.jsonl``: one JSON object a line with ``doc_id``,
``target``, responses, ``doc_hash``, and one entry a metric, which is a number or an object that the task's own
aggregation reads. A number counts as it is; of the objects these are understood:

- ``score``: a number, or a list of one (MMMU's judge);
- ``true_false`` (MathVista, MathVerse);
- ``answer`` with ``parsed_pred`` (MMMU, MMMU-Pro), scored by MMMU's published rule;
- MME's pairs of questions, scored as lmms-eval sums them up: accuracy plus accuracy+ a picture, in per cent, added up
  over the categories.

Precision, recall, F1 and the share of yes are no means over samples, and are left out, as is what is not understood.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.items import Items, Role
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Row, Setup, build_study
from mergekit_snrf.evidence.wording import printable

_FILE = re.compile(r"(?P<run>.*?)_samples_(?P<task>.+)\.jsonl")
_TIME = re.compile(r"\d{8}_\d{6}")
_MAX_FILE_BYTES = 2_000_000_000
_MAX_LINE_BYTES = 20_000_000
_MAX_SAMPLES = 100_000
_MAX_METRICS = 100
_MAX_FILES = 10_000
_MAX_NAME = 200
_MAX_SCORE = 1e9
# What a sample holds besides its metrics.
_OTHER_FIELDS = {
    "doc_id", "doc", "doc_hash", "target", "target_hash", "prompt_hash", "input", "arguments", "resps",
    "filtered_resps", "filter", "metrics", "submission", "token_counts", "success",
}  # fmt: skip
_NO_MEAN = re.compile(r"(precision|recall|f1|f1_score|yes_ratio)$", re.IGNORECASE)
_MME = re.compile(r"mme_(perception|percetion|cognition)_score")


@dataclass(frozen=True)
class Sample:
    """One line of a file.

    Attributes:
        key: what it is paired by.
        evidence: the hash and the target, which must agree.
        line: its number, from 1.
        values: by metric.
    """

    key: str
    evidence: tuple[str | None, str | None]
    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The samples of one model.

    Attributes:
        name: of the folder.
        files: the newest of every task.
        tasks: samples by task.
        notes: a sentence for every task with several runs.
    """

    name: str
    files: Mapping[str, Path]
    tasks: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def compare_runs(
    folders: Sequence[str | os.PathLike[str]],
    *,
    tasks: Sequence[str] = (),
    metrics: Sequence[str] = (),
    keep: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Study, list[str]]:
    """Compare what lmms-eval measured of several models on the same samples.

    Args:
        folders: one a model, that of the target first, then that of its merge, then of any controls.
        tasks: only these; none: all.
        metrics: only these, ``metric`` or ``task/metric``; none: all.
        keep: those that a merge shall keep; the others it shall gain.
        seed: of the intervals.

    Returns:
        The study, and notes: a sentence for every task of which a folder holds several runs, and for every metric that
        was left out.

    Raises:
        SnrfError: a file is missing, too large or not of lmms-eval, samples do not pair, or no metric is left.
    """
    if len(folders) < 2:
        raise SnrfError(f"a comparison needs two folders or more, got {len(folders)}; give that of the target first")
    names = _names(folders)
    runs = [_read_run(Path(folder), name, tasks) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        lacking = sorted(set(runs[0].files) ^ set(run.files))
        if lacking:
            raise SnrfError(
                f"{runs[0].name} and {run.name} do not have the same tasks: only one has {', '.join(lacking[:5])}; "
                f"choose those of both with --task"
            )
    _check_chosen("--task", tasks, runs[0].files)
    notes = [note for run in runs for note in run.notes]
    skipped: list[str] = []
    known: set[str] = set()
    scores: list[dict[str, Items]] = [{} for _ in runs]
    for task in sorted(runs[0].files):
        _check_pairs(runs, task)
        found = sorted({metric for run in runs for sample in run.tasks[task] for metric in sample.values})
        for metric in found:
            name = f"{task}/{metric}"
            known |= {metric, name}
            if metrics and not {metric, name} & set(metrics):
                continue
            try:
                items = [_items(run, task, metric, runs[0]) for run in runs]
                if any((one.ids, one.groups) != (items[0].ids, items[0].groups) for one in items):
                    raise _Unknown("whose questions are not those of the same pictures in all folders")
            except _Unknown as reason:
                skipped.append(f"{name}, {reason}")
                continue
            for kept, one in zip(scores, items, strict=True):
                kept[name] = one
    _check_chosen("--metric", metrics, known)
    if not scores[0]:
        reasons = "; ".join(skipped[:3]) or "no sample has a metric of that name"
        raise SnrfError(
            f"{names[0]}: there is no metric to compare ({reasons}); choose others with --task and --metric"
        )
    return _study(names, runs, scores, keep, seed), [*notes, *(f"Left out: {reason}" for reason in skipped)]


class _Unknown(Exception):
    """Why a metric is left out."""


def _study(
    names: Sequence[str], runs: Sequence[Run], scores: Sequence[Mapping[str, Items]], keep: Sequence[str], seed: int
) -> Study:
    kept = {name for one in keep for name in _kept(one, scores[0])}
    roles: dict[str, Role] = {name: "keep" if name in kept else "gain" for name in scores[0]}
    rows = [Row(names[0], "reference"), Row(names[1], "claim"), *(Row(name, "control") for name in names[2:])]
    setup = Setup(
        kind="comparison",
        model=names[0],
        evaluation=f"lmms-eval: {', '.join(sorted(runs[0].files))}",
        seed=seed,
        settings={"files": {run.name: [printable(str(file)) for file in run.files.values()] for run in runs}},
    )
    return build_study(setup, rows, {name: [of_run] for name, of_run in zip(names, scores, strict=True)}, roles)


def _kept(chosen: str, names: Collection[str]) -> list[str]:
    """Return what a name stands for: ``task/metric``, a metric of any task, or the only metric of a task."""
    found = [name for name in names if chosen in (name, name.rpartition("/")[2])]
    if found:
        return found
    of_task = [name for name in names if name.rpartition("/")[0] == chosen]
    if len(of_task) > 1:
        raise SnrfError(f"--keep: {printable(chosen)} has {len(of_task)} metrics; name one of {', '.join(of_task)}")
    if not of_task:
        _check_chosen("--keep", [chosen], {part for name in names for part in (name, name.rpartition("/")[2])})
    return of_task


def _check_chosen(option: str, chosen: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SnrfError(f"{option}: {printable(unknown[0])!r} is none of {', '.join(sorted(known)) or 'what there is'}")


def _names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the last parts of every path, as few as are enough to tell the folders apart."""
    whole = [Path(folder).resolve() for folder in folders]
    for index, path in enumerate(whole):
        if path in whole[:index]:
            shown = printable(os.fspath(folders[index]))
            raise SnrfError(f"{shown}: is given twice; a comparison is of different folders")
    parts = [path.parts[1:] for path in whole]
    count = next(n for n in range(1, 1 + max(map(len, parts))) if len({part[-n:] for part in parts}) == len(parts))
    return [printable("/".join(part[-count:]) or "/") for part in parts]


def _read_run(folder: Path, name: str, tasks: Sequence[str]) -> Run:
    shown = printable(str(folder))
    if not folder.is_dir():
        raise SnrfError(f"{shown}: is not a folder; give the --output_path of lmms-eval, or a model's folder in it")
    files: dict[str, list[Path]] = defaultdict(list)
    for file in _sample_files(folder):
        match = _FILE.fullmatch(file.name)
        if match is None or match["run"] == "checkpoint" or (tasks and match["task"] not in tasks):
            continue
        of_task = files[printable(match["task"])]
        if of_task and of_task[0].parent != file.parent:
            raise SnrfError(
                f"{shown}: holds samples of {printable(match['task'])} in several folders "
                f"({printable(of_task[0].parent.name)} and {printable(file.parent.name)}); give one of them"
            )
        of_task.append(file)
    if not files:
        raise SnrfError(
            f"{shown}: has no file *_samples_{'TASK' if len(tasks) != 1 else printable(tasks[0])}.jsonl; run lmms-eval "
            f"with --log_samples"
        )
    newest = {task: max(of_task, key=_age) for task, of_task in sorted(files.items())}
    notes = [
        f"{name} has {len(files[task])} runs of {task}; the newest by its name counts, {printable(file.name)}."
        for task, file in newest.items()
        if len(files[task]) > 1
    ]
    return Run(name, newest, {task: list(_read_samples(file)) for task, file in newest.items()}, notes)


def _age(file: Path) -> tuple[list[str], str]:
    """Return what files of samples are ordered by: the time in the name, then the name."""
    return _TIME.findall(file.name)[:1], file.name


def _sample_files(folder: Path) -> list[Path]:
    files = []
    for place, _, names in os.walk(folder):
        files += [Path(place, name) for name in names if name.endswith(".jsonl")]
        if len(files) > _MAX_FILES:
            raise SnrfError(f"{printable(str(folder))}: has more than {_MAX_FILES} .jsonl files; give a model's folder")
    return sorted(files)


def _read_samples(path: Path) -> Iterator[Sample]:
    shown = printable(str(path))
    seen: dict[str, int] = {}
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise SnrfError(f"{shown}: {path.stat().st_size} bytes are too many for a file of samples")
        with path.open("rb") as file:
            for number in range(1, _MAX_SAMPLES + 2):
                line = file.readline(_MAX_LINE_BYTES + 1)
                if not line:
                    break
                if len(line) > _MAX_LINE_BYTES or number > _MAX_SAMPLES:
                    raise SnrfError(f"{shown}, line {number}: the line is too long, or there are too many samples")
                if not line.strip():
                    continue
                sample = _sample(line, number, f"{shown}, line {number}")
                if sample.key in seen:
                    raise SnrfError(
                        f"{shown}, line {number}: doc_id {sample.key} is that of line {seen[sample.key]}, too; a file "
                        f"of one run has every sample once"
                    )
                seen[sample.key] = number
                yield sample
    except OSError as error:
        raise SnrfError(f"{shown}: cannot be read ({error.strerror or error})") from None
    if not seen:
        raise SnrfError(f"{shown}: has no samples; run lmms-eval with --log_samples again")


def _sample(line: bytes, number: int, place: str) -> Sample:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))[:_MAX_NAME]
        raise SnrfError(f"{place}: not JSON ({reason}); run lmms-eval again") from None
    if not isinstance(content, dict) or type(content.get("doc_id")) not in (int, str):
        raise SnrfError(f"{place}: is no sample of lmms-eval, which has a doc_id; give files of --log_samples")
    key = printable(json.dumps(content["doc_id"]))
    if len(key) > _MAX_NAME:
        raise SnrfError(f"{place}: the doc_id has {len(key)} characters, which is no doc_id")
    values = {name: value for name, value in content.items() if name not in _OTHER_FIELDS}
    if len(values) > _MAX_METRICS:
        raise SnrfError(f"{place}: has {len(values)} metrics; at most {_MAX_METRICS} are read")
    evidence = tuple(value if isinstance(value, str) else None for value in map(content.get, ("doc_hash", "target")))
    return Sample(key, (evidence[0], evidence[1]), number, {_metric_name(name, place): v for name, v in values.items()})


def _metric_name(name: str, place: str) -> str:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise SnrfError(f"{place}: {printable(name[:40])!r} is no name of a metric; give files of --log_samples")
    return name


def _check_pairs(runs: Sequence[Run], task: str) -> None:
    first = {sample.key: sample for sample in runs[0].tasks[task]}
    for run in runs[1:]:
        other = {sample.key: sample for sample in run.tasks[task]}
        alone = sorted(first.keys() ^ other.keys())
        differ = [key for key in first.keys() & other.keys() if not _agree(first[key].evidence, other[key].evidence)]
        if alone or differ:
            example = (alone or sorted(differ))[0]
            raise SnrfError(
                f"{runs[0].name} and {run.name}: of the {len(first.keys() | other.keys())} samples of {task}, "
                f"{len(alone)} are in one only, and {len(differ)} have the same doc_id but another document (doc_id "
                f"{example}); evaluate both on the same samples"
            )


def _agree(a: Sequence[str | None], b: Sequence[str | None]) -> bool:
    return all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))


def _items(run: Run, task: str, metric: str, first: Run) -> Items:
    """Return the items of a metric, in the order of the first run.

    Raises:
        _Unknown: a value is not understood, or some model lacks it.
    """
    by_key = {sample.key: sample for sample in run.tasks[task]}
    samples = [by_key[sample.key] for sample in first.tasks[task] if metric in sample.values]
    extra = sum(metric in sample.values for sample in by_key.values())
    missing = sum(metric not in sample.values for sample in samples)
    if missing or extra != len(samples):
        raise _Unknown(f"which {run.name} and {first.name} do not have for the same samples")
    if _NO_MEAN.search(metric):
        raise _Unknown("which is no mean over samples")
    where = f"{printable(run.files[task].name)}, line"
    if _MME.fullmatch(metric):
        return _mme(samples, metric, where)
    return Items(
        tuple(_score(sample.values[metric], f"{where} {sample.line}") for sample in samples),
        ids=tuple(sample.key for sample in samples),
    )


def _score(value: Any, place: str) -> float:
    number = _number(value)
    if number is not None:
        return number
    if isinstance(value, dict):
        for name in ("score", "true_false"):
            found = value.get(name)
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
            number = _number(float(found) if found in ("0", "1") else found)
            if number is not None:
                return number
        if "parsed_pred" in value and "score" not in value:
            return _mmmu(value, place)
    raise _Unknown(f"whose value in {place} is {_described(value)}")


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object without a score that is understood (it has {printable(', '.join(list(value)[:5]))[:100]})"
    return "not finite or too large" if isinstance(value, int | float) else f"no number but {type(value).__name__}"


def _number(value: Any) -> float | None:
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _MAX_SCORE else None


def _mmmu(value: Mapping[str, Any], place: str) -> float:
    """Score one answer of MMMU: a choice must be the answer; an open one must have the answer among its candidates."""
    answer, parsed = value.get("answer"), value["parsed_pred"]
    answers = answer if isinstance(answer, list) else [answer]
    candidates = parsed if isinstance(parsed, list) else [parsed]
    candidates = [one for entry in candidates for one in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(one, str | int | float) for one in (*answers, *candidates)):
        raise _Unknown(f"whose value in {place} holds an answer that is neither text nor a number")
    if isinstance(answer, list) and value.get("question_type") is None:
        raise _Unknown(f"whose value in {place} has several answers at once")
    if value.get("question_type", "multiple-choice") == "multiple-choice":
        return float(any(candidate in answers for candidate in candidates))
    wanted = [form for one in answers for form in _forms(str(one))]
    return float(
        any(
            any(isinstance(form, str) and form in candidate for form in wanted)
            if isinstance(candidate, str)
            else candidate in wanted
            for candidate in candidates
        )
    )


def _forms(text: str) -> list[str | float]:
    """Return an open answer as MMMU compares it: a number to two places, or text, a single letter as a word's end."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mme(samples: Sequence[Sample], metric: str, where: str) -> Items:
    """Return a picture an item: accuracy plus accuracy+ of its two questions, so that the mean is MME's score."""
    pictures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        value, place = sample.values[metric], f"{where} {sample.line}"
        if not isinstance(value, dict) or not all(isinstance(value.get(n), str) for n in ("category", "question_id")):
            raise _Unknown(f"whose value in {place} is no object with category, question_id and score")
        pictures[value["category"], value["question_id"]].append(_score(value, place))
    uneven = sum(len(scores) != 2 for scores in pictures.values())
    if uneven:
        raise _Unknown(f"where {uneven} of {len(pictures)} pictures do not have two questions")
    categories = len({category for category, _ in pictures})
    return Items(
        tuple(categories * 100 * (sum(scores) / 2 + (sum(scores) == 2)) for scores in pictures.values()),
        ids=tuple(printable(f"{category}/{question}") for category, question in pictures),
        groups=tuple(printable(category) for category, _ in pictures),
    )
