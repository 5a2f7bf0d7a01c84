from __future__ import annotations

import pytest
import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling import memory


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
