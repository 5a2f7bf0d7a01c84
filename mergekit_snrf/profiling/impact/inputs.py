"""What the impact of neurons is computed from: tensors captured from one layer, and how a change is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention layer saw in one forward pass; every batch item is a probe.

    Attributes:
        query: output of q_proj incl. bias, before any norm and before RoPE.
        key: output of k_proj, the same.
        value: output of v_proj.
        head_dim: d, the size of one query or key head. Value heads may have another size.
        scaling: s, the factor of the scores, usually ``head_dim ** -0.5``.
        cos: RoPE cosines of this layer in the half-split layout; rotary_dim < head_dim leaves the other dims
            unrotated, and M-RoPE arrives already mixed. None for a layer without positions.
        sin: RoPE sines, None with ``cos``.
        query_norm: weight of an RMS norm over each query head, as it multiplies (for Gemma: 1 + weight), or None.
        key_norm: the same for key heads.
        norm_eps: epsilon of both norms, > 0.
        softcap: c of ``c * tanh(scores / c)``, applied before the mask, or None.
        causal: position i attends to j <= i only.
        window: position i attends to j > i - window only, or None.
        key_mask: nonzero where a token is real, 0 on padding; None if there is none.
        mask: the whole mask, boolean (True attends) or additive, in place of ``causal``, ``window`` and ``key_mask``.
            Additive entries in the lower half of their dtype's range mean masked.

    Raises:
        ValueError: shapes or values do not fit together.
    """

    query: Float[Tensor, "batch tokens heads*head_dim"]
    key: Float[Tensor, "batch tokens kv_heads*head_dim"]
    value: Float[Tensor, "batch tokens kv_heads*value_dim"]
    head_dim: int
    scaling: float
    cos: Float[Tensor, "#batch tokens rotary_dim"] | None = None
    sin: Float[Tensor, "#batch tokens rotary_dim"] | None = None
    query_norm: Float[Tensor, " head_dim"] | None = None
    key_norm: Float[Tensor, " head_dim"] | None = None
    norm_eps: float = 1e-6
    softcap: float | None = None
    causal: bool = True
    window: int | None = None
    key_mask: Shaped[Tensor, "batch tokens"] | None = None
    mask: Shaped[Tensor, "#batch 1 tokens tokens"] | None = None

    def __post_init__(self) -> None:
        shapes = [list(tensor.shape) for tensor in (self.query, self.key, self.value)]
        if any(len(shape) != 3 or shape[:2] != shapes[0][:2] for shape in shapes):
            raise ValueError(f"query, key and value must have shape [batch, tokens, heads * head_dim], got {shapes}")
        batch, tokens, width = self.query.shape
        if self.head_dim < 1 or width % self.head_dim or self.key.shape[2] % self.head_dim:
            widths = f"query ({width}) and key ({self.key.shape[2]})"
            raise ValueError(f"head_dim {self.head_dim} does not divide the widths of {widths}")
        if self.kv_heads < 1 or self.heads % self.kv_heads or self.value.shape[2] % self.kv_heads:
            of = f"{self.heads} query heads and value width {self.value.shape[2]}"
            raise ValueError(f"{self.kv_heads} key heads do not divide {of}")
        self._check_rotary(batch, tokens)
        for name in ("query_norm", "key_norm"):
            weight = getattr(self, name)
            if weight is not None and weight.shape != (self.head_dim,):
                raise ValueError(f"{name} must have shape [{self.head_dim}], got {list(weight.shape)}")
        for name in ("norm_eps", "softcap", "window"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if self.key_mask is not None and self.key_mask.shape != (batch, tokens):
            raise ValueError(f"key_mask must have shape {[batch, tokens]}, got {list(self.key_mask.shape)}")
        if self.mask is not None:
            if self.window is not None or self.key_mask is not None:
                raise ValueError("mask is the whole mask: leave window and key_mask out")
            if self.mask.shape not in ((batch, 1, tokens, tokens), (1, 1, tokens, tokens)):
                wanted = f"[{batch} or 1, 1, {tokens}, {tokens}]"
                raise ValueError(f"mask must have shape {wanted}, got {list(self.mask.shape)}")

    def _check_rotary(self, batch: int, tokens: int) -> None:
        if self.cos is None or self.sin is None:
            if self.cos is not self.sin:
                raise ValueError("cos and sin must be given together")
            return
        rotary = self.cos.shape[-1]
        if self.cos.shape != self.sin.shape or self.cos.shape not in ((batch, tokens, rotary), (1, tokens, rotary)):
            shapes = f"{list(self.cos.shape)} and {list(self.sin.shape)}"
            raise ValueError(f"cos and sin must have shape [{batch} or 1, {tokens}, rotary_dim], got {shapes}")
        if rotary % 2 or rotary > self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim {self.head_dim}, got {rotary}")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[2] // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key heads; query head h reads key head ``h // (heads // kv_heads)``."""
        return self.key.shape[2] // self.head_dim

    @property
    def value_dim(self) -> int:
        """Size of one value head."""
        return self.value.shape[2] // self.kv_heads


@dataclass(frozen=True)
class Readout:
    """How a change of the attention output counts after o_proj (site post_o), ``||R dY|| = ||W_o dY||``.

    Small factors R with ``R^T R = W_o^T W_o``: of each query ``head`` for attn.q, of the query heads of each key head
    jointly for attn.k, and of the n output columns that one value row feeds for attn.v.
    """

    heads: Float[Tensor, "heads rank_q value_dim"]
    groups: Float[Tensor, "kv_heads rank_k n*value_dim"]
    columns: Float[Tensor, "kv_heads value_dim rank_v n"]

    @staticmethod
    @torch.no_grad()
    def of(weight: Float[Tensor, "hidden heads*value_dim"], heads: int, kv_heads: int) -> Readout:
        """Return the factors for ``o_proj.weight`` with so many query and key heads."""
        if kv_heads < 1 or heads % kv_heads or weight.ndim != 2 or weight.shape[1] % heads:
            wanted = f"[hidden, heads * value_dim] for {heads} heads and {kv_heads} key heads"
            raise ValueError(f"o_proj weight must have shape {wanted}, got {list(weight.shape)}")
        weight = weight.to(working_dtype(weight))
        n, value_dim = heads // kv_heads, weight.shape[1] // heads
        per_head = weight.unflatten(1, (heads, value_dim)).transpose(0, 1)
        per_group = weight.unflatten(1, (kv_heads, n * value_dim)).transpose(0, 1)
        per_column = weight.unflatten(1, (kv_heads, n, value_dim)).permute(1, 3, 0, 2)
        # R of A = QR has R^T R = A^T A, and keeps the digits that forming A^T A would lose.
        return Readout(*(torch.linalg.qr(part, mode="r").R for part in (per_head, per_group, per_column)))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the maths: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def position_weights(
    weights: Shaped[Tensor, "batch tokens"] | None,
    default: Shaped[Tensor, "batch tokens"] | None,
    like: Float[Tensor, "batch tokens width"],
    *,
    trusted: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """Return w_i >= 0 of every position of ``like`` in its working dtype, by default 1 where ``default`` is nonzero.

    ``trusted`` weights are known to be finite and not negative: to check them is to wait for the device.
    """
    dtype = working_dtype(like)
    if weights is None:
        if default is None:
            return torch.ones(like.shape[:2], dtype=dtype, device=like.device)
        return (default != 0).to(like.device, dtype)
    if weights.shape != like.shape[:2]:
        raise ValueError(f"weights must have shape {list(like.shape[:2])}, got {list(weights.shape)}")
    weights = weights.to(like.device, dtype)
    if not trusted and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weights must be finite and not negative")
    return weights


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute float32 products in float32: no autocast, no TF32, no bfloat16, whatever the process has set.

    An impact is a difference of nearly equal outputs; shorter products would leave nothing of it.
    """
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            # torch refuses to mix this switch with its newer ones, so the process has set one of those.
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            if before != "highest":
                stack.callback(torch.set_float32_matmul_precision, before)
                torch.set_float32_matmul_precision("highest")
        yield
