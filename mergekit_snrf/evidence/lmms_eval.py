"""Per-sample results of lmms-eval (``--log_samples``), compared between models.

lmms-eval writes ``{output_path}/{model}/{date}_samples_{task}.jsonl``: one JSON object a line with ``doc_id``,
``target``, responses, ``doc_hash``, and one entry a metric, which is a number or an object that the task's own
aggregation reads. A number counts as it is; of the objects these are understood:

- ``score``: a number, or a list of one (MMMU's judge);
- ``true_false`` (MathVista, MathVerse);
- ``answer`` with ``parsed_pred`` (MMMU, MMMU-Pro), scored by MMMU's published rule;
- MME's pairs of questions, scored as lmms-eval sums them up: accuracy plus accuracy+ a picture, in per cent, added up
  over the categories.

Precision, recall, F1 and the share of yes are not means over samples and are left out, as is what is not understood.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from mergekit_snrf.errors import SnrfError, did_you_mean, printable
from mergekit_snrf.evidence.items import Items, Role, Scores
from mergekit_snrf.evidence.lmms_files import Run, read_run
from mergekit_snrf.evidence.lmms_metrics import UnknownMetricError, metric_items
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Row, Setup, build_study


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
        folders: that of the target first, then that of its merge, then of any controls.
        tasks: only these; none: all.
        metrics: only these, ``metric`` or ``task/metric``; none: all.
        keep: those that a merge should preserve; the others it should improve.
        seed: of the intervals.

    Returns:
        The study, and a sentence for every task of which a folder holds several runs and every metric left out.

    Raises:
        SnrfError: a file is missing, too large or not of lmms-eval, samples do not pair, or no metric is left.
    """
    if len(folders) < 2:
        raise SnrfError(None, f"a comparison needs two folders or more, got {len(folders)}", "give the target's first")
    names = _names(folders)
    runs = [read_run(Path(folder), name, tasks) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        lacking = sorted(set(runs[0].files) ^ set(run.files))
        if lacking:
            what = f"do not have the same tasks: only one has {', '.join(lacking[:5])}"
            raise SnrfError(f"{runs[0].name} and {run.name}", what, "choose tasks of both", field="task")
    _check_chosen("task", tasks, runs[0].files)
    for task in runs[0].files:
        _check_pairs(runs, task)
    every = [
        (task, metric)
        for task in sorted(runs[0].files)
        for metric in sorted({metric for run in runs for sample in run.tasks[task] for metric in sample.values})
    ]
    _check_chosen("metric", metrics, {name for task, metric in every for name in (metric, f"{task}/{metric}")})
    chosen = [pair for pair in every if not metrics or {pair[1], "/".join(pair)} & set(metrics)]
    scores, skipped = _read_metrics(runs, chosen)
    if not scores[0]:
        reasons = "; ".join(skipped[:3]) or "no sample has a metric of that name"
        raise SnrfError(names[0], f"there is no metric to compare ({reasons})", "choose other tasks and metrics")
    notes = [note for run in runs for note in run.notes]
    return _study(names, runs, scores, keep, seed), [*notes, *(f"Left out: {reason}" for reason in skipped)]


def _read_metrics(runs: Sequence[Run], names: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Items]], list[str]]:
    """Return the scores of every run, and why metrics were left out."""
    found: list[dict[str, Items]] = [{} for _ in runs]
    skipped = []
    for task, metric in names:
        try:
            items = [metric_items(run, task, metric, runs[0]) for run in runs]
            if any((one.ids, one.groups) != (items[0].ids, items[0].groups) for one in items):
                raise UnknownMetricError("whose questions are not those of the same pictures in all folders")
        except UnknownMetricError as reason:
            skipped.append(f"{task}/{metric}, {reason}")
            continue
        for scores, one in zip(found, items, strict=True):
            scores[f"{task}/{metric}"] = one
    return found, skipped


def _study(
    names: Sequence[str], runs: Sequence[Run], scores: Sequence[Scores], keep: Sequence[str], seed: int
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
        raise SnrfError(None, f"{chosen} has {len(of_task)} metrics", f"name one of {', '.join(of_task)}", field="keep")
    if not of_task:
        _check_chosen("keep", [chosen], {part for name in names for part in (name, name.rpartition("/")[2])})
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


def _check_pairs(runs: Sequence[Run], task: str) -> None:
    first = {sample.key: sample for sample in runs[0].tasks[task]}
    for run in runs[1:]:
        other = {sample.key: sample for sample in run.tasks[task]}
        alone = sorted(first.keys() ^ other.keys())
        differ = [key for key in first.keys() & other.keys() if not _agree(first[key].evidence, other[key].evidence)]
        if alone or differ:
            example = (alone or sorted(differ))[0]
            what = (
                f"of the {len(first.keys() | other.keys())} samples of {task}, {len(alone)} are in one only, and "
                f"{len(differ)} have the same doc_id but another document (doc_id {example})"
            )
            raise SnrfError(f"{runs[0].name} and {run.name}", what, "evaluate both on the same samples")


def _agree(a: Sequence[str | None], b: Sequence[str | None]) -> bool:
    return all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))
