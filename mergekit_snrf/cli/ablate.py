"""``snrf ablate``: whether the neurons of a mask matter."""

from __future__ import annotations

from typing import Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.reference import ModelRef


@click.command()
@click.argument("model", metavar="MODEL")
@options.mask_option
@click.option("--eval", "reference", required=True, metavar="EVAL", help=options.eval_help)
@click.option("--profile", "profile_file", metavar="PROFILE", help="Of MODEL, to find its least important neurons.")
@options.draws_option
@options.seed_option
@options.loading_options
@options.json_option
@common.command_options
def ablate(
    model: str,
    mask: str,
    reference: str,
    profile_file: str | None,
    draws: int,
    seed: int,
    loading: dict[str, Any],
    json_file: str | None,
) -> None:
    """Deactivate the neurons of MASK in MODEL, and random ones.

    As many random and as many least important ones are deactivated for comparison (Table 3). Weights and biases are
    zeroed in memory. An evaluation named in Python runs with your rights; read it first.
    """
    from mergekit_snrf.evidence.ablate import ablation_rows
    from mergekit_snrf.evidence.evaluation import load_evaluation
    from mergekit_snrf.evidence.least import least_important, read_profile_of
    from mergekit_snrf.evidence.study import Setup, run_study
    from mergekit_snrf.files.references import sha256
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder
    from mergekit_snrf.neurons.maskfile import load_mask
    from mergekit_snrf.neurons.shape import check_fit
    from mergekit_snrf.neurons.sites import PROJECTIONS

    common.check_outputs(json_file)
    ref = options.construct(ModelRef, {"model": model, **loading})
    checkpoint = open_checkpoint(model, trust_remote_code=ref.trust_remote_code)
    chosen = load_mask(mask, towers=True)
    if not chosen.neurons.count():
        raise SnrfError(chosen.path, "has no neurons", "give a mask with at least one")
    check_fit(chosen.neurons.of(*PROJECTIONS), find_decoder(checkpoint).shape, where=chosen.path, model=model)
    settings: dict[str, Any] = {"dtype": ref.dtype, "config_sha256": checkpoint.config_sha256}
    least = None
    if profile_file is not None:
        profile = read_profile_of(checkpoint, profile_file)
        least = least_important([profile], chosen.neurons)
        settings |= {"profile": profile.path, "profile_sha256": sha256(profile.path)}
    rows = ablation_rows(chosen.neurons, least=least, draws=draws, seed=seed)
    common.silence_progress()
    evaluation = load_evaluation(reference)
    subject, processor = common.loaded(ref, settings)
    digests = sha256(chosen.path), chosen.neurons.sha256()
    setup = Setup("ablation", model, evaluation.name, chosen.path, *digests, seed, settings)
    study = run_study(setup, rows, subject, processor, evaluation, progress=not common.is_quiet())
    common.say(common.study_text(study))
    if least is None:
        common.say("The least important neurons were left out: they need --profile, the profile of MODEL.")
    common.write_outputs(study, json_file)
