"""Byte ranges of tensors, against the safetensors library and against whole-file writes."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models import shards
from mergekit_snrf.models.shards import byte_ranges, overwrite_neurons, read_tensor

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file by hand, whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@st.composite
def edits(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """A weight, the same with random neurons changed, which neurons, and their axis."""
    rows, columns, axis = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.integers(0, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS)))]
    before, noise = (torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)).to(dtype)
    count = (rows, columns)[axis]
    neurons = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    member = neurons[:, None] if axis == 0 else neurons[None]
    return before, torch.where(member, noise, before), neurons, axis


def test_ranges_and_tensors_are_those_of_the_library(scratch):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 7, generator=generator).to(dtype) for name, dtype in FLOATS.items()}
    save_file({**tensors, "ids": torch.arange(3), "flag": torch.ones(1, dtype=torch.bool)}, scratch / "all.safetensors")
    ranges = byte_ranges(scratch / "all.safetensors")
    assert ranges.keys() == tensors.keys()
    content = (scratch / "all.safetensors").read_bytes()
    for name, tensor in load_file(scratch / "all.safetensors").items():
        if name in tensors:
            where = ranges[name]
            assert content[where.offset : where.offset + where.bytes] == bits(tensor)
            assert read_tensor(where).dtype == tensor.dtype
            assert torch.equal(read_tensor(where), tensor)


def test_tensor_at_an_odd_offset(scratch):
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    header = {"flags": entry("U8", [3], [0, 3]), "weight": entry("F32", [2, 2], [3, 19])}
    path = write_raw(scratch / "odd", header, b"\1\2\3" + bits(values))
    (where,) = byte_ranges(path).values()
    assert torch.equal(read_tensor(where), values)
    assert overwrite_neurons(where, path, values[1:] * 2, torch.tensor([False, True]), 0) == 8
    assert path.read_bytes().endswith(b"\1\2\3" + bits(torch.tensor([[1.5, -2.0], [0.5, 6.0]])))


@given(edits())
def test_overwritten_neurons_equal_a_whole_write(scratch, edit):
    before, after, neurons, axis = edit
    neighbours = {"a": torch.full((3, 3), 7.0), "z": torch.full((3,), -7.0, dtype=torch.float16)}
    save_file({**neighbours, "weight": before}, scratch / "before.safetensors")
    save_file({**neighbours, "weight": after}, scratch / "after.safetensors")
    where = byte_ranges(scratch / "before.safetensors")["weight"]
    copy = scratch / "copy.safetensors"
    copy.write_bytes((scratch / "before.safetensors").read_bytes())
    written = overwrite_neurons(where, copy, (after if axis == 0 else after.mT)[neurons], neurons, axis)
    assert copy.read_bytes() == (scratch / "after.safetensors").read_bytes()
    changed = int(neurons.sum()) if axis == 0 else before.shape[0] * bool(neurons.any())
    assert written == changed * before.shape[1] * before.element_size()


@pytest.mark.parametrize("at_once", [3, 7, 64])
def test_reads_and_writes_in_pieces(scratch, monkeypatch, at_once):
    monkeypatch.setattr(shards, "_AT_ONCE", at_once)
    for unix in ("preadv", "pread", "pwrite", "pwritev", "sendfile", "O_NONBLOCK"):
        monkeypatch.delattr(os, unix, raising=False)
    path = write_raw(scratch / "short", {"w": entry("F32", [4, 5], [0, 80])}, bytes(80))
    (where,) = byte_ranges(path).values()
    values = torch.arange(20.0).view(4, 5)
    neurons = torch.tensor([True, True, False, True])
    assert overwrite_neurons(where, path, values[neurons], neurons, 0) == 60
    values[2] = 0
    assert torch.equal(read_tensor(where), values)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 3)])
def test_an_empty_weight_and_no_neurons_write_nothing(scratch, shape, axis):
    data = bytes(4 * shape[0] * shape[1])
    path = write_raw(scratch / "empty", {"w": entry("F32", shape, [0, len(data)])}, data)
    (where,) = byte_ranges(path).values()
    assert read_tensor(where).shape == shape
    neurons = torch.full((shape[axis],), not data)
    assert overwrite_neurons(where, path, torch.ones(shape if axis == 0 else shape[::-1])[neurons], neurons, axis) == 0
    assert path.read_bytes().endswith(data)


@pytest.mark.parametrize(
    ("weight", "neurons", "axis"),
    [
        (torch.ones(2, 3, dtype=torch.float16), torch.ones(2, dtype=torch.bool), 0),
        (torch.ones(3, 2), torch.ones(2, dtype=torch.bool), 0),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.bool), 0),
        (torch.ones(2, 3), torch.ones(2, dtype=torch.bool), 1),
    ],
)
def test_weight_that_does_not_fit_is_not_written(scratch, weight, neurons, axis):
    path = write_raw(scratch / "unfit", {"w": entry("F32", [2, 3], [0, 24])}, bytes(24))
    (where,) = byte_ranges(path).values()
    with pytest.raises(ValueError, match=r"expected torch.float32 of shape \[2, 3\]"):
        overwrite_neurons(where, path, weight, neurons, axis)
    assert path.read_bytes().endswith(bytes(24))


def test_file_that_was_cut_short(scratch):
    path = write_raw(scratch / "cut", {"w": entry("F32", [2, 3], [0, 24])}, bytes(24))
    (where,) = byte_ranges(path).values()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SnrfError, match="ends in the middle of a tensor"):
        read_tensor(where)


@pytest.mark.parametrize(
    ("content", "length"),
    [
        (b"", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        *((json.dumps({"w": value}).encode(), None) for value in (None, [], entry("F99"), entry(shape=[2, 4]))),
        *((json.dumps({"w": entry(offsets=value)}).encode(), None) for value in ([0], [24, 0], [8, 32], ["0", "24"])),
        # Longer than the file, or than any number.
        *((b"{}", length) for length in (25 + 8, 2**64 - 1)),
        (None, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_a_shard(scratch, content, length):
    path = scratch / "damaged"
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        write_raw(path, content, bytes(24), length=length)
    with pytest.raises(SnrfError, match=r"damaged: (cannot be read \(|is not a regular file)"):
        byte_ranges(path)


def test_missing_file(scratch):
    with pytest.raises(SnrfError, match=r"missing: cannot be read \(No such file"):
        byte_ranges(scratch / "missing")


@given(st.data())
@settings(max_examples=100)
def test_fuzzed_bytes_raise_snrf_errors_alone(scratch, data):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, scratch / "good.safetensors")
    content = bytearray((scratch / "good.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = scratch / "fuzzed"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with suppress(SnrfError):
        for where in byte_ranges(path).values():
            assert 8 <= where.offset <= where.offset + where.bytes <= path.stat().st_size
            assert tuple(read_tensor(where).shape) == where.shape
