"""``snrf sweep``: every combination of a recipe's parameters on one loaded target."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from mergekit_snrf.cli.common import (
    check_outputs,
    command_options,
    is_quiet,
    loaded,
    numbers,
    say,
    silence_progress,
    study_drawings,
    study_text,
    write_outputs,
)
from mergekit_snrf.cli.options import (
    cache_options,
    construct,
    eval_help,
    figures_option,
    json_option,
    linear_betas_option,
    loading_options,
    seed_option,
)
from mergekit_snrf.errors import SnrfError, naming, option

_OF_LINEAR = ("biases", "source_base", "allow_family_mismatch")
"""Parameters that the linear merge takes from the recipe; with several values, the first."""

if TYPE_CHECKING:
    from mergekit_snrf.evidence.grid import Combination, Sweep
    from mergekit_snrf.evidence.recipes import OpenedRecipe
    from mergekit_snrf.evidence.study import Row


@click.command()
@click.argument("recipe", metavar="RECIPE.yml", type=click.Path(dir_okay=False))
@click.option("--eval", "reference", required=True, metavar="EVAL", help=eval_help)
@click.option(
    "--set",
    "settings",
    multiple=True,
    required=True,
    metavar="NAME=VALUE,...",
    help="Values of a parameter of the recipe; repeat for several parameters. All combinations are tried.",
)
@linear_betas_option
@click.option(
    "--keep-drop",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="The best recipe gains most while no metric to keep falls by more than this, in points where it is a share.",
)
@click.option("--best", metavar="FILE", help="The best recipe is written here. [default: RECIPE.best.yml]")
@seed_option
@loading_options
@cache_options
@json_option
@figures_option
@command_options
def sweep(
    recipe: str, reference: str, settings: tuple[str, ...], best: str | None, json_file: str | None, **options: Any
) -> None:
    """Try every combination of parameters of RECIPE on the items of EVAL, and write the best recipe.

    The target is loaded once, edited in memory and put back; no model is written. The linear merge is swept beside
    it. With --json, a sweep that was interrupted continues where it stopped.
    """
    from mergekit_snrf.evidence.grid import combinations, write_sweep
    from mergekit_snrf.files.reading import load_yaml
    from mergekit_snrf.files.writing import check_writable, write_text
    from mergekit_snrf.merge.recipefile import checked_recipe

    figures, drop = options.pop("figures"), options["keep_drop"]
    check_outputs(json_file, figures)
    content = load_yaml(recipe)
    checked_recipe(content, recipe)
    best = best or str(Path(recipe).with_suffix(".best.yml"))
    if Path(best).suffix not in (".yml", ".yaml"):
        raise SnrfError(best, "is not the name of a recipe", "end it in .yml", field="--best")
    if os.path.realpath(best) == os.path.realpath(recipe):
        raise SnrfError(best, "is RECIPE itself", "choose another name", field="--best")
    if Path(best).resolve().parent != Path(recipe).resolve().parent:
        raise SnrfError(
            best, "is in another folder", "write it beside RECIPE, whose paths are relative", field="--best"
        )
    check_writable(best)
    with naming(option):
        found = combinations(content, settings)
    done, enough = _swept(recipe, content, found, reference, json_file, **options)
    assert done.study is not None
    chosen = next(one for one in found if one.name == done.best)
    write_text(best, yaml.safe_dump(chosen.recipe, sort_keys=False))
    if json_file not in (None, "-"):
        write_sweep(json_file, done)
    say(study_text(done.study))
    if not enough:
        say(f"No combination keeps within {drop:g}: this one keeps most. Set values of a weaker merge.")
    say(f"{best}: {done.best}")
    write_outputs(done, "-" if json_file == "-" else None, figures, study_drawings(done.study))


def _swept(
    recipe: str,
    content: dict[str, Any],
    found: Sequence[Combination],
    reference: str,
    json_file: str | None,
    *,
    loading: dict[str, Any],
    caches: dict[str, Any],
    **given: Any,
) -> tuple[Sweep, bool]:
    """Return the complete sweep, and whether its best row keeps enough."""
    from mergekit_snrf.evidence import grid
    from mergekit_snrf.evidence.evaluation import load_evaluation
    from mergekit_snrf.evidence.study import Setup
    from mergekit_snrf.models.reference import ModelRef

    betas = numbers(given["linear_betas"], "--linear-betas", 1)
    opened = _opened(recipe, found, loading, caches)
    evaluation = load_evaluation(reference)
    # What the update is depends on the combination.
    models = {name: value for name, value in opened[0].settings.items() if name != "update"}
    like = {"recipe": content, "loading": loading, **models}
    key = grid.sweep_key(like, evaluation.name, (opened[0].target, opened[0].source))
    started = grid.Sweep(key=key)
    if json_file not in (None, "-"):
        started = grid.read_sweep(json_file, key)
    silence_progress()
    made: dict[str, Any] = {"recipe": recipe, **models}
    model, processor = loaded(construct(ModelRef, {"model": str(opened[0].target_folder), **loading}), made)
    rows = _rows(found, opened, betas, model)

    def visit(so_far: Sweep) -> None:
        if json_file not in (None, "-"):
            grid.write_sweep(json_file, so_far)
        if not is_quiet():
            row = so_far.rows[-1]
            means = "  ".join(f"{metric} {items.mean:.3f}" for metric, items in row.scores.items())
            done = len({one.name for one in so_far.rows} & {one.name for one in rows})
            click.echo(f"{done:3}/{len(rows)}  {row.name}: {means}", err=True)

    with naming({"dtype": "--dtype"}):
        scores = grid.run_sweep(rows, model, processor, evaluation, started, visit)
    roles = {metric: evaluation.role(metric) for metric in scores[rows[0].name][0]}
    best, enough = grid.best_row([one.name for one in found], scores, roles, rows[0].name, given["keep_drop"])
    target, mask = opened[0].target.name, opened[0].mask
    setup = Setup("comparison", target, evaluation.name, mask, seed=given["seed"], settings=made)
    study = grid.swept_study(setup, rows, scores, roles, best, len(found))
    others = [row for row in started.rows if row.name not in {one.name for one in rows}]
    scored = [
        grid.ScoredRow(name=row.name, settings=dict(row.settings), scores=dict(scores[row.name][0])) for row in rows
    ]
    return grid.Sweep(key=key, rows=(*others, *scored), best=best, study=study), enough


def _opened(
    recipe: str, found: Sequence[Combination], loading: dict[str, Any], caches: dict[str, Any]
) -> list[OpenedRecipe]:
    """Open the recipe of every combination, before the target is loaded; ``loading`` gets their dtype."""
    from mergekit_snrf.evidence.recipes import open_recipe
    from mergekit_snrf.merge.recipefile import MergeOptions, checked_recipe

    options = MergeOptions(**caches, trust_remote_code=loading.get("trust_remote_code", False), quiet=is_quiet())
    folder, opened = os.path.dirname(os.path.realpath(recipe)), []
    for one in found:
        try:
            opened.append(open_recipe(checked_recipe(one.recipe, recipe), options, folder))
        except SnrfError as error:
            raise error.at(f"{one.name}: {error.where}" if error.where else one.name) from None
    if loading.get("dtype", "auto") == "auto":
        loading["dtype"] = opened[0].dtype
    return opened


def _rows(
    found: Sequence[Combination], opened: Sequence[OpenedRecipe], betas: Sequence[float], model: Any
) -> list[Row]:
    """Return the target, every combination, and the linear merge over its strengths."""
    from mergekit_snrf.evidence.compare import Controls, comparison_rows
    from mergekit_snrf.evidence.grid import curves
    from mergekit_snrf.evidence.study import Row
    from mergekit_snrf.files.references import sha256

    reference, _, *linear = comparison_rows(opened[0].merge, model, Controls(("linear",), linear_betas=betas))
    shared = {key: value for key, value in found[0].values.items() if key in _OF_LINEAR}
    linear = [replace(row, settings={**row.settings, **shared}) for row in linear]
    points, rows, digest = curves(found), [reference], cache(sha256)
    for one, recipe in zip(found, opened, strict=True):
        files = {"mask": recipe.mask, "moments": recipe.merge.moments and recipe.merge.moments.path}
        digests = {f"{name}_sha256": digest(path) for name, path in files.items() if path}
        curve, strength = points.get(one.name, (None, None))
        neurons, settings = recipe.merge.neurons.count(), {**one.values, **digests}
        rows.append(
            Row(one.name, "control", (recipe.merge,), neurons, curve=curve, strength=strength, settings=settings)
        )
    return rows + linear
