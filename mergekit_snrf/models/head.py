"""How a loaded model makes logits of the residual stream: its final norm, its head and its soft cap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.live import LiveDecoder

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_OF_HALF = 0.05


@dataclass(frozen=True)
class LiveHead:
    """The last modules of a model.

    Attributes:
        model: the model's name, for messages.
        softcap: c of ``c * tanh(logits / c)``, or None.
    """

    model: str
    norm: nn.Module = field(repr=False)
    head: nn.Module = field(repr=False)
    softcap: float | None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have a logit."""
        return int(self.head.out_features)  # type: ignore[arg-type]

    @property
    def weights(self) -> int:
        """Number of weights of the head."""
        return self.vocabulary * int(self.head.in_features)  # type: ignore[arg-type]

    def logits(self, stream: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Return the logits of the stream after a layer, float64 for a float64 model, else float32."""
        logits: Tensor = self.head(self.norm(stream))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def check(self, stream: Float[Tensor, "tokens hidden"], logits: Float[Tensor, "tokens vocabulary"]) -> None:
        """Raise ``SnrfError`` if the model's own logits are not those of its last stream."""
        expected = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not bool(expected.isfinite().all()):
            raise SnrfError(self.model, "its logits are NaN or infinite", "load the model in float32", field="dtype")
        error = (self.logits(stream).to(expected) - expected).norm() / expected.norm()
        if not float(error) <= _TOLERANCE.get(logits.dtype, _TOLERANCE_OF_HALF):
            what = f"its logits do not follow from its final norm and head (relative error {float(error):.2g})"
            raise SnrfError(self.model, what, "the model is not supported")


def find_live_head(model: nn.Module, decoder: LiveDecoder) -> LiveHead:
    """Return what the model puts behind its text decoder.

    Raises:
        SnrfError: there is no final norm or no head.
    """
    above = decoder.path.rpartition(".")[0]
    norm = getattr(model.get_submodule(above), "norm", None)
    head: Any = None
    while head is None:
        holder: Any = model.get_submodule(above)
        head = holder.get_output_embeddings() if hasattr(holder, "get_output_embeddings") else None
        if not above:
            break
        above = above.rpartition(".")[0]
    if norm is None or not isinstance(getattr(head, "out_features", None), int):
        what = "has no final norm and linear head behind its text decoder"
        raise SnrfError(decoder.model, what, "use a model that generates text")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return LiveHead(decoder.model, norm, head, getattr(text, "final_logit_softcapping", None))
