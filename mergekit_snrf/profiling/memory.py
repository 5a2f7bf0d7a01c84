"""How much memory profiling needs beside the model, and how much there is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.profiling.impact.blocks import QUERY_ROWS, block_size

DEFAULT_SHARE = 0.5
"""Share of the free memory that profiling may use beside the model, unless a budget is given."""

STATISTICS_BYTES = 164
"""Bytes that the running statistics keep for one neuron of attn.q, attn.k, attn.v and fwd.up."""

LIBRARY_BYTES = 2**25
"""What the libraries that compute products keep for themselves, measured with oneDNN and MKL on a CPU."""

_SMALLEST_BLOCK = 2**16
_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_size(text: str) -> int:
    """Return the bytes that ``500MB``, ``2GiB`` or ``1e9`` stand for.

    Raises:
        SnrfError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]) > 0:
        raise SnrfError(f"{text!r} is not an amount of memory; write it as 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, None where it cannot be told; a container's limit counts."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    free = [value for value in (_available(), _container_free()) if value is not None]
    return min(free) if free else None


def _available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _container_free() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def block_bytes(device: torch.device, budget: int | None) -> int:
    """Return the size of a block of changed scores: the device's default, or a power of two that a budget allows.

    It depends on nothing but the kind of device and the budget, since results of other sizes differ in rounding.
    """
    default = block_size(device, None)
    if budget is None:
        return default
    return max(_SMALLEST_BLOCK, min(default, 2 ** max(0, (budget // 8).bit_length() - 1)))


def working_bytes(
    shape: DecoderShape, probes: int, tokens: int, *, dtype: torch.dtype, block: int, up: bool = False
) -> int:
    """Return an upper estimate of what the impacts of a batch need beside model and forward pass.

    That is the captured tensors of one layer, the factors of one group of heads, one block of changed scores, the
    running statistics and the libraries' own buffers. It does not grow with the number of probes of a run.

    Args:
        probes: in the batch.
        tokens: in the longest probe.
        dtype: of the model.
        block: bytes of a block of changed scores.
        up: whether the output of up_proj is captured as well.
    """
    size = torch.finfo(dtype).bits // 8
    work = max(4, size)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    captured = probes * tokens * (2 * query + 2 * key + (2 if up else 1) * shape.intermediate_size + shape.hidden_size)
    # Queries, keys and values of a group: rotated, direct, crossed and grown, and the factors of the removals.
    group = tokens * shape.head_dim * (12 * shape.repeats + 17)
    blocks = shape.head_dim * QUERY_ROWS * shape.head_dim * (shape.repeats + 1) + QUERY_ROWS * tokens
    neurons = shape.layers * (query + 2 * key + shape.intermediate_size)
    kept = neurons * (STATISTICS_BYTES + probes * work)
    return captured * size + (group + blocks) * work + block + kept + LIBRARY_BYTES
