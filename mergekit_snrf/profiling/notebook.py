"""Profiling of a loaded model, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.neurons.maskfile import ModelProvenance
from mergekit_snrf.profiling.measure.meter import Measure, Meter
from mergekit_snrf.profiling.probes.batches import ProbeBatch
from mergekit_snrf.profiling.request import versions
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance
from mergekit_snrf.profiling.result.statistics import Statistics


def profile(
    model: nn.Module,
    batches: Iterable[ProbeBatch | Mapping[str, Any]] | Mapping[str, Any],
    *,
    measure: Measure | None = None,
    progress: bool = False,
) -> Profile:
    """Measure the impact of every neuron of a loaded model on batches of probes (Eq. 14).

    Args:
        model: any transformers model with a text decoder; it is left as it was.
        batches: what the model's processor or tokenizer returns, with ``input_ids`` [probes, tokens], or objects with
            ``numbers``, ``inputs``, ``attention_mask`` and ``answer_mask``.
        measure: what counts as the impact; None is Eq. 14 over all tokens.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: the model or a batch is not supported, or the model computes NaN or infinite values.
    """
    measure = measure or Measure()
    meter = Meter(model, measure)
    statistics = Statistics(meter.neurons)
    with tqdm(unit="probe", disable=not progress) as bar:
        for batch in _as_batches(batches, measure):
            statistics.update(meter.impacts(batch))
            bar.update(len(batch.numbers))
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.") or None
    config = getattr(model, "config", None)
    known = {"path": getattr(config, "name_or_path", None), "model_type": getattr(config, "model_type", None)}
    named = ModelProvenance(**{key: value or None for key, value in known.items()})
    provenance = ProfileProvenance(model=named, measure=measure.model_dump(), dtype=dtype, versions=versions())
    return statistics.profile(provenance)


def _as_batches(
    batches: Iterable[ProbeBatch | Mapping[str, Any]] | Mapping[str, Any], measure: Measure
) -> Iterator[ProbeBatch]:
    count = 0
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        if not isinstance(batch, Mapping):
            if not hasattr(batch, "answer_mask"):
                raise unexpected("batches", batch, "what a processor or tokenizer returns")
            yield batch
            continue
        if measure.tokens == "answer":
            raise SnrfError(None, "needs batches with an answer_mask", "give them, or leave out tokens", field="tokens")
        if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].ndim != 2:
            remedy = "call the processor with return_tensors='pt' and padding=True"
            raise SnrfError(None, "a batch has no tensor input_ids of shape [probes, tokens]", remedy)
        numbers = tuple(range(count, count + len(batch["input_ids"])))
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        yield ProbeBatch(numbers, batch, mask, mask != 0)
        count += len(numbers)
