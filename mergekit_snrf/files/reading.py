"""Guarded reading of text, YAML and JSON: regular files of limited size, and one kind of error."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import yaml

from mergekit_snrf.errors import SnrfError, first_line, os_reason

CONFIG_BYTES = 1_000_000  # No configuration that people write is larger,
DATA_BYTES = 256_000_000  # and no JSON file that the package reads as a whole.
_MAX_NODES, _MAX_DEPTH = 100_000, 100
_PATH = "correct the path"
_Path = str | os.PathLike[str]


@contextmanager
def open_regular(path: _Path, *, remedy: str = _PATH) -> Iterator[BinaryIO]:
    """Open a regular file to read, or raise ``SnrfError``; a FIFO or device would never end."""
    try:
        _check_regular(path, os.stat(path).st_mode, remedy)
        # What replaced the file since is found below, without waiting for the writer of a FIFO.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            _check_regular(path, os.fstat(file.fileno()).st_mode, remedy)
            yield file
    except SnrfError:
        raise
    except (OSError, ValueError) as error:
        raise SnrfError(path, f"cannot be read ({os_reason(error)})", remedy) from None


def _check_regular(path: _Path, mode: int, remedy: str) -> None:
    if not stat.S_ISREG(mode):
        raise SnrfError(path, "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file", remedy)


def read_bytes(path: _Path, limit: int, *, remedy: str = _PATH) -> bytes:
    """Return the content of a regular file, or raise ``SnrfError``, also where it has more than ``limit`` bytes."""
    with open_regular(path, remedy=remedy) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise SnrfError(path, f"has {size} bytes, more than the limit of {limit} for such a file", remedy)
    return content


def read_text(path: _Path, limit: int = CONFIG_BYTES, *, remedy: str = _PATH) -> str:
    """Return the text of a regular UTF-8 file; errors are as of ``read_bytes``."""
    try:
        return read_bytes(path, limit, remedy=remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SnrfError(path, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None


def load_json(path: _Path, limit: int = DATA_BYTES, *, remedy: str = _PATH) -> Any:
    """Return the content of a JSON file; errors are as of ``read_bytes`` and ``parse_json``."""
    return parse_json(read_bytes(path, limit, remedy=remedy), path)


def parse_json(content: bytes | str, where: object) -> Any:
    """Return what JSON text holds, or raise ``SnrfError``."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SnrfError(where, f"not valid JSON ({first_line(error)})", "the file is damaged, get it again") from None


def load_yaml(path: _Path, limit: int = CONFIG_BYTES, *, remedy: str = _PATH) -> Any:
    """Return the content of a YAML file; errors are as of ``read_text`` and ``parse_yaml``."""
    return parse_yaml(read_text(path, limit, remedy=remedy), path)


def parse_yaml(text: str, where: object | None, *, several: bool = False) -> Any:
    """Return what YAML text holds, as PyYAML's safe loader does; with ``several`` a list of all documents.

    ``SnrfError``: it is not YAML, has a duplicate key, or is too deep or too large with its aliases written out.
    """
    try:
        return list(yaml.load_all(text, _Loader)) if several else yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position) - 1
        what = f"character U+{error.character:04X} is not allowed"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
        parts = (error.context, error.problem) if str(error.problem).startswith("but ") else (error.problem,)
        what = ", ".join(filter(None, parts))
    raise SnrfError(where, f"not valid YAML at line {line + 1}, column {column + 1} ({what})", "correct it")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, without duplicate keys, and with a place for every problem."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes, self._depth = 0.0, 0
        self._nodes_of: dict[str, float] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; an alias counts as much as what it stands for."""
        event, before = self.peek_event(), self._nodes
        anchor, is_alias = event.anchor, isinstance(event, yaml.AliasEvent)
        self._nodes += self._nodes_of.get(anchor, 1) if is_alias else 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {_MAX_DEPTH} levels", event.start_mark)
        if self._nodes > _MAX_NODES:
            what = f"more than {_MAX_NODES} values with its aliases written out"
            raise yaml.MarkedYAMLError(None, None, what, event.start_mark)
        if anchor and not is_alias:
            self._nodes_of[anchor] = math.inf  # An alias inside its own anchor never ends.
        node = super().compose_node(parent, index)
        if anchor and not is_alias:
            self._nodes_of[anchor] = self._nodes - before
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, of which a key that occurs twice would hide a value."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(name)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; one that does not fit its type, such as 2020-13-45, keeps its place."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:
            # A date or number that is not one raises whatever Python's own functions raise.
            what = f"{node.value!s:.40} is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(None, None, what, node.start_mark) from None
