"""The product of attention weights and values, by the fastest of the libraries that torch has."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

ONEDNN_ROWS = (8, 16, 32)
"""Numbers of rows of a block that oneDNN multiplies; QUERY_ROWS is the largest."""


def product(weights: Float[Tensor, "*dims rows keys"], values: Float[Tensor, "width keys"]) -> Tensor:
    """Return ``weights @ values^T`` over all leading dimensions."""
    rows, keys = weights.shape[-2:]
    regular = rows in ONEDNN_ROWS and keys % key_step(keys) == 0
    if regular and weights.device.type == "cpu" and weights.dtype == torch.float32 and _onednn_linear():
        # torch.matmul leaves float32 to MKL, which on other makers' CPUs gets half of oneDNN's speed. But oneDNN
        # keeps code, some 0.2 MB, for every shape it has seen: irregular shapes would fill the memory.
        return torch.ops.mkldnn._linear_pointwise(weights, values.contiguous(), None, "none", [], "")
    return weights @ values.mT


def key_step(keys: int) -> int:
    """Return the step, about a sixteenth, that numbers of keys are rounded to."""
    return max(16, 1 << max(0, keys.bit_length() - 5))


@cache
def _onednn_linear() -> bool:
    """Return whether this torch can be asked for oneDNN's float32 product; it has no public name."""
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "") == 1)
    except (AttributeError, RuntimeError, TypeError):
        return False
