"""The models of a recipe: where they lie, and their headers, with an adapter of the source applied first."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import Decoder


@dataclass(frozen=True)
class OpenedModel:
    """A model of a merge, as the recipe names it with absolute folders, and its headers with an adapter applied."""

    reference: ModelReference
    checkpoint: Checkpoint
    decoder: Decoder


def absolute(reference: ModelReference, recipe_folder: str | None) -> ModelReference:
    """Return the same model and adapter with absolute folders, found from the working folder or beside the recipe."""

    def located(part: ModelPath) -> ModelPath:
        places = (os.path.join(folder, part.path) for folder in ("", recipe_folder or ""))
        found = next((os.path.abspath(place) for place in places if os.path.isdir(place)), part.path)
        return ModelPath(path=found, revision=part.revision)

    return ModelReference(
        model=located(reference.model),
        lora=None if reference.lora is None else located(reference.lora),
        override_architecture=reference.override_architecture,
    )


def opened(reference: ModelReference, options: MergeOptions) -> Checkpoint:
    """Open the model below an adapter; its folders must be absolute."""
    return open_checkpoint(
        reference.model.path,
        reference.model.revision,
        cache_dir=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
    )


def with_adapter(reference: ModelReference, options: MergeOptions) -> Checkpoint:
    """Let mergekit merge an adapter into its cache folder, which reads weights, and open the result."""
    try:
        merged = reference.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
    except Exception as error:
        what = f"mergekit cannot merge the adapter into the source ({first_line(error)})"
        remedy = f"check the adapter, and empty {options.lora_merge_cache} before the next run"
        raise SnrfError(reference, what, remedy) from error
    return open_checkpoint(merged.model.path, trust_remote_code=options.trust_remote_code)
