"""The moments file of a recipe with ``update: regmean``: found, and compared with the recipe's target."""

from __future__ import annotations

from mergekit_snrf.files.references import local_path
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.moments import Moments, read_moments


def open_moments(reference: str, recipe_folder: str | None) -> Moments:
    """Return the moments that a recipe names, downloaded if they are on the hub.

    Raises:
        SnrfError: the file is missing, damaged or of another format.
    """
    return read_moments(local_path(reference, (recipe_folder,) if recipe_folder else ()))


def compare_moments(moments: Moments, target: Checkpoint) -> list[str]:
    """Return a warning where the moments say that they were taken on another model."""
    found = moments.provenance.model
    if found is None or found.config_sha256 in (None, target.config_sha256):
        return []
    taken = found.path or "another model"
    return [f"{moments.path}: taken on {taken}, whose config.json differs from that of {target.name}"]
