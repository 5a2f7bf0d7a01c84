from __future__ import annotations

import pytest
import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import DecoderShape, check_fit
from mergekit_snrf.neurons.sites import PROJECTIONS, Neuron, Site

SHAPE = DecoderShape(layers=3, hidden_size=8, heads=4, kv_heads=2, head_dim=3, intermediate_size=10)


def full(**sizes: int) -> NeuronSet:
    """Return all neurons of SHAPE, with other numbers of some projections (``attn_k=12``)."""
    counts = {name: sizes.get(name.replace(".", "_"), SHAPE.neurons(name)) for name in PROJECTIONS}
    return NeuronSet({site: torch.ones(counts[site.projection], dtype=torch.bool) for site in SHAPE.sites()})


def misfit(neurons: NeuronSet | list[Neuron]) -> SnrfError:
    with pytest.raises(SnrfError) as caught:
        check_fit(neurons, SHAPE, where="mask", model="owner/model")
    assert caught.value.where == "mask"
    assert "owner/model" in caught.value.what
    return caught.value


def test_neurons_of_the_model_fit() -> None:
    check_fit(full(), SHAPE, where=None, model="m")
    check_fit(NeuronSet({}), SHAPE, where=None, model="m")
    check_fit(full().neurons(), SHAPE, where=None, model="m")


@pytest.mark.parametrize(
    ("site", "length"),
    [(Site(0, "attn.k"), 7), (Site(0, "attn.q"), 6), (Site(2, "fwd.up"), 11), (Site(3, "fwd.down"), 10)],
)
def test_one_tensor_that_does_not_fit_is_named(site: Site, length: int) -> None:
    error = misfit(NeuronSet({site: torch.zeros(length, dtype=torch.bool)}))
    assert f"tensor {site} of shape [{length}]" in error.what
    assert error.remedy == "use a mask made for this model"


def test_another_model_is_one_diagnosis() -> None:
    """The import is offered only where q and fwd fit, so that k and v can be what counts repeated heads."""
    error = misfit(full(attn_k=12, attn_v=12))
    assert "layers.0.attn.k" in error.what
    assert "5 further" in error.what
    assert "snrf mask import" in (error.remedy or "")
    for other in (full(attn_k=12, attn_v=12, attn_q=24), full(attn_k=11, attn_v=12), full(attn_k=12, fwd_up=9)):
        assert misfit(other).remedy == "use a mask made for this model"


@pytest.mark.parametrize("neuron", ["attn.k.L0.N6", "fwd.up.L3.N0", "fwd.down.L2.N10"])
def test_single_neurons_that_the_model_lacks(neuron: str) -> None:
    assert neuron in misfit([Neuron.parse("attn.q.L2.N11"), Neuron.parse(neuron)]).what
