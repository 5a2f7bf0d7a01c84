from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.reading import load_json, load_yaml, parse_yaml, read_bytes, read_text

BOMB = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30))])
BAD = {
    "date": ("a: 2020-13-45", "line 1, column 4"),
    "timestamp": ("a:\n  !!timestamp x", "line 2, column 3"),
    "hexadecimal": ("a: 0x_", "line 1, column 4"),
    "integer": ("a: " + "9" * 5000, "line 1, column 4"),
    "flow nesting": ("[" * 600, "line 1, column 101"),
    "endless nesting": ("[" * 900_000, "line 1, column 101"),
    "endless mappings": ("{a: " * 200_000, "nested deeper"),
    "endless entries": ("- " * 400_000, "nested deeper"),
    "endless pairs": ("[1," * 300_000, "nested deeper"),
    "block nesting": ("".join(" " * i + "-\n" for i in range(600)), "line 101, column 101"),
    "duplicate key": ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11"),
    "itself": ("a: &a [*a]", "line 1, column 8"),
    "merge bomb": (BOMB, "line 15, column 17"),
    "alias bomb": (BOMB.replace("{<<:", "").replace("]}", "]"), "more than 100000 values"),
    "NUL": ("a: 1\nbc: \0", "line 2, column 5"),
    "open": ("a: [1\nb", "line 2, column 2"),
    "unhashable": ("? [1]\n: 2", "line 1, column 3"),
    "python": ("a: !!python/object:os.x {}", "line 1, column 4"),
    "two documents": ("--- 1\n--- 2", "line 2, column 1"),
    "undefined alias": ("a: *b", "line 1, column 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_yaml_is_one_error_with_its_place(name: str) -> None:
    text, place = BAD[name]
    with pytest.raises(SnrfError) as caught:
        parse_yaml(text, "file.yml")
    assert caught.value.where == "file.yml"
    assert place in caught.value.what
    assert len(str(caught.value)) < 300


def test_a_duplicate_key_is_named() -> None:
    with pytest.raises(SnrfError, match="duplicate key 'limit'"):
        parse_yaml("limit: 1\nlimit: 2", None)


@settings(max_examples=100)
@given(st.text("ab:&*<[]{}-?!|>\"'#%@,. \n0x1:~=", max_size=30))
def test_yaml_is_read_as_pyyaml_reads_it(text: str) -> None:
    try:
        found: Any = parse_yaml(text, None)
    except SnrfError as error:
        if "duplicate key" in error.what:
            return
        with pytest.raises(Exception):  # noqa: B017, PT011
            yaml.safe_load(text)
    else:
        assert repr(found) == repr(yaml.safe_load(text))


def test_merge_keys_may_override() -> None:
    text = "deep: {x: {y: &a {<<: &z {k: 1}, k: 2}}}\nb: {<<: *a, k: 3}"
    assert parse_yaml(text, None) == yaml.safe_load(text)


def test_only_regular_files_of_limited_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"[1, 2]")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    assert read_bytes(tmp_path / "link", 6) == b"[1, 2]"
    assert load_json(tmp_path / "file") == load_yaml(tmp_path / "file") == [1, 2]
    for path, what in {
        "file": "has 6 bytes, more than the limit of 5 for such a file",
        "sparse": f"has {2**40} bytes, more than the limit of 5 for such a file",
        "folder": "is a folder, not a file",
        "fifo": "is not a regular file",
        "missing": "cannot be read (No such file or directory)",
        "a\0b": "cannot be read (",
    }.items():
        with pytest.raises(SnrfError) as caught:
            read_bytes(f"{tmp_path}/{path}", 5, remedy="give the recipe")
        assert caught.value.what.startswith(what)
        assert caught.value.remedy == "give the recipe"
    with pytest.raises(SnrfError, match="regular"):
        read_text("/dev/zero")


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"9" * 5000, b"\xff", b""])
def test_bad_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SnrfError) as caught:
        load_json(tmp_path / "file")
    assert caught.value.where == str(tmp_path / "file")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"caf\xe9")
    with pytest.raises(SnrfError, match="not UTF-8"):
        load_yaml(tmp_path / "file")
