"""Running statistics of impacts over probes, which do not depend on the order of the probes.

For every site four numbers a neuron are kept: the least impact, the greatest rank, the sum of the impacts and a
histogram of rank shares. Minimum, maximum and counts are the same for every split of the probes into shards, merged in
any order. So is the sum, in float64, as long as the impacts of a neuron lie within a factor of 2^29 / probes of each
other; otherwise its last digits, and so the last digit of the mean, may depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sites import Site
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
    total: Float64[Tensor, " neurons"]
    hits: Int32[Tensor, "neurons bins"]

    @classmethod
    def empty(cls, neurons: int) -> _Running:
        return cls(
            torch.full((neurons,), torch.inf),
            torch.zeros(neurons, dtype=torch.int32),
            torch.zeros(neurons, dtype=torch.float64),
            torch.zeros(neurons, len(EDGES), dtype=torch.int32),
        )

    def update(self, impacts: Float32[Tensor, "probes neurons"]) -> None:
        torch.minimum(self.min_impact, impacts.amin(0), out=self.min_impact)
        places = ranks(impacts)
        torch.maximum(self.max_rank, places.amax(0).to(torch.int32), out=self.max_rank)
        bounds = torch.tensor(edge_ranks(EDGES, impacts.shape[1]))
        bins = torch.searchsorted(bounds, places).T
        self.hits.scatter_add_(1, bins, torch.ones((), dtype=torch.int32).expand(bins.shape))
        self.total.add_(impacts.double().sum(0))

    def merge(self, other: _Running) -> None:
        torch.minimum(self.min_impact, other.min_impact, out=self.min_impact)
        torch.maximum(self.max_rank, other.max_rank, out=self.max_rank)
        self.total.add_(other.total)
        self.hits.add_(other.hits)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("min_impact", "max_rank", "total", "hits"):
            yield name, getattr(self, name)


class Statistics:
    """What a profile is made of, for the neurons of one model.

    Memory does not grow with the probes: 92 bytes a neuron of attn.q, attn.k, attn.v and fwd.up (fwd.down has the
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
                raise SnrfError(site, f"a layer and projection has 1 to {MAX_NEURONS} neurons, got {neurons[site]}")
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
            raise SnrfError(wrong, "impacts must be given for exactly the measured sites")
        probes = len(next(iter(impacts.values())))
        rounded = {}
        for site, value in impacts.items():
            expected = (probes, len(self._running[site].min_impact))
            if value.shape != expected:
                raise SnrfError(
                    site, f"impacts must have shape [probes, neurons] = {list(expected)}, got {list(value.shape)}"
                )
            # Adding zero turns -0.0 into 0.0, so that a minimum of zero has one form.
            rounded[site] = value.detach().to("cpu", torch.float32) + 0.0
            if not bool((rounded[site].isfinite() & (rounded[site] >= 0)).all()):
                raise SnrfError(site, "an impact is negative, infinite or NaN in float32")
        self._check_count(probes)
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
            raise SnrfError(None, "statistics of different models cannot be merged: their sites or neurons differ")
        self._check_count(other.probes)
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
            for (_, tensor), operation in zip(running.named(), ("min", "max", "sum", "sum"), strict=True):
                reduce(tensor, operation)
        probes = torch.tensor(self.probes)
        reduce(probes, "sum")
        self.probes = int(probes)

    def state(self) -> dict[str, Tensor]:
        """Return everything except ``probes``; equal statistics have equal states."""
        return {
            f"{site.key}.{name}": tensor.clone()
            for site, running in self._running.items()
            for name, tensor in running.named()
        }

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
            for name, tensor in running.named()
        }
        if tensors.keys() != expected.keys():
            raise SnrfError(None, f"tensor {sorted(tensors.keys() ^ expected.keys())[0]!r} is missing or unknown")
        for key, tensor in expected.items():
            found = tensors[key]
            if found.dtype != tensor.dtype or found.shape != tensor.shape:
                raise SnrfError(
                    None,
                    f"tensor {key!r} must be {tensor.dtype} of shape {list(tensor.shape)}, "
                    f"got {found.dtype} of shape {list(found.shape)}",
                )
            tensor.copy_(found)
        return statistics

    def restore(self, tensors: Mapping[str, Tensor], probes: int) -> None:
        """Take over the ``state`` of statistics of the same model.

        Raises:
            SnrfError: as ``from_state``, or the sites or their numbers of neurons differ.
        """
        other = Statistics.from_state(tensors, probes)
        if other.neurons != self.neurons:
            raise SnrfError(None, "belongs to a model of another shape")
        self._running, self.probes = other._running, probes

    def profile(self, provenance: ProfileProvenance | None = None) -> Profile:
        """Return the profile of the probes so far, with fwd.down beside fwd.up.

        Raises:
            SnrfError: no probe was added yet.
        """
        if not self.probes:
            raise SnrfError(None, "a profile needs at least one probe")
        sites: dict[Site, SiteProfile] = {}
        for site, running in self._running.items():
            measured = SiteProfile(
                running.min_impact.clone(),
                running.max_rank.to(torch.float32) / len(running.max_rank),
                (running.total / self.probes).to(torch.float32),
                running.hits.clone(),
            )
            sites[site] = measured
            for twin, original in TWINS.items():
                if site.projection == original:
                    sites[Site(site.layer, twin)] = measured
        return Profile({site: sites[site] for site in sorted(sites)}, self.probes, provenance or ProfileProvenance())

    def _check_count(self, more: int) -> None:
        if self.probes + more > MAX_PROBES:
            raise SnrfError(None, f"a profile holds at most {MAX_PROBES} probes")
