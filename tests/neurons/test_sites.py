from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sites import MAX_LAYERS, PROJECTIONS, Neuron, Site

examples = settings(max_examples=50)
sites = st.builds(Site, st.integers(0, 3), st.sampled_from(list(PROJECTIONS)))


def test_unknown_projection_is_named_beside_the_known_ones() -> None:
    with pytest.raises(SnrfError, match=r"'fwd\.gate'.*attn\.q, attn\.k, attn\.v, fwd\.up"):
        Site(0, "fwd.gate")


@examples
@given(sites)
def test_site_round_trip(site: Site) -> None:
    assert Site.from_key(site.key) == site
    assert str(site) == site.key == f"layers.{site.layer}.{site.projection}"
    assert (site.axis, site.module) == (PROJECTIONS[site.projection].axis, PROJECTIONS[site.projection].module)


@examples
@given(sites, st.integers(0, 2**31))
def test_neuron_round_trip(site: Site, index: int) -> None:
    neuron = Neuron(site, index)
    assert str(neuron) == f"{site.projection}.L{site.layer}.N{index}"
    assert Neuron.parse(str(neuron)) == neuron


KEYS = (
    *("", "attn.k", "layers.attn.k", "layers.1.attn", "layers.007.attn.k", "layers.-1.attn.k", "layers.1.5.attn.k"),
    *("layers.1e3.attn.k", "layers.1.attn.k ", "layers.1.attn.k\n", "layers.1.attn.k.weight", "model.layers.1.attn.k"),
    *("layers.1.ATTN.K", "layers.\u0661.attn.k", "layers.100000.attn.k", "layers." + "9" * 5000 + ".attn.k"),
)
NAMES = ("", "L14.N1", "fwd.up.L14", "fwd.up.14.1", "fwd.up.L014.N1", "fwd.up.L1.N01", "x.L1.N1")


@pytest.mark.parametrize("key", KEYS)
def test_malformed_keys_are_refused(key: str) -> None:
    with pytest.raises(SnrfError, match=r"does not name a layer and projection"):
        Site.from_key(key)


@pytest.mark.parametrize("name", NAMES)
def test_malformed_neuron_names_are_refused(name: str) -> None:
    with pytest.raises(SnrfError, match=r"does not name a neuron"):
        Neuron.parse(name)


def test_sites_outside_every_model_are_refused() -> None:
    assert Site(MAX_LAYERS - 1, "attn.q").layer == MAX_LAYERS - 1
    for layer in (-1, MAX_LAYERS):
        with pytest.raises(SnrfError, match=rf"layer {layer} is not in \[0, {MAX_LAYERS}\)"):
            Site(layer, "attn.q")
    with pytest.raises(SnrfError, match="unknown projection"):
        Site(0, "mlp.up")
    with pytest.raises(SnrfError, match="unknown projection"):
        Site.from_key("layers.0.attn.o")
    with pytest.raises(SnrfError, match="unknown projection"):
        Neuron.parse("attn.o.L0.N0")
