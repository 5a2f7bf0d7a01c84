from __future__ import annotations

import pytest
import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.profiling import memory
from mergekit_snrf.profiling.result.statistics import Statistics


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5 * 10**8), ("2GiB", 2**31), ("1e6", 10**6), ("1.5 kb", 1500), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "0", "1XB", "nan", "10%"])
def test_impossible_sizes_are_refused(text):
    with pytest.raises(SnrfError, match="is not an amount of memory"):
        memory.parse_size(text)


def test_block_size_depends_on_the_budget_alone():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert memory.block_bytes(cpu, None) == memory.block_bytes(cpu, 10**9) == 2**20
    assert memory.block_bytes(cpu, 10**6) == 2**16
    assert memory.block_bytes(cuda, 2**27) == 2**24
    assert memory.free_bytes(torch.device("meta")) is None


def test_statistics_take_the_bytes_that_the_estimate_counts():
    shape = DecoderShape(layers=2, hidden_size=8, heads=4, kv_heads=2, head_dim=2, intermediate_size=12)
    state = Statistics({site: shape.neurons(site.projection) for site in shape.sites()}).state()
    # The digits of the sums are int64 in memory and int32 in a file.
    kept = sum(t.numel() * (8 if name.endswith("total") else t.element_size()) for name, t in state.items())
    neurons = 2 * (8 + 4 + 4 + 12)
    assert kept == neurons * memory.STATISTICS_BYTES


def test_estimate_grows_with_tokens_and_batch_but_not_with_anything_else():
    shape = DecoderShape(layers=30, hidden_size=576, heads=9, kv_heads=3, head_dim=64, intermediate_size=1536)

    def needed(probes: int, tokens: int) -> int:
        return memory.working_bytes(shape, probes, tokens, dtype=torch.float32, block=2**20)

    assert needed(1, 512) < 100e6
    assert needed(1, 512) < needed(1, 1024) < 2 * needed(1, 512)
    assert needed(1, 512) < needed(8, 512) < 8 * needed(1, 512)
