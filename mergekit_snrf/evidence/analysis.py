"""What the analyses share: the loaded model, masks and profiles as objects or files, the least important neurons."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.references import sha256
from mergekit_snrf.models import loading
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site
from mergekit_snrf.profiling.result.profilefile import AnyProfile, Profile, profile_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_snrf.models.checkpoint import Checkpoint
    from mergekit_snrf.models.reference import ModelRef

logger = logging.getLogger(__name__)


def loaded(ref: ModelRef, settings: dict[str, Any], *, images: bool | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a model with its processor, and write into ``settings`` how it was loaded."""
    model, processor = loading.load_model(ref, images=images)
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    return model, processor


def digest(path: str | os.PathLike[str]) -> str | None:
    """Return the sha256 of a file; None for an object that was not read from one."""
    return sha256(path) if os.path.isfile(path) else None


def of_mask(mask: Mask) -> dict[str, str | None]:
    """Return the fields of a study that say which mask it is about."""
    found = digest(mask.path)
    path = None if found is None else mask.path
    return {"mask": path, "mask_sha256": found, "neurons_sha256": mask.neurons.sha256()}


def warn(warnings: Sequence[str]) -> None:
    """Log warnings."""
    for warning in warnings:
        logger.warning(warning)


def read_profile_of(checkpoint: Checkpoint, reference: AnyProfile) -> Profile:
    """Return the profile of a model, read from its file if need be; ``SnrfError``: it is of another model.

    A profile without the sha256 of its model's config.json is accepted; other weights of an equal config.json, such as
    those of a fine-tune and its parent, are not noticed.
    """
    profile = profile_of(reference)
    model = profile.provenance.model
    if model is not None and model.config_sha256 not in (None, checkpoint.config_sha256):
        what = f"is the profile of another model than {checkpoint.name} ({model.path})"
        raise SnrfError(profile.path, what, f"give the profile of {checkpoint.name}")
    return profile


def least_important(profiles: Sequence[Profile], neurons: NeuronSet) -> NeuronSet:
    """Return as many neurons as ``neurons`` has at every site, those of the lowest mean impact, ties by index.

    The mean is over the probes of all profiles, which are of one model.
    """
    members = {}
    for site, member in neurons.nonempty().items():
        order = torch.argsort(_mean_impact(profiles, site, len(member)), stable=True)
        members[site] = torch.zeros_like(member)
        members[site][order[: int(member.sum())]] = True
    return NeuronSet(members)


def _mean_impact(profiles: Sequence[Profile], site: Site, neurons: int) -> Float[Tensor, " neurons"]:
    total = sum(profile.count for profile in profiles)
    mean = torch.zeros(neurons, dtype=torch.float64)
    for profile in profiles:
        statistics = profile.sites.get(site)
        found = 0 if statistics is None else statistics.neurons
        if statistics is None or found != neurons:
            what = f"has {found} neurons at {site}, where the mask has {neurons}"
            raise SnrfError(profile.path, what, "give the profile of the model that the mask is used on")
        mean += statistics.mean_impact.double() * (profile.count / total)
    # Rounded as in the profiles, so that ties stay ties.
    return mean.float()
