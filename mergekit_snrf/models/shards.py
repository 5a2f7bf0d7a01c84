"""Byte ranges of tensors in safetensors shards: read one tensor, or overwrite neurons of it, in place.

The safetensors library reads and writes whole files; a merge changes a few rows of files of gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError, os_reason
from mergekit_snrf.models.headers import FLOAT_DTYPES, read_header

# Linux reads and writes at most 2 GiB at once; smaller pieces can be interrupted.
_AT_ONCE = 1 << 26
_AGAIN = "get the file again"


@dataclass(frozen=True)
class ByteRange:
    """Where a floating-point tensor lies in a shard; ``offset`` is from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


def byte_ranges(path: Path) -> dict[str, ByteRange]:
    """Return the byte ranges of all floating-point tensors of a shard; raises as ``read_header``."""
    return {
        name: ByteRange(path, getattr(torch, FLOAT_DTYPES[entry.dtype]), entry.shape, entry.begin, entry.bytes)
        for name, entry in read_header(path).items()
        if entry.dtype in FLOAT_DTYPES
    }


def read_tensor(where: ByteRange) -> Float[Tensor, "rows columns"]:
    """Read one tensor with plain reads; a memory map would fault in every page one by one."""
    if where.bytes == 0:
        return torch.empty(where.shape, dtype=where.dtype)
    buffer = bytearray(where.bytes)
    view = memoryview(buffer)
    try:
        with where.path.open("rb", buffering=0) as file:
            file.seek(where.offset)
            position = 0
            while position < where.bytes:
                count = file.readinto(view[position : position + _AT_ONCE])
                if not count:
                    raise SnrfError(where.path, "ends in the middle of a tensor", _AGAIN)
                position += count
    except OSError as error:
        raise SnrfError(where.path, f"cannot be read ({os_reason(error)})", _AGAIN) from None
    return torch.frombuffer(buffer, dtype=where.dtype).view(where.shape)


def overwrite_neurons(
    where: ByteRange, path: Path, weight: Float[Tensor, "rows columns"], neurons: Bool[Tensor, " neurons"], axis: int
) -> int:
    """Write the changed neurons of a weight into ``path``, a copy of its shard; return the number of bytes written.

    Rows are written run by run. Columns touch every page of the tensor, so it is written whole.
    """
    if weight.dtype != where.dtype or tuple(weight.shape) != where.shape or len(neurons) != where.shape[axis]:
        raise ValueError(
            f"expected {where.dtype} of shape {list(where.shape)} and its neurons along axis {axis}, "
            f"got {weight.dtype} {list(weight.shape)} and {len(neurons)} neurons"
        )
    if where.bytes == 0 or not bool(neurons.any()):
        return 0
    data = weight.contiguous().view(torch.uint8).numpy().reshape(-1).data
    width = where.bytes // where.shape[0]
    runs = [(0, where.shape[0])] if axis == 1 else _runs(neurons)
    with path.open("r+b", buffering=0) as file:
        for start, end in runs:
            file.seek(where.offset + start * width)
            rest = data[start * width : end * width]
            while rest:
                rest = rest[file.write(rest[:_AT_ONCE]) :]
    return sum(end - start for start, end in runs) * width


def _runs(member: Bool[Tensor, " neurons"]) -> list[tuple[int, int]]:
    padded = torch.nn.functional.pad(member.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
