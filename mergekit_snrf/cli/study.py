"""What the commands that measure a loaded model share: loading it, the options in messages, and a study as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_snrf.cli.common import table
from mergekit_snrf.errors import SnrfError, naming, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_snrf.evidence.results import Study
    from mergekit_snrf.models.reference import ModelRef
    from mergekit_snrf.neurons.maskfile import Mask
    from mergekit_snrf.neurons.shape import DecoderShape


def loaded(ref: ModelRef, settings: dict[str, Any], *, images: bool | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a model with its processor, and write into ``settings`` how it was loaded.

    Raises:
        SnrfError: as ``load_model``, with the command's options.
    """
    from mergekit_snrf.models import loading

    with naming(option):
        model, processor = loading.load_model(ref, images=images)
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    return model, processor


def study_text(study: Study) -> str:
    """Return a study as text: a table per metric, and the verdict."""
    from mergekit_snrf.evidence.tables import study_table

    parts = []
    for metric in study.items:
        one = study_table(study, metric)
        parts.append(table((one.caption, *one.header[1:]), one.rows))
    intervals = f"[{100 * study.level:g} % intervals]: paired bootstrap over items and draws, seed {study.seed}."
    return "\n\n".join([*parts, "\n".join([intervals, *study.verdict])])


def check_mask(mask: Mask, shape: DecoderShape, name: str) -> None:
    """Check a mask against a decoder's shape, before the model is loaded.

    Args:
        mask: whose ``path`` messages name.
        shape: of the decoder.
        name: of the model.

    Raises:
        SnrfError: the mask has no neurons, or a layer or a number of neurons that the decoder does not have.
    """
    from mergekit_snrf.neurons.shape import check_fit

    if not mask.neurons.count():
        raise SnrfError(mask.path, "has no neurons", "give a mask with at least one")
    check_fit(mask.neurons, shape, where=mask.path, model=name)
