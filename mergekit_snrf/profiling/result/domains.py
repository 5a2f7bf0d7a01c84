"""The choice of domain-specific neurons from counts (MMNeuron, arXiv 2406.11193, after LAPE, arXiv 2402.16438).

A neuron's activity on domain i is ``p_i``, the share of tokens on which its activation is above zero. Its entropy
``H = - sum_i q_i ln q_i``, with ``q = p / sum_i p_i``, is low where few domains use it. A neuron must be active above a
bar, a quantile of all p, on some domain; of those, the share of neurons with the lowest H is domain-specific.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.activations import DECODER, VISION
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import TOWERS, Site
from mergekit_snrf.profiling.result.choice import Choice
from mergekit_snrf.profiling.result.domainsfile import KINDS, Domains

UNSPECIFIC = 0.95
"""Above this share of ln(domains), the lowest entropy says that no neuron is specific to a domain."""

_PROJECTIONS = {DECODER: ("fwd.up", "fwd.down"), VISION: TOWERS[:1]}


@dataclass(frozen=True)
class Chosen:
    """The domain-specific neurons of one module.

    Attributes:
        sets: by domain; of the text decoder the rows of fwd.up and the columns of fwd.down.
        members: the same as one tensor, layer after layer.
        layers: the number of neurons of each layer.
        entropy: H in nats of the neurons above the bar.
        bar: the share of active tokens that a neuron must exceed.
    """

    module: str
    sets: dict[str, NeuronSet]
    members: Bool[Tensor, "domains neurons"]
    layers: list[int]
    entropy: Float64[Tensor, " candidates"]
    bar: float

    @property
    def unspecific(self) -> bool:
        """Whether no neuron of the module is specific to a domain."""
        lowest = min(self.entropy.tolist(), default=math.inf)
        return lowest > UNSPECIFIC * math.log(len(self.sets))

    @property
    def counts(self) -> Int64[Tensor, "domains layers"]:
        """How many neurons each domain has in each layer; a row and a column of the decoder count as one."""
        return torch.stack([part.sum(1) for part in self.members.split(self.layers, dim=1)], dim=1)


def activity(domains: Domains, module: str, tokens: str = "all") -> list[Float64[Tensor, "domains neurons"]]:
    """Return the share of tokens on which every neuron of a module is active, layer by layer.

    Args:
        tokens: kind of tokens in the text decoder, or ``all``.

    Raises:
        SnrfError: the file has no such module, or a domain has no such tokens.
    """
    if module not in domains.active:
        raise SnrfError(domains.path, f"has no counts of the {module}", f"it has {', '.join(domains.active)}")
    layers, total = list(domains.active[module]), domains.tokens[module]
    if module == DECODER:
        kinds = slice(None) if tokens == "all" else slice(KINDS.index(tokens), KINDS.index(tokens) + 1)
        layers, total = [layer[:, kinds].sum(1) for layer in layers], total[:, kinds].sum(1)
    lacking = [name for name, count in zip(domains.names, total.tolist(), strict=True) if not count]
    if lacking:
        what = f"has no tokens of the {module} for {', '.join(lacking)}"
        raise SnrfError(domains.path, what, "choose other tokens, or probes with images", field="tokens")
    return [layer.double() / total.double()[:, None] for layer in layers]


def entropy(shares: Float64[Tensor, "domains neurons"]) -> Float64[Tensor, " neurons"]:
    """Return H of every neuron in nats, 0 where it is never active."""
    total = shares.sum(0)
    q = torch.where(total > 0, shares / total, 0.0)
    # Adding zero turns -0.0 into 0.0.
    return torch.special.entr(q).sum(0) + 0.0


def choose(domains: Domains, module: str, choice: Choice | None = None) -> Chosen:
    """Return the domain-specific neurons of a module: of equal H, the lower layer and index wins.

    Raises:
        SnrfError: as ``activity``.
    """
    choice = choice or Choice()
    layers = activity(domains, module, choice.tokens)
    shares = torch.cat(layers, dim=1)
    bar = float(shares.flatten().kthvalue(max(1, round(choice.percentile * shares.numel()))).values)
    found, above = entropy(shares), shares > bar
    # Equal up to rounding, as of domains in another order, is equal.
    ranked = torch.where(above.any(0), found.round(decimals=9), torch.inf)
    lowest = ranked.argsort(stable=True)[: round(choice.top * len(ranked))]
    specific = torch.zeros(len(ranked), dtype=torch.bool)
    specific[lowest] = ranked[lowest].isfinite()
    assigned = _assigned(shares, above, choice.assign) & specific
    sizes = [layer.shape[1] for layer in layers]
    sets = {
        name: NeuronSet(
            {
                Site(layer, projection): part
                for layer, part in enumerate(member.split(sizes))
                for projection in _projections(module)
            }
        )
        for name, member in zip(domains.names, assigned, strict=True)
    }
    return Chosen(module, sets, assigned, sizes, found[above.any(0)], bar)


def _projections(module: str) -> tuple[str, ...]:
    return _PROJECTIONS.get(module, TOWERS[1:])


def _assigned(
    shares: Float64[Tensor, "domains neurons"], above: Bool[Tensor, "domains neurons"], assign: str
) -> Bool[Tensor, "domains neurons"]:
    if assign == "bar":
        return above
    if assign == "exclusive":
        return above & (above.sum(0) == 1)
    # The first maximum: of several, torch's argmax may return any.
    first = (shares == shares.amax(0)).cumsum(0).cumsum(0)
    return first == 1
