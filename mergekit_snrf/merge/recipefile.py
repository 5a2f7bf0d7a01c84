"""Reading a recipe file as mergekit does, with the key in every error."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_snrf.errors import SnrfError, first_line, invalid
from mergekit_snrf.files.reading import load_yaml
from mergekit_snrf.merge.recipe import stray_keys

# What pydantic adds to the place of an error where a value may be of several types.
_BRANCH = re.compile(r"ConditionalParameter|bool|int|float|str|(list|dict)\[.*")
_EXPECTED = {
    "ConditionalParameter": "a value, a list of values, or a mapping with value and filter",
    "InputModelDefinition": "a mapping that begins with 'model: NAME'",
    "ModelReference": "the name of a model, a folder or a hub id",
}


def load_recipe(path: str | os.PathLike[str]) -> MergeConfiguration:
    """Return the content of a recipe file.

    Raises:
        SnrfError: the file is missing, not YAML, or not a merge configuration.
    """
    parsed = load_yaml(path)
    if not isinstance(parsed, dict):
        raise SnrfError(path, "is not a recipe", "begin it with merge_method: snrf")
    if strays := stray_keys(parsed):
        raise SnrfError.several(f"{path}: the recipe cannot be used", [stray.at(path) for stray in strays])
    try:
        return MergeConfiguration.model_validate(parsed)
    except ValidationError as error:
        raise _invalid(path, error.errors()) from None
    except RuntimeError as error:
        raise SnrfError(path, first_line(error), "correct the recipe") from None


def _invalid(path: str | os.PathLike[str], entries: Sequence[Mapping[str, Any]]) -> SnrfError:
    """Return the error of a recipe; of the types that a value may have, the one that fits best counts."""

    def keys(entry: Mapping[str, Any]) -> list[str | int]:
        return [part for part in entry["loc"] if not _BRANCH.fullmatch(str(part))]

    entry = max(entries, key=lambda one: (len(keys(one)), one["input"] is None))
    several = len(keys(entry)) < len(entry["loc"])
    name = "ConditionalParameter" if several else (entry.get("ctx") or {}).get("class_name", "")
    return invalid(path, [entry], keys=keys(entry), expected=_EXPECTED.get(name))
