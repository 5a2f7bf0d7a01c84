"""Running statistics of impacts over probes, exact and independent of the order of the probes.

For every site four numbers a neuron are kept: the least impact, the greatest rank, the sum of the impacts and a
histogram of rank shares. Minimum, maximum and integer counts do not depend on any order. A sum of floats does, so the
sum is kept as an integer: every float32 is an integer multiple of 2^-149 below 2^277, and the sum of up to 2^31 of
them is held in ten digits of 31 bits, to which a float adds at most two. Adding integers is exact, so any split of the
probes into shards, merged in any order, has the same digits. The mean is formed from the digits once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.result.profilefile import (
    EDGES,
    MAX_NEURONS,
    Profile,
    ProfileProvenance,
    SiteProfile,
    edge_ranks,
)

TWINS: dict[str, str] = {"fwd.down": "fwd.up"}
"""Projections whose impacts equal another one's: measured once, stored under both names."""

MAX_PROBES = 2**31 - 1
"""More would overflow the int32 counts."""

_DIGIT_BITS, _DIGITS = 31, 10
_DIGIT = 2**_DIGIT_BITS - 1
_SMALLEST_EXPONENT = -149


def ranks(impacts: Float[Tensor, "probes neurons"]) -> Int64[Tensor, "probes neurons"]:
    """Return every neuron's rank on every probe, 1 for the greatest impact; of equal impacts the lower index wins."""
    order = impacts.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, impacts.shape[-1] + 1, device=impacts.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


@dataclass(frozen=True)
class _Running:
    """The statistics of one site; tensors are updated in place."""

    min_impact: Float32[Tensor, " neurons"]
    max_rank: Int32[Tensor, " neurons"]
    total: Int64[Tensor, "digits neurons"]
    hits: Int32[Tensor, "neurons bins"]

    @classmethod
    def empty(cls, neurons: int) -> _Running:
        return cls(
            torch.full((neurons,), torch.inf),
            torch.zeros(neurons, dtype=torch.int32),
            torch.zeros(_DIGITS, neurons, dtype=torch.int64),
            torch.zeros(neurons, len(EDGES), dtype=torch.int32),
        )

    def update(self, impacts: Float32[Tensor, "probes neurons"]) -> None:
        torch.minimum(self.min_impact, impacts.amin(0), out=self.min_impact)
        places = ranks(impacts)
        torch.maximum(self.max_rank, places.amax(0).to(torch.int32), out=self.max_rank)
        bounds = torch.tensor(edge_ranks(EDGES, impacts.shape[1]))
        bins = torch.searchsorted(bounds, places).T
        self.hits.scatter_add_(1, bins, torch.ones((), dtype=torch.int32).expand(bins.shape))
        bits = impacts.contiguous().view(torch.int32).long()
        exponent = bits >> 23
        mantissa = torch.where(exponent > 0, bits & 0x7FFFFF | 0x800000, bits & 0x7FFFFF)
        shift = (exponent - 1).clamp(min=0)
        digit = shift // _DIGIT_BITS
        shifted = mantissa << (shift % _DIGIT_BITS)
        self.total.scatter_add_(0, digit, shifted & _DIGIT)
        self.total.scatter_add_(0, digit + 1, shifted >> _DIGIT_BITS)

    def merge(self, other: _Running) -> None:
        torch.minimum(self.min_impact, other.min_impact, out=self.min_impact)
        torch.maximum(self.max_rank, other.max_rank, out=self.max_rank)
        self.total.add_(other.total)
        self.hits.add_(other.hits)
        self.carry()

    def carry(self) -> None:
        """Bring the digits of the sum into [0, 2^31), where equal sums have equal digits."""
        for lower, upper in zip(self.total[:-1], self.total[1:], strict=True):
            upper.add_(lower >> _DIGIT_BITS)
            lower.bitwise_and_(_DIGIT)

    def mean(self, probes: int) -> Float32[Tensor, " neurons"]:
        self.carry()
        total = torch.zeros(self.total.shape[1], dtype=torch.float64)
        for digit in self.total.flip(0):
            total = total * 2.0**_DIGIT_BITS + digit
        return (total / probes * 2.0**_SMALLEST_EXPONENT).to(torch.float32)


class Statistics:
    """What a profile is made of, for the neurons of one model.

    Memory does not grow with the probes: 164 bytes a neuron of attn.q, attn.k, attn.v and fwd.up (fwd.down has the
    statistics of fwd.up).

    >>> import torch
    >>> statistics = Statistics({Site(0, "attn.k"): 3})
    >>> statistics.update({Site(0, "attn.k"): torch.tensor([[1.0, 3.0, 2.0], [1.0, 5.0, 0.5]])})
    >>> statistics.profile().sites[Site(0, "attn.k")].ranks.tolist()
    [3, 1, 3]

    Args:
        neurons: how many neurons each site has; those of ``TWINS`` are left out.

    Raises:
        SnrfError: a site has too many neurons.
    """

    def __init__(self, neurons: Mapping[Site, int]) -> None:
        self.probes = 0
        self._running = {}
        for site in sorted(neurons):
            if not 0 < neurons[site] <= MAX_NEURONS:
                raise SnrfError(f"{site}: a layer and projection has 1 to {MAX_NEURONS} neurons, got {neurons[site]}")
            if site.projection not in TWINS:
                self._running[site] = _Running.empty(neurons[site])

    @property
    def neurons(self) -> dict[Site, int]:
        """How many neurons each measured site has."""
        return {site: len(running.min_impact) for site, running in self._running.items()}

    def update(self, impacts: Mapping[Site, Float[Tensor, "probes neurons"]]) -> None:
        """Add probes: for every measured site one impact for each probe and neuron, compared in float32.

        Nothing is added if it raises.

        Raises:
            SnrfError: a site or a neuron is missing, an impact is negative, infinite or NaN in float32, or the sites
                disagree on the number of probes.
        """
        if impacts.keys() != self._running.keys():
            wrong = sorted(impacts.keys() ^ self._running.keys())[0]
            raise SnrfError(f"{wrong}: impacts must be given for exactly the measured sites")
        probes = len(next(iter(impacts.values())))
        rounded = {}
        for site, value in impacts.items():
            expected = (probes, len(self._running[site].min_impact))
            if value.shape != expected:
                raise SnrfError(
                    f"{site}: impacts must have shape [probes, neurons] = {list(expected)}, got {list(value.shape)}"
                )
            # Adding zero turns -0.0, whose sign bit is no part of the sum, into 0.0.
            rounded[site] = value.detach().to("cpu", torch.float32) + 0.0
            if not bool((rounded[site].isfinite() & (rounded[site] >= 0)).all()):
                raise SnrfError(f"{site}: an impact is negative, infinite or NaN in float32")
        if self.probes + probes > MAX_PROBES:
            raise SnrfError(f"a profile holds at most {MAX_PROBES} probes")
        if probes:
            for site, value in rounded.items():
                self._running[site].update(value)
            self.probes += probes

    def merge(self, other: Statistics) -> None:
        """Add the probes of ``other``, which must be different ones of the same model.

        Raises:
            SnrfError: the sites or their numbers of neurons differ.
        """
        if self.neurons != other.neurons:
            raise SnrfError("statistics of different models cannot be merged: their sites or neurons differ")
        if self.probes + other.probes > MAX_PROBES:
            raise SnrfError(f"a profile holds at most {MAX_PROBES} probes")
        for site, running in self._running.items():
            running.merge(other._running[site])
        self.probes += other.probes

    def reduce(self, reduce: Callable[[Tensor, str], None]) -> None:
        """Combine with the statistics of other processes, whose probes must be different ones of the same model.

        Args:
            reduce: combines a tensor in place with those that the other processes give at the same call, by ``min``,
                ``max`` or ``sum``.
        """
        for running in self._running.values():
            running.carry()
            for (_, tensor), operation in zip(_named(running), ("min", "max", "sum", "sum"), strict=True):
                reduce(tensor, operation)
            running.carry()
        probes = torch.tensor(self.probes)
        reduce(probes, "sum")
        self.probes = int(probes)

    def state(self) -> dict[str, Tensor]:
        """Return everything but ``probes`` as float32 and int32 tensors; equal statistics have equal states."""
        tensors: dict[str, Tensor] = {}
        for site, running in self._running.items():
            running.carry()
            for name, tensor in _named(running):
                tensors[f"{site.key}.{name}"] = tensor.to(torch.int32) if name == "total" else tensor.clone()
        return tensors

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], probes: int) -> Statistics:
        """Return the statistics whose ``state`` this is.

        Raises:
            SnrfError: a tensor is missing, unknown or of the wrong dtype or shape.
        """
        sites = {key.rpartition(".")[0] for key in tensors}
        statistics = cls({Site.from_key(key): len(tensors.get(f"{key}.min_impact", ())) for key in sites})
        statistics.probes = probes
        expected = {
            f"{site.key}.{name}": tensor
            for site, running in statistics._running.items()
            for name, tensor in _named(running)
        }
        if tensors.keys() != expected.keys():
            raise SnrfError(f"tensor {sorted(tensors.keys() ^ expected.keys())[0]!r} is missing or unknown")
        for key, tensor in expected.items():
            stored = torch.int32 if tensor.dtype == torch.int64 else tensor.dtype
            if tensors[key].dtype != stored or tensors[key].shape != tensor.shape:
                raise SnrfError(
                    f"tensor {key!r} must be {stored} of shape {list(tensor.shape)}, got {tensors[key].dtype} of shape "
                    f"{list(tensors[key].shape)}"
                )
            tensor.copy_(tensors[key])
        return statistics

    def profile(self, provenance: ProfileProvenance | None = None) -> Profile:
        """Return the profile of the probes so far, with fwd.down beside fwd.up.

        Raises:
            SnrfError: there is no probe yet.
        """
        if not self.probes:
            raise SnrfError("a profile needs at least one probe")
        sites: dict[Site, SiteProfile] = {}
        for site, running in self._running.items():
            measured = SiteProfile(
                running.min_impact.clone(),
                running.max_rank.to(torch.float32) / len(running.max_rank),
                running.mean(self.probes),
                running.hits.clone(),
            )
            sites[site] = measured
            for twin, original in TWINS.items():
                if site.projection == original:
                    sites[Site(site.layer, twin)] = measured
        return Profile({site: sites[site] for site in sorted(sites)}, self.probes, provenance or ProfileProvenance())


def _named(running: _Running) -> Iterator[tuple[str, Tensor]]:
    for name in ("min_impact", "max_rank", "total", "hits"):
        yield name, getattr(running, name)
