"""The impact of every neuron of a live model on each probe of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.settings import Settings
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.models.live import LiveDecoder, find_live_decoder, weight_of
from mergekit_snrf.neurons.sites import Site
from mergekit_snrf.profiling.impact.blocks import Positions
from mergekit_snrf.profiling.impact.inputs import Readout
from mergekit_snrf.profiling.impact.layer import (
    AttentionScores,
    attention_impact,
    attention_output,
    column_norms,
    ffn_impact,
)
from mergekit_snrf.profiling.impact.released import released_attention_scores, released_ffn_scores
from mergekit_snrf.profiling.impact.sdpa import Backend
from mergekit_snrf.profiling.measure.capture import CapturedLayer, run_layers
from mergekit_snrf.profiling.measure.gradient import LayerGradient, layer_gradients
from mergekit_snrf.profiling.measure.inputs import run_once
from mergekit_snrf.profiling.probes.batches import ProbeBatch

if TYPE_CHECKING:
    from typing_extensions import Self

CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Largest median over positions of the relative error with which captured tensors must give the attention's output.

A layer that is called in an unknown way is off by about one. Rounding is far below, even where large scores amplify it:
the model rounds queries and keys to its own dtype after RoPE, the impact does not.
"""


class Measure(Settings):
    """What counts as the impact of a neuron.

    >>> Measure(weight="residual").model_dump()
    {'scoring': 'exact', 'weight': 'residual', 'site': 'pre_o', 'tokens': 'all'}

    A squared change counts at a position by one (``paper``), divided by the mean square of the residual stream after
    the layer (``residual``), or multiplied by how much the final states feel a change there (``gradient``).
    """

    scoring: Literal["exact", "released"] = Field(
        default="exact", description="The exact impact (Eq. 14), or the score of the paper's released code."
    )
    weight: Literal["paper", "residual", "gradient"] = Field(
        default="paper", description="Weight of the positions: one, by the residual stream, or by a gradient."
    )
    site: Literal["pre_o", "post_o"] = Field(
        default="pre_o", description="Compare the attention output before or after o_proj."
    )
    tokens: Literal["all", "answer"] = Field(default="all", description="The positions that count.")

    @model_validator(mode="after")
    def _check_released(self) -> Self:
        for name, field in type(self).model_fields.items():
            exact_only = name in ("weight", "site", "backend") and getattr(self, name) != field.default
            if self.scoring == "released" and exact_only:
                raise ValueError(f"{name} has no effect with scoring: released; remove it")
        return self


class Meter:
    """Measures impacts on the probes of batches, with one forward pass a batch, or two with ``weight: gradient``.

    The first batch checks every layer: the attention output that the captured tensors imply must be the one that the
    model computed. So an attention of an unknown kind is an error, never a wrong number.

    Args:
        shape: of the decoder, where it is known from the checkpoint.
        name: of the model, for messages.
        block_bytes, backend: as for ``attention_impact``.
    """

    def __init__(
        self,
        model: nn.Module,
        measure: Measure | None = None,
        *,
        shape: DecoderShape | None = None,
        name: str | None = None,
        block_bytes: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.model = model
        self.measure = measure or Measure()
        self.decoder = find_live_decoder(model, shape, name=name)
        self._block_bytes = block_bytes
        self._backend = backend
        self._column_norms: dict[int, Tensor] = {}
        self._checked = False

    @property
    def neurons(self) -> dict[Site, int]:
        """How many neurons each measured site has; fwd.down has the impacts of fwd.up."""
        return {site: self.decoder.shape.neurons(site.projection) for site in self.decoder.shape.sites()}

    def impacts(self, batch: ProbeBatch) -> dict[Site, Float[Tensor, "probes neurons"]]:
        """Return the impacts of one batch, on the CPU: float64 for a float64 model, else float32.

        ``SnrfError``: a layer is called in an unknown way or gives NaN or infinite values, or no token counts.
        """
        counted = batch.attention_mask != 0
        if self.measure.tokens == "answer":
            counted &= batch.answer_mask
        positions = Positions(counted)
        for number, probe in zip(batch.numbers, positions.counted, strict=True):
            if not bool(probe.any()):
                what = f"probe {number} has no token that counts with {self.measure.tokens!r}"
                raise SnrfError(self.decoder.model, what, "leave out the row, or count all tokens", field="tokens")
        found: dict[Site, Tensor] = {}
        unfit: dict[Site, Tensor] = {}
        gradients: list[LayerGradient] = []
        if self.measure.weight == "gradient":
            gradients = layer_gradients(self.model, self.decoder, lambda: run_once(self.model, batch.inputs), counted)

        def visit(layer: CapturedLayer) -> None:
            unfit.update(_not_finite(layer, batch.attention_mask))
            if not self._checked:
                self._refuse(unfit, batch)
                check_attention(self.decoder, layer, batch.attention_mask)
            gradient = gradients[layer.index] if gradients else None
            found.update(self.layer_impacts(layer, positions, counted, gradient))

        run_layers(
            self.decoder,
            lambda: run_once(self.model, batch.inputs),
            batch.attention_mask,
            visit,
            up=self.measure.scoring == "released",
        )
        # To look at a number on a device is to wait for it, so that all is looked at after the last layer.
        found = {site: value.cpu() for site, value in found.items()}
        wrong = {site: unfit[site].cpu() | ~value.isfinite().all(-1) for site, value in found.items()}
        self._refuse(wrong, batch)
        self._check_gradients(gradients, counted, batch)
        self._checked = True
        return found

    def layer_impacts(
        self,
        layer: CapturedLayer,
        positions: Positions,
        counted: Bool[Tensor, "batch tokens"],
        gradient: LayerGradient | None = None,
    ) -> dict[Site, Float[Tensor, "probes neurons"]]:
        """Return the impacts of one layer where it was computed; nothing here waits for the device."""
        weights, ffn_weights = self._position_weights(layer, counted, gradient)
        attention = self._attention(layer, weights, positions)
        values = {"attn.q": attention.query, "attn.k": attention.key, "attn.v": attention.value}
        values["fwd.up"] = self._ffn(layer, ffn_weights, positions)
        return {Site(layer.index, projection): value for projection, value in values.items()}

    def _position_weights(
        self, layer: CapturedLayer, counted: Bool[Tensor, "batch tokens"], gradient: LayerGradient | None
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
        """Return the weights of the attention's positions and of the FFN's."""
        stream = layer.stream
        dtype = torch.float64 if stream.dtype == torch.float64 else torch.float32
        counted = counted.to(stream.device)
        if gradient is not None:
            # Weights that are not finite are reported when no projection of any layer is to blame for them.
            attention, ffn = (
                torch.where(counted, weight.to(stream.device).nan_to_num(posinf=0.0), 0.0)
                for weight in (gradient.attention, gradient.ffn)
            )
            return attention, ffn
        if self.measure.weight == "paper":
            return counted.to(dtype), counted.to(dtype)
        square = stream.to(dtype).square().mean(-1)
        # Where the stream is not finite the impacts are not either, and that is reported with its projection.
        weight = torch.nan_to_num(square.clamp(min=torch.finfo(dtype).tiny).reciprocal())
        weight = torch.where(counted, weight, 0.0)
        return weight, weight

    def _attention(
        self, layer: CapturedLayer, weights: Float[Tensor, "batch tokens"], positions: Positions
    ) -> AttentionScores:
        if self.measure.scoring == "released":
            return released_attention_scores(layer.attention, weights, self._block_bytes, positions)
        readout = None
        if self.measure.site == "post_o":
            output = weight_of(layer.module.get_submodule("self_attn.o_proj"))
            output = output.to(layer.attention.query.device)
            readout = Readout.of(output, layer.attention.heads, layer.attention.kv_heads)
        if self._backend == "sdpa" and layer.attention.softcap is not None:
            what = "caps its attention scores, which 'sdpa' cannot"
            raise SnrfError(self.decoder.model, what, "use 'auto'", field="backend")
        return attention_impact(
            layer.attention, weights, readout, self._block_bytes, positions=positions, backend=self._backend
        )

    def _ffn(
        self, layer: CapturedLayer, weights: Float[Tensor, "batch tokens"], positions: Positions
    ) -> Float[Tensor, "batch intermediate"]:
        if self.measure.scoring == "released":
            assert layer.up is not None
            return released_ffn_scores(layer.up, weights, positions)
        if layer.index not in self._column_norms:
            self._column_norms[layer.index] = column_norms(weight_of(layer.module.get_submodule("mlp.down_proj")))
        return ffn_impact(layer.hidden, self._column_norms[layer.index].to(layer.hidden.device), weights, positions)

    def _check_gradients(
        self, gradients: list[LayerGradient], counted: Bool[Tensor, "batch tokens"], batch: ProbeBatch
    ) -> None:
        for index, gradient in enumerate(gradients):
            finite = gradient.attention.isfinite() & gradient.ffn.isfinite()
            wrong = (~finite & counted.to(finite.device)).any(-1)
            if bool(wrong.any()):
                number = batch.numbers[int(wrong.nonzero()[0])]
                what = f"the gradient at layer {index} is NaN or infinite on probe {number}"
                remedy = "load the model in a dtype of more range such as float32, or weight by 'residual'"
                raise SnrfError(self.decoder.model, what, remedy, field="weight")

    def _refuse(self, wrong: Mapping[Site, Bool[Tensor, " probes"]], batch: ProbeBatch) -> None:
        """Name the first projection that gives NaN or infinite values, and its first probe."""
        for site, probes in wrong.items():
            if bool(probes.any()):
                number = batch.numbers[int(probes.nonzero()[0])]
                raise SnrfError(
                    self.decoder.model,
                    f"layer {site.layer}, {site.projection} gives NaN or infinite values on probe {number}",
                    f"check the weights of {self.decoder.path}.{site.layer}, or load the model in a dtype of more "
                    f"range such as float32",
                )


def _not_finite(
    layer: CapturedLayer, attention_mask: Shaped[Tensor, "batch tokens"]
) -> dict[Site, Bool[Tensor, " probes"]]:
    """Return for each projection the probes on which it gives NaN or infinite values at a real token."""
    captured = {
        "attn.q": layer.attention.query,
        "attn.k": layer.attention.key,
        "attn.v": layer.attention.value,
        "fwd.up": layer.hidden if layer.up is None else layer.up,
    }
    return {
        Site(layer.index, projection): (~tensor.isfinite().all(-1) & (attention_mask != 0).to(tensor.device)).any(-1)
        for projection, tensor in captured.items()
    }


def check_attention(decoder: LiveDecoder, layer: CapturedLayer, attention_mask: Shaped[Tensor, "batch tokens"]) -> None:
    """Raise ``SnrfError`` if the attention output that the captured tensors imply is not the model's own."""
    actual = layer.attended
    real = (attention_mask != 0).to(actual.device)
    expected = attention_output(layer.attention, real.to(torch.float32))[real]
    actual = actual[real].to(expected.dtype)
    error = (expected - actual).norm(dim=-1) / actual.norm(dim=-1).clamp(min=torch.finfo(actual.dtype).tiny)
    tolerance = CHECK_TOLERANCE.get(layer.attended.dtype, 0.3)
    if not float(error.median()) <= tolerance:
        what = (
            f"the attention of {decoder.path}.{layer.index} does not follow from its projections (relative "
            f"error {float(error.median()):.2g}, allowed {tolerance:g}); its rotary layout, mask or scaling is "
            f"unknown"
        )
        raise decoder.unsupported(what)
