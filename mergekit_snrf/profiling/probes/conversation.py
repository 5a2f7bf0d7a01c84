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

    Raises:
        RowError: there is no question, or a message has no text or an unknown role.
    """
    if isinstance(value, Mapping):
        lists = {name: entries for name, entries in value.items() if isinstance(entries, list | tuple)}
        value = [dict(zip(lists, message, strict=True)) for message in zip(*lists.values(), strict=True)]
    turns = [_turn(message, column) for message in value]
    asked = [index for index, (role, _) in enumerate(turns) if role == "user"]
    if not asked:
        raise RowError(None, f"the conversation in column {column!r} has no message of the user")
    reply = turns[asked[-1] + 1 : asked[-1] + 2]
    return tuple(turns[: asked[-1] + 1]), reply[0][1] if reply else None


def _turn(message: Mapping[str, Any], column: str) -> Turn:
    role, content = message.get("role") or message.get("from"), message.get("content") or message.get("value")
    role = _ROLES.get(str(role), str(role))
    if role not in _KNOWN:
        raise RowError(None, f"the conversation in column {column!r} has a message of {role!r}")
    if isinstance(content, list | tuple):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise RowError(None, f"the conversation in column {column!r} has a message of {role!r} without text")
    return role, content


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE
    return str(part.get("text") or "") if kind == "text" else ""
