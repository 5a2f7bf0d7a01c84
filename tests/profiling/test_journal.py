from __future__ import annotations

import pytest
import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.distributed import Ranks
from mergekit_snrf.profiling.journal import Journals, Progress, Tally
from mergekit_snrf.profiling.result.statistics import Statistics

KEY = Site(0, "attn.k")


def statistics_of(values: list[float]) -> Statistics:
    statistics = Statistics({KEY: 2})
    if values:
        statistics.update({KEY: torch.tensor(values)[:, None] * torch.tensor([1.0, 2.0])})
    return statistics


def test_journals_of_several_processes_come_together(tmp_path):
    journals = Journals(tmp_path / "m.target", {"seed": 0})
    parts = {0: ({0, 3}, [1.0, 2.0]), 1: ({1}, [0.1]), 2: ({2, 4}, [1e-20, 1e20])}
    for rank, (groups, values) in parts.items():
        journals.write(rank, Progress(statistics_of(values), Tally(tokens=rank, digest=2**255), groups))
    found = journals.read(lambda: statistics_of([]))
    assert (found.done, found.statistics.probes) == ({0, 1, 2, 3, 4}, 5)
    assert found.tally == Tally(tokens=3, digest=2**255)
    whole = statistics_of([1e20, 0.1, 2.0, 1e-20, 1.0])
    assert all(torch.equal(found.statistics.state()[key], tensor) for key, tensor in whole.state().items())
    # Killed after all were written to one and before the others were deleted: nothing counts twice.
    journals.write(0, found)
    again = journals.read(lambda: statistics_of([]))
    assert (again.done, again.statistics.probes, again.tally) == (found.done, 5, found.tally)
    journals.delete(keep=0)
    assert journals.files() == [journals.path(0)]


def test_journals_that_contradict_each_other_are_refused(tmp_path):
    journals = Journals(tmp_path / "m.target", {"seed": 0})
    journals.write(0, Progress(statistics_of([1.0, 2.0]), Tally(), {0, 1}))
    journals.write(1, Progress(statistics_of([1.0]), Tally(), {1, 2}))
    with pytest.raises(SnrfError, match=r"journal-1.* overlaps with another journal"):
        journals.read(lambda: statistics_of([]))
    with pytest.raises(SnrfError, match="of another run: seed was 0 and is 1"):
        Journals(tmp_path / "m.target", {"seed": 1}).read(lambda: statistics_of([]))
    journals.path(1).unlink()
    with pytest.raises(SnrfError, match=r"journal-0.* is damaged .*of shape \[3\]"):
        journals.read(lambda: Statistics({KEY: 3}))
    journals.write(0, Progress(statistics_of([1.0]), Tally(tokens="many"), {0}))  # type: ignore[arg-type]
    with pytest.raises(SnrfError, match="a count is not a whole number"):
        journals.read(lambda: statistics_of([]))
    journals.path(0).write_bytes(b"not a journal")
    with pytest.raises(SnrfError, match="not a readable safetensors file"):
        journals.read(lambda: statistics_of([]))


def test_ranks_share_every_group_once():
    shares = [Ranks(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(group for share in shares for group in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) == 1
    assert (Ranks().device(None), Ranks().device("cuda:1"), Ranks(1, 2).device("cpu")) == (None, "cuda:1", "cpu")
    with pytest.raises(SnrfError, match="'cuda:0' would be shared by 2 processes"):
        Ranks(1, 2).device("cuda:0")
