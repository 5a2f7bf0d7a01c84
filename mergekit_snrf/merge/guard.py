"""How mergekit's commands read recipes: with limits, and what cannot be read as one sentence.

Imports nothing of mergekit, whose own import may lead here.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TextIO

import click
import yaml

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.reading import DATA_BYTES, parse_yaml, read_text

_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/")  # Where the shell's <(...) and pipes are found.
_OURS = re.compile(r"^[^#\n]*\bmerge_method['\"]?\s*:\s*['\"]?snrf\b", re.MULTILINE)


def open_recipe(path: str, *args: Any, **options: Any) -> TextIO:
    """Open a recipe as the built-in does.

    ``click.ClickException``: it is missing, not UTF-8 text, or a device or FIFO that may never end.
    """
    if path == "-":
        return io.StringIO(sys.stdin.read())
    if path.startswith(_STREAMS):
        return open(path, *args, **options)
    try:
        return io.StringIO(read_text(path, DATA_BYTES))
    except SnrfError as error:
        raise click.ClickException(str(error)) from None


class GuardedYaml:
    """PyYAML with guarded ``safe_load`` and ``safe_load_all``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(yaml, name)

    def safe_load(self, text: str) -> Any:
        """Return what a recipe holds."""
        found = _parsed(text) if _OURS.search(text) else yaml.safe_load(text)
        _check_method(found)
        return found

    def safe_load_all(self, text: str) -> Iterable[Any]:
        """Return what the recipes of a file hold."""
        return _parsed(text, several=True) if _OURS.search(text) else yaml.safe_load_all(text)


def _check_method(recipe: Any) -> None:
    """Refuse a misspelled ``snrf``, which mergekit would only call unimplemented."""
    from mergekit.merge_methods import registry

    method = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if isinstance(method, str) and method not in registry._METHODS and get_close_matches(method.lower(), ["snrf"]):
        raise click.ClickException(f"merge_method: {method!r} is unknown; did you mean 'snrf'?")


def _parsed(text: str, **how: Any) -> Any:
    context = click.get_current_context(silent=True)
    try:
        return parse_yaml(text, context and context.params.get("config_file"), **how)
    except SnrfError as error:
        if context is None:
            raise
        raise click.ClickException(str(error)) from None
