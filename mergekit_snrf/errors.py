"""The one exception type of the package: where a problem is, what it is, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_LONGEST_PART = 500
_LONGEST_VALUE = 60
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
    """A problem that the user can fix, shown as ``where: field: what; remedy``.

    Every part is one line of printable text: control characters and marks of text direction, which files may hold,
    are written as escapes.

    Args:
        where: the file, model or tensor; None where there is only one place it can be.
        what: what is wrong there, with the value that was found.
        remedy: what to do about it.
        field: the setting at fault, by its name in the package's types; ``naming`` makes it what the user typed.

    >>> str(SnrfError("mask.safetensors", "has no neurons", "choose a larger top_ratio"))
    'mask.safetensors: has no neurons; choose a larger top_ratio'
    """

    def __init__(self, where: object | None, what: str, remedy: str | None = None, *, field: str | None = None) -> None:
        self.what = _part(what)
        self.where = None if where is None else _part(str(where))
        self.remedy = None if remedy is None else _part(remedy)
        self.field = field
        self.problems: tuple[SnrfError, ...] = ()
        super().__init__(self.where, self.what, self.remedy)

    def __str__(self) -> str:
        """Return the whole message."""
        place = "".join(f"{part}: " for part in (self.where, self.field) if part)
        message = f"{place}{self.what}" + (f"; {self.remedy}" if self.remedy else "")
        return message + "".join(f"\n  {number}. {one}" for number, one in enumerate(self.problems, 1))

    def at(self, where: object | None = None, *, field: str | None = None) -> SnrfError:
        """Return the same problem with another place or field; what is None stays."""
        moved = SnrfError(self.where if where is None else where, self.what, self.remedy, field=field or self.field)
        moved.problems = self.problems
        return moved

    @classmethod
    def several(cls, what: str, problems: Sequence[SnrfError]) -> SnrfError:
        """Return one problem as it is, or several as a numbered list under ``what``."""
        if len(problems) == 1:
            return problems[0]
        error = cls(None, f"{what}, there are {len(problems)} problems:")
        error.problems = tuple(problems)
        return error


@contextmanager
def naming(name: Mapping[str, str] | Callable[[str], str], where: object | None = None) -> Iterator[None]:
    """Name the field of errors in the block as the user types it: a key of a file, or an option.

    A mapping leaves other fields as they are. ``where`` is the place of errors that name none, such as the file read.
    """
    try:
        yield
    except SnrfError as error:
        typed = error.field
        if typed is not None:
            typed = name.get(typed, typed) if isinstance(name, Mapping) else name(typed)
        raise error.at(error.where or where, field=typed) from error.__cause__


@contextmanager
def keys_of_file() -> Iterator[None]:
    """Make the field of errors in the block part of their place: it is a key of a file, which no option is named as."""
    try:
        yield
    except SnrfError as error:
        place = ": ".join(part for part in (error.where, error.field) if part)
        moved = SnrfError(place or None, error.what, error.remedy)
        moved.problems = error.problems
        raise moved from error.__cause__


def unexpected(field: str, value: object, expected: str, remedy: str | None = None) -> SnrfError:
    """Return the error of an argument of a wrong type."""
    return SnrfError(None, f"must be {expected}, got {type(value).__name__}", remedy, field=field)


def option(field: str) -> str:
    """Return the command line option of a field: ``max_new_tokens`` is ``--max-new-tokens``."""
    return f"--{field.replace('_', '-')}"


def printable(text: str) -> str:
    """Return ``text`` with line breaks, control characters and marks of text direction written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign exception's message that says something, or else its type.

    PyTorch ends a line with a colon and lists the facts below it: then the next line is part of it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def os_reason(error: Exception) -> str:
    """Return what the operating system says of an ``OSError``, or the message of another exception."""
    return str(getattr(error, "strerror", None) or first_line(error))


def did_you_mean(name: str, known: Iterable[str], what: str = "known are") -> str:
    """Return a hint at the closest known name, or the list of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{what} {', '.join(known)}"


def invalid(
    where: object | None,
    entries: Sequence[Mapping[str, Any]],
    *,
    fields: Collection[str] = (),
    keys: Sequence[str | int] | None = None,
    expected: str | None = None,
    remedy: str | None = None,
) -> SnrfError:
    """Return the first entry of pydantic's ``ValidationError.errors()`` as an error with the key as its field.

    Args:
        where: the file that was read; None: the values come from Python or options, so the field is the plain name.
        entries: of ``errors()``.
        fields: the keys that are known where an unknown one stands.
        keys: where the value stands; None: where the entry says.
        expected: what the value must be; None: what the entry says.
        remedy: what to do about it, where the entry says nothing.
    """
    entry = entries[0]
    parts = [str(part) for part in (entry["loc"] if keys is None else keys)]
    of_name = parts[-1:] == ["[key]"]
    key = ".".join(parts[:-2] if of_name else parts) or None
    if entry["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], fields, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = f"the keys there are {', '.join(fields)}" if fields else "remove it"
        return SnrfError(where, f"unknown key {key!r}", hint + known)
    if entry["type"] == "missing":
        return SnrfError(where, f"key {key!r} is missing", "add it")
    what = f"must be {expected}, got {_given(entry['input'])}" if expected is not None else _message(entry)
    field = key and f"key {key!r}"
    if where is None:
        field, what = key, what.replace("remove the key", "leave it out")
    return SnrfError(where, f"a name in it {what}" if of_name else what, remedy, field=field)


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
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}…"


def _part(text: str) -> str:
    text = "".join(c if c == "\n" else printable(c) for c in text)
    return text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}…"
