"""Sweeps from beginning to end: every combination of a recipe's parameters on one loaded target."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import grid
from mergekit_snrf.evidence.analysis import loaded
from mergekit_snrf.evidence.compare import Controls, comparison_rows
from mergekit_snrf.evidence.evaluation import AnyEvaluation, load_evaluation
from mergekit_snrf.evidence.grid import Combination, Values
from mergekit_snrf.evidence.items import Role, Scores
from mergekit_snrf.evidence.options import SweepOptions, takes
from mergekit_snrf.evidence.recipes import OpenedRecipe, Recipe, merge_options, open_recipe, recipe_content
from mergekit_snrf.evidence.study import Row, Setup
from mergekit_snrf.evidence.swept import ScoredRow, Sweep, read_sweep, write_sweep
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
    started = Sweep(key=grid.sweep_key(like, evaluation.name, (opened[0].target, opened[0].source)))
    if json is not None:
        started = read_sweep(json, started.key)
    made: dict[str, Any] = {"recipe": content if isinstance(recipe, Mapping) else where, **models}
    model, processor = loaded(ref, made)
    rows = _rows(found, opened, how.linear_betas, model)

    def visit(so_far: Sweep) -> None:
        if json is not None:
            write_sweep(json, so_far)
        if progress and so_far.study is None:
            sys.stderr.write(_line(so_far, rows))

    scores = grid.run_sweep(rows, model, processor, evaluation, started, visit)
    roles = {metric: evaluation.role(metric) for metric in scores[rows[0].name][0]}
    setup = Setup("comparison", opened[0].target.name, evaluation.name, opened[0].mask, seed=how.seed, settings=made)
    done = _chosen(setup, rows, scores, roles, found, how.keep_drop)
    others = [row for row in started.rows if row.name not in scores]
    done = done.model_copy(update={"key": started.key, "rows": (*others, *done.rows)})
    visit(done)
    return done


def _line(so_far: Sweep, rows: Sequence[Row]) -> str:
    row = so_far.rows[-1]
    means = "  ".join(f"{metric} {items.mean:.3f}" for metric, items in row.scores.items())
    done = len({one.name for one in so_far.rows} & {one.name for one in rows})
    return f"{done:3}/{len(rows)}  {row.name}: {means}\n"


def _chosen(
    setup: Setup,
    rows: Sequence[Row],
    scores: Mapping[str, Sequence[Scores]],
    roles: Mapping[str, Role],
    found: Sequence[Combination],
    drop: float,
) -> Sweep:
    """Return the scored rows with the best combination."""
    best, enough = grid.best_row([one.name for one in found], scores, roles, rows[0].name, drop)
    study = grid.swept_study(setup, rows, scores, roles, best, len(found))
    if not enough:
        note = f"No combination keeps within {drop:g}: this one keeps most. Set values of a weaker merge."
        study = study.model_copy(update={"notes": [note]})
    scored = tuple(
        ScoredRow(name=row.name, settings=dict(row.settings), scores=dict(scores[row.name][0])) for row in rows
    )
    recipe = next(dict(one.recipe) for one in found if one.name == best)
    return Sweep(key="", rows=scored, best=best, recipe=recipe, study=study)


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
    found: Sequence[Combination], opened: Sequence[OpenedRecipe], betas: Sequence[float], model: PreTrainedModel
) -> list[Row]:
    """Return the target, every combination, and the linear merge over its strengths."""
    reference, _, *linear = comparison_rows(opened[0].merge, model, Controls(("linear",), linear_betas=betas))
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
