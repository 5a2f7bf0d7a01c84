"""What runs add up over probes, and the statistics of impacts among it, which do not depend on the order of the probes.

Minimum, maximum and counts are the same for every split of the probes into shards, merged in any order. So is the sum,
in float64, as long as the impacts of a neuron lie within a factor of 2^29 / probes of each other; otherwise its last
digits, and so the last digit of the mean, may depend on the split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
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

MAX_PROBES = 2**31 - 1
"""More would overflow the int32 counts."""

_COMBINED: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add}


class Sums(ABC):
    """Tensors that combine element by element with those of other probes; subclasses name them in ``parts``."""

    probes: int = 0

    @abstractmethod
    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return every tensor, which is changed in place, with ``min``, ``max``, ``sum``, or ``same`` for a setting."""

    def count(self, probes: int) -> None:
        """Count more probes. Raises ``SnrfError`` if there are too many."""
        if self.probes + probes > MAX_PROBES:
            raise SnrfError(None, f"a profile holds at most {MAX_PROBES} probes")
        self.probes += probes

    def merge(self, other: Any) -> None:
        """Add the sums of other probes through the same model. Raises ``SnrfError`` if they are of another model."""
        mine, theirs = self.parts(), other.parts()
        if {key: tensor.shape for key, (tensor, _) in mine.items()} != {key: t.shape for key, (t, _) in theirs.items()}:
            raise SnrfError(None, "statistics of different models cannot be merged: their sites or neurons differ")
        self.count(other.probes)
        for key, (tensor, operation) in mine.items():
            if operation != "same":
                _COMBINED[operation](tensor, theirs[key][0], out=tensor)

    def reduce(self, reduce: Callable[[Tensor, str], None]) -> None:
        """Combine with other processes; ``reduce`` combines a tensor in place with theirs at the same call."""
        for tensor, operation in self.parts().values():
            if operation != "same":
                reduce(tensor, operation)
        probes = torch.tensor(self.probes)
        reduce(probes, "sum")
        self.probes = int(probes)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a journal, not copied; equal sums have equal states."""
        return {key: tensor for key, (tensor, _) in self.parts().items()}

    def restore(self, tensors: Mapping[str, Tensor], probes: int) -> None:
        """Take over a state of sums of the same model and settings; ``SnrfError`` names a tensor that does not fit."""
        parts = self.parts()
        if tensors.keys() != parts.keys():
            raise SnrfError(None, f"tensor {sorted(tensors.keys() ^ parts.keys())[0]!r} is missing or unknown")
        for key, (tensor, operation) in parts.items():
            found = tensors[key]
            if found.dtype != tensor.dtype or found.shape != tensor.shape:
                wanted = f"{tensor.dtype} of shape {list(tensor.shape)}"
                got = f"{found.dtype} of shape {list(found.shape)}"
                raise SnrfError(None, f"tensor {key!r} must be {wanted}, got {got}")
            if operation == "same" and not torch.equal(found, tensor):
                raise SnrfError(None, f"tensor {key!r} was {found.tolist()} and is {tensor.tolist()}")
        for key, (tensor, _) in parts.items():
            tensor.set_(tensors[key])  # type: ignore[call-overload]
        self.probes = probes


TWINS: dict[str, str] = {"fwd.down": "fwd.up"}
"""Projections whose impacts equal another one's: measured once, stored under both names."""

_OPERATIONS = {"min_impact": "min", "max_rank": "max", "total": "sum", "hits": "sum"}


def ranks(impacts: Float[Tensor, "probes neurons"]) -> Int64[Tensor, "probes neurons"]:
    """Return every neuron's rank on every probe, 1 for the greatest impact; of equal impacts the lower index wins."""
    order = impacts.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, impacts.shape[-1] + 1, device=impacts.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


class Statistics(Sums):
    """What a profile is made of, for the neurons of one model: 92 bytes a measured neuron, for any number of probes.

    >>> import torch
    >>> statistics = Statistics({Site(0, "attn.k"): 3})
    >>> statistics.update({Site(0, "attn.k"): torch.tensor([[1.0, 3.0, 2.0], [1.0, 5.0, 0.5]])})
    >>> statistics.profile().sites[Site(0, "attn.k")].ranks.tolist()
    [3, 1, 3]

    ``neurons`` says how many each site has; sites of ``TWINS`` are left out.
    """

    def __init__(self, neurons: Mapping[Site, int]) -> None:
        self._running: dict[Site, dict[str, Tensor]] = {}
        for site in sorted(neurons):
            if not 0 < neurons[site] <= MAX_NEURONS:
                raise SnrfError(site, f"a layer and projection has 1 to {MAX_NEURONS} neurons, got {neurons[site]}")
            if site.projection not in TWINS:
                self._running[site] = {
                    "min_impact": torch.full((neurons[site],), torch.inf),
                    "max_rank": torch.zeros(neurons[site], dtype=torch.int32),
                    "total": torch.zeros(neurons[site], dtype=torch.float64),
                    "hits": torch.zeros(neurons[site], len(EDGES), dtype=torch.int32),
                }

    @property
    def neurons(self) -> dict[Site, int]:
        """How many neurons each measured site has."""
        return {site: len(running["total"]) for site, running in self._running.items()}

    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return the tensors of every measured site."""
        return {
            f"{site.key}.{name}": (tensor, _OPERATIONS[name])
            for site, running in self._running.items()
            for name, tensor in running.items()
        }

    def update(self, impacts: Mapping[Site, Float[Tensor, "probes neurons"]]) -> None:
        """Add probes: for every measured site one impact for each probe and neuron, compared in float32.

        ``SnrfError``: other sites or sizes, or an impact is negative, infinite or NaN in float32; nothing is added.
        """
        if impacts.keys() != self._running.keys():
            wrong = sorted(impacts.keys() ^ self._running.keys())[0]
            raise SnrfError(wrong, "impacts must be given for exactly the measured sites")
        probes = len(next(iter(impacts.values())))
        rounded = {}
        for site, value in impacts.items():
            shape, found = [probes, self.neurons[site]], list(value.shape)
            if found != shape:
                raise SnrfError(site, f"impacts must have shape [probes, neurons] = {shape}, got {found}")
            # Adding zero turns -0.0 into 0.0, so that a minimum of zero has one form.
            rounded[site] = value.detach().to("cpu", torch.float32) + 0.0
            if not bool((rounded[site].isfinite() & (rounded[site] >= 0)).all()):
                raise SnrfError(site, "an impact is negative, infinite or NaN in float32")
        self.count(probes)
        for site, value in rounded.items() if probes else ():
            running = self._running[site]
            torch.minimum(running["min_impact"], value.amin(0), out=running["min_impact"])
            places = ranks(value)
            torch.maximum(running["max_rank"], places.amax(0).to(torch.int32), out=running["max_rank"])
            bins = torch.searchsorted(torch.tensor(edge_ranks(EDGES, value.shape[1])), places).T
            running["hits"].scatter_add_(1, bins, torch.ones((), dtype=torch.int32).expand(bins.shape))
            running["total"].add_(value.double().sum(0))

    def profile(self, provenance: ProfileProvenance | None = None) -> Profile:
        """Return the profile of the probes so far, with fwd.down beside fwd.up."""
        if not self.probes:
            raise SnrfError(None, "a profile needs at least one probe")
        sites: dict[Site, SiteProfile] = {}
        for site, running in self._running.items():
            sites[site] = SiteProfile(
                running["min_impact"].clone(),
                running["max_rank"].to(torch.float32) / len(running["max_rank"]),
                (running["total"] / self.probes).to(torch.float32),
                running["hits"].clone(),
            )
            for twin, original in TWINS.items():
                if site.projection == original:
                    sites[Site(site.layer, twin)] = sites[site]
        return Profile({site: sites[site] for site in sorted(sites)}, self.probes, provenance or ProfileProvenance())
