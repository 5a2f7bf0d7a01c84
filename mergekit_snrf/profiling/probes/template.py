"""Prompt templates: format strings over a row's columns that can name a column and do nothing else."""

from __future__ import annotations

import string
from collections.abc import Mapping

from mergekit_snrf.errors import SnrfError, did_you_mean

IMAGE = "<image>"
"""Marks an image in a template and in a data set's questions, whatever the model's own token is."""


def template_fields(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, in order of appearance.

    Attributes, indices, conversions and format specifications are errors, so that a template cannot run code.
    """
    return tuple(dict.fromkeys(name for _, name in _parse(template) if name is not None))


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Replace every ``{column}`` by the row's text; ``{{`` and ``}}`` are braces."""
    parts = []
    for literal, name in _parse(template):
        parts.append(literal)
        if name is not None:
            if name not in fields:
                raise SnrfError(None, f"there is no column {name!r}", did_you_mean(name, fields), field="template")
            parts.append(fields[name])
    return "".join(parts)


def _parse(template: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        what = f"template {template!r} is not a format string ({error})"
        raise SnrfError(None, what, "write a column as {question} and a brace as {{ or }}") from None
    for _, name, specification, conversion in parsed:
        if name is None:
            continue
        if specification or conversion or not name.strip() or any(sign in name for sign in ".[]{}"):
            what = f"{{{name}}} in template {template!r} is not the plain name of a column"
            raise SnrfError(None, what, "remove attributes, indices, conversions and format specifications")
    return [(literal, name) for literal, name, _, _ in parsed]
