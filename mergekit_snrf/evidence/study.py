"""The pipeline of every study: edit a model, evaluate it, put it back, resample, and build one result.

A study is a list of rows: one reference, one claim, and controls. Ablations and comparisons differ only in their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from mergekit_snrf.evidence.evaluation import Evaluation, evaluate
from mergekit_snrf.evidence.intervals import LEVEL, RESAMPLES, Bootstrap, measure, resample
from mergekit_snrf.evidence.items import Role, Scores
from mergekit_snrf.evidence.results import Condition, Contrast, Measured, Study
from mergekit_snrf.evidence.sweep import BASE, REGMEAN, Curve, at_equal, restoration
from mergekit_snrf.evidence.verdict import Words, format_losses, verdict
from mergekit_snrf.models.edits import Edit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Draw = Callable[["PreTrainedModel"], Edit]
"""Edits a loaded model in place; the edit is undone after the evaluation."""


@dataclass(frozen=True)
class Row:
    """One row of a study: a model that is evaluated once per draw, an edit of ``neurons`` neurons; none: as it is.

    ``curve`` and ``strength`` are those of a point of a sweep; ``settings`` say how to repeat the row.
    """

    name: str
    role: Literal["reference", "claim", "control"]
    draws: tuple[Draw, ...] = ()
    neurons: int = 0
    words: Words = field(default_factory=Words)
    curve: Curve | None = None
    strength: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What a study was made with; part of its result."""

    kind: Literal["ablation", "comparison"]
    model: str
    evaluation: str
    mask: str | None = None
    mask_sha256: str | None = None
    neurons_sha256: str | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


def run_study(
    setup: Setup,
    rows: Sequence[Row],
    model: PreTrainedModel,
    processor: Any,
    evaluation: Evaluation,
    *,
    progress: bool = False,
    known: Mapping[str, list[Scores]] | None = None,
) -> Study:
    """Evaluate a loaded target under every row's edits and return the study.

    The weights are put back bit for bit after every evaluation, including one that fails. Rows whose scores are
    ``known``, by name, are not evaluated.
    """
    todo = [row for row in rows if row.name not in (known or {})]
    with tqdm(total=sum(max(1, len(row.draws)) for row in todo), unit="evaluation", disable=not progress) as bar:

        def begin(row: Row) -> None:
            bar.set_description(row.name)

        def visit(row: Row, found: Scores) -> None:
            bar.set_postfix({metric: f"{items.mean:.3f}" for metric, items in found.items()})
            bar.update()

        scores = score_rows(rows, model, processor, evaluation, known or {}, visit, begin)
    return build_study(setup, rows, scores, {metric: evaluation.role(metric) for metric in scores[rows[0].name][0]})


def score_rows(
    rows: Sequence[Row],
    model: PreTrainedModel,
    processor: Any,
    evaluation: Evaluation,
    known: Mapping[str, Sequence[Scores]],
    visit: Callable[[Row, Scores], None],
    begin: Callable[[Row], None] = lambda row: None,
) -> dict[str, list[Scores]]:
    """Return the scores of a loaded target under each row's edits, all on the same metrics and items.

    Rows that are ``known`` are not evaluated; ``begin`` and ``visit`` are called before and after every evaluation.

    Raises:
        SnrfError: an edit does not fit the model, or the evaluation fails.
    """
    scores: dict[str, list[Scores]] = {row.name: list(known.get(row.name, ())) for row in rows}
    like = next((found[0] for found in known.values()), None)
    for row in rows:
        if row.name in known:
            continue
        for draw in row.draws or (None,):
            begin(row)
            with nullcontext() if draw is None else draw(model):
                found = evaluate(evaluation, model, processor, like=like)
            like = like or found
            scores[row.name].append(found)
            visit(row, found)
    return scores


def build_study(
    setup: Setup, rows: Sequence[Row], scores: Mapping[str, Sequence[Scores]], roles: Mapping[str, Role]
) -> Study:
    """Return means, changes to the reference, contrasts to the claim and a verdict.

    One row is the reference, one the claim. A sweep among the rows is followed by its points at the claim's level of
    each metric to keep. ``scores`` are by name of the row, one per draw, all on the same items.
    """
    reference, claim = (next(row.name for row in rows if row.role == role) for role in ("reference", "claim"))
    bootstraps = resample(scores, seed=setup.seed)
    measured = measure(bootstraps, scores, reference)
    keep = [metric for metric, role in roles.items() if role == "keep"]
    rows = _with_equals(rows, keep, (reference, claim), bootstraps, measured)
    own = next(row.curve for row in rows if row.role == "claim")
    sweep = {row.name for row in rows if row.curve is not None}
    controls = [row for row in rows if row.role == "control" and (own is None or row.curve is not own)]
    contrasts = [
        Contrast(left=claim, right=row.name, metric=metric, difference=bootstrap.difference(claim, row.name))
        for metric, bootstrap in bootstraps.items()
        for row in controls
    ]
    conditions = [_condition(row, scores.get(row.name, ()), measured[row.name]) for row in rows]
    study = Study(
        items={metric: len(items) for metric, items in scores[reference][0].items()},
        roles=dict(roles),
        level=LEVEL,
        conditions=conditions,
        contrasts=[contrast for contrast in contrasts if contrast.right not in sweep],
        **{**vars(setup), "settings": {"resamples": RESAMPLES, **setup.settings}},
    )
    words = {row.name: row.words for row in rows}
    sentences = verdict(study, words, contrasts)
    if any(row.curve is BASE for row in rows):
        for metric in keep[:1]:
            whole = claim if own is REGMEAN else f"{REGMEAN.name} at equal {metric}"
            gains = {gain: one for gain, one in bootstraps.items() if roles.get(gain) == "gain"}
            found = [restoration(gain, metric, reference, whole, one, measured) for gain, one in gains.items()]
            sentences += [sentence for sentence in found if sentence is not None]
    if setup.kind == "ablation":
        sentences += format_losses(words[claim].start(claim), scores[reference][0], scores[claim][0])
    return study.model_copy(update={"verdict": sentences})


def _with_equals(
    rows: Sequence[Row],
    keep: Sequence[str],
    ends: tuple[str, str],
    bootstraps: Mapping[str, Bootstrap],
    measured: dict[str, dict[str, Measured]],
) -> list[Row]:
    """Return the rows with the points of every sweep at the claim's level of the metrics to keep behind it."""
    rows = list(rows)
    own = next(row.curve for row in rows if row.role == "claim")
    for curve in dict.fromkeys(row.curve for row in rows if row.role == "control" and row.curve is not None):
        points = [row for row in rows if row.curve is curve]
        if curve is own:
            continue
        place = 1 + rows.index(points[-1])
        sweep = {row.name: row.strength for row in points if row.strength is not None}
        found = [at_equal(metric, ends, curve, sweep, bootstraps, measured) for metric in keep]
        rows[place:place] = [
            Row(name, "control", neurons=points[-1].neurons, words=words, settings=settings)
            for name, words, settings in found
        ]
    return rows


def _condition(row: Row, draws: Sequence[Scores], metrics: Mapping[str, Measured]) -> Condition:
    settings = dict(row.settings)
    if len(draws) > 1:
        settings["means"] = {metric: [draw[metric].mean for draw in draws] for metric in draws[0]}
    return Condition(
        name=row.name,
        role=row.role,
        draws=max(1, len(draws)),
        neurons=row.neurons,
        curve=None if row.curve is None else row.curve.name,
        strength=row.strength,
        settings=settings,
        metrics=dict(metrics),
    )
