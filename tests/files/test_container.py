from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.container import Format
from mergekit_snrf.neurons.maskfile import MASK

FORMAT, VERSION = "snrf-profile", 3
KIND = Format(
    FORMAT,
    VERSION,
    "make one with snrf-profile",
    "make it again",
    {"snrf-mask": "a mask is made from profiles, which snrf-profile writes"},
)

examples = settings(max_examples=40)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    leaves | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
contents = st.dictionaries(texts, json_values, max_size=4)


@st.composite
def tensor_maps(draw: st.DrawFn) -> dict[str, Tensor]:
    keys = draw(st.sets(texts.filter(lambda key: key != "__metadata__"), max_size=5))
    return {key: draw(tensors()) for key in keys}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    kinds = [bits, bits.view(torch.float32) if shape else bits.float(), bits > 0, bits.double(), bits.long()]
    return draw(st.sampled_from([*kinds, bits.half(), bits.bfloat16()]))


def write(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> bytes:
    KIND.write(path, tensors, content)
    return path.read_bytes()


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return KIND.read(path)


def outcome(path: Path) -> dict[str, Tensor] | str:
    """Return the tensors, or the message of the one exception that may be raised."""
    try:
        return read(path)[0]
    except SnrfError as error:
        return str(error)


def same(a: Tensor, b: Tensor) -> bool:
    bits = [value.reshape(-1).view(torch.uint8) for value in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def crafted(
    header: dict[str, Any] | None = None, data: bytes = b"", metadata: dict[str, Any] | None = None, **own: Any
) -> bytes:
    """Return a safetensors file with any header whatever, made without the code under test."""
    metadata = {"format": FORMAT, "version": str(VERSION), **own} if metadata is None else metadata
    text = json.dumps({"__metadata__": metadata, **(header or {})}).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safefile")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "example.safetensors"
    tensors = {"a": torch.tensor([True, False, True]), "b": torch.arange(6.0).reshape(2, 3), "c": torch.arange(4).int()}
    write(path, tensors, {"answer": 42, "probes": {"count": 3}})
    return path


@examples
@given(values=tensor_maps(), content=contents)
def test_files_are_plain_safetensors_and_aligned(
    folder: Path, values: dict[str, Tensor], content: dict[str, Any]
) -> None:
    path = folder / "plain.safetensors"
    raw = write(path, values, content)
    ours, found_content = read(path)
    assert found_content == content
    for found in (ours, load_file(path)):
        assert found.keys() == values.keys()
        assert all(same(found[key], value) for key, value in values.items())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "version", "snrf"}
    assert (metadata["format"], metadata["version"]) == (FORMAT, str(VERSION))
    assert json.loads(metadata["snrf"]) == content
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for key, value in values.items():
        assert (8 + length + header[key]["data_offsets"][0]) % value.element_size() == 0


@examples
@given(values=tensor_maps(), content=contents, shuffle=st.randoms(use_true_random=False))
def test_equal_inputs_give_equal_bytes(
    folder: Path, values: dict[str, Tensor], content: dict[str, Any], shuffle: random.Random
) -> None:
    reordered, recontent = list(values.items()), list(content.items())
    shuffle.shuffle(reordered)
    shuffle.shuffle(recontent)
    first = write(folder / "first.safetensors", values, content)
    assert write(folder / "second.safetensors", dict(reordered), dict(recontent)) == first


def test_views_are_written_by_value(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).t()[1:]
    write(tmp_path / "view.safetensors", {"a": value.requires_grad_(False)}, {})
    assert torch.equal(read(tmp_path / "view.safetensors")[0]["a"], value)


def test_file_names_that_are_not_unicode_stay_readable(tmp_path: Path) -> None:
    write(tmp_path / "name.safetensors", {}, {"file": os.fsdecode(b"caf\xe9.json")})
    assert read(tmp_path / "name.safetensors")[1] == {"file": "caf?.json"}
    assert load_file(tmp_path / "name.safetensors") == {}


@examples
@given(data=st.data())
def test_truncated_files_are_refused(example_bytes: bytes, folder: Path, data: st.DataObject) -> None:
    path = folder / "truncated.safetensors"
    path.write_bytes(example_bytes[: data.draw(st.integers(0, len(example_bytes) - 1))])
    with pytest.raises(SnrfError, match=r"truncated\.safetensors: not a readable safetensors file .* get it again"):
        read(path)


@pytest.fixture(scope="module")
def example_bytes(folder: Path) -> bytes:
    values = {"a": torch.tensor([True, False, True]), "b": torch.arange(6.0).reshape(2, 3)}
    return write(folder / "example.safetensors", values, {"answer": 42, "probes": {"count": 3}})


@settings(examples, max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_give_values_or_one_error(
    example_bytes: bytes, folder: Path, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(example_bytes)
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged)
    values_or_message = outcome(path)
    assert isinstance(values_or_message, dict) or values_or_message.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"its metadata says format=None; make one with snrf-profile"),
        ({"format": "pt"}, r"a snrf-profile file is needed, but its metadata says format='pt'"),
        ({"format": "snrf-mask", "version": "3"}, r"its metadata says format='snrf-mask'"),
        ({"format": "snrf-mask", "version": "1"}, r"; a mask is made from profiles, which snrf-profile writes"),
        ({"format": FORMAT}, r"snrf-profile version None is not supported, only 3; update mergekit-snrf"),
        ({"format": FORMAT, "version": "4"}, r"snrf-profile version '4' is not supported, only 3"),
        ({"format": FORMAT, "version": 3}, r"not a readable safetensors file"),
        ("text", r"not a readable safetensors file"),
    ],
)
def test_other_formats_and_versions(tmp_path: Path, metadata: Any, message: str) -> None:
    (tmp_path / "other").write_bytes(crafted(metadata=metadata))
    with pytest.raises(SnrfError, match=rf"other: .*{message}"):
        read(tmp_path / "other")


def test_weights_of_a_model_are_not_a_mask(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(SnrfError, match=r"model\.safetensors: a snrf-mask file is needed, .*'snrf mask select'"):
        MASK.read(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "snrf",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"a":' * 101 + "1" + "}" * 101,
        '{"a":' + "[" * 100 + "1" + "]" * 100 + "}",
        '{"a": ' + "9" * 5000 + "}",
        r'{"a": "\ud800"}',
        r'{"\ud800": 1}',
    ],
    ids=lambda text: text[:20],
)
def test_hostile_metadata(tmp_path: Path, snrf: str) -> None:
    (tmp_path / "hostile").write_bytes(crafted(snrf=snrf))
    with pytest.raises(SnrfError, match=r"hostile: the metadata entry 'snrf' is not a JSON object of Unicode text"):
        read(tmp_path / "hostile")


def test_metadata_may_be_absent_or_nested(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(crafted())
    assert read(tmp_path / "plain") == ({}, {})
    (tmp_path / "nested").write_bytes(crafted(snrf='{"a":' * 99 + "1" + "}" * 99))
    assert write(tmp_path / "again", {}, read(tmp_path / "nested")[1])


def test_bytes_that_are_no_booleans(tmp_path: Path) -> None:
    header = {"a": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "good").write_bytes(crafted(header, b"\0\1\1\0"))
    assert read(tmp_path / "good")[0]["a"].tolist() == [False, True, True, False]
    for bad in (b"\0\1\2\0", b"\xff\0\0\0"):
        (tmp_path / "bad").write_bytes(crafted(header, bad))
        with pytest.raises(SnrfError, match=r"bad: tensor 'a' holds bytes that are not booleans"):
            read(tmp_path / "bad")


DTYPES = ["U8", "I8", "U16", "I16", "F16", "BF16", "U32", "U64", "I64", "F64", "C64", "F8_E5M2", "F8_E4M3", "F8_E8M0"]


@settings(examples, max_examples=100)
@given(
    dtype=st.sampled_from([*DTYPES, "F4", "F6_E2M3", "F8_E4M3FNUZ", "STRING", "bool", 3, None]),
    shape=st.sampled_from([[8], [2, 2, 2], [], [0], [-1], [2**63], [2**64 - 1, 2], [1.5], ["8"], "8", None]),
    size=st.sampled_from([0, 1, 4, 8, 16, 32, 64]),
)
def test_any_header_gives_tensors_or_one_error(folder: Path, dtype: Any, shape: Any, size: int) -> None:
    path = folder / "header.safetensors"
    path.write_bytes(crafted({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size)))
    values_or_message = outcome(path)
    if isinstance(values_or_message, dict):
        assert values_or_message["a"].numel() * values_or_message["a"].element_size() == size
    else:
        assert values_or_message.startswith(f"{path}: not a readable safetensors file")


@pytest.mark.parametrize("name", ["missing", "missing/file", "x" * 300, "x/" * 3000, "a\0b"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(SnrfError, match=r"does not exist; give the path of a snrf-profile file") as caught:
        read(f"{tmp_path}/{name}")
    assert str(tmp_path) in str(caught.value)


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("", "fifo"):
        with pytest.raises(SnrfError, match=r"is not a file; give the path of a snrf-profile file"):
            read(tmp_path / name)
