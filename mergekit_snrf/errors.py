"""The one exception type of the package, and what pydantic finds wrong in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_LONGEST = 60
_KINDS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "string_type": "text",
    "tuple_type": "a list",
}
_LENGTHS = {
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} {entries}",
}


class SnrfError(ValueError):
    """A problem the user can mend; the message is one sentence with the file, the tensor and the remedy."""


def problem(
    entry: Mapping[str, Any],
    *,
    keys: Sequence[str | int] | None = None,
    fields: Collection[str] = (),
    expected: str | None = None,
) -> str:
    """Say what is wrong with a key, what is allowed there and what was given: ``key 'a.b': must be text, got 3``.

    Args:
        entry: of the ``errors()`` of pydantic's ``ValidationError``.
        keys: where the value stands; None: where the entry says.
        fields: the keys that are known where an unknown one stands.
        expected: what the value must be; None: what the entry says.
    """
    parts = [str(part) for part in (entry["loc"] if keys is None else keys)]
    of_name = parts[-1:] == ["[key]"]
    key = ".".join(parts[:-2] if of_name else parts)
    if entry["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], fields, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}" + (f"the keys there are {', '.join(fields)}" if fields else "remove it")
    if entry["type"] == "missing":
        return f"key {key!r} is missing; add it"
    message = f"must be {expected}, got {_given(entry['input'])}" if expected is not None else _message(entry)
    message = f"a name in it {message}" if of_name else message
    return f"key {key!r}: {message}" if key else message


def _message(entry: Mapping[str, Any]) -> str:
    kind, limits, given = entry["type"], entry.get("ctx") or {}, entry["input"]
    if kind in _KINDS:
        return f"must be {_KINDS[kind].format(**limits)}, got {_given(given)}"
    if kind in _LENGTHS:
        entries = "entry" if limits.get("min_length") == 1 else "entries"
        return f"{_LENGTHS[kind].format(entries=entries, **limits)}, got {len(given)}"
    if kind == "string_too_short":
        return "is empty; write a value or remove the key"
    return str(entry["msg"]).removeprefix("Value error, ")


def _given(value: Any) -> str:
    if value is None:
        return "nothing; write a value or remove the key"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
