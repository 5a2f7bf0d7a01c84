"""Recipes without the folders of this machine, for model cards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import PurePath

import yaml

from mergekit_snrf.files.references import cached_place

# A name that YAML reads as the same text without quotes.
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z][\w.+@-]*", re.ASCII | re.IGNORECASE)


def portable(recipe: str, inputs: Collection[str] = ()) -> str:
    """Return a recipe's text with local paths cut to their last part, or to as many as tell them apart.

    A path in the hub's cache becomes the hub's name of what lies there, with its revision.
    ``inputs`` are absolute paths of what the recipe reads, to which its relative paths lead.
    """
    scalars = [token for token in yaml.scan(recipe, yaml.SafeLoader) if isinstance(token, yaml.ScalarToken)]
    local = {path: _absolute(path, inputs) for token in scalars for path, _ in _parts(token.value)}
    names = _names({path: absolute for path, absolute in local.items() if absolute is not None})
    pieces, end = [], 0
    for token in scalars:
        short = "".join(names.get(path, path) + rest for path, rest in _parts(token.value))
        if short == token.value:
            continue
        written = recipe[token.start_mark.index : token.end_mark.index]
        # A block scalar ends after its line break.
        after = written[len(written.rstrip()) :]
        quoted = short if _PLAIN.fullmatch(short) else json.dumps(short, ensure_ascii=False)
        pieces += [recipe[end : token.start_mark.index], quoted + after]
        end = token.end_mark.index
    return "".join([*pieces, recipe[end:]])


def _parts(reference: str) -> list[tuple[str, str]]:
    """Split a reference to a mask or a model into paths and what follows each; joined again they are the reference."""
    if os.path.isabs(reference) and os.path.exists(reference):
        return [(reference, "")]
    # A model may be model@revision+adapter@revision.
    parts = [part.partition("@") for part in reference.split("+")]
    return [
        (path, at + revision + ("+" if number < len(parts) else ""))
        for number, (path, at, revision) in enumerate(parts, 1)
    ]


def _absolute(path: str, inputs: Collection[str]) -> PurePath | None:
    """Return the absolute form of a local path, None of other text."""
    if os.path.isabs(path):
        return PurePath(path) if os.path.exists(path) else None
    if "://" in path or not path:
        return None
    tail = tuple(part for part in PurePath(os.path.normpath(path)).parts if part not in (os.curdir, os.pardir))
    ends = (PurePath(one) for one in inputs)
    return next((one for one in ends if tail and one.parts[-len(tail) :] == tail), None)


def _names(paths: dict[str, PurePath]) -> dict[str, str]:
    """Return the shortest ends of paths that tell them apart."""
    distinct = {path.parts for path in paths.values()}

    def name(of: tuple[str, ...]) -> str:
        ends = (of[-count:] for count in range(1, len(of) + 1))
        return str(PurePath(*next(end for end in ends if sum(other[-len(end) :] == end for other in distinct) == 1)))

    return {written: _on_hub(path) or name(path.parts) for written, path in paths.items()}


def _on_hub(path: PurePath) -> str | None:
    """Return the hub's name of a model or file in the hub's cache, None for other paths."""
    place = cached_place(path)
    if place is None:
        return None
    repository, revision, file = place
    return f"{repository}@{revision}" if file is None else f"hf://{repository}@{revision}/{file}"
