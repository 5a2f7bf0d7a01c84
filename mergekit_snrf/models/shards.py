"""Byte ranges of tensors in safetensors shards: read one tensor, or overwrite neurons of it, in place.

The safetensors library reads and writes whole files; a merge changes a few rows of files of gigabytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError

_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class ByteRange:
    """Where a floating-point tensor lies in a shard.

    Attributes:
        offset: bytes from the start of the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


def byte_ranges(path: Path) -> dict[str, ByteRange]:
    """Return the byte ranges of all floating-point tensors of a shard.

    Raises:
        SnrfError: the file cannot be read, or its header is damaged or points outside the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        ranges = {}
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _TORCH:
                continue
            dtype, shape = _TORCH[entry["dtype"]], tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (*shape, *entry["data_offsets"])):
                raise ValueError(f"tensor {name!r} has a shape or place that is not made of whole numbers")
            begin, end = (8 + length + position for position in entry["data_offsets"])
            if not begin <= end <= size or end - begin != dtype.itemsize * math.prod(shape):
                raise ValueError(f"tensor {name!r} lies outside the file")
            ranges[name] = ByteRange(path, dtype, shape, begin, end - begin)
    except OSError as error:
        raise SnrfError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise SnrfError(f"{path}: not a readable safetensors file ({error}); get the file again") from None
    return ranges


def read_tensor(where: ByteRange) -> Float[Tensor, "rows columns"]:
    """Read one tensor with plain reads; a memory map would fault in every page one by one.

    Raises:
        SnrfError: the file cannot be read, or ends early.
    """
    if where.bytes == 0:
        return torch.empty(where.shape, dtype=where.dtype)
    buffer = bytearray(where.bytes)
    view = memoryview(buffer)
    try:
        with where.path.open("rb", buffering=0) as file:
            position = 0
            while position < where.bytes:
                count = os.preadv(file.fileno(), [view[position : position + (1 << 26)]], where.offset + position)
                if count == 0:
                    raise SnrfError(f"{where.path}: ends in the middle of a tensor; get the file again")
                position += count
    except OSError as error:
        raise SnrfError(f"{where.path}: cannot be read ({error.strerror or error}); get the file again") from None
    return torch.frombuffer(buffer, dtype=where.dtype).view(where.shape)


def overwrite_neurons(
    where: ByteRange, path: Path, weight: Float[Tensor, "rows columns"], neurons: Bool[Tensor, " neurons"], axis: int
) -> int:
    """Write the changed neurons of a weight into a copy of its shard; return the number of bytes written.

    Rows are written run by run. Columns touch every page of the tensor, so it is written whole.

    Args:
        where: the tensor's place in the original shard.
        path: the copy.
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
            _pwrite(file.fileno(), data[start * width : end * width], where.offset + start * width)
    return sum(end - start for start, end in runs) * width


def _runs(member: Bool[Tensor, " neurons"]) -> list[tuple[int, int]]:
    padded = torch.nn.functional.pad(member.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data[: 1 << 26], offset)
        data, offset = data[count:], offset + count
