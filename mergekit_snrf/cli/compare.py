"""``snrf compare``: a merge against its controls, or what an evaluation tool measured of several models."""

from __future__ import annotations

from typing import Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.errors import naming
from mergekit_snrf.evidence.options import ComparisonOptions, SamplesOptions
from mergekit_snrf.files.settings import own_first


@click.command()
@click.argument("places", metavar="RECIPE.yml | DIR...", nargs=-1, required=True, type=click.Path())
@click.option("--eval", "reference", metavar="EVAL", help=options.eval_help)
@options.settings_options("of_recipe", ComparisonOptions, *own_first(ComparisonOptions))
@click.option(
    "--from", "from_samples", is_flag=True, help="Compare DIRs of lmms-eval, lm-evaluation-harness or VLMEvalKit."
)
@options.settings_options("of_samples", SamplesOptions, "task", "metric", "keep")
@options.json_option
@options.figures_option
@common.command_options
def compare(
    places: tuple[str, ...],
    reference: str | None,
    from_samples: bool,
    of_recipe: dict[str, Any],
    of_samples: dict[str, Any],
    json_file: str | None,
    figures: str | None,
) -> None:
    """Compare the merge of RECIPE with its controls on the items of EVAL, all in one table.

    The target is edited in memory and put back for every row; no model is written. An evaluation named in Python runs
    with your rights; read it first.

    With --from, compare the samples that an evaluation tool wrote of several models to two or more DIRs: the first is
    the reference (the target), the second the claim (its merge), any others are controls. lmms-eval and
    lm-evaluation-harness write samples with --log_samples.
    """
    from mergekit_snrf.evidence.comparison import compare as compared

    common.check_outputs(json_file, figures)
    if not from_samples:
        common.silence_progress()
    how: dict[str, Any] = {"from_samples": from_samples, "progress": not common.is_quiet(), **of_recipe, **of_samples}
    with naming(common.options_of(ComparisonOptions, SamplesOptions, eval="--eval")):
        study = compared(*places, eval=reference, **how)
    common.say(common.study_text(study))
    common.write_outputs(study, json_file, figures)
