"""Results of other tools' evaluations, compared between models.

A folder is read by the tool that wrote it: lmms-eval, lm-evaluation-harness or VLMEvalKit (``evidence/readers``). A
number counts as it is; of the objects these are understood:

- ``score``: a number, or a list of one (MMMU's judge);
- ``true_false`` (MathVista, MathVerse);
- ``answer`` with ``parsed_pred`` (MMMU, MMMU-Pro), scored by MMMU's published rule;
- MME's pairs of questions, scored as MME sums them up: accuracy plus accuracy+ a picture, in per cent, added up over
  the categories.

Precision, recall, F1 and the share of yes are not means over samples and are left out, as is what is not understood.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mergekit_snrf.errors import SnrfError, did_you_mean, printable
from mergekit_snrf.evidence.items import Items, Role, Scores
from mergekit_snrf.evidence.readers.base import Found, Task, UnknownMetricError, files_in
from mergekit_snrf.evidence.readers.harness import LM_EVAL, LMMS_EVAL, Harness
from mergekit_snrf.evidence.readers.vlmevalkit import VLMEvalKit
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Row, Setup, build_study

Reader = Harness | VLMEvalKit
READERS: tuple[Reader, ...] = (LMMS_EVAL, LM_EVAL, VLMEvalKit())


def compare_runs(
    folders: Sequence[str | os.PathLike[str]],
    *,
    tasks: Sequence[str] = (),
    metrics: Sequence[str] = (),
    keep: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Study, list[str]]:
    """Compare what an evaluation tool measured of several models on the same samples.

    Args:
        folders: that of the target first, then that of its merge, then of any controls.
        tasks: only these; none: all.
        metrics: only these, ``metric`` or ``task/metric``; none: all.
        keep: those that a merge should preserve; the others it should improve.
        seed: of the intervals.

    Returns:
        The study, and a sentence for every task of which a folder holds several runs, and for every task and metric
        that is left out: a file is damaged, samples do not pair, or a value is not understood.

    Raises:
        SnrfError: a folder has no samples or those of another tool, or no metric is left.
    """
    if len(folders) < 2:
        raise SnrfError(None, f"a comparison needs two folders or more, got {len(folders)}", "give the target's first")
    names = _names(folders)
    found = [_find(Path(folder)) for folder in folders]
    tools = {reader.name: name for name, (reader, _) in zip(names, found, strict=True)}
    if len(tools) > 1:
        (tool, first), (other, second), *_ = tools.items()
        raise SnrfError(f"{first} and {second}", f"were written by {tool} and {other}", "compare folders of one tool")
    reader, runs = found[0][0], [of_tasks for _, of_tasks in found]
    known = sorted({task for run in runs for task in run})
    _check_chosen("task", tasks, known)
    known = [task for task in known if not tasks or task in tasks]
    scores, left_out = _read(reader, dict(zip(names, runs, strict=True)), known, metrics)
    read = {name: [run[task] for task in known if task in run] for name, run in zip(names, runs, strict=True)}
    paths = {name: [path for one in of_run for path in one.paths] for name, of_run in read.items()}
    several = [f"{name} has {one.note}." for name, of_run in read.items() for one in of_run if one.note]
    study = _study(f"{reader.name}: {', '.join(known)}", paths, scores, keep, seed)
    return study, [*several, *(f"Left out: {reason}" for reason in left_out)]


def _read(
    reader: Reader, runs: Mapping[str, Mapping[str, Found]], tasks: Sequence[str], metrics: Sequence[str]
) -> tuple[list[dict[str, Items]], list[str]]:
    """Return the scores of every run, and what was left out and why."""
    scores: list[dict[str, Items]] = [{} for _ in runs]
    errors: list[SnrfError] = []
    left_out: list[str] = []
    known: set[str] = set()
    for task in tasks:
        try:
            read = _read_task(reader, runs, task)
        except SnrfError as error:
            errors.append(error)
            left_out.append(f"{task}; {error}")
            continue
        for metric in sorted({name for one in read for name in (*one.items, *one.left_out)}):
            called = _called(task, metric)
            known |= called
            if metrics and not called & set(metrics):
                continue
            try:
                items = _paired(list(runs), read, metric)
            except UnknownMetricError as reason:
                left_out.append(f"{task}/{metric}, {reason}")
                continue
            for of_run, one in zip(scores, items, strict=True):
                of_run[f"{task}/{metric}"] = one
    if len(errors) == len(tasks) == 1:
        raise errors[0]
    if known:
        _check_chosen("metric", metrics, known)
    if not scores[0]:
        reasons = "; ".join(left_out[:3]) or "no sample has a metric"
        raise SnrfError(
            next(iter(runs)), f"there is no metric to compare ({reasons})", "choose other tasks and metrics"
        )
    return scores, left_out


def _find(folder: Path) -> tuple[Reader, dict[str, Found]]:
    """Return the reader of the tool that wrote a folder, and the files of every task."""
    files = files_in(folder)
    found = [(reader, tasks) for reader in READERS if (tasks := reader.find(files))]
    if len(found) > 1:
        what = f"holds samples of {found[0][0].name} and {found[1][0].name}"
        raise SnrfError(folder, what, "give the folder of one of them")
    if found:
        return found[0]
    for reader in READERS:
        if any(map(reader.wrote, files)):
            raise SnrfError(folder, f"has results of {reader.name} and no samples", reader.remedy)
    tools = ", ".join(reader.name for reader in READERS)
    what = f"has no results of {tools}"
    raise SnrfError(folder, what, "give a folder that one of them wrote; lmms-eval and lm_eval need --log_samples")


def _read_task(reader: Reader, runs: Mapping[str, Mapping[str, Found]], task: str) -> list[Task]:
    names = list(runs)
    lacking = [name for name, run in runs.items() if task not in run]
    if lacking:
        raise SnrfError(lacking[0], f"has no samples of {task}", "evaluate all models on it")
    read = [reader.read(task, run[task].paths) for run in runs.values()]
    for name, other in zip(names[1:], read[1:], strict=True):
        first, second = read[0].evidence, other.evidence
        alone = sorted(first.keys() ^ second.keys())
        # What one of both does not say agrees.
        differ = sorted(
            key
            for key in first.keys() & second.keys()
            if any(a != b for a, b in zip(first[key], second[key], strict=True) if a is not None and b is not None)
        )
        if alone or differ:
            what = (
                f"of the {len(first.keys() | second.keys())} samples of {task}, {len(alone)} are in one only, and "
                f"{len(differ)} have the same id but another document (id {(alone or differ)[0]})"
            )
            raise SnrfError(f"{names[0]} and {name}", what, "evaluate both on the same samples")
    return read


def _paired(names: Sequence[str], read: Sequence[Task], metric: str) -> list[Items]:
    """Return every model's items of a metric, in the order of the first."""
    for name, task in zip(names, read, strict=True):
        if metric in task.left_out:
            raise UnknownMetricError(task.left_out[metric])
        if metric not in task.items or set(task.items[metric].ids or ()) != set(read[0].items[metric].ids or ()):
            raise UnknownMetricError(f"which {name} and {names[0]} do not have for the same samples")
    items = [_ordered(task.items[metric], read[0].items[metric].ids or ()) for task in read]
    if any(one.groups != items[0].groups for one in items):
        raise UnknownMetricError("whose questions are not those of the same pictures in all folders")
    return items


def _ordered(items: Items, ids: Sequence[str]) -> Items:
    places = {name: place for place, name in enumerate(items.ids or ())}
    order = [places[name] for name in ids]
    groups = None if items.groups is None else tuple(items.groups[place] for place in order)
    return Items(tuple(items.scores[place] for place in order), ids=tuple(ids), groups=groups)


def _called(task: str, metric: str) -> set[str]:
    """Return how a metric may be called: with its task, alone, and without its filter."""
    return {f"{task}/{metric}", metric, metric.partition(",")[0]}


def _study(
    evaluation: str, paths: Mapping[str, Sequence[Path]], scores: Sequence[Scores], keep: Sequence[str], seed: int
) -> Study:
    names = list(paths)
    kept = {name for one in keep for name in _kept(one, scores[0])}
    roles: dict[str, Role] = {name: "keep" if name in kept else "gain" for name in scores[0]}
    rows = [Row(names[0], "reference"), Row(names[1], "claim"), *(Row(name, "control") for name in names[2:])]
    setup = Setup(
        kind="comparison",
        model=names[0],
        evaluation=evaluation,
        seed=seed,
        settings={"files": {name: [printable(str(file)) for file in files] for name, files in paths.items()}},
    )
    return build_study(setup, rows, {name: [of_run] for name, of_run in zip(names, scores, strict=True)}, roles)


def _kept(chosen: str, names: Collection[str]) -> list[str]:
    """Return what a name stands for: ``task/metric``, a metric of any task, or the only metric of a task."""
    calls = {name: _called(*name.rsplit("/", 1)) for name in names}
    found = [name for name, called in calls.items() if chosen in called]
    if found:
        return found
    of_task = [name for name in names if name.rpartition("/")[0] == chosen]
    if len(of_task) > 1:
        raise SnrfError(None, f"{chosen} has {len(of_task)} metrics", f"name one of {', '.join(of_task)}", field="keep")
    if not of_task:
        _check_chosen("keep", [chosen], set().union(*calls.values()))
    return of_task


def _check_chosen(field: str, chosen: Sequence[str], known: Collection[str]) -> None:
    for name in chosen:
        if name not in known:
            remedy = did_you_mean(name, sorted(known), "there is")
            raise SnrfError(None, f"{name!r} does not exist", remedy, field=field)


def _names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the last parts of every path, as few as are enough to tell the folders apart."""
    whole = [Path(os.path.realpath(folder)) for folder in folders]
    for index, path in enumerate(whole):
        if path in whole[:index]:
            raise SnrfError(os.fspath(folders[index]), "is given twice", "give different folders")
    parts = [path.parts[1:] for path in whole]
    count = next(n for n in range(1, 1 + max(map(len, parts))) if len({part[-n:] for part in parts}) == len(parts))
    return [printable("/".join(part[-count:]) or "/") for part in parts]
