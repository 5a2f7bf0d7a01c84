"""Markdown pages: tables whose cells hold any text, and documents with front matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.reading import parse_yaml

_MAX_CELL = 300
# Backslash first: the others are written with it. Hubs make links of bare addresses.
_ESCAPED = {"\\": "\\\\", "|": "\\|", "<": "&lt;", "[": "\\[", "!": "\\!", "://": "&#58;//", "www.": "www&#46;"}


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of escaped cells."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(value: object) -> str:
    """Return text for a cell; what comes from a file cannot leave it, nor put HTML or links on the page."""
    text = line(str(value))
    for mark, escaped in _ESCAPED.items():
        text = text.replace(mark, escaped)
    return text


def line(text: str) -> str:
    """Return printable text on one line, at most 300 characters of it."""
    text = "".join(mark for mark in " ".join(text.split()) if mark.isprintable())
    return text if len(text) <= _MAX_CELL else text[:_MAX_CELL] + "…"


def share(part: int, whole: int) -> str:
    """Return a share as per cent with two digits."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def document(title: str, parts: Iterable[str], front: Mapping[str, Any]) -> str:
    """Return a page with the front matter that hubs read, without its empty values."""
    kept = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False)}---\n" + "\n\n".join([f"# {title}", *parts]) + "\n"


def front_matter(page: str) -> dict[str, Any]:
    """Return the front matter of a page; empty where it has none that is a mapping."""
    head, separator, _ = page.removeprefix("---\n").partition("\n---")
    if not page.startswith("---\n") or not separator:
        return {}
    try:
        found = parse_yaml(head, None)
    except SnrfError:
        return {}
    return found if isinstance(found, dict) else {}
