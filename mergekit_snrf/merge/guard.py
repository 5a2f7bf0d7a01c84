"""How mergekit's commands read YAML: recipes of snrf with limits, and what is not YAML as one sentence.

Imports nothing of mergekit, whose own import may lead here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click
import yaml

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.reading import parse_yaml

_OURS = re.compile(r"merge_method['\"]?\s*:\s*['\"]?snrf\b")


class GuardedYaml:
    """PyYAML with guarded ``safe_load`` and ``safe_load_all``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(yaml, name)

    def safe_load(self, text: str) -> Any:
        """Return what a recipe holds."""
        return _parsed(text) if _OURS.search(text) else yaml.safe_load(text)

    def safe_load_all(self, text: str) -> Iterable[Any]:
        """Return what the recipes of a file hold."""
        return _parsed(text, several=True) if _OURS.search(text) else yaml.safe_load_all(text)


def _parsed(text: str, **how: Any) -> Any:
    context = click.get_current_context(silent=True)
    try:
        return parse_yaml(text, context and context.params.get("config_file"), **how)
    except SnrfError as error:
        if context is None:
            raise
        raise click.ClickException(str(error)) from None
