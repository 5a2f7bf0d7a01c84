"""Reading a recipe file as mergekit does, with the key in every error.

Other rooms take mergekit's types from here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TextIO

import yaml
from mergekit.common import dtype_from_name as dtype_from_name
from mergekit.config import MergeConfiguration as MergeConfiguration
from mergekit.options import MergeOptions as MergeOptions
from pydantic import ValidationError

from mergekit_snrf.errors import SnrfError, first_line, invalid
from mergekit_snrf.files.reading import CONFIG_BYTES, parse_yaml, read_text
from mergekit_snrf.merge.recipe import stray_keys

# What pydantic adds to the place of an error where a value may be of several types.
_BRANCH = re.compile(r"ConditionalParameter|bool|int|float|str|(list|dict)\[.*")
_EXPECTED = {
    "ConditionalParameter": "a value, a list of values, or a mapping with value and filter",
    "InputModelDefinition": "a mapping that begins with 'model: NAME'",
    "ModelReference": "the name of a model, a folder or a hub id",
}

_OTHER_FILES = {"a profile.yml": ("target", "probes", "domains"), "an evaluation": ("metrics",)}


def recipe_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a recipe file; ``-`` is standard input, which is read once."""
    if os.fspath(path).endswith(".safetensors"):
        raise SnrfError(path, "is a mask or other safetensors file, not a recipe", "give the YAML file that names it")
    return _all_of(sys.stdin) if os.fspath(path) == "-" else read_text(path)


@lru_cache(maxsize=1)
def _all_of(stream: TextIO) -> str:
    try:
        text = stream.read(CONFIG_BYTES + 1)
    except UnicodeDecodeError as error:
        raise SnrfError("-", f"is not UTF-8 text (byte {error.start})", "pass a recipe as UTF-8") from None
    if len(text) > CONFIG_BYTES:
        raise SnrfError("-", f"has more than {CONFIG_BYTES} characters", "pass a recipe")
    return text


def load_recipe(path: str | os.PathLike[str]) -> MergeConfiguration:
    """Return the content of a recipe file; ``SnrfError``: it is missing, not YAML, or not a merge configuration."""
    return checked_recipe(parse_yaml(recipe_text(path), path), path)


def checked_recipe(parsed: Any, path: str | os.PathLike[str]) -> MergeConfiguration:
    """Return the parsed content of a recipe file ``path`` as mergekit's type; errors are as of ``load_recipe``."""
    if not isinstance(parsed, dict):
        raise SnrfError(path, "is not a recipe", "begin it with merge_method: snrf")
    if "merge_method" not in parsed:
        for kind, keys in _OTHER_FILES.items():
            if any(key in parsed for key in keys):
                raise SnrfError(path, f"is {kind}, not a recipe", "give a file that begins with merge_method: snrf")
    if strays := stray_keys(parsed):
        raise SnrfError.several(f"{path}: the recipe cannot be used", [stray.at(path) for stray in strays])
    try:
        return MergeConfiguration.model_validate(parsed)
    except ValidationError as error:
        raise _invalid(path, error.errors()) from None
    except RuntimeError as error:
        raise SnrfError(path, first_line(error), "correct the recipe") from None


def with_keep(text: str, keep: float, path: str | os.PathLike[str]) -> str:
    """Return a recipe's text with another number for ``keep``; everything else stays as it is.

    Where the recipe has no ``keep``, it is written behind ``update: regmean``. ``SnrfError``: it is not one number.
    """
    changed, (before, _) = _with_keep(text, keep, path), _keeps_of(parse_yaml(text, path))
    with suppress(SnrfError):
        if _keeps_of(parse_yaml(changed, path)) == (before, [float(f"{keep:.10g}")]):
            return changed
    raise _no_place(keep, path)


def _keeps_of(content: Any) -> tuple[Any, list[Any]]:
    """Return a recipe without ``keep`` in its blocks of parameters, and its values."""
    if isinstance(content, list):
        parts = [_keeps_of(one) for one in content]
        return [part for part, _ in parts], [value for _, found in parts for value in found]
    if not isinstance(content, dict):
        return content, []
    rest, values = {}, []
    for key, value in content.items():
        if key == "parameters" and isinstance(value, dict) and "keep" in value:
            values.append(value["keep"])
            value = {name: one for name, one in value.items() if name != "keep"}
        rest[key], found = _keeps_of(value)
        values += found
    return rest, values


def _no_place(keep: float, path: object) -> SnrfError:
    return SnrfError(path, "has no place for it", f"write keep: {keep:.10g} below update: regmean", field="keep")


def _with_keep(text: str, keep: float, path: str | os.PathLike[str]) -> str:
    scalars = [
        (key, value)
        for block in _parameter_blocks(yaml.compose(text, Loader=yaml.SafeLoader))
        for key, value in block.value
    ]
    found = [value for key, value in scalars if key.value == "keep"]
    number = f"{keep:.10g}"
    if len(found) == 1:
        start, end = found[0].start_mark.index, found[0].end_mark.index
        if isinstance(found[0], yaml.ScalarNode) and text[start:end] == found[0].value:
            return f"{text[:start]}{number}{text[end:]}"
    if found:
        what = f"is written {len(found)} times" if len(found) > 1 else "is not one number"
        raise SnrfError(path, what, f"write keep: {number} once", field="keep")
    updates = [(key, value) for key, value in scalars if key.value == "update"]
    if len(updates) != 1:
        raise _no_place(keep, path)
    key, value = updates[0]
    start, end = key.start_mark.index, value.end_mark.index
    line = text[text.rfind("\n", 0, start) + 1 : start]
    ending = "\r\n" if "\r\n" in text else "\n"
    joint = f"{ending}{line}" if not line.strip() else ", "
    rest = text[end:]
    if not line.strip():
        # A comment on the line of update stays there.
        end += len(rest.split("\n", 1)[0].rstrip("\r"))
    return f"{text[:end]}{joint}keep: {number}{text[end:]}"


def _parameter_blocks(root: yaml.Node | None) -> list[yaml.MappingNode]:
    """Return the mappings under every key ``parameters``."""
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "parameters" and isinstance(value, yaml.MappingNode):
                    found.append(value)
                else:
                    todo.append(value)
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value
    return found


def _invalid(path: str | os.PathLike[str], entries: Sequence[Mapping[str, Any]]) -> SnrfError:
    """Return the error of a recipe; of the types that a value may have, the one that fits best counts."""

    def keys(entry: Mapping[str, Any]) -> list[str | int]:
        return [part for part in entry["loc"] if not _BRANCH.fullmatch(str(part))]

    entry = max(entries, key=lambda one: (len(keys(one)), one["input"] is None))
    several = len(keys(entry)) < len(entry["loc"])
    name = "ConditionalParameter" if several else (entry.get("ctx") or {}).get("class_name", "")
    return invalid(path, [entry], keys=keys(entry), expected=_EXPECTED.get(name))
