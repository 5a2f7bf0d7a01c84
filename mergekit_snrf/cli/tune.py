"""``snrf moments tune``: the strength of RegMean without labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.errors import SnrfError, naming, option
from mergekit_snrf.evidence.options import Reading

if TYPE_CHECKING:
    from mergekit_snrf.evidence.study_results import TunedPoint, Tuning


@click.command()
@options.recipe_argument
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    default=0.01,
    show_default=True,
    help="Bound of the mean KL(target || merge), in nats per token of the target's own answers.",
)
@click.option(
    "--profile",
    metavar="PROFILE.yml",
    help="Of the moments, to find their data sets; default: what the moments file says of them.",
)
@click.option("--eval", "reference", metavar="EVAL", help=f"Scores every strength, too: {options.eval_help}")
@click.option("--dry-run", is_flag=True, help="Do not write the number into RECIPE.")
@options.settings_options("reading", Reading)
@options.json_option
@options.figures_option
@common.command_options
def tune(
    recipe: str,
    max_kl: float,
    profile: str | None,
    reference: str | None,
    dry_run: bool,
    json_file: str | None,
    figures: str | None,
    reading: Reading,
) -> None:
    """Choose keep, the strength of regmean, without labels.

    It is the smallest whose merge stays close to its target, and is written into RECIPE, which has update: regmean. The
    merge is made in memory; how far it moves is measured on held-out probes to keep, the rows behind those of the
    moments, on the target's own answers. No label is used; --eval only shows more.
    """
    from mergekit_snrf.evidence.wording import tuning_sentences, tuning_table
    from mergekit_snrf.files import writing
    from mergekit_snrf.merge.recipefile import recipe_text, with_keep

    common.check_outputs(json_file, figures)
    text = recipe_text(recipe)
    if not dry_run:
        if recipe == "-":
            raise SnrfError("-", "is standard input, where no number can be written", "give --dry-run")
        # A recipe that has no place for the number is found before hours of work.
        with_keep(text, 1.0, recipe)
        writing.check_writable(recipe)
    tuning = _tuned(recipe, max_kl, profile, reference, reading)
    tried = tuning_table(tuning)
    common.say("\n".join([common.table(tried.header, tried.rows), "", *tuning_sentences(tuning)]))
    common.write_outputs(tuning, json_file, figures)
    if not dry_run:
        with writing.replacing(recipe) as file:
            file.write(with_keep(text, tuning.keep, recipe).encode())
        common.say(f"{recipe}: keep: {tuning.keep:g}")


def _tuned(recipe: str, max_kl: float, profile: str | None, reference: str | None, reading: Reading) -> Tuning:
    from mergekit_snrf.evidence.analysis import loaded
    from mergekit_snrf.evidence.evaluation import evaluate, load_evaluation
    from mergekit_snrf.evidence.recipes import load_recipe_at, merge_options, open_recipe
    from mergekit_snrf.evidence.tune import held_out, kinds_of
    from mergekit_snrf.evidence.tune import tune as bisect
    from mergekit_snrf.profiling.settings import load_profile_config

    config, folder = load_recipe_at(recipe)
    opened = open_recipe(config, merge_options(reading, quiet=common.is_quiet()), folder)
    moments = opened.merge.moments
    if moments is None:
        raise SnrfError(recipe, "does not use moments", "tune a recipe with update: regmean", field="update")
    of_profile = None if profile is None else load_profile_config(profile)
    with naming(option):
        kinds = kinds_of(moments, of_profile)
    evaluation = None if reference is None else load_evaluation(reference)
    common.silence_progress()
    settings: dict[str, Any] = {"recipe": recipe, "moments": moments.path, "evaluation": reference}
    with naming(option):
        model, processor = loaded(opened.ref(reading), settings)
    folders = [Path(os.path.realpath(place)).parent for place in (profile, moments.path, recipe) if place is not None]
    found = held_out(kinds, model, processor, folders)

    def scores() -> dict[str, float]:
        assert evaluation is not None
        return {metric: items.mean for metric, items in evaluate(evaluation, model, processor).items()}

    def show(point: TunedPoint) -> None:
        click.echo(f"keep {point.keep:g}: KL {point.kl:.4f}", err=True)

    with naming(option):
        tuning = bisect(
            opened.merge,
            model,
            found,
            max_kl,
            evaluate=None if evaluation is None else scores,
            visit=None if common.is_quiet() else show,
        )
    return tuning.model_copy(update={"settings": settings})
