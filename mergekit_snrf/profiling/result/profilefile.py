"""Profile files: how much a model uses every neuron on a corpus.

Format ``snrf-profile``, version 1: safetensors with four tensors for every layer and projection,
``layers.{l}.{projection}`` followed by

- ``.min_impact`` float32 [neurons]: least impact over the probes;
- ``.max_rank`` float32 [neurons]: greatest rank share over the probes, rank / neurons in (0, 1]: 1 / neurons for the
  strongest neuron of the layer and projection, ties won by the lower index;
- ``.mean_impact`` float32 [neurons];
- ``.hits`` int32 [neurons, bins]: number of probes whose rank share lies in each bin.

Bin b holds the shares in (edges[b - 1], edges[b]], bin 0 those in (0, edges[0]]; the edges are stored as decimal
strings. fwd.up and fwd.down have the same impacts and are stored under both names. A profile is a sufficient statistic
for Eq. 5 with any threshold or top ratio, and for Eq. 6.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from mergekit_snrf.errors import SnrfError, did_you_mean, unexpected
from mergekit_snrf.files.container import Format
from mergekit_snrf.files.references import local_path
from mergekit_snrf.files.shown import Plotted
from mergekit_snrf.neurons.maskfile import RunProvenance
from mergekit_snrf.neurons.sites import Site

PROFILE = Format(
    "snrf-profile",
    1,
    "make one with snrf-profile",
    "make the profile again",
    {"snrf-mask": "a mask is made from profiles, which snrf-profile writes beside it"},
)

EDGES: tuple[str, ...] = (
    "0.001", "0.0015", "0.002", "0.003", "0.005", "0.007",
    "0.01", "0.015", "0.02", "0.03", "0.05", "0.07",
    "0.1", "0.15", "0.2", "0.3", "0.5", "0.7", "1",
)  # fmt: skip
"""Upper edges of the bins of rank shares: six a decade, log-spaced up to rounding to the ratios that people use."""

MAX_NEURONS = 2**23
"""Up to this many neurons a float32 rank share gives its rank back exactly."""

_STATISTICS = {**dict.fromkeys(("min_impact", "max_rank", "mean_impact"), torch.float32), "hits": torch.int32}


class ProfileProvenance(RunProvenance):
    """Where a profile comes from."""

    side: str | None = None
    measure: dict[str, Any] | None = None


@dataclass(frozen=True, repr=False)
class SiteProfile:
    """The four statistics of one layer and projection; an impossible dtype, shape or value is an error."""

    min_impact: Float32[Tensor, " neurons"]
    max_rank: Float32[Tensor, " neurons"]
    mean_impact: Float32[Tensor, " neurons"]
    hits: Int32[Tensor, "neurons bins"]

    def __repr__(self) -> str:
        return f"<SiteProfile of {self.neurons} neurons>"

    def __post_init__(self) -> None:
        neurons = len(self.min_impact)
        for name, dtype in _STATISTICS.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape[:1] != (neurons,) or tensor.ndim != (2 if name == "hits" else 1):
                shape = "[neurons, bins]" if name == "hits" else "[neurons]"
                found = f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise SnrfError(None, f"{name} must be {dtype} of shape {shape} = [{neurons}, ...], got {found}")
        if not 0 < neurons <= MAX_NEURONS:
            raise SnrfError(None, f"a layer and projection has 1 to {MAX_NEURONS} neurons, got {neurons}")
        for name in ("min_impact", "mean_impact"):
            tensor = getattr(self, name)
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise SnrfError(None, f"{name} has a value that is negative, infinite or NaN")
        if not bool(((self.ranks >= 1) & (self.ranks <= neurons)).all()):
            raise SnrfError(None, "max_rank has a value that is not in (0, 1]")

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return len(self.min_impact)

    @cached_property
    def ranks(self) -> Int32[Tensor, " neurons"]:
        """The greatest rank over the probes, 1 for the strongest neuron: exact, whatever the rounding of the share."""
        return torch.round(self.max_rank.double() * self.neurons).nan_to_num(-1.0).to(torch.int32)


@dataclass(frozen=True, repr=False)
class Profile(Plotted):
    """What a model uses on a corpus of ``count`` probes, and where that was measured.

    Attributes:
        edges: upper edges of the bins of ``hits`` as decimal strings, rising, the last one 1.
        path: the file it was read from, for messages.
    """

    sites: Mapping[Site, SiteProfile]
    count: int
    provenance: ProfileProvenance = field(default_factory=ProfileProvenance)
    edges: tuple[str, ...] = EDGES
    path: str = "profile"

    def __repr__(self) -> str:
        return f"<Profile {Path(self.path).name}: {self.count} probes, {len(self.sites)} layers and projections>"

    def __post_init__(self) -> None:
        try:
            shares = [Fraction(edge) for edge in self.edges]
        except (ValueError, ZeroDivisionError):
            shares = []
        if not shares or shares[0] <= 0 or shares[-1] != 1 or any(a >= b for a, b in pairwise(shares)):
            raise SnrfError(self.path, f"the edges of the bins must rise from above 0 to 1, got {list(self.edges)}")
        if not 1 <= self.count < 2**31:
            raise SnrfError(self.path, f"a profile needs at least one probe, and fewer than {2**31}")
        for site, statistics in self.sites.items():
            bins = statistics.hits.shape[1]
            if bins != len(self.edges):
                raise SnrfError(self.path, f"{site}.hits has {bins} bins for {len(self.edges)} edges")
            if not bool((statistics.hits.sum(1) == self.count).all()) or bool((statistics.hits < 0).any()):
                raise SnrfError(self.path, f"{site}.hits does not add up to the {self.count} probes of the profile")


@lru_cache(maxsize=256)
def edge_ranks(edges: tuple[str, ...], neurons: int) -> tuple[int, ...]:
    """Return the last rank that each bin holds in a projection of ``neurons``: ``floor(edge * neurons)``, exactly."""
    return tuple(math.floor(Fraction(edge) * neurons) for edge in edges)


def write_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile file; equal profiles give equal bytes, and an existing file is replaced at once or not at all."""
    tensors = {
        f"{site.key}.{name}": getattr(statistics, name)
        for site, statistics in profile.sites.items()
        for name in _STATISTICS
    }
    content = profile.provenance.model_dump(mode="json", exclude_none=True)
    content |= {"count": profile.count, "edges": list(profile.edges)}
    PROFILE.write(path, tensors, content)


AnyProfile = Profile | str | os.PathLike[str]
"""A profile, or where its file is."""


def profile_of(profile: AnyProfile) -> Profile:
    """Return a profile, read from a path or ``hf://owner/repo@revision/path`` if need be."""
    if isinstance(profile, Profile):
        return profile
    if not isinstance(profile, str | os.PathLike):
        raise unexpected("profile", profile, "a Profile, or the path of one")
    return read_profile(local_path(profile))


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and validate a profile file.

    Raises:
        SnrfError: the file is missing, damaged, of another format, or has an unknown tensor.
    """
    tensors, content = PROFILE.read(path)
    grouped: dict[Site, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, _, name = key.rpartition(".")
        if name not in _STATISTICS:
            raise SnrfError(path, f"tensor {key!r} is not a statistic", did_you_mean(name, _STATISTICS))
        try:
            grouped.setdefault(Site.from_key(place), {})[name] = tensor
        except SnrfError as error:
            raise SnrfError(path, f"tensor {key!r}: {error.what}", error.remedy) from None
    sites = {}
    for site in sorted(grouped):
        missing = sorted(_STATISTICS.keys() - grouped[site].keys())
        if missing:
            raise SnrfError(path, f"tensor '{site}.{missing[0]}' is missing", PROFILE.again)
        try:
            sites[site] = SiteProfile(**grouped[site])
        except SnrfError as error:
            raise SnrfError(path, f"{site}: {error.what}", PROFILE.again) from None
    count, edges = content.pop("count", None), content.pop("edges", None)
    if type(count) is not int or not isinstance(edges, list) or not all(isinstance(edge, str) for edge in edges):
        raise SnrfError(path, "the metadata entry 'snrf' lacks 'count' or 'edges'", PROFILE.again)
    return Profile(sites, count, PROFILE.parsed(path, content, ProfileProvenance), tuple(edges), str(path))
