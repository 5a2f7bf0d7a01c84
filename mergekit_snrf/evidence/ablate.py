"""Ablations (Table 3): a model without the neurons of a mask, and without as many others.

The claim is that the masked neurons carry a skill. Controls have the same counts at every layer and projection.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.evidence.analysis import digest, least_important, loaded, of_mask, read_profile_of
from mergekit_snrf.evidence.evaluation import AnyEvaluation, load_evaluation
from mergekit_snrf.evidence.options import AblationOptions, takes
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Draw, Row, Setup, run_study
from mergekit_snrf.evidence.verdict import Words
from mergekit_snrf.files.settings import construct
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.edits import deactivate
from mergekit_snrf.neurons.maskfile import AnyNeurons, mask_of
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import check_fit
from mergekit_snrf.neurons.sites import PROJECTIONS, TOWERS, Site

REFERENCE, CLAIM, RANDOM, LEAST = "as it is", "masked neurons", "random neurons", "least important neurons"


@takes(AblationOptions)
def ablate(
    model: str | os.PathLike[str], mask: AnyNeurons, eval: AnyEvaluation, *, progress: bool = False, **options: Any
) -> Study:
    """Deactivate neurons of a model, and as many random and least important ones, and evaluate it (Table 3).

    Weights and biases are zeroed in memory. Options are those of ``snrf ablate``; ``profile`` may also be a Profile.

    Args:
        model: a folder or a hub id.
        mask: the neurons, or the path of a mask.
        eval: a function of a model and its processor, or a reference to one.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: an option or a file is wrong, which is found before the model is loaded; or the evaluation fails.
    """
    how = construct(AblationOptions, options)
    ref = how.ref(model)
    checkpoint = open_checkpoint(ref.model, trust_remote_code=ref.trust_remote_code)
    with naming({"neurons": "mask"}):
        chosen = mask_of(mask, towers=True)
    if not chosen.neurons.count():
        raise SnrfError(chosen.path, "has no neurons", "give a mask with at least one")
    check_fit(chosen.neurons.of(*PROJECTIONS), find_decoder(checkpoint).shape, where=chosen.path, model=ref.model)
    settings: dict[str, Any] = {"dtype": ref.dtype, "config_sha256": checkpoint.config_sha256}
    least, notes = None, []
    if how.profile is None:
        notes.append("Left out: the least important neurons, which need the option profile, a profile of the model.")
    else:
        profile = read_profile_of(checkpoint, how.profile)
        least = least_important([profile], chosen.neurons)
        settings |= {"profile": profile.path, "profile_sha256": digest(profile.path)}
    rows = ablation_rows(chosen.neurons, least=least, draws=how.draws, seed=how.seed)
    evaluation = load_evaluation(eval)
    subject, processor = loaded(ref, settings)
    more: dict[str, Any] = {**of_mask(chosen), "seed": how.seed, "settings": settings}
    setup = Setup("ablation", ref.model, evaluation.name, **more)
    study = run_study(setup, rows, subject, processor, evaluation, progress=progress)
    return study.model_copy(update={"notes": notes})


def ablation_rows(
    neurons: NeuronSet,
    *,
    least: NeuronSet | None = None,
    draws: int = 3,
    seed: int = 0,
    called: str = "masked neurons",
    paired: bool = False,
) -> list[Row]:
    """Return the model as it is, then with the neurons and with those of the controls deactivated.

    Random neurons are drawn with ``seed``, ``seed + 1``, ...; ``least`` are the least important ones, if any.

    Args:
        called: what sentences call the neurons, after their number.
        paired: a row of fwd.up and the column of fwd.down with its index count and are drawn as one neuron.
    """
    if draws < 1:
        raise SnrfError(None, f"must be at least 1, got {draws}", field="draws")
    drawn = neurons.of(*(name for name in (*PROJECTIONS, *TOWERS) if name != "fwd.down")) if paired else neurons
    count = drawn.count()
    if not count:
        raise SnrfError(None, "has no neurons", "give a mask with at least one", field="mask")
    seeds = [(seed + draw) % 2**32 for draw in range(draws)]
    sets = [drawn.random(one) for one in seeds]
    random = tuple(_without(with_columns(one) if paired else one) for one in sets)
    several = f"{count} {called}" if count > 1 else called.replace("neurons", "neuron", 1)
    others = Words(f"deactivating {count} random neurons instead", "the choice of neurons")
    rows = [
        Row(REFERENCE, "reference"),
        Row(CLAIM, "claim", (_without(neurons),), count, Words(f"deactivating the {several}")),
        Row(RANDOM, "control", random, count, others, settings={"seeds": seeds}),
    ]
    if least is not None:
        words = Words(f"deactivating the {count} least important neurons instead", "the choice of important neurons")
        rows.append(Row(LEAST, "control", (_without(least),), count, words))
    return rows


def with_columns(neurons: NeuronSet) -> NeuronSet:
    """Return neurons with the columns of fwd.down that have the indices of their rows of fwd.up."""
    columns = {Site(site.layer, "fwd.down"): member for site, member in neurons.of("fwd.up").items()}
    return NeuronSet({**neurons, **columns})


def _without(neurons: NeuronSet) -> Draw:
    return partial(deactivate, neurons=neurons)
