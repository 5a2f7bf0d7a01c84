"""``snrf ablate``: whether the neurons of a mask matter."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from mergekit_snrf.cli.common import command_options, model_options
from mergekit_snrf.cli.study import report
from mergekit_snrf.errors import SnrfError

logger = logging.getLogger(__name__)


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
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write the study to FILE.")
@command_options
def ablate(
    model: str,
    mask_file: str,
    reference: str,
    profile_file: str | None,
    draws: int,
    seed: int,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    json_file: str | None,
) -> None:
    """Deactivate the neurons of MASK in MODEL, and as many random and least important ones (Table 3).

    Weights and biases are zeroed in memory. An evaluation named in Python runs with your rights; read it first.
    """
    from mergekit_snrf import safefile
    from mergekit_snrf.analysis import ablation
    from mergekit_snrf.analysis.evaluation import load_evaluation, load_model
    from mergekit_snrf.analysis.results import write_result
    from mergekit_snrf.checkpoint import open_checkpoint
    from mergekit_snrf.decoder import find_decoder
    from mergekit_snrf.maskfile import local_path, read_mask
    from mergekit_snrf.profilefile import read_profile

    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise SnrfError(f"{json_file}: there is no such folder; make it, or choose another place for --json")
    quiet = bool(click.get_current_context().params.get("quiet"))
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    path = local_path(mask_file)
    mask = read_mask(path)
    ablation.check_mask(mask, find_decoder(checkpoint).shape, model)
    settings: dict[str, object] = {"dtype": dtype, "config_sha256": checkpoint.config_sha256}
    profile = None
    if profile_file is not None:
        profile_path = local_path(profile_file)
        profile = read_profile(profile_path)
        ablation.least_important(profile, mask.neurons)
        settings |= {"profile": str(profile_path), "profile_sha256": safefile.sha256(profile_path)}
        profiled = profile.provenance.model
        if profiled is not None and profiled.config_sha256 not in (None, checkpoint.config_sha256):
            raise SnrfError(
                f"{profile_path}: is the profile of another model than {model} ({profiled.path}); give its own"
            )
    evaluation = load_evaluation(reference)
    if quiet:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    loaded, processor = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    settings |= {"dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device.type}
    study = ablation.ablate(
        loaded,
        processor,
        evaluation,
        mask,
        profile=profile,
        draws=draws,
        seed=seed,
        name=model,
        mask_sha256=safefile.sha256(path),
        settings=settings,
        progress=not quiet,
    )
    click.echo(report(study))
    if profile is None:
        click.echo("The least important neurons were left out: they need --profile, the profile of MODEL.")
    if json_file is not None:
        write_result(json_file, study)
