"""Prompt templates: format strings over a row's columns that can name a column and do nothing else."""

from __future__ import annotations

import string
from collections.abc import Mapping

from mergekit_snrf.errors import SnrfError

IMAGE = "<image>"
"""What stands for an image in a template and in a dataset's questions, whatever the model's own token is."""


def template_fields(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, in order of appearance.

    Raises:
        SnrfError: a brace is not closed, or a field is anything but the plain name of a column: attributes, indices,
            conversions and format specifications are refused, so that a template runs no code.
    """
    return tuple(dict.fromkeys(name for _, name in _parse(template) if name is not None))


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Replace every ``{column}`` by the row's text; ``{{`` and ``}}`` stand for braces.

    Raises:
        SnrfError: as ``template_fields``, or a column is not in ``fields``.
    """
    parts = []
    for literal, name in _parse(template):
        parts.append(literal)
        if name is not None:
            if name not in fields:
                raise SnrfError(f"template {template!r} names {name!r}, which is none of {', '.join(fields)}")
            parts.append(fields[name])
    return "".join(parts)


def _parse(template: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise SnrfError(
            f"template {template!r} is not a format string ({error}); write a column as {{question}} and a brace as "
            f"{{{{ or }}}}"
        ) from None
    for _, name, specification, conversion in parsed:
        if name is None:
            continue
        if specification or conversion or not name.strip() or any(sign in name for sign in ".[]{}"):
            raise SnrfError(
                f"template {template!r}: {{{name}}} must be the plain name of a column, without attribute, index, "
                f"conversion or format specification"
            )
    return [(literal, name) for literal, name, _, _ in parsed]
