"""What every analysis of a loaded model does: accept masks and profiles as objects or files, and load the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_snrf.files.references import sha256
from mergekit_snrf.models import loading
from mergekit_snrf.neurons.maskfile import Mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
