from __future__ import annotations

import logging
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiling.test_profilefile import KEY, profile, site_profile

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance
from mergekit_snrf.profiling.result.selection import Selection, select, top_rank


def chosen(neurons: NeuronSet, site: Site = KEY) -> list[int]:
    return neurons[site].nonzero().flatten().tolist()


@given(neurons=st.integers(1, 30_000), ratio=st.decimals(0, 1, places=4))
def test_top_ratio_counts_as_the_decimal_number_it_is(neurons, ratio):
    assert top_rank(float(ratio), neurons) == (Fraction(ratio) * neurons).__floor__()


@pytest.mark.parametrize("neurons", [10, 30, 70, 110, 190, 18_944])
def test_tenth_of_the_neurons_is_a_tenth_whatever_float32_rounds_to(neurons):
    ranks = [list(range(1, neurons + 1))]
    found = select([profile(attn_k=ranks)], top_ratio=0.1)
    assert chosen(found) == list(range(neurons // 10))
    assert chosen(select([profile(attn_k=ranks)], top_ratio=1.0)) == list(range(neurons))
    assert found.count()
    assert not select([profile(attn_k=ranks)], top_ratio=0).count()


def test_ratio_by_group_and_by_projection():
    ranks = {name: [[1, 2, 3, 4]] for name in ("attn_q", "attn_k", "attn_v", "fwd_up", "fwd_down")}
    found = select([profile(**ranks)], top_ratio={"attn": 0.5, "attn.k": 0.25, "fwd": 1})
    counts = {site.projection: found.count(site) for site in found}
    assert counts == {"attn.q": 2, "attn.k": 1, "attn.v": 2, "fwd.up": 4, "fwd.down": 4}


def test_sigma_is_a_least_impact_on_every_probe():
    impacts = [[0.5, 0.05, 2.0], [0.05, 0.049, 1.0]]
    found = Profile({KEY: site_profile([[2, 3, 1], [2, 3, 1]], impacts)}, 2)
    # float32(0.05) lies above 0.05 and float32(0.049) below.
    assert chosen(select([found], sigma=0.05)) == [0, 2]
    assert chosen(select([found], sigma={"attn": 1.0, "fwd": 0})) == [2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_ratio": "1e-1"}, {"top_ratio": 0.1}),
        ({"sigma": "attn=1e-3, fwd=2"}, {"sigma": {"attn": 1e-3, "fwd": 2.0}}),
        ({"top_ratio": 1, "at_least": "90"}, {"top_ratio": 1.0, "at_least": 90}),
        ({"top_ratio": 0, "at_least": "0.9"}, {"top_ratio": 0.0, "at_least": 0.9}),
    ],
)
def test_numbers_may_be_written_as_text(given, expected):
    selection = Selection(**given)
    assert selection.rule == expected
    assert {name: type(value) for name, value in selection.rule.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_profiles_intersect_as_in_eq_6():
    one = profile(attn_k=[[1, 2, 3, 4], [2, 1, 3, 4]])
    other = profile(attn_k=[[4, 1, 2, 3]])
    assert chosen(select([one, other], top_ratio=0.5)) == [1]
    # the elementwise maximum of the ranks, and the minimum of the impacts
    ranks = torch.maximum(one.sites[KEY].ranks, other.sites[KEY].ranks)
    assert chosen(select([one, other], top_ratio=0.75)) == (ranks <= 3).nonzero().flatten().tolist()
    least = torch.minimum(one.sites[KEY].min_impact, other.sites[KEY].min_impact)
    assert chosen(select([one, other], sigma=0.3)) == (least >= 0.3).nonzero().flatten().tolist()


RANKS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 4, 2, 3, 5, 6, 7, 8, 9, 10], [1, 4, 3, 2, 5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (1, [0, 1, 2, 3]),
        (2, [0, 2, 3]),
        (3, [0, 2]),
        (1.0, [0, 2]),
        (0.67, [0, 2]),
        (0.66, [0, 2, 3]),
        (0.3, [0, 1, 2, 3]),
    ],
)
def test_at_least_counts_probes_or_a_share_of_them(at_least, expected):
    assert chosen(select([profile(attn_k=RANKS)], top_ratio=0.3, at_least=at_least)) == expected


def test_at_least_is_exact_at_the_edges_and_cautious_between_them(caplog):
    with caplog.at_level(logging.WARNING):
        exact = select([profile(attn_k=RANKS)], top_ratio=0.3, at_least=2)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        # 4 of 10 neurons lie between the edges 0.3 and 0.5: rank 4 cannot be told from rank 5
        between = select([profile(attn_k=RANKS)], top_ratio=0.4, at_least=2)
    assert between == exact
    assert "top_ratio 0.4 is rounded down to 0.3" in caplog.text
    # but every probe is exact, whatever the ratio
    assert chosen(select([profile(attn_k=RANKS)], top_ratio=0.4, at_least=1.0)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "give exactly one"),
        ({"top_ratio": 0.1, "sigma": 1.0}, "give exactly one"),
        ({"top_ratio": 1.5}, r"share in \[0, 1\] such as 0.1, got 1.5"),
        ({"top_ratio": -0.1}, r"share in \[0, 1\] such as 0.1, got -0.1"),
        ({"sigma": float("nan")}, "sigma: must be a number of at least 0"),
        ({"sigma": "much"}, "sigma: must be a number of at least 0, got 'much'"),
        ({"top_ratio": True}, "top_ratio: must be a share"),
        ({"top_ratio": {"attn": 0.1, "ffn": 0.1}}, "'ffn' is not a projection; known are attn, fwd, attn.q"),
        ({"top_ratio": {"fwd": 0.1}}, "no value for attn.q; add attn or attn.q"),
        ({"sigma": 1.0, "at_least": 2}, "needs top_ratio"),
        ({"top_ratio": 0.1, "at_least": 4}, "profile: at_least: has 3 probes, fewer than 4"),
        ({"top_ratio": 0.1, "at_least": 1.5}, "at_least: must be a share"),
        ({"top_ratio": 0.1, "at_least": 0}, "at_least: must be a share"),
    ],
)
def test_impossible_rule_is_refused(rule, message):
    with pytest.raises(SnrfError, match=message):
        select([profile(attn_k=RANKS)], **rule)


def test_estimates_of_a_screened_profile_are_never_selected():
    screened = replace(profile(attn_k=RANKS), provenance=ProfileProvenance(measure={"screen": 0.3}), path="old")
    with pytest.raises(SnrfError, match=r"old: was made by an earlier version with screen: 0\.3"):
        select([screened], top_ratio=0.1)


def test_profiles_of_other_shapes_are_refused():
    with pytest.raises(SnrfError, match=r"two: has 3 neurons at layers\.0\.attn\.k where one has 2"):
        select(
            [replace(profile(attn_k=[[1, 2]]), path="one"), replace(profile(attn_k=[[1, 2, 3]]), path="two")], sigma=0
        )
    with pytest.raises(SnrfError, match=r"where profile has 0"):
        select([profile(attn_k=[[1, 2]]), profile(attn_k=[[1, 2]], fwd_up=[[1, 2]])], sigma=0)
    with pytest.raises(SnrfError, match="at least one profile"):
        select([], sigma=0)
