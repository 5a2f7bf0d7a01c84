"""Heads of queries and keys after norm and RoPE, and what zeroing one column of the projection takes from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Rotary(NamedTuple):
    """RoPE of one probe as ``x~ = x cos + (x cross)[partner]``."""

    cos: Float[Tensor, "#tokens 1 head_dim"]
    cross: Float[Tensor, "#tokens 1 head_dim"]
    partner: Int[Tensor, " head_dim"]

    @staticmethod
    def of(cos: Tensor | None, sin: Tensor | None, item: int, head_dim: int, like: Tensor) -> Rotary:
        """Return the RoPE of probe ``item`` from cos and sin as in ``AttentionInputs``, None for no rotation."""
        partner = torch.arange(head_dim, device=like.device)
        if cos is None or sin is None:
            one = like.new_ones(1, 1, head_dim)
            return Rotary(one, torch.zeros_like(one), partner)
        half = cos.shape[-1] // 2
        partner[: 2 * half] = partner[: 2 * half].roll(half)
        cos, sin = (table[item % len(table)].to(like)[:, None] for table in (cos, sin))
        cross = torch.cat([sin[..., half:], -sin[..., :half]], dim=-1)
        rest = head_dim - 2 * half
        return Rotary(F.pad(cos, (0, rest), value=1.0), F.pad(cross, (0, rest)), partner)

    def at(self, rows: Int[Tensor, " rows"]) -> Rotary:
        """Return the RoPE of some positions."""
        return self if len(self.cos) == 1 else Rotary(self.cos[rows], self.cross[rows], self.partner)


class Side(NamedTuple):
    """Heads of queries or keys: what norm and RoPE make of them, and what zeroing a column takes away."""

    rotated: Float[Tensor, "tokens heads head_dim"]
    direct: Float[Tensor, "tokens heads head_dim"]
    crossed: Float[Tensor, "tokens heads head_dim"]
    growth: Float[Tensor, "tokens heads head_dim"] | None

    @staticmethod
    def of(
        raw: Float[Tensor, "tokens heads head_dim"],
        norm: Float[Tensor, " head_dim"] | None,
        eps: float,
        rotary: Rotary,
    ) -> Side:
        """Apply the RMS norm, if there is one, and RoPE to the heads of a raw projection."""
        growth = None
        if norm is not None:
            squares = raw.square()
            # Sums of all squares but one, from both ends: a difference would cancel where one column dominates.
            before = F.pad(squares.cumsum(-1)[..., :-1], (1, 0))
            after = F.pad(squares.flip(-1).cumsum(-1)[..., :-1], (1, 0)).flip(-1)
            mean = squares.mean(-1, keepdim=True)
            growth = ((mean + eps) / ((before + after) / raw.shape[-1] + eps)).sqrt()
            raw = raw * (mean + eps).rsqrt() * norm.to(raw)
        direct, crossed = raw * rotary.cos, raw * rotary.cross
        return Side(direct + crossed[..., rotary.partner], direct, crossed, growth)
