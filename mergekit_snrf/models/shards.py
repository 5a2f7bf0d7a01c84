"""Byte ranges of tensors in safetensors shards: read one tensor, or overwrite neurons of it, in place.

The safetensors library reads and writes whole files; a merge changes a few rows of files of gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError, os_reason
from mergekit_snrf.fusion.updates import panels
from mergekit_snrf.models.headers import FLOAT_DTYPES, read_header

# Linux reads and writes at most 2 GiB at once; smaller pieces can be interrupted.
_AT_ONCE = 1 << 26
_AGAIN = "get the file again"
_CPU = torch.device("cpu")


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
