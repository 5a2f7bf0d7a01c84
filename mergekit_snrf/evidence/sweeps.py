"""Sweeps from beginning to end: every combination of a recipe's parameters on one loaded target."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mergekit_snrf.errors import SnrfError, invalid
from mergekit_snrf.evidence import grid
from mergekit_snrf.evidence.analysis import loaded
from mergekit_snrf.evidence.compare import Controls, comparison_rows
from mergekit_snrf.evidence.evaluation import AnyEvaluation, Evaluation, load_evaluation
from mergekit_snrf.evidence.grid import Combination, Values
from mergekit_snrf.evidence.items import Scores
from mergekit_snrf.evidence.options import ComparisonOptions, SweepOptions, takes
from mergekit_snrf.evidence.recipes import OpenedRecipe, Recipe, merge_options, open_recipe, recipe_content
from mergekit_snrf.evidence.results import write_result
from mergekit_snrf.evidence.study import Row, Setup, build_study, score_rows
from mergekit_snrf.evidence.study_results import ScoredRow, Sweep
from mergekit_snrf.files.reading import DATA_BYTES, read_bytes
from mergekit_snrf.files.references import sha256
from mergekit_snrf.files.settings import construct
from mergekit_snrf.merge.recipefile import checked_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_LINEAR = ("biases", "source_base", "allow_family_mismatch")
"""Parameters that the linear merge takes from the recipe; with several values, the first."""


@takes(SweepOptions)
def sweep(
    recipe: Recipe,
    eval: AnyEvaluation,
    set: Values,
    *,
    json: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """Try every combination of a recipe's parameters on the items of an evaluation.

    The target is loaded once, edited in memory and put back; no model is written. The linear merge is swept beside it.
    Options are those of ``snrf sweep``; the best recipe is ``recipe`` of the result.

    Args:
        recipe: its path, or its content.
        eval: a function of a model and its processor, or a reference to one.
        set: values by parameter, such as ``{"beta": [0.25, 0.5], "rank": [4, 16]}``.
        json: a file that every scored row is written to, from which an interrupted sweep continues.
        progress: write a line for every row to stderr.

    Raises:
        SnrfError: an option, a recipe or a file is wrong, which is found before the model is loaded; or the evaluation
            fails.
    """
    how = construct(SweepOptions, options)
    content, where, folder = recipe_content(recipe)
    checked_recipe(content, where)
    found = grid.combinations(content, set)
    opened = _opened(found, where, folder, how, quiet=not progress)
    evaluation = load_evaluation(eval)
    if json is not None and not isinstance(eval, str | os.PathLike):
        what = "cannot tell whether a function is still the same"
        raise SnrfError(None, what, "give eval as a reference, such as evaluation.py:name", field="json")
    # What the update is depends on the combination.
    models = {name: value for name, value in opened[0].settings.items() if name != "update"}
    ref = opened[0].ref(how)
    like = {"recipe": content, "loading": ref.model_dump(exclude={"model"}), **models}
    started = _started(json, grid.sweep_key(like, evaluation.name, (opened[0].target, opened[0].source)))
    made: dict[str, Any] = {"recipe": content if isinstance(recipe, Mapping) else where, **models}
    model, processor = loaded(ref, made)
    rows = _rows(found, opened, ComparisonOptions(rows=("linear",), linear_betas=how.linear_betas), model)
    settings = {row.name: dict(row.settings) for row in rows}
    # Rows of another grid on the same file stay in it.
    others = tuple(row for row in started.rows if row.name not in settings)
    known = {row.name: [row.scores] for row in started.rows if row.settings == settings.get(row.name)}
    done = Sweep(key=started.key, rows=(*others, *(row for row in started.rows if row.name in known)))

    def visit(row: Row, scores: Scores) -> None:
        nonlocal done
        done = _kept(done.model_copy(update={"rows": (*done.rows, _scored(row, scores))}), json)
        if progress:
            means = "  ".join(f"{metric} {items.mean:.3f}" for metric, items in scores.items())
            sys.stderr.write(f"{len(done.rows) - len(others):3}/{len(rows)}  {row.name}: {means}\n")

    scores = score_rows(rows, model, processor, evaluation, known, visit)
    setup = Setup("comparison", opened[0].target.name, evaluation.name, opened[0].mask, seed=how.seed, settings=made)
    chosen = _chosen(setup, rows, scores, evaluation, found, how.keep_drop)
    in_order = (*others, *(_scored(row, scores[row.name][0]) for row in rows))
    return _kept(done.model_copy(update={**chosen, "rows": in_order}), json)


def _started(path: str | os.PathLike[str] | None, key: str) -> Sweep:
    """Return the sweep of a file, or a new one if there is no file.

    Raises:
        SnrfError: it is not a sweep, or one of another recipe, evaluation or model.
    """
    remedy = "choose another file, or remove it"
    if path is None or not os.path.exists(path):
        return Sweep(key=key)
    try:
        found = Sweep.model_validate_json(read_bytes(path, DATA_BYTES))
    except ValidationError as error:
        raise invalid(path, error.errors(), remedy=remedy) from None
    if found.key != key:
        raise SnrfError(path, "is the sweep of another recipe, evaluation or model", remedy)
    return found


def _kept(sweep: Sweep, path: str | os.PathLike[str] | None) -> Sweep:
    """Write a sweep to its file, if it has one, and return it."""
    if path is not None:
        write_result(path, sweep)
    return sweep


def _scored(row: Row, scores: Scores) -> ScoredRow:
    return ScoredRow(name=row.name, settings=dict(row.settings), scores=dict(scores))


def _chosen(
    setup: Setup,
    rows: Sequence[Row],
    scores: Mapping[str, Sequence[Scores]],
    evaluation: Evaluation,
    found: Sequence[Combination],
    drop: float,
) -> dict[str, Any]:
    """Return the best combination, and the rows as a comparison whose claim it is, which says that it was chosen."""
    roles = {metric: evaluation.role(metric) for metric in scores[rows[0].name][0]}
    best, enough = grid.best_row([one.name for one in found], scores, roles, rows[0].name, drop)
    claimed = [replace(row, role="claim") if row.name == best else row for row in rows]
    study = build_study(setup, claimed, scores, roles)
    chosen = (
        f"{best} was chosen among {len(found)} combinations on these items, which makes it look better than it is: "
        f"check it on other items before you rely on it."
    )
    note = f"No combination keeps within {drop:g}: this one keeps most. Set values of a weaker merge."
    study = study.model_copy(update={"verdict": [*study.verdict, chosen], "notes": [] if enough else [note]})
    return {"best": best, "recipe": next(dict(one.recipe) for one in found if one.name == best), "study": study}


def _opened(
    found: Sequence[Combination], where: str, folder: str | None, how: SweepOptions, *, quiet: bool
) -> list[OpenedRecipe]:
    """Open the recipe of every combination, before the target is loaded."""
    options, opened = merge_options(how, quiet=quiet), []
    for one in found:
        try:
            opened.append(open_recipe(checked_recipe(one.recipe, where), options, folder))
        except SnrfError as error:
            raise error.at(f"{one.name}: {error.where}" if error.where else one.name) from None
    return opened


def _rows(
    found: Sequence[Combination], opened: Sequence[OpenedRecipe], how: ComparisonOptions, model: PreTrainedModel
) -> list[Row]:
    """Return the target, every combination, and the linear merge over its strengths."""
    reference, _, *linear = comparison_rows(opened[0].merge, model, Controls(how))
    shared = {key: value for key, value in found[0].values.items() if key in _OF_LINEAR}
    linear = [replace(row, settings={**row.settings, **shared}) for row in linear]
    points, rows, digest = grid.curves(found), [reference], cache(sha256)
    for one, recipe in zip(found, opened, strict=True):
        files = {"mask": recipe.mask, "moments": recipe.merge.moments and recipe.merge.moments.path}
        digests = {f"{name}_sha256": digest(path) for name, path in files.items() if path}
        curve, strength = points.get(one.name, (None, None))
        neurons, settings = recipe.merge.neurons.count(), {**one.values, **digests}
        rows.append(
            Row(one.name, "control", (recipe.merge,), neurons, curve=curve, strength=strength, settings=settings)
        )
    return rows + linear
