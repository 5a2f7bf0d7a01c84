"""``snrf sweep``: every combination of a recipe's parameters on one loaded target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import yaml

from mergekit_snrf.cli import common, options
from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.evidence.options import SweepOptions


@click.command()
@click.argument("recipe", metavar="RECIPE.yml", type=click.Path(dir_okay=False))
@options.eval_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    required=True,
    metavar="NAME=VALUE,...",
    help="Values of a parameter of the recipe; repeat for several parameters. All combinations are tried.",
)
@options.settings_options("given", SweepOptions)
@click.option("--best", metavar="FILE", help="The best recipe is written here. [default: RECIPE.best.yml]")
@options.json_option
@options.figures_option
@common.command_options
def sweep(
    recipe: str,
    reference: str,
    settings: tuple[str, ...],
    given: SweepOptions,
    best: str | None,
    json_file: str | None,
    figures: str | None,
) -> None:
    """Try every combination of parameters of RECIPE on the items of EVAL, and write the best recipe.

    The target is loaded once, edited in memory and put back; no model is written. The linear merge is swept beside
    it. With --json, a sweep that was interrupted continues where it stopped.
    """
    from mergekit_snrf.evidence.sweeps import sweep as swept
    from mergekit_snrf.files.writing import write_text

    common.check_outputs(json_file, figures)
    best = _place(best, recipe)
    common.silence_progress()
    how: dict[str, Any] = given.model_dump(exclude_unset=True)
    how |= {"json": None if json_file == "-" else json_file, "progress": not common.is_quiet()}
    with naming(common.options_of(SweepOptions, eval="--eval", set="--set")):
        done = swept(recipe, reference, settings, **how)
    assert done.study is not None
    write_text(best, yaml.safe_dump(done.recipe, sort_keys=False))
    common.say(common.study_text(done.study))
    common.say(f"{best}: {done.best}")
    common.write_outputs(done, "-" if json_file == "-" else None, figures)


def _place(best: str | None, recipe: str) -> str:
    """Return where the best recipe is written, after checking that it can be."""
    from mergekit_snrf.files.writing import check_writable

    best = best or str(Path(recipe).with_suffix(".best.yml"))
    what = remedy = None
    if Path(best).suffix not in (".yml", ".yaml"):
        what, remedy = "is not the name of a recipe", "end it in .yml"
    elif os.path.realpath(best) == os.path.realpath(recipe):
        what, remedy = "is RECIPE itself", "choose another name"
    elif Path(best).resolve().parent != Path(recipe).resolve().parent:
        what, remedy = "is in another folder", "write it beside RECIPE, whose paths are relative"
    if what is not None:
        raise SnrfError(best, what, remedy, field="--best")
    check_writable(best)
    return best
