"""Conversations in a column of a data set: ``messages`` as chat models take them, or ``conversations`` of ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_snrf.profiling.probes.source import IMAGE, RowError

_ROLES = {"human": "user", "gpt": "assistant", "bard": "assistant", "chatgpt": "assistant"}
_KNOWN = ("system", "user", "assistant")

Turn = tuple[str, str]
"""A role (system, user or assistant) and a text."""


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, or a mapping of lists as ``datasets`` stores one."""
    if isinstance(value, Mapping):
        return any(name in value for name in ("role", "from"))
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def read_conversation(value: Any, column: str) -> tuple[tuple[Turn, ...], str | None]:
    """Return the messages up to the last question, and the reply to it if there is one.

    Messages are ``{role, content}`` or ``{from, value}``; a content is text, or parts of type text and image.
    ``RowError``: there is no question, or a message has no text or an unknown role.
    """
    if isinstance(value, Mapping):
        lists = {name: entries for name, entries in value.items() if isinstance(entries, list | tuple)}
        if len(set(map(len, lists.values()))) > 1:
            raise RowError(None, f"the conversation in column {column!r} has lists of different lengths")
        value = [dict(zip(lists, message, strict=True)) for message in zip(*lists.values(), strict=True)]
    roles = [_role(message, column) for message in value]
    if "user" not in roles:
        raise RowError(None, f"the conversation in column {column!r} has no message of the user")
    last = len(roles) - 1 - roles[::-1].index("user")
    written = list(zip(roles, value, strict=True))
    turns = [(role, _text(message, role, column)) for role, message in written[: last + 1]]
    reply = next((_content(message) for role, message in written[last + 1 :] if role == "assistant"), None)
    # An empty system message says nothing, and some data sets have one in every conversation.
    return tuple(turn for turn in turns if turn != ("system", "")), reply


def _role(message: Mapping[str, Any], column: str) -> str:
    role = str(message.get("role") or message.get("from"))
    role = _ROLES.get(role, role)
    if role not in _KNOWN:
        raise RowError(None, f"the conversation in column {column!r} has a message of {role!r}")
    return role


def _text(message: Mapping[str, Any], role: str, column: str) -> str:
    text = _content(message)
    if not isinstance(text, str) or (not text.strip() and role != "system"):
        raise RowError(None, f"the conversation in column {column!r} has a message of {role!r} without text")
    return text if text.strip() else ""


def _content(message: Mapping[str, Any]) -> Any:
    content = message.get("content", message.get("value"))
    if isinstance(content, list | tuple):
        return "".join(map(_part, content))
    return "" if content is None else content


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE
    if kind != "text":
        raise RowError(None, f"a message has a part of type {kind!r}", "use parts of type text and image")
    return str(part.get("text") or "")
