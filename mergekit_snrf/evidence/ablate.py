"""Deactivate neurons of a loaded model and see what it still can do (Table 3).

The claim, that the neurons of a mask carry a skill, is compared with two controls of the same counts at every layer and
projection: random neurons, and those of the least impact. All are asked the same items, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.evaluation import Evaluation, Scores, evaluate
from mergekit_snrf.evidence.intervals import (
    FEW_DRAWS,
    FEW_ITEMS,
    LEVEL,
    RESAMPLES,
    measure,
    resample,
    scale_of,
    side_of,
    size_of,
    spoken,
)
from mergekit_snrf.evidence.results import Condition, Contrast, Study
from mergekit_snrf.files.references import local_path
from mergekit_snrf.models.edits import deactivate
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import check_fit
from mergekit_snrf.profiling.result.profilefile import Profile, read_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_snrf.models.checkpoint import Checkpoint
    from mergekit_snrf.models.decoder import DecoderShape

REFERENCE, CLAIM, RANDOM, LEAST = "as it is", "masked neurons", "random neurons", "least important neurons"


def ablate(
    model: PreTrainedModel,
    processor: Any,
    evaluation: Evaluation,
    mask: Mask,
    *,
    profile: Profile | None = None,
    draws: int = 3,
    seed: int = 0,
    name: str | None = None,
    mask_sha256: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Study:
    """Evaluate a model as it is, then with the mask's neurons and with the controls' deactivated.

    The weights are zeroed in place and put back bit for bit after every evaluation, also one that fails.

    Args:
        model: any loaded model with a text decoder.
        processor: of the model.
        evaluation: of ``load_evaluation``.
        mask: the neurons of the claim.
        profile: of the model, for the least important neurons; None leaves that control out.
        draws: sets of random neurons, drawn with ``seed``, ``seed + 1``, ...
        seed: of the first draw, and of the intervals.
        name: of the model, for the study.
        mask_sha256: of the mask's file, for the study.
        settings: kept in the study.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: the mask is empty or not the model's, the profile is not the model's, or the evaluation fails.
    """
    if draws < 1:
        raise SnrfError(f"draws must be at least 1, got {draws}")
    if not mask.neurons.count():
        raise SnrfError(f"{mask.path}: has no neurons; give a mask with at least one")
    seeds = [(seed + draw) % 2**32 for draw in range(draws)]
    edits: dict[str, list[NeuronSet]] = {
        REFERENCE: [NeuronSet({})],
        CLAIM: [mask.neurons],
        RANDOM: [mask.neurons.random(one) for one in seeds],
    }
    if profile is not None:
        edits[LEAST] = [least_important(profile, mask.neurons)]
    scores: dict[str, list[Scores]] = {condition: [] for condition in edits}
    with tqdm(total=sum(map(len, edits.values())), unit="evaluation", disable=not progress) as bar:
        for condition, sets in edits.items():
            for neurons in sets:
                bar.set_description(condition)
                like = scores[REFERENCE][0] if scores[REFERENCE] else None
                with deactivate(model, neurons):
                    scores[condition].append(evaluate(evaluation, model, processor, like=like))
                bar.update()
    bootstraps = resample(scores, seed=seed)
    measured = measure(bootstraps, scores, REFERENCE)
    roles = {REFERENCE: "reference", CLAIM: "claim"}
    conditions = [
        Condition(
            name=condition,
            role=roles.get(condition, "control"),  # type: ignore[arg-type]
            draws=len(sets),
            neurons=sets[0].count(),
            settings=_drawn(scores[RANDOM], seeds) if condition == RANDOM else {},
            metrics=measured[condition],
        )
        for condition, sets in edits.items()
    ]
    contrasts = [
        Contrast(left=CLAIM, right=control, metric=metric, difference=bootstrap.difference(CLAIM, control))
        for metric, bootstrap in bootstraps.items()
        for control in edits
        if control not in (REFERENCE, CLAIM)
    ]
    first = scores[REFERENCE][0]
    study = Study(
        kind="ablation",
        model=name or str(model.config.name_or_path),
        mask=mask.path,
        mask_sha256=mask_sha256,
        evaluation=evaluation.name,
        items={metric: len(items) for metric, items in first.items()},
        roles={metric: evaluation.role(metric) for metric in first},
        level=LEVEL,
        seed=seed,
        conditions=conditions,
        contrasts=contrasts,
        settings={"resamples": RESAMPLES, **(settings or {})},
    )
    return study.model_copy(update={"verdict": [*verdict(study), *format_losses(first, scores[CLAIM][0])]})


def least_important(profile: Profile, neurons: NeuronSet) -> NeuronSet:
    """Return as many neurons as ``neurons`` has at every site, those of the lowest mean impact, ties by index.

    Raises:
        SnrfError: the profile lacks a site, or has another number of neurons there.
    """
    members = {}
    for site, member in neurons.nonempty().items():
        statistics = profile.sites.get(site)
        found = 0 if statistics is None else statistics.neurons
        if statistics is None or found != len(member):
            raise SnrfError(
                f"{profile.path}: has {found} neurons at {site}, where the mask has {len(member)}; give the profile of "
                f"the model that the mask is used on"
            )
        order = torch.argsort(statistics.mean_impact, stable=True)
        members[site] = torch.zeros_like(member)
        members[site][order[: int(member.sum())]] = True
    return NeuronSet(members)


def read_profile_of(checkpoint: Checkpoint, reference: str) -> Profile:
    """Read the profile of a model.

    A profile that does not say which config.json its model had is taken as it is. One that does tells models apart by
    that file only: weights that differ under an equal config.json, as a fine-tune's and its parent's, go unnoticed.

    Args:
        checkpoint: of the model.
        reference: a file, or hf://owner/repo@revision/path.

    Raises:
        SnrfError: it cannot be read, or its model had another config.json.
    """
    profile = read_profile(local_path(reference))
    model = profile.provenance.model
    if model is not None and model.config_sha256 not in (None, checkpoint.config_sha256):
        raise SnrfError(
            f"{profile.path}: is the profile of another model than {checkpoint.name} ({model.path}); give its own"
        )
    return profile


def check_mask(mask: Mask, shape: DecoderShape, name: str) -> None:
    """Refuse a mask that is not of a decoder's shape, before the model is loaded.

    Args:
        mask: whose ``path`` messages name.
        shape: of the decoder.
        name: of the model.

    Raises:
        SnrfError: the mask has no neurons, or a layer or a number of neurons that the decoder does not have.
    """
    if not mask.neurons.count():
        raise SnrfError(f"{mask.path}: has no neurons; give a mask with at least one")
    check_fit(mask.neurons, shape, where=mask.path, model=name)


def verdict(study: Study) -> list[str]:
    """Return sentences that say what the intervals of an ablation support, and no more.

    A difference is spoken of where its interval excludes zero. Each interval is of the study's level by itself; of
    many sentences one can be wrong by chance.
    """
    by_name = {condition.name: condition for condition in study.conditions}
    count = by_name[CLAIM].neurons
    neurons = f"the {count} masked neurons" if count > 1 else "the masked neuron"
    measured = {name: condition.metrics for name, condition in by_name.items()}
    sentences = []
    for metric in study.items:
        scale, unit = scale_of(metric, measured)
        change = measured[CLAIM][metric].change
        assert change is not None
        direction = side_of(change, scale)
        if direction:
            verb = "lowers" if direction < 0 else "raises"
            sentences.append(f"Deactivating {neurons} {verb} {metric} by {size_of(change, scale)}{unit}.")
        else:
            sentences.append(
                f"No change of {metric} by deactivating {neurons} can be told from chance: "
                f"{spoken(change, scale, '+')}{unit}."
            )
        for contrast in study.contrasts:
            if contrast.metric == metric:
                sentences.append(_contrast(contrast, by_name[contrast.right], scale, unit))
    few = [metric for metric, items in study.items.items() if items < FEW_ITEMS]
    if few:
        sentences.append(f"The intervals of {' and '.join(few)} are of fewer than {FEW_ITEMS} items, and too narrow.")
    draws = by_name[RANDOM].draws
    if draws == 1:
        sentences.append("One draw of random neurons does not show how much draws differ; use more.")
    elif draws < FEW_DRAWS:
        sentences.append(f"{draws} draws tell little of how much draws differ: the intervals over them are too narrow.")
    if len(sentences) > 1:
        sentences.append("The intervals are not corrected for their number.")
    return sentences


def format_losses(before: Scores, after: Scores) -> list[str]:
    """Say of every metric how many of the items that score lower now have a malformed answer, which they had not."""
    sentences = []
    for metric, items in after.items():
        malformed, earlier = items.malformed, before[metric].malformed
        if malformed is None or earlier is None:
            continue
        lower = [
            index for index, (new, old) in enumerate(zip(items.scores, before[metric].scores, strict=True)) if new < old
        ]
        broken = sum(malformed[index] and not earlier[index] for index in lower)
        if broken:
            sentences.append(
                f"{len(lower)} items of {metric} score lower with the masked neurons deactivated, {broken} of them "
                f"with an answer that is malformed only now: a broken output format is not lost reasoning."
            )
    return sentences


def _drawn(draws: Sequence[Scores], seeds: Sequence[int]) -> dict[str, Any]:
    return {"seeds": list(seeds), "means": {metric: [draw[metric].mean for draw in draws] for metric in draws[0]}}


def _contrast(contrast: Contrast, control: Condition, scale: float, unit: str) -> str:
    others = f"as many {control.name}" if control.name != LEAST else f"as many of the {control.name}"
    if control.draws > 1:
        means = control.settings["means"][contrast.metric]
        others += f" ({control.draws} draws, {scale * min(means):.1f} to {scale * max(means):.1f})"
    direction = side_of(contrast.difference, scale)
    if not direction:
        return (
            f"{contrast.metric} without the masked neurons cannot be told from {contrast.metric} without "
            f"{others}: difference {spoken(contrast.difference, scale, '+')}{unit}."
        )
    comparative = "lower" if direction < 0 else "higher"
    size = size_of(contrast.difference, scale)
    return f"{contrast.metric} is {size}{unit} {comparative} without the masked neurons than without {others}."
