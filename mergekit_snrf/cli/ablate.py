"""``snrf ablate``: whether the neurons of a mask matter."""

from __future__ import annotations

from typing import Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.errors import naming
from mergekit_snrf.evidence.options import AblationOptions


@click.command()
@click.argument("model", metavar="MODEL")
@options.mask_option
@options.eval_option
@options.settings_options("given", AblationOptions)
@options.json_option
@common.command_options
def ablate(model: str, mask: str, reference: str, given: AblationOptions, json_file: str | None) -> None:
    """Deactivate the neurons of MASK in MODEL, and random ones.

    As many random and as many least important ones are deactivated for comparison (Table 3). Weights and biases are
    zeroed in memory. An evaluation named in Python runs with your rights; read it first.
    """
    from mergekit_snrf.evidence.ablate import ablate as ablated

    common.check_outputs(json_file)
    common.silence_progress()
    more: dict[str, Any] = given.model_dump(exclude_unset=True)
    with naming(common.options_of(AblationOptions, eval="--eval", mask="--mask")):
        study = ablated(model, mask, reference, progress=not common.is_quiet(), **more)
    common.say(common.study_text(study))
    common.write_outputs(study, json_file)
