"""``snrf ablate``: whether the neurons of a mask matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import (
    check_outputs,
    command_options,
    is_quiet,
    json_option,
    model_options,
    silence_progress,
)
from mergekit_snrf.cli.study import check_mask, loaded, study_text

if TYPE_CHECKING:
    from mergekit_snrf.models.reference import Dtype


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--mask", "mask_file", required=True, metavar="MASK", help="A file, or hf://owner/repo@revision/path.")
@click.option(
    "--eval",
    "reference",
    required=True,
    metavar="EVAL",
    help="file.yml (exact match), path/file.py:name, package.module:name, or an entry point.",
)
@click.option("--profile", "profile_file", metavar="PROFILE", help="Of MODEL, to find its least important neurons.")
@click.option("--draws", type=click.IntRange(1), default=3, show_default=True, help="Sets of random neurons.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the first draw, and of the intervals.",
)
@model_options
@json_option
@command_options
def ablate(
    model: str,
    mask_file: str,
    reference: str,
    profile_file: str | None,
    draws: int,
    seed: int,
    device: str | None,
    dtype: Dtype,
    trust_remote_code: bool,
    json_file: str | None,
) -> None:
    """Deactivate the neurons of MASK in MODEL, and as many random and least important ones (Table 3).

    Weights and biases are zeroed in memory. An evaluation named in Python runs with your rights; read it first.
    """
    from mergekit_snrf.evidence.ablate import ablation_rows
    from mergekit_snrf.evidence.evaluation import load_evaluation
    from mergekit_snrf.evidence.least import least_important, read_profile_of
    from mergekit_snrf.evidence.results import write_result
    from mergekit_snrf.evidence.study import Setup, run_study
    from mergekit_snrf.files.references import local_path, sha256
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder
    from mergekit_snrf.models.reference import ModelRef
    from mergekit_snrf.neurons.maskfile import read_mask

    check_outputs(json_file)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    mask = read_mask(local_path(mask_file))
    check_mask(mask, find_decoder(checkpoint).shape, model)
    settings: dict[str, Any] = {"dtype": dtype, "config_sha256": checkpoint.config_sha256}
    least = None
    if profile_file is not None:
        profile = read_profile_of(checkpoint, profile_file)
        least = least_important([profile], mask.neurons)
        settings |= {"profile": profile.path, "profile_sha256": sha256(profile.path)}
    rows = ablation_rows(mask.neurons, least=least, draws=draws, seed=seed)
    silence_progress()
    evaluation = load_evaluation(reference)
    subject, processor = loaded(
        ModelRef(model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code), settings
    )
    setup = Setup("ablation", model, evaluation.name, mask.path, sha256(mask.path), seed, settings)
    study = run_study(setup, rows, subject, processor, evaluation, progress=not is_quiet())
    click.echo(study_text(study))
    if least is None:
        click.echo("The least important neurons were left out: they need --profile, the profile of MODEL.")
    if json_file is not None:
        write_result(json_file, study)
