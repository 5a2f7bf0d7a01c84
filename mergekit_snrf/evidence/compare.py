"""A merge against what is easier, at equal conditions (Tables 1 and 2 with their controls).

Every model is the target edited in memory and put back; all are asked the same items, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, Int64
from tqdm import tqdm

from mergekit_snrf.evidence.controls import Row
from mergekit_snrf.evidence.evaluation import Evaluation, Role, Scores, evaluate
from mergekit_snrf.evidence.intervals import LEVEL, RESAMPLES, Bootstrap, measure, resample, scale_of
from mergekit_snrf.evidence.results import Condition, Contrast, Measured, Study
from mergekit_snrf.evidence.verdict import verdict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compare(
    model: PreTrainedModel,
    processor: Any,
    evaluation: Evaluation,
    rows: Sequence[Row],
    *,
    name: str | None = None,
    seed: int = 0,
    progress: bool = False,
    **of_study: Any,
) -> Study:
    """Evaluate the target as it is, and edited to every row's merges.

    The weights are put back bit for bit after every evaluation, also one that fails.

    Args:
        model: the loaded target.
        processor: of the model.
        evaluation: of ``load_evaluation``.
        rows: of ``controls.build_rows``.
        name: of the model, for the study.
        seed: of the intervals.
        progress: show a progress bar on stderr.
        of_study: further fields of the study: mask, mask_sha256, settings.

    Raises:
        SnrfError: a row's merge is not of this model, or the evaluation fails.
    """
    scores: dict[str, list[Scores]] = {}
    like: Scores | None = None
    with tqdm(total=sum(max(1, len(row.draws)) for row in rows), unit="evaluation", disable=not progress) as bar:
        for row in rows:
            bar.set_description(row.name)
            scores[row.name] = []
            for merge in row.draws or (None,):
                if merge is None:
                    scores[row.name].append(evaluate(evaluation, model, processor, like=like))
                else:
                    with merge.apply(model):
                        scores[row.name].append(evaluate(evaluation, model, processor, like=like))
                like = like or scores[row.name][0]
                bar.set_postfix({metric: f"{items.mean:.3f}" for metric, items in scores[row.name][-1].items()})
                bar.update()
    roles = {metric: evaluation.role(metric) for metric in like or {}}
    return tabulate(
        rows,
        scores,
        roles,
        seed=seed,
        model=name or str(model.config.name_or_path),
        evaluation=evaluation.name,
        **of_study,
    )


def tabulate(
    rows: Sequence[Row],
    scores: Mapping[str, Sequence[Scores]],
    roles: Mapping[str, Role],
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **of_study: Any,
) -> Study:
    """Return the study of what rows scored: means, changes to the reference, contrasts to the claim and a verdict.

    Args:
        rows: one is the reference, one the claim. A linear sweep among them is followed by its points of equal
            perception, one for every metric to keep.
        scores: by name of the row, a draw each.
        roles: of all metrics.
        seed: of the intervals.
        settings: kept in the study.
        of_study: further fields of the study: model, mask, mask_sha256, evaluation.

    Raises:
        SnrfError: the rows were not scored on the same items.
    """
    reference, claim = (next(row.name for row in rows if row.role == role) for role in ("reference", "claim"))
    bootstraps = resample(scores, seed=seed)
    measured = measure(bootstraps, scores, reference)
    sweep = [row for row in rows if row.beta is not None]
    rows = list(rows)
    if sweep:
        place = rows.index(sweep[-1]) + 1
        for metric in (metric for metric, role in roles.items() if role == "keep"):
            row = _at_equal(metric, reference, claim, sweep, bootstraps, measured)
            rows.insert(place, row)
            place += 1
    contrasts = [
        Contrast(left=claim, right=row.name, metric=metric, difference=bootstrap.difference(claim, row.name))
        for metric, bootstrap in bootstraps.items()
        for row in rows
        if row.role == "control" and row.beta is None
    ]
    conditions = [
        Condition(
            name=row.name,
            role=row.role,
            draws=max(1, len(scores.get(row.name, ()))),
            neurons=row.neurons,
            settings={**row.settings, **_draw_means(scores.get(row.name, ()))},
            metrics=measured[row.name],
        )
        for row in rows
    ]
    study = Study(
        kind="comparison",
        items={metric: len(items) for metric, items in scores[reference][0].items()},
        roles=dict(roles),
        level=LEVEL,
        seed=seed,
        conditions=conditions,
        contrasts=contrasts,
        settings={"resamples": RESAMPLES, **(settings or {})},
        **of_study,
    )
    return study.model_copy(update={"verdict": verdict(study, rows)})


def _draw_means(draws: Sequence[Scores]) -> dict[str, Any]:
    if len(draws) < 2:
        return {}
    return {"means": {metric: [draw[metric].mean for draw in draws] for metric in draws[0]}}


def _at_equal(
    metric: str,
    reference: str,
    claim: str,
    sweep: Sequence[Row],
    bootstraps: Mapping[str, Bootstrap],
    measured: dict[str, dict[str, Measured]],
) -> Row:
    """Add to bootstraps and measurements the linear merge that keeps as much of a metric as the claim does.

    Its beta is found, and all metrics are interpolated at it, in every resample anew.
    """
    curve = [reference, *(row.name for row in sweep)]
    betas = np.array([0.0, *(row.beta or 0.0 for row in sweep)])
    name = f"linear at equal {metric}"
    kept = bootstraps[metric]
    below, share = crossing(_stack(kept, curve), kept.means[claim])
    below_0, share_0 = crossing(
        np.array([[kept.estimates[point] for point in curve]]), np.array([kept.estimates[claim]])
    )
    measured[name] = {}
    for other, bootstrap in bootstraps.items():
        bootstrap.means[name] = interpolated(_stack(bootstrap, curve), below, share)
        estimates = np.array([[bootstrap.estimates[point] for point in curve]])
        bootstrap.estimates[name] = float(interpolated(estimates, below_0, share_0)[0])
        measured[name][other] = Measured(mean=bootstrap.mean(name), change=bootstrap.difference(name, reference))
    at = kept.interval(
        float(interpolated(betas[None], below_0, share_0)[0]),
        interpolated(np.broadcast_to(betas, (len(below), len(betas))), below, share),
    )
    scale, unit = scale_of(metric, measured)
    exact = abs(kept.estimates[name] - kept.estimates[claim]) < 1e-9
    strength = f"beta {at.estimate:.2f} [{at.low:.2f}, {at.high:.2f}]"
    if exact:
        spoken = f"The linear merge of {strength} (interpolated), which keeps as much {metric} as {claim} does,"
    else:
        ours, theirs = (f"{scale * kept.estimates[one]:.1f}" for one in (name, claim))
        spoken = (
            f"The linear merge of {strength}, which comes closest to the {metric} of {claim} "
            f"({ours} against {theirs}{unit}),"
        )
    return Row(
        name,
        "control",
        sweep[0].draws,
        spoken,
        f"at equal {metric} the masked update" if exact else "",
        settings={"beta": at.model_dump(), "metric": metric, "reached": exact},
    )


def _stack(bootstrap: Bootstrap, names: Sequence[str]) -> Float64[np.ndarray, "resamples points"]:
    return np.stack([bootstrap.means[name] for name in names], axis=1)


def crossing(
    curve: Float64[np.ndarray, "rows points"], level: Float64[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """Return where each row last keeps its level: a point, and the share of the way to the next one.

    That is the last crossing of a broken line. A row that keeps the level to its end is at its last point; one that
    lies below the level everywhere is at its highest point.
    """
    points = curve.shape[1]
    # Equal means can differ in their last digits, by the order of the sums.
    keeps = curve >= (level - 1e-12 * np.abs(level))[:, None]
    last = points - 1 - np.argmax(keeps[:, ::-1], axis=1)
    last = np.where(keeps.any(axis=1), last, np.argmax(curve, axis=1))
    rows = np.arange(len(curve))
    here, after = curve[rows, last], curve[rows, np.minimum(last + 1, points - 1)]
    falls = keeps.any(axis=1) & (here > after)
    share = np.where(falls, (here - level) / np.where(falls, here - after, 1.0), 0.0)
    return last, np.clip(share, 0.0, 1.0)


def interpolated(
    curve: Float64[np.ndarray, "rows points"], below: Int64[np.ndarray, " rows"], share: Float64[np.ndarray, " rows"]
) -> Float64[np.ndarray, " rows"]:
    """Return the value of each row's broken line at a point and a share of the way to the next one."""
    rows = np.arange(len(curve))
    after = np.minimum(below + 1, curve.shape[1] - 1)
    return (1 - share) * curve[rows, below] + share * curve[rows, after]
