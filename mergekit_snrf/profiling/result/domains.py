"""Counts of active neurons by domain: the files that hold them, and the choice of domain-specific neurons.

Format ``snrf-domains``, version 1, safetensors of int64. Kinds of tokens are image, prompt and answer.

- ``text.layers.{l}.active`` [domains, kinds, neurons]: tokens with an activation above zero in the text decoder;
- ``vision.layers.{l}.active``, ``projector.{i}.active`` [domains, neurons]: the same of the vision tower and the
  projector;
- ``text.tokens`` [domains, kinds], ``vision.tokens`` [domains] and ``projector.tokens`` [domains]: all tokens.

Nothing is decided in it: thresholds, kinds of tokens and assignment are chosen afterwards, as in MMNeuron (arXiv
2406.11193) after LAPE (arXiv 2402.16438). A neuron's activity on domain i is ``p_i``, the share of tokens on which its
activation is above zero. Its entropy ``H = - sum_i q_i ln q_i``, with ``q = p / sum_i p_i``, is low where few domains
use it. A neuron must be active above a bar, a quantile of all p, on some domain; of those, the share of neurons with
the lowest H is domain-specific.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.container import Format
from mergekit_snrf.models.activations import DECODER, MODULES, VISION, activation_key
from mergekit_snrf.neurons.maskfile import RunProvenance
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import TOWERS, Site
from mergekit_snrf.profiling.result.choice import Choice

DOMAINS = Format("snrf-domains", 1, "make one with snrf-profile and domains: in its file", "count again")
KINDS = ("image", "prompt", "answer")
"""Kinds of tokens in the text decoder."""

_KEY = re.compile(r"(text\.layers|vision\.layers|projector)\.(0|[1-9][0-9]{0,3})\.active")


def tokens_key(module: str) -> str:
    """Return the key of the numbers of tokens of a module."""
    return activation_key(module, 0).split(".")[0] + ".tokens"


class DomainsProvenance(RunProvenance):
    """Where counts come from.

    Attributes:
        names: of the domains, in the order of the tensors.
        probes: of the domains, as in masks.
    """

    names: list[str]
    probes: list[dict[str, Any]] | None = None


@dataclass(frozen=True, repr=False)
class Domains:
    """A checked file of counts.

    Attributes:
        active: by module and layer: [domains, kinds, neurons] in the decoder, else [domains, neurons].
        tokens: by module: [domains, kinds] in the decoder, else [domains].
    """

    active: Mapping[str, list[Int64[Tensor, "domains *kinds neurons"]]]
    tokens: Mapping[str, Int64[Tensor, domains * kinds]]
    provenance: DomainsProvenance
    path: str = field(default="counts")

    @property
    def names(self) -> list[str]:
        """The domains."""
        return self.provenance.names

    def __repr__(self) -> str:
        """Return the path and the sizes."""
        sizes = ", ".join(f"{len(layers)} layers of the {module}" for module, layers in self.active.items())
        return f"<Domains {self.path}: {', '.join(self.names)}; {sizes}>"


def write_domains(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], provenance: DomainsProvenance) -> None:
    """Write a file of counts; equal arguments give equal bytes.

    ``SnrfError``: the file cannot be written, or another kind of file lies there.
    """
    DOMAINS.check_replaceable(path)
    content = provenance.model_dump(mode="json", exclude_none=True)
    DOMAINS.write(path, tensors, content)


def read_domains(path: str | os.PathLike[str]) -> Domains:
    """Read and check a file of counts.

    ``SnrfError``: the file is missing, damaged or of another format, a tensor is missing, unknown or of another shape,
    or there are more active tokens than tokens.
    """
    tensors, content = DOMAINS.read(path)
    provenance = DOMAINS.parsed(path, content, DomainsProvenance)
    domains = len(provenance.names)
    active: dict[str, list[Tensor]] = {}
    tokens: dict[str, Tensor] = {}
    for module in MODULES:
        stem = activation_key(module, 0).removesuffix("0")
        count = sum(key.startswith(stem) for key in tensors if _KEY.fullmatch(key))
        if not count:
            continue
        kinds = [len(KINDS)] if module == DECODER else []
        tokens[module] = _checked(path, tensors, tokens_key(module), [domains, *kinds])
        layers = [f"{activation_key(module, layer)}.active" for layer in range(count)]
        active[module] = [_checked(path, tensors, key, [domains, *kinds, None]) for key in layers]
        for key, layer in zip(layers, active[module], strict=True):
            if bool((layer < 0).any()) or bool((layer > tokens[module][..., None]).any()):
                raise SnrfError(path, f"tensor {key!r} has a count that is not in [0, tokens]", DOMAINS.again)
    if tensors or DECODER not in active:
        key = next(iter(tensors), "text.layers.0.active")
        raise SnrfError(path, f"tensor {key!r} is {'unknown' if tensors else 'missing'}", DOMAINS.again)
    return Domains(active, tokens, provenance, str(path))


def _checked(path: object, tensors: dict[str, Tensor], key: str, shape: list[int | None]) -> Tensor:
    """Take a tensor of a shape, in which None is any size, out of ``tensors``."""
    tensor = tensors.pop(key, None)
    found = None if tensor is None else [tensor.dtype, *tensor.shape]
    if tensor is None or tensor.dtype != torch.int64 or tensor.ndim != len(shape):
        raise SnrfError(path, f"tensor {key!r} must be int64 of {len(shape)} axes, found {found}", DOMAINS.again)
    if any(want is not None and size != want for size, want in zip(tensor.shape, shape, strict=True)):
        raise SnrfError(path, f"tensor {key!r} must have the shape {shape}, found {list(tensor.shape)}", DOMAINS.again)
    return tensor


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

    ``SnrfError``: the file has no such module, or a domain has no such tokens.

    Args:
        tokens: kind of tokens in the text decoder, or ``all``.
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

    ``SnrfError`` as ``activity``.
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
