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
    """A model of a merge.

    Attributes:
        reference: as the recipe names it, with absolute folders.
        checkpoint: its headers, with an adapter applied.
        decoder: its text decoder.
    """

    reference: ModelReference
    checkpoint: Checkpoint
    decoder: Decoder


def located(reference: ModelReference, recipe_folder: str | None) -> str:
    """Return a model's absolute folder, found from the working folder or beside the recipe, or else its hub id."""
    path = reference.model.path
    for folder in ("", recipe_folder or ""):
        candidate = os.path.join(folder, path)
        if os.path.isdir(candidate):
            return os.path.abspath(candidate)
    return path


def absolute(reference: ModelReference, recipe_folder: str | None) -> ModelReference:
    """Return the same model and adapter with absolute folders; hub ids stay as they are."""
    lora = reference.lora
    if lora is not None:
        lora = ModelPath(path=located(ModelReference(model=lora), recipe_folder), revision=lora.revision)
    return ModelReference(
        model=ModelPath(path=located(reference, recipe_folder), revision=reference.model.revision),
        lora=lora,
        override_architecture=reference.override_architecture,
    )


def opened(reference: ModelReference, options: MergeOptions) -> Checkpoint:
    """Open the model below an adapter.

    Args:
        reference: with absolute folders.

    Raises:
        SnrfError: there is no such model, or it cannot be read.
    """
    return open_checkpoint(
        reference.model.path,
        reference.model.revision,
        cache_dir=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
    )


def with_adapter(reference: ModelReference, options: MergeOptions) -> Checkpoint:
    """Let mergekit merge an adapter into its cache folder, which reads weights, and open the result.

    Raises:
        SnrfError: mergekit cannot merge it.
    """
    try:
        merged = reference.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
    except Exception as error:
        raise SnrfError(
            reference,
            f"mergekit cannot merge the adapter into the source ({first_line(error)})",
            f"check the adapter, and empty {options.lora_merge_cache} before the next run",
        ) from error
    return open_checkpoint(merged.model.path, trust_remote_code=options.trust_remote_code)
