"""What the CUDA path launches in a layer, counted on the meta device; benchmarks/device_budget.py does it for 7B."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_snrf.profiling.result.moments import InputSum

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
from device_budget import Counted, count_layer  # noqa: E402

# Its profiling.py must not stand for tests/profiling.
sys.path.remove(BENCHMARKS)

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 128,
}


def test_a_layer_never_waits_for_the_device_and_launches_no_more_than_it_did():
    counts = count_layer(TINY, 40)
    assert {part: dict(counted.waits) for part, counted in counts.items()} == {part: {} for part in counts}
    launches = {part: len(counted.operations) for part, counted in counts.items()}
    # 4 query heads and 2 key heads, each of one batch of neurons.
    assert 20 < launches["forward pass"] < 60
    assert 100 < launches["impacts"] <= 240
    assert 30 < launches["moments"] <= 75
    # A probe of three times the tokens needs no more of them.
    assert {part: len(counted.operations) for part, counted in count_layer(TINY, 120).items()} == launches
    heads = count_layer({**TINY, "num_attention_heads": 8, "num_key_value_heads": 4}, 40)["impacts"]
    assert 1.7 < len(heads.operations) / launches["impacts"] < 2


def test_flops_and_bytes_are_those_of_the_definition():
    tokens, heads, groups, head_dim = 40, 4, 2, 16
    fused = [one for one in count_layer(TINY, tokens)["impacts"].operations if one.name == "sdpa"]
    # A causal attention for every neuron of q, one for each query head that reads a neuron of k, and one unchanged.
    attentions = heads * head_dim + heads * head_dim + heads
    assert sum(one.flops for one in fused) == attentions * 2 * 2 * head_dim * tokens * tokens // 2
    assert not any(one.half for one in fused)
    assert len(fused) == heads + 2 * groups


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
    ],
)
def test_whatever_waits_for_the_device_is_seen(wait):
    with Counted() as counted:
        wait(torch.ones(3))  # type: ignore[operator]
    assert sum(counted.waits.values()) == 1


@pytest.mark.parametrize(("free", "where"), [(900, "cuda"), (200, "cpu")])
def test_sums_of_moments_live_on_a_device_that_has_room(free, where, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**20, 1000 * 2**20))
    with FakeTensorMode():
        one = InputSum(4, 1.0, torch.randn(4, 2))
        one.add(torch.randn(3, 4, device="cuda"))
        assert (one.total.device.type, one.counts.device.type, one.largest.device.type) == (where, "cuda", "cuda")
        one.leave()
        assert (one.total.device.type, one.counts.device.type, one.largest.device.type) == ("cpu", "cpu", "cpu")
