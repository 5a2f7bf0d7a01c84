from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

examples = settings(max_examples=50)

LENGTHS = {"attn.q": 8, "attn.k": 4, "attn.v": 4, "fwd.up": 9, "fwd.down": 9}

sites = st.builds(Site, st.integers(0, 3), st.sampled_from(list(PROJECTIONS)))


@st.composite
def neuron_sets(draw: st.DrawFn) -> NeuronSet:
    chosen = draw(st.sets(sites, max_size=8))
    return NeuronSet({site: draw(members(LENGTHS[site.projection])) for site in chosen})


def members(length: int) -> st.SearchStrategy[Tensor]:
    return st.lists(st.booleans(), min_size=length, max_size=length).map(torch.tensor)


def names(neurons: NeuronSet) -> set[str]:
    return {str(neuron) for neuron in neurons.neurons()}


def subset(site: Site, *indices: int, length: int = 9) -> NeuronSet:
    member = torch.zeros(length, dtype=torch.bool)
    member[list(indices)] = True
    return NeuronSet({site: member})


@pytest.mark.parametrize(
    ("member", "got"),
    [
        (torch.zeros(3), r"torch\.float32 of shape \[3\]"),
        (torch.zeros(3, dtype=torch.uint8), r"torch\.uint8 of shape \[3\]"),
        (torch.zeros(2, 3, dtype=torch.bool), r"torch\.bool of shape \[2, 3\]"),
        (torch.tensor(True), r"torch\.bool of shape \[\]"),
        (torch.zeros(0, dtype=torch.bool), r"torch\.bool of shape \[0\]"),
    ],
)
def test_members_are_boolean_vectors(member: Tensor, got: str) -> None:
    with pytest.raises(SnrfError, match=rf"layers\.0\.attn\.k: .* got {got}"):
        NeuronSet({Site(0, "attn.k"): member})


@examples
@given(neuron_sets(), neuron_sets())
def test_algebra_is_that_of_pythons_sets(a: NeuronSet, b: NeuronSet) -> None:
    before = {site: member.clone() for site, member in a.items()}
    assert names(a & b) == names(a) & names(b)
    assert names(a | b) == names(a) | names(b)
    assert names(a - b) == names(a) - names(b)
    assert (a == b) == (names(a) == names(b))
    assert all(torch.equal(a[site], member) for site, member in before.items())


@examples
@given(neuron_sets())
def test_counts_and_order(a: NeuronSet) -> None:
    listed = list(a.neurons())
    assert all(first < second for first, second in pairwise(listed))
    assert a.count() == len(listed) == len(names(a))
    assert sum(a.count(site) for site in a) == a.count()
    assert a.nonempty().keys() == {neuron.site for neuron in listed}
    assert list(a) == sorted(a)
    assert len(a) == len(list(a))
    assert repr(a) == f"NeuronSet({len(listed)} neurons at {len(a.nonempty())} sites)"


def test_sets_equal_only_sets_of_the_same_model() -> None:
    site = Site(0, "attn.q")
    assert subset(site, 1, length=4) != subset(site, 1, length=5)
    assert subset(site, 1) != {"attn.q.L0.N1"}
    with pytest.raises(TypeError, match="unhashable"):
        hash(subset(site, 1))


@pytest.mark.parametrize("operation", [NeuronSet.__and__, NeuronSet.__or__, NeuronSet.__sub__])
def test_sets_of_different_models_do_not_combine(operation: Callable[[NeuronSet, NeuronSet], NeuronSet]) -> None:
    a, b = subset(Site(3, "attn.k"), 1, length=4), subset(Site(3, "attn.k"), 1, length=16)
    for one, other, sizes in ((a, b, ".* 4 .* 16"), (b, a, ".* 16 .* 4")):
        with pytest.raises(SnrfError, match=rf"layers\.3\.attn\.k: {sizes}"):
            operation(one, other)


@examples
@given(neuron_sets(), st.integers(0, 2**32 - 1))
def test_random_keeps_every_count(a: NeuronSet, seed: int) -> None:
    drawn = a.random(seed)
    assert drawn.keys() == a.keys()
    for site, member in a.items():
        assert drawn[site].shape == member.shape
        assert drawn[site].dtype == torch.bool
        assert drawn.count(site) == a.count(site)


@examples
@given(neuron_sets(), neuron_sets(), st.integers(0, 2**32 - 1))
def test_random_depends_on_seed_site_and_count_alone(a: NeuronSet, b: NeuronSet, seed: int) -> None:
    drawn = a.random(seed)
    assert drawn == a.random(seed)
    for site, member in a.items():
        alone = NeuronSet({site: member.flip(0)}).random(seed)
        assert torch.equal(alone[site], drawn[site])
    both = {**b, **a}
    together = NeuronSet(both).random(seed)
    assert all(torch.equal(together[site], drawn[site]) for site in a)


def test_random_stream_is_frozen() -> None:
    drawn = NeuronSet({Site(14, "fwd.up"): torch.arange(64) < 16, Site(2, "attn.k"): torch.arange(24) < 5}).random(7)
    assert {site.key: np.packbits(member.numpy()).tobytes().hex() for site, member in drawn.items()} == {
        "layers.2.attn.k": "480806",
        "layers.14.fwd.up": "9404284a88060822",
    }


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(SnrfError, match=str(seed)) as caught:
        NeuronSet({}).random(seed)
    assert caught.value.field == "seed"
