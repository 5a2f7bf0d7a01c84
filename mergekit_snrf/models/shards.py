"""The files of a model's weights: headers, byte ranges of tensors, and neurons that are overwritten in place.

The safetensors library reads and writes whole files; a merge changes a few rows of files of gigabytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError, first_line, os_reason
from mergekit_snrf.files.reading import DATA_BYTES, open_regular, parse_json, read_bytes
from mergekit_snrf.fusion.updates import panels

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors dtype."""

FLOAT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""safetensors names of the dtypes that weights are computed with, and torch's names for them."""

_OF_TORCH = {getattr(torch, name): dtype for dtype, name in FLOAT_DTYPES.items()} | {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.complex64: "C64",
}  # fmt: skip
_AGAIN = "get the file again"
_CPU = torch.device("cpu")
# Linux reads and writes at most 2 GiB at once; smaller pieces can be interrupted.
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class TensorHeader:
    """What a checkpoint's header says of one tensor.

    ``dtype`` is as safetensors writes it, such as ``BF16``; ``file`` the shard's name inside the checkpoint; ``begin``
    the tensor's first byte in a local safetensors file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int = field(default=0, compare=False)

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return self.parameters * ITEM_BYTES.get(self.dtype, 1)


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Return a JSON object, or raise ``SnrfError``."""
    parsed = parse_json(content, path)
    if not isinstance(parsed, dict):
        raise SnrfError(path, "not a JSON object", f"the file is damaged, {_AGAIN}")
    return parsed


def weight_map(folder: Path) -> dict[str, str] | str | None:
    """Return the files of the tensors by an index, or the one file of weights; None if there is neither."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            found = parse_object(read_bytes(index, DATA_BYTES, remedy=_AGAIN), index).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(v, str) and Path(v).name == v for v in found.values()):
                raise SnrfError(index, "'weight_map' does not map tensors to file names", "get the index again")
            return found
        if (folder / stem).is_file():
            return stem
    return None


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return the headers of all tensors of a folder's weights; ``SnrfError``: there are none, or a file is damaged."""
    places = weight_map(folder)
    if places is None:
        what = "holds neither model.safetensors nor pytorch_model.bin nor an index of shards"
        raise SnrfError(folder, what, "give the folder of a complete checkpoint")
    if isinstance(places, str):
        return _read_shard(folder / places)
    shards = {file: _read_shard(folder / file) for file in sorted(set(places.values()))}
    missing = sorted(tensor for tensor, file in places.items() if tensor not in shards[file])
    if missing:
        what = f"lacks tensor {missing[0]!r}, which the index places in this file ({len(missing)} such tensors)"
        raise SnrfError(folder / places[missing[0]], what, "get the shard again")
    return {tensor: shards[file][tensor] for tensor, file in places.items()}


def _read_shard(path: Path) -> dict[str, TensorHeader]:
    if not os.path.isfile(path):
        raise SnrfError(path, "the index names this shard, but the file is missing", "get it again")
    if path.suffix == ".safetensors":
        return read_header(path)
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        state = state.get("state_dict", state) if isinstance(state, Mapping) else state
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise ValueError("it does not map names to tensors")
    except Exception as error:
        # torch's second sentence recommends weights_only=False, which would run code from the file.
        raise _unreadable(path, first_line(error).partition(". ")[0]) from None
    return {
        key: TensorHeader(_OF_TORCH.get(value.dtype, str(value.dtype)), tuple(value.shape), path.name)
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the header of a safetensors file; ``SnrfError``: it is damaged, or does not fit the file's size."""
    with open_regular(path, remedy=_AGAIN) as file:
        try:
            # The library checks the header against the size of the file, but does not say where tensors are.
            with safetensors.safe_open(path, framework="pt"):
                pass
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        except Exception as error:
            raise _unreadable(path, first_line(error)) from None
    return {
        name: TensorHeader(entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _unreadable(path: Path, reason: str) -> SnrfError:
    return SnrfError(path, f"cannot be read ({reason})", f"{_AGAIN}, or convert it to safetensors")


@dataclass(frozen=True)
class ByteRange:
    """A floating-point tensor in a shard; ``tensor[begin:end]`` reads these rows, and raises as ``read_tensor``.

    ``offset`` is from the start of the file, ``device`` that of the rows.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int
    device: torch.device = _CPU

    def __getitem__(self, rows: slice) -> Tensor:
        start, end, _ = rows.indices(self.shape[0])
        return _read(self, start, end, (end - start, *self.shape[1:]))


def byte_ranges(path: Path) -> dict[str, ByteRange]:
    """Return the byte ranges of all floating-point tensors of a shard; raises as ``read_header``."""
    return {
        name: ByteRange(path, getattr(torch, FLOAT_DTYPES[entry.dtype]), entry.shape, entry.begin, entry.bytes)
        for name, entry in read_header(path).items()
        if entry.dtype in FLOAT_DTYPES
    }


def read_tensor(where: ByteRange) -> Float[Tensor, "rows columns"]:
    """Read one tensor with plain reads; a memory map would fault in every page one by one."""
    return _read(where, 0, where.shape[0] if where.shape else 1, where.shape)


def _read(where: ByteRange, start: int, end: int, shape: tuple[int, ...]) -> Tensor:
    """Read rows from ``start`` to ``end``."""
    width = where.bytes // where.shape[0] if where.shape and where.shape[0] else where.bytes
    size = (end - start) * width
    if size == 0:
        return torch.empty(shape, dtype=where.dtype)
    buffer = bytearray(size)
    view = memoryview(buffer)
    try:
        with where.path.open("rb", buffering=0) as file:
            file.seek(where.offset + start * width)
            position = 0
            while position < size:
                count = file.readinto(view[position : position + _AT_ONCE])
                if not count:
                    raise SnrfError(where.path, "ends in the middle of a tensor", _AGAIN)
                position += count
    except OSError as error:
        raise SnrfError(where.path, f"cannot be read ({os_reason(error)})", _AGAIN) from None
    return torch.frombuffer(buffer, dtype=where.dtype).view(shape)


def overwrite_neurons(
    where: ByteRange,
    path: Path,
    values: Float[Tensor, "selected ..."],
    neurons: Bool[Tensor, " neurons"],
    axis: int,
) -> int:
    """Write neurons of a weight into a copy of its shard; return the number of bytes written.

    Rows are written run by run. Columns touch every page of the tensor, so it is written whole, a panel of rows at a
    time, from the original: the copy need not hold it yet.

    Args:
        where: the tensor's place in the original shard.
        path: the copy.
        values: of the chosen neurons, one a row.
    """
    shape = (int(neurons.sum()), *where.shape[:axis], *where.shape[axis + 1 :])
    if values.dtype != where.dtype or values.shape != shape or len(neurons) != where.shape[axis]:
        raise ValueError(
            f"expected {where.dtype} of shape {list(where.shape)} and its neurons along axis {axis}, "
            f"got {values.dtype} {list(values.shape)} and {len(neurons)} neurons"
        )
    if where.bytes == 0 or not shape[0]:
        return 0
    width, written = where.bytes // where.shape[0], 0
    with path.open("r+b", buffering=0) as file:
        if axis == 0:
            for start, end in _runs(neurons):
                rows = values[written : written + end - start]
                _write(file, where.offset + start * width, rows)
                written += end - start
            return written * width
        for panel in panels(where.shape):
            rows = where[panel]
            rows[:, neurons] = values[:, panel].mT
            _write(file, where.offset + panel.start * width, rows)
    return where.bytes


def _write(file: FileIO, offset: int, rows: Tensor) -> None:
    data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
    file.seek(offset)
    while data:
        data = data[file.write(data[:_AT_ONCE]) :]


def _runs(member: Bool[Tensor, " neurons"]) -> list[tuple[int, int]]:
    padded = torch.nn.functional.pad(member.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
