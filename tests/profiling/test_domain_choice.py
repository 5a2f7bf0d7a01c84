"""The choice of domain-specific neurons against numpy, on random counts with ties and neurons that are never active."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sites import Site
from mergekit_snrf.profiling.result.choice import Choice
from mergekit_snrf.profiling.result.domains import Domains, DomainsProvenance, choose

KINDS = ("image", "prompt", "answer")


def made(seed: int, domains: int, layers: int, neurons: int, top: int = 5) -> Domains:
    """Counts of few values, so that shares and entropies tie, with whole rows of zeros."""
    rng = np.random.default_rng(seed)
    active: dict[str, list[torch.Tensor]] = {"decoder": [], "vision": [], "projector": []}
    for module, shape in (("decoder", (domains, 3)), ("vision", (domains,)), ("projector", (domains,))):
        for layer in range(1 if module == "projector" else layers):
            size = neurons + layer if module == "vision" else neurons
            counts = rng.integers(0, top, (*shape, size)) * (rng.random(size) < 0.8)
            active[module].append(torch.from_numpy(counts))
    tokens = {
        module: torch.from_numpy(rng.integers(top, top + 2, shape))
        for module, shape in (("decoder", (domains, 3)), ("vision", domains), ("projector", domains))
    }
    return Domains(active, tokens, DomainsProvenance(names=[f"d{number}" for number in range(domains)]))


def by_numpy(found: Domains, module: str, choice: Choice) -> tuple[list[set[tuple[int, int]]], float, list[float]]:
    """Members by domain as (layer, neuron), the bar, and H of the neurons above it: loops over plain floats."""
    kinds = range(3) if choice.tokens == "all" else [KINDS.index(choice.tokens)]
    places, shares = [], []
    for layer, tensor in enumerate(found.active[module]):
        counts, tokens = tensor.numpy(), found.tokens[module].numpy()
        if module == "decoder":
            counts, tokens = sum(counts[:, k] for k in kinds), sum(tokens[:, k] for k in kinds)
        for neuron in range(counts.shape[-1]):
            places.append((layer, neuron))
            shares.append([float(c) / float(n) for c, n in zip(counts[:, neuron], tokens, strict=True)])
    everything = sorted(p for share in shares for p in share)
    bar = everything[max(1, round(choice.percentile * len(everything))) - 1]
    ranked = []
    for index, share in enumerate(shares):
        if max(share) > bar:
            q = np.array(share) / sum(share)
            ranked.append((float(-np.sum(q[q > 0] * np.log(q[q > 0]))), index))
    count = round(choice.top * len(shares))
    # Equal values of H may differ in their last bit from one way to add to another.
    specific = [index for _, index in sorted((round(h, 9), index) for h, index in ranked)[:count]]
    sets: list[set[tuple[int, int]]] = [set() for _ in found.names]
    for index in specific:
        above = [domain for domain, p in enumerate(shares[index]) if p > bar]
        if choice.assign == "argmax":
            above = [int(np.argmax(shares[index]))]
        elif choice.assign == "exclusive" and len(above) > 1:
            above = []
        for domain in above:
            sets[domain].add(places[index])
    return sets, bar, [h for h, _ in ranked]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(2, 5), st.integers(1, 3), st.integers(1, 12)),
    module=st.sampled_from(["decoder", "vision", "projector"]),
    choice=st.builds(
        Choice,
        top=st.sampled_from([0.01, 0.1, 0.3, 1.0]),
        percentile=st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]),
        tokens=st.sampled_from(["all", *KINDS]),
        assign=st.sampled_from(["bar", "argmax", "exclusive"]),
    ),
)
def test_selection_is_that_of_numpy(seed, sizes, module, choice):
    found = made(seed, *sizes)
    expected, bar, entropies = by_numpy(found, module, choice)
    chosen = choose(found, module, choice)
    projections = {"decoder": ("fwd.up", "fwd.down"), "vision": ("vision.mlp",), "projector": ("projector.mlp",)}[
        module
    ]
    assert chosen.bar == bar
    assert sorted(chosen.entropy.tolist()) == pytest.approx(sorted(entropies), abs=1e-12)
    for name, places in zip(found.names, expected, strict=True):
        for projection in projections:
            neurons = {
                (site.layer, index)
                for site, member in chosen.sets[name].of(projection).items()
                for index in member.nonzero().flatten().tolist()
            }
            assert neurons == places
        assert set(chosen.sets[name]) == {
            Site(layer, projection) for layer in range(len(found.active[module])) for projection in projections
        }
    counts = [[sum(at == layer for at, _ in one) for layer in range(len(chosen.layers))] for one in expected]
    assert chosen.counts.tolist() == counts
    lowest = min(entropies, default=float("inf"))
    assert chosen.unspecific == (lowest > 0.95 * np.log(len(found.names)))


def test_tokens_and_modules_that_were_not_counted_are_named():
    found = made(0, 3, 1, 4)
    found.tokens["decoder"][1, 2] = 0
    with pytest.raises(SnrfError, match="has no tokens of the decoder for d1") as caught:
        choose(found, "decoder", Choice(tokens="answer"))
    assert caught.value.field == "tokens"
    choose(found, "decoder", Choice(tokens="all"))
    del found.active["vision"]  # type: ignore[attr-defined]
    with pytest.raises(SnrfError, match="has no counts of the vision; it has decoder, projector"):
        choose(found, "vision")
