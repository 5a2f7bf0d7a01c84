"""The size of the blocks that the impacts are computed in, and what a process has used."""

from __future__ import annotations

import re
import sys

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.impact.blocks import block_size

_SMALLEST_BLOCK = 2**16
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``500MB``, ``2GiB`` or ``1e9``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]) or not float(match[1]) > 0:
        what = f"{text!r} is not an amount of memory"
        raise SnrfError(None, what, "write it as 500MB or 2GiB", field="memory_budget")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()])


def block_bytes(device: torch.device, budget: int | None) -> int:
    """Return the size of a block of changed scores: the device's default, or a power of two that fits a budget.

    It depends on these two only, because results with other sizes differ in rounding.
    """
    default = block_size(device, None)
    if budget is None:
        return default
    return max(_SMALLEST_BLOCK, min(default, 2 ** max(0, (budget // 8).bit_length() - 1)))


def peak(device: torch.device) -> str:
    """Return the peak memory of the device, or of the process, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB on {device}"
    try:
        import resource
    except ImportError:
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB"
