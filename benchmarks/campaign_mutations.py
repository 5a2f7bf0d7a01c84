"""Seeded damage of files: bytes, text, JSON and YAML trees, headers of safetensors files, and what is no file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TOKENS = (
    *("\0", "\x1b[31m", "\u202e", "\ud800", "\u2028", "\r", "\t", "- ", ": ", "{{", "{", "[", "*a", "&a "),
    *("<<: *a\n", "'", '"', "9" * 5000, "1e999", "NaN", "-1", "0", "-0.0", "1e-400", "0x_", "2020-13-45"),
    *("!!timestamp x", "!!python/object:os.system x", "!!int x", "!!binary x", "[" * 600, "{a: " * 300),
    *("a" * 100_000, "/dev/zero", "/dev/stdin", "../../etc/passwd", "x\0y", "a: &a [x, x]\nb: &b [*a, *a]\n"),
    *("? [a]\n: b\n", "---\n", "\ufeff", "null", "true", ".inf", "hf://a/b@c/d.json"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf"), "", "\0"),
    *("\u202e\x1b[31m", "a" * 2000, "/dev/zero", "../..", "9" * 5000, [], {}, [[]], {"": {}}, ["a"] * 3000),
    *([1, "a", None], {"a": {"b": {"c": 1}}}),
)
_DEEP = 2000


def damage(
    content: bytes, suffix: str, generator: np.random.Generator, tokens: Sequence[str] = ()
) -> tuple[str, bytes]:
    """Return what was done to a file's content, and the result."""
    ways: list[Callable[..., bytes]] = [_bytes, _text]
    if suffix == ".safetensors":
        ways = [_bytes, _header, _header]
    elif suffix in (".json", ".jsonl", ".yml", ".yaml"):
        ways += [_tree, _tree]
    elif tokens:
        ways = [_text]
    name, result = "bytes", content
    for _ in range(1 + int(generator.random() < 0.4)):
        way = ways[int(generator.integers(len(ways)))]
        name = way.__name__.strip("_")
        try:
            common = generator.random() < 0.5 or not tokens
            result = way(result, suffix, generator, [*tokens, *TOKENS] if common else tokens)
        except Exception:
            # What was damaged before may not parse any more.
            result = _bytes(result, suffix, generator, TOKENS)
    return name, result


def replaced(file: Path, generator: np.random.Generator) -> str:
    """Put something else where a file was; return what."""
    file.unlink()
    kind = ("fifo", "folder", "loop", "zero", "sparse", "nothing", "empty")[int(generator.integers(7))]
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "sparse":
        with file.open("wb") as made:
            made.truncate(8 * 2**30)
    elif kind == "empty":
        file.touch()
    return kind


def _bytes(content: bytes, suffix: str, generator: np.random.Generator, tokens: Sequence[str]) -> bytes:
    if not content:
        return bytes(generator.integers(0, 256, 20, dtype=np.uint8))
    start, length = int(generator.integers(len(content))), int(generator.integers(1, 65))
    kind = int(generator.integers(6))
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[start + length :]
    if kind == 2:
        return content[: start + length] + content[start:]
    noise = bytes(generator.integers(0, 256, length if kind == 3 else 1, dtype=np.uint8))
    if kind == 5:
        return content[:start] + noise + content[start:]
    return content[:start] + noise + content[start + len(noise) :]


def _text(content: bytes, suffix: str, generator: np.random.Generator, tokens: Sequence[str]) -> bytes:
    start = int(generator.integers(len(content) + 1))
    token = tokens[int(generator.integers(len(tokens)))].encode("utf-8", "surrogatepass")
    cut = int(generator.integers(12))
    if suffix == ".jinja" and generator.random() < 0.6:
        # Elsewhere a template is hardly ever one.
        start, cut = (0, 0) if generator.random() < 0.5 else (len(content), 0)
    return content[:start] + token + content[start + cut :]


def _tree(content: bytes, suffix: str, generator: np.random.Generator, tokens: Sequence[str]) -> bytes:
    if suffix == ".jsonl":
        lines = content.splitlines()
        number = int(generator.integers(len(lines)))
        lines[number] = _dumped(_changed(json.loads(lines[number]), generator, tokens))
        return b"\n".join(lines) + b"\n"
    if suffix == ".json":
        return _dumped(_changed(json.loads(content), generator, tokens))
    return yaml.safe_dump(_changed(yaml.safe_load(content), generator, tokens)).encode("utf-8", "surrogatepass")


def _dumped(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    return text.replace('"deep"', "[" * _DEEP + "]" * _DEEP).encode("utf-8", "surrogatepass")


def _changed(value: Any, generator: np.random.Generator, tokens: Sequence[str]) -> Any:
    """Return a tree with one place changed: another value, a key renamed, removed or added."""
    here = not isinstance(value, dict | list) or not value or generator.random() < 0.15
    if here and isinstance(value, dict) and value:
        key = list(value)[int(generator.integers(len(value)))]
        changed = dict(value)
        moved = changed.pop(key)
        if generator.random() < 0.5:
            names = ("", "x", f"{key}x", "\x1b[0m", key.upper() if isinstance(key, str) else "y")
            changed[names[int(generator.integers(5))]] = moved
        return changed
    if here:
        values = tokens if generator.random() < 0.3 else VALUES
        return "deep" if generator.random() < 0.05 else values[int(generator.integers(len(values)))]
    if isinstance(value, dict):
        key = list(value)[int(generator.integers(len(value)))]
        return {**value, key: _changed(value[key], generator, tokens)}
    index = int(generator.integers(len(value)))
    return [*value[:index], _changed(value[index], generator, tokens), *value[index + 1 :]]


def _header(content: bytes, suffix: str, generator: np.random.Generator, tokens: Sequence[str]) -> bytes:
    """Change the JSON header of a safetensors file, or the JSON inside its metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    inside = header.get("__metadata__", {})
    if "snrf" in inside and generator.random() < 0.6:
        written = _dumped(_changed(json.loads(inside["snrf"]), generator, tokens)).decode("utf-8", "replace")
        header["__metadata__"] = {**inside, "snrf": written}
    else:
        header = _changed(header, generator, tokens)
    text = _dumped(header)
    if generator.random() < 0.1:
        length = int(generator.integers(0, 2**63))
        return struct.pack("<Q", length) + text + content[8 + length :]
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + struct.unpack("<Q", content[:8])[0] :]
