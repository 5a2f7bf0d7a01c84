from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.result.profilefile import EDGES
from mergekit_snrf.profiling.result.statistics import Statistics

QUERY, UP, DOWN = Site(0, "attn.q"), Site(2, "fwd.up"), Site(2, "fwd.down")
NEURONS = {QUERY: 5, UP: 7}

# Every nonnegative float32: subnormal, tiny, huge, and ties on purpose.
IMPACTS = st.one_of(
    st.floats(0, float(np.finfo(np.float32).max), width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 1e30, 1.0, 1.0 + 2**-23, float(np.finfo(np.float32).max), 2.0**-149]),
)


@st.composite
def corpora(draw: st.DrawFn) -> dict[Site, Tensor]:
    probes = draw(st.integers(1, 12))
    return {
        site: torch.from_numpy(draw(arrays.arrays(np.float32, (probes, neurons), elements=IMPACTS)))
        for site, neurons in NEURONS.items()
    }


def measured(corpus: dict[Site, Tensor]) -> Statistics:
    statistics = Statistics(NEURONS)
    statistics.update(corpus)
    return statistics


def restored(statistics: Statistics) -> Statistics:
    """What a journal gives back."""
    other = Statistics(statistics.neurons)
    other.restore({key: tensor.clone() for key, tensor in statistics.state().items()}, statistics.probes)
    return other


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(corpus=corpora(), data=st.data())
def test_any_shards_in_any_order_give_the_statistics_of_one_run(corpus, data):
    probes = len(corpus[QUERY])
    shards = data.draw(st.lists(st.integers(0, 3), min_size=probes, max_size=probes))
    order = data.draw(st.permutations(range(probes)))
    parts = [Statistics(NEURONS) for _ in range(4)]
    for probe in order:
        parts[shards[probe]].update({site: values[probe : probe + 1] for site, values in corpus.items()})
    # One shard comes back from a file, as after a resume.
    parts[1] = restored(parts[1])
    merged = Statistics(NEURONS)
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    expected = measured(corpus).state()
    for key, tensor in merged.state().items():
        if key.endswith(".total"):
            torch.testing.assert_close(tensor, expected[key], rtol=1e-14, atol=0)
        else:
            assert torch.equal(tensor, expected[key])


def test_sums_of_impacts_of_similar_size_are_the_same_for_every_split():
    generator = torch.Generator().manual_seed(0)
    values = torch.exp(10 * torch.rand(64, 5, generator=generator) - 5)
    shuffled = values[torch.randperm(64, generator=generator)]
    whole, parts = Statistics({QUERY: 5}), Statistics({QUERY: 5})
    whole.update({QUERY: values})
    for part in shuffled.split(7):
        parts.update({QUERY: part})
    assert all(torch.equal(parts.state()[key], tensor) for key, tensor in whole.state().items())


@settings(max_examples=40)
@given(corpus=corpora())
def test_statistics_are_what_exact_arithmetic_over_the_whole_corpus_gives(corpus):
    profile = measured(corpus).profile()
    for site, values in corpus.items():
        rows = values.tolist()
        neurons = len(rows[0])
        found = profile.sites[site]
        # rank 1 is the greatest; Python's sort is stable, so of equal impacts the lower index comes first
        expected = [
            [sorted(range(neurons), key=lambda k: -row[k]).index(n) + 1 for n in range(neurons)] for row in rows
        ]
        assert found.min_impact.tolist() == [min(column) for column in zip(*rows, strict=True)]
        assert found.ranks.tolist() == [max(column) for column in zip(*expected, strict=True)]
        assert found.max_rank.tolist() == [np.float32(rank) / np.float32(neurons) for rank in found.ranks.tolist()]
        for neuron, column in enumerate(zip(*rows, strict=True)):
            mean = sum(map(Fraction, column)) / len(column)
            assert float(found.mean_impact[neuron]) == pytest.approx(float(mean), rel=2**-23, abs=2**-149)
        for neuron, column in enumerate(zip(*expected, strict=True)):
            shares = [Fraction(rank, neurons) for rank in column]
            counted = [sum(share <= Fraction(edge) for share in shares) for edge in EDGES]
            assert found.hits[neuron].cumsum(0).tolist() == counted


def test_largest_sums_do_not_overflow():
    site, largest = Site(0, "attn.v"), float(np.finfo(np.float32).max)
    statistics = Statistics({site: 2})
    statistics.update({site: torch.full((4096, 2), largest)})
    for _ in range(12):
        statistics.merge(restored(statistics))
    assert statistics.probes == 4096 * 2**12
    assert statistics.profile().sites[site].mean_impact.tolist() == [largest, largest]


def test_mean_of_equal_impacts_is_that_impact():
    site = Site(0, "attn.v")
    values = torch.tensor([[0.1, 1e-38, 2.0**-149, 0.0]])
    statistics = Statistics({site: 4})
    statistics.update({site: values.expand(7, 4)})
    assert torch.equal(statistics.profile().sites[site].mean_impact, values[0])


def test_fwd_down_is_stored_with_the_statistics_of_fwd_up():
    corpus = {QUERY: torch.rand(3, 5), UP: torch.rand(3, 7)}
    profile = measured(corpus).profile()
    assert list(profile.sites) == [QUERY, DOWN, UP]
    assert profile.sites[DOWN] is profile.sites[UP]
    assert Statistics({UP: 7, DOWN: 7}).neurons == {UP: 7}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 1e300])
def test_impossible_impact_is_refused_and_nothing_is_added(bad):
    statistics = Statistics(NEURONS)
    good = {QUERY: torch.ones(2, 5, dtype=torch.float64), UP: torch.ones(2, 7, dtype=torch.float64)}
    statistics.update(good)
    before = {key: tensor.clone() for key, tensor in statistics.state().items()}
    good[UP][1, 3] = bad
    with pytest.raises(SnrfError, match=r"layers\.2\.fwd\.up: an impact is negative, infinite or NaN"):
        statistics.update(good)
    assert statistics.probes == 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in statistics.state().items())


def test_wrong_sites_and_shapes_are_refused():
    statistics = Statistics(NEURONS)
    with pytest.raises(SnrfError, match=r"layers\.2\.fwd\.up: impacts must be given for exactly the measured sites"):
        statistics.update({QUERY: torch.ones(2, 5)})
    with pytest.raises(SnrfError, match=r"\[probes, neurons\] = \[2, 7\], got \[1, 7\]"):
        statistics.update({QUERY: torch.ones(2, 5), UP: torch.ones(1, 7)})
    with pytest.raises(SnrfError, match="different models"):
        statistics.merge(Statistics({QUERY: 6, UP: 7}))
    with pytest.raises(SnrfError, match="at least one probe"):
        statistics.profile()


def test_damaged_state_is_refused():
    state = measured({QUERY: torch.rand(3, 5), UP: torch.rand(3, 7)}).state()
    key = "layers.0.attn.q.total"
    with pytest.raises(SnrfError, match=r"layers\.0\.attn\.q\.total' is missing"):
        Statistics(NEURONS).restore({name: tensor for name, tensor in state.items() if name != key}, 3)
    with pytest.raises(SnrfError, match=r"total' must be torch.float64 of shape \[5\], got .*\[4\]"):
        Statistics(NEURONS).restore({**state, key: state[key][1:]}, 3)
