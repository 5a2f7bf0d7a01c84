"""Where fused attention runs and how it is called; only CPU kernels are run here. Its impacts: ``test_impact``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import load, make_source
from profiling.test_capture import left_padded
from profiling.test_impact import random_inputs
from torch import Tensor
from torch.nn import functional

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.impact.layer import attention_impact
from mergekit_snrf.profiling.impact.sdpa import uses_sdpa
from mergekit_snrf.profiling.measure.meter import Meter


def test_probes_without_holes_need_no_mask(monkeypatch):
    """Flash attention takes none."""
    seen: list[dict[str, object]] = []
    real = functional.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    padded = torch.ones(2, 40)
    padded[0, :7] = 0
    padded[1, 30:] = 0
    attention_impact(random_inputs(40, key_mask=padded), backend="sdpa")
    assert seen
    assert all(call.get("is_causal") and "attn_mask" not in call for call in seen)
    seen.clear()
    attention_impact(random_inputs(40, window=8), backend="sdpa")
    assert all("attn_mask" in call for call in seen)


def test_the_backend_follows_the_device_and_the_cap():
    inputs = random_inputs(5)
    on_cuda = replace(inputs, softcap=None)
    object.__setattr__(on_cuda, "query", _OnCuda())
    capped = replace(inputs, softcap=30.0)
    assert not uses_sdpa(inputs, "auto")
    assert uses_sdpa(on_cuda, "auto")
    assert not uses_sdpa(on_cuda, "blocked")
    assert uses_sdpa(inputs, "sdpa")
    object.__setattr__(on_cuda, "softcap", 30.0)
    assert not uses_sdpa(on_cuda, "auto")
    with pytest.raises(ValueError, match="cannot cap the scores"):
        attention_impact(capped, backend="sdpa")


def test_a_model_that_caps_its_scores_is_told_apart(tmp_path):
    model = load(make_source(tmp_path / "gemma2", "gemma2"), dtype=torch.float32)
    with pytest.raises(SnrfError, match="backend: caps its attention scores"):
        Meter(model, backend="sdpa").impacts(left_padded())


class _OnCuda:
    device = torch.device("cuda")
