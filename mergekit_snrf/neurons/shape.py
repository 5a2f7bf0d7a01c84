"""The shape of a text decoder, and whether neurons fit it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import GROUPED, PROJECTIONS, TOWERS, Neuron, Site


@dataclass(frozen=True)
class DecoderShape:
    """The numbers that two decoders must share for their neurons to pair by index."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DecoderShape:
        """Return the shape that a text configuration describes; ``ValueError``: a number is missing or impossible."""
        try:
            hidden_size, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            shape = cls(
                layers=int(config["num_hidden_layers"]),
                hidden_size=hidden_size,
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden_size // heads),
                intermediate_size=int(config["intermediate_size"]),
            )
        except (KeyError, TypeError, ArithmeticError) as error:
            raise ValueError(f"the configuration lacks a number ({error})") from None
        if min(astuple(shape)) < 1 or shape.heads % shape.kv_heads:
            raise ValueError(f"no decoder has the shape {shape}")
        return shape

    @property
    def repeats(self) -> int:
        """Query heads for every key and value head (grouped-query attention)."""
        return self.heads // self.kv_heads

    def neurons(self, projection: str) -> int:
        """Return the number of neurons of a projection in one layer."""
        if projection.startswith("fwd."):
            return self.intermediate_size
        return (self.kv_heads if projection in GROUPED else self.heads) * self.head_dim

    def sites(self) -> list[Site]:
        """Return every layer and projection."""
        return [Site(layer, name) for layer in range(self.layers) for name in PROJECTIONS]


def every_neuron(shape: DecoderShape) -> NeuronSet:
    """Return all neurons of the five projections."""
    import torch

    return NeuronSet({site: torch.ones(shape.neurons(site.projection), dtype=torch.bool) for site in shape.sites()})


def check_fit(neurons: NeuronSet | Iterable[Neuron], shape: DecoderShape, *, where: object | None, model: str) -> None:
    """Raise ``SnrfError`` where neurons of a file ``where`` are not those of the decoder of ``model``."""
    check_decoder_only(neurons, where)
    if not isinstance(neurons, NeuronSet):
        _check_indices(neurons, shape, where, model)
        return
    expected = set(shape.sites())
    misfits = [site for site in neurons if site not in expected or len(neurons[site]) != shape.neurons(site.projection)]
    if not misfits:
        return
    site = misfits[0]
    has = f"it has layers 0 to {shape.layers - 1}"
    if site.layer < shape.layers:
        has = f"it has {shape.neurons(site.projection)} neurons there"
    further = f" ({len(misfits) - 1} further tensors do not fit either)" if len(misfits) > 1 else ""
    what = f"tensor {site} of shape [{len(neurons[site])}] does not fit {model}, {has}{further}"
    raise SnrfError(where, what, _remedy(neurons, misfits, shape))


def check_decoder_only(neurons: NeuronSet | Iterable[Neuron], where: object | None) -> None:
    """Raise ``SnrfError`` where neurons are not of a text decoder: those can be deactivated, nothing else."""
    sites = neurons if isinstance(neurons, NeuronSet) else (neuron.site for neuron in neurons)
    tower = next((site for site in sites if site.projection in TOWERS), None)
    if tower is not None:
        what = f"has neurons outside of the text decoder ({tower})"
        raise SnrfError(where, what, "use them with 'snrf ablate' or 'snrf domains ablate'; nothing else takes them")


def _remedy(neurons: NeuronSet, misfits: Sequence[Site], shape: DecoderShape) -> str:
    repeated = shape.heads * shape.head_dim
    if all(s.layer < shape.layers and s.projection in GROUPED and len(neurons[s]) == repeated for s in misfits):
        # Where q and fwd fit, k and v may count repeated heads.
        return "attn.k and attn.v count heads repeated for GQA; make the mask again with 'snrf mask import'"
    return "use a mask made for this model"


def _check_indices(neurons: Iterable[Neuron], shape: DecoderShape, where: object | None, model: str) -> None:
    for neuron in neurons:
        name = neuron.site.projection
        if neuron.site.layer >= shape.layers or neuron.index >= shape.neurons(name):
            last = f"{name}.L{shape.layers - 1}.N{shape.neurons(name) - 1}"
            what = f"{neuron} is not in {model}, whose last one is {last}"
            raise SnrfError(where, what, "name neurons of this model")
