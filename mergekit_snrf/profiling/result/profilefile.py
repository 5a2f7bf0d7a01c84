"""Profile files: how much a model uses every neuron on a corpus, and the selection of neurons from them.

Format ``snrf-profile``, version 1: safetensors with four tensors for every layer and projection,
``layers.{l}.{projection}`` followed by

- ``.min_impact`` float32 [neurons]: least impact over the probes;
- ``.max_rank`` float32 [neurons]: greatest rank share over the probes, rank / neurons in (0, 1]: 1 / neurons for the
  strongest neuron of the layer and projection, ties won by the lower index;
- ``.mean_impact`` float32 [neurons];
- ``.hits`` int32 [neurons, bins]: number of probes whose rank share lies in each bin.

Bin b holds the shares in (edges[b - 1], edges[b]], bin 0 those in (0, edges[0]]; the edges are stored in the file as
decimal strings. fwd.up and fwd.down have the same impacts and are stored under both names. A profile is a sufficient
statistic for Eq. 5 with any threshold or top ratio, and for Eq. 6.

Where ``measure`` has a ``screen``, an earlier version made the profile, and most of its impacts of attn.q and attn.k
are estimates; ``select`` refuses to choose these neurons from it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from itertools import pairwise
from operator import and_
from typing import Any

import torch
from jaxtyping import Float32, Int32
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from mergekit_snrf.errors import SnrfError, problem
from mergekit_snrf.files import container
from mergekit_snrf.neurons.maskfile import ModelProvenance
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site

PROFILE_FORMAT, PROFILE_VERSION = "snrf-profile", 1

EDGES: tuple[str, ...] = (
    "0.001", "0.0015", "0.002", "0.003", "0.005", "0.007",
    "0.01", "0.015", "0.02", "0.03", "0.05", "0.07",
    "0.1", "0.15", "0.2", "0.3", "0.5", "0.7", "1",
)  # fmt: skip
"""Upper edges of the bins of rank shares: six a decade, log-spaced up to rounding to the ratios that people use."""

MAX_NEURONS = 2**23
"""Up to this many neurons a float32 rank share gives its rank back exactly."""

_STATISTICS = {
    "min_impact": torch.float32,
    "max_rank": torch.float32,
    "mean_impact": torch.float32,
    "hits": torch.int32,
}

logger = logging.getLogger(__name__)


class ProfileProvenance(BaseModel):
    """Where a profile comes from; every field is optional and unknown fields are kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    side: str | None = None
    model: ModelProvenance | None = None
    measure: dict[str, Any] | None = None
    seed: int | None = None
    dtype: str | None = None
    versions: dict[str, str] | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class SiteProfile:
    """The four statistics of one layer and projection.

    Raises:
        SnrfError: a dtype, a shape or a value is impossible.
    """

    min_impact: Float32[Tensor, " neurons"]
    max_rank: Float32[Tensor, " neurons"]
    mean_impact: Float32[Tensor, " neurons"]
    hits: Int32[Tensor, "neurons bins"]

    def __post_init__(self) -> None:
        neurons = len(self.min_impact)
        for name, dtype in _STATISTICS.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape[:1] != (neurons,) or tensor.ndim != (2 if name == "hits" else 1):
                shape = "[neurons, bins]" if name == "hits" else "[neurons]"
                raise SnrfError(
                    f".{name} must be {dtype} of shape {shape} with neurons = {neurons}, got {tensor.dtype} of shape "
                    f"{list(tensor.shape)}"
                )
        if not 0 < neurons <= MAX_NEURONS:
            raise SnrfError(f"a layer and projection has 1 to {MAX_NEURONS} neurons, got {neurons}")
        for name in ("min_impact", "mean_impact"):
            tensor = getattr(self, name)
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise SnrfError(f".{name} holds a value that is negative, infinite or NaN")
        if not bool(((self.ranks >= 1) & (self.ranks <= neurons)).all()):
            raise SnrfError(".max_rank holds a value that is not in (0, 1]")

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return len(self.min_impact)

    @cached_property
    def ranks(self) -> Int32[Tensor, " neurons"]:
        """The greatest rank over the probes, 1 for the strongest neuron: exact, whatever the rounding of the share."""
        return torch.round(self.max_rank.double() * self.neurons).nan_to_num(-1.0).to(torch.int32)


@dataclass(frozen=True)
class Profile:
    """What a model uses on a corpus of ``count`` probes, and where that was measured.

    Attributes:
        edges: upper edges of the bins of ``hits`` as decimal strings, rising, the last one 1.
        path: the file it was read from, for messages.

    Raises:
        SnrfError: the hits do not add up to the number of probes, or the edges are not rising.
    """

    sites: Mapping[Site, SiteProfile]
    count: int
    provenance: ProfileProvenance = field(default_factory=ProfileProvenance)
    edges: tuple[str, ...] = EDGES
    path: str = "profile"

    def __post_init__(self) -> None:
        try:
            shares = [Fraction(edge) for edge in self.edges]
        except (ValueError, ZeroDivisionError):
            shares = []
        if not shares or shares[0] <= 0 or shares[-1] != 1 or any(a >= b for a, b in pairwise(shares)):
            raise SnrfError(f"{self.path}: the edges of the bins must rise from above 0 to 1, got {list(self.edges)}")
        if self.count < 1:
            raise SnrfError(f"{self.path}: a profile is of at least one probe, got {self.count}")
        for site, statistics in self.sites.items():
            if statistics.hits.shape[1] != len(self.edges):
                raise SnrfError(
                    f"{self.path}: {site}.hits has {statistics.hits.shape[1]} bins for {len(self.edges)} edges"
                )
            if not bool((statistics.hits.sum(1) == self.count).all()) or bool((statistics.hits < 0).any()):
                raise SnrfError(f"{self.path}: {site}.hits does not add up to the {self.count} probes of the profile")


@lru_cache(maxsize=256)
def edge_ranks(edges: tuple[str, ...], neurons: int) -> tuple[int, ...]:
    """Return the last rank that each bin holds in a projection of ``neurons``: ``floor(edge * neurons)``, exactly."""
    return tuple(math.floor(Fraction(edge) * neurons) for edge in edges)


def top_rank(ratio: float | str, neurons: int) -> int:
    """Return how many of ``neurons`` a top ratio keeps on one probe: ``floor(ratio * neurons)``.

    The ratio counts as the decimal number that prints it, so 0.29 of 100 neurons are 29, although the
    float 0.29 * 100 lies below 29.
    """
    return math.floor(Fraction(str(ratio)) * neurons)


def write_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile file; equal profiles give equal bytes, and an existing file is replaced at once or not at all.

    Raises:
        SnrfError: the file cannot be written.
    """
    tensors = {
        f"{site.key}.{name}": getattr(statistics, name)
        for site, statistics in profile.sites.items()
        for name in _STATISTICS
    }
    container.write(
        path,
        tensors,
        file_format=PROFILE_FORMAT,
        version=PROFILE_VERSION,
        content={
            **profile.provenance.model_dump(mode="json", exclude_none=True),
            "count": profile.count,
            "edges": list(profile.edges),
        },
    )


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and validate a profile file.

    Raises:
        SnrfError: the file is missing, damaged, of another format, or holds a tensor that is no statistic.
    """
    tensors, content = container.read(path, file_format=PROFILE_FORMAT, version=PROFILE_VERSION)
    grouped: dict[Site, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, _, name = key.rpartition(".")
        if name not in _STATISTICS:
            raise SnrfError(f"{path}: tensor {key!r} is none of the statistics {', '.join(_STATISTICS)}")
        try:
            grouped.setdefault(Site.from_key(place), {})[name] = tensor
        except SnrfError as error:
            raise SnrfError(f"{path}: tensor {key!r}: {error}") from None
    sites = {}
    for site in sorted(grouped):
        missing = sorted(_STATISTICS.keys() - grouped[site].keys())
        if missing:
            raise SnrfError(f"{path}: tensor '{site}.{missing[0]}' is missing; make the profile again")
        try:
            sites[site] = SiteProfile(**grouped[site])
        except SnrfError as error:
            raise SnrfError(f"{path}: {site}{error}; make the profile again") from None
    count, edges = content.pop("count", None), content.pop("edges", None)
    if type(count) is not int or not isinstance(edges, list) or not all(isinstance(edge, str) for edge in edges):
        raise SnrfError(f"{path}: the metadata entry 'snrf' lacks 'count' or 'edges'; make the profile again")
    try:
        provenance = ProfileProvenance.model_validate(content)
    except ValidationError as error:
        raise SnrfError(f"{path}: provenance {problem(error.errors()[0])}; make the profile again") from None
    return Profile(sites, count, provenance, tuple(edges), str(path))


PerProjection = float | Mapping[str, float]
"""One number, or one for each of ``attn`` and ``fwd``, or one a projection; ``attn.k`` comes before ``attn``."""


def select(
    profiles: Sequence[Profile],
    *,
    top_ratio: PerProjection | None = None,
    sigma: PerProjection | None = None,
    at_least: float | None = None,
) -> NeuronSet:
    """Return the neurons that every profile finds active (Eq. 5 for each profile, Eq. 6 over all of them).

    Exactly one of ``top_ratio`` and ``sigma`` says when a neuron is active on a probe.

    - ``top_ratio`` r: its rank among the n neurons of its layer and projection is at most ``floor(r * n)``.
    - ``sigma``: its impact is at least sigma.

    A neuron is selected if it is active on every probe of every profile. ``at_least`` asks for less: active on that
    share (a float in (0, 1]) or that number (an int) of the probes of every profile. That is counted from the hits,
    which know ranks up to the edges of their bins only: a top ratio that cuts a bin in two is rounded down
    to the bin's lower edge, with a warning, so that no neuron is selected that fell short of ``at_least``.

    Args:
        profiles: of models with the same decoder shape.
        top_ratio: in [0, 1]; 0 selects nothing.
        sigma: at least 0.
        at_least: only with ``top_ratio``.

    Raises:
        SnrfError: a value is out of range, a projection has no value, the profiles are of different shapes, or one
            was screened.
    """
    if not profiles:
        raise SnrfError("a selection needs at least one profile")
    if (top_ratio is None) == (sigma is None):
        raise SnrfError("a selection is by either top_ratio or sigma, give exactly one of them")
    if at_least is not None and top_ratio is None:
        raise SnrfError(
            "at_least counts rank shares, so it needs top_ratio; with sigma a neuron is active on every probe"
        )
    _check_same_sites(profiles)
    rule = "sigma" if top_ratio is None else "top_ratio"
    values = _by_projection(rule, top_ratio if top_ratio is not None else sigma, profiles[0].sites)
    found = []
    for profile in profiles:
        _check_screen(profile, rule, values)
        members = {}
        cut: dict[float, str] = {}
        needed = _needed(profile, at_least)
        for site, statistics in profile.sites.items():
            value = values[site.projection]
            if rule == "sigma":
                members[site] = statistics.min_impact.double() >= value
            elif needed == profile.count:
                members[site] = statistics.ranks <= top_rank(value, statistics.neurons)
            else:
                covered = _covered_bins(profile.edges, statistics.neurons, value, cut)
                members[site] = statistics.hits[:, :covered].sum(1) >= needed
        for ratio, edge in cut.items():
            logger.warning(
                "%s: at_least counts rank shares up to %s, so top_ratio %s is rounded down to %s",
                profile.path, ", ".join(profile.edges), ratio, edge,
            )  # fmt: skip
        found.append(NeuronSet(members))
    return reduce(and_, found)


def _check_screen(profile: Profile, rule: str, values: Mapping[str, float]) -> None:
    """Refuse a selection that would rest on the estimates of a screened profile."""
    screen = (profile.provenance.measure or {}).get("screen")
    estimated = [name for name in ("attn.k", "attn.q") if name in values and (rule == "sigma" or values[name] > 0)]
    if screen is not None and estimated:
        raise SnrfError(
            profile.path,
            f"was made with screen: {screen}, so most impacts of {' and '.join(estimated)} are estimates",
            "make the profile again",
        )


def _covered_bins(edges: tuple[str, ...], neurons: int, ratio: float, cut: dict[float, str]) -> int:
    """Return how many bins a top ratio covers whole, and note in ``cut`` if it covers another one in part."""
    last = top_rank(ratio, neurons)
    bounds = edge_ranks(edges, neurons)
    covered = sum(bound <= last for bound in bounds)
    if last > 0 and last not in bounds:
        cut[ratio] = edges[covered - 1] if covered else "0"
    return covered


def _needed(profile: Profile, at_least: float | None) -> int:
    if at_least is None:
        return profile.count
    if isinstance(at_least, bool) or not at_least > 0 or (isinstance(at_least, float) and at_least > 1):
        raise SnrfError(f"at_least is a share in (0, 1] such as 0.9, or a number of probes such as 90, got {at_least}")
    if isinstance(at_least, int):
        if at_least > profile.count:
            raise SnrfError(
                f"{profile.path}: at_least {at_least} asks for more probes than the profile's {profile.count}"
            )
        return at_least
    return math.ceil(Fraction(str(at_least)) * profile.count)


def _by_projection(rule: str, value: PerProjection | None, sites: Iterable[Site]) -> dict[str, float]:
    assert value is not None
    given = value if isinstance(value, Mapping) else {"attn": value, "fwd": value}
    allowed = ["attn", "fwd", *PROJECTIONS]
    for name, number in given.items():
        if name not in allowed:
            raise SnrfError(f"{rule}: {name!r} is none of {', '.join(allowed)}")
        if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0 or math.isinf(number):
            raise SnrfError(f"{rule}: {name} must be a number that is not negative, got {number!r}")
        if rule == "top_ratio" and number > 1:
            raise SnrfError(f"top_ratio: {name} must be a share in [0, 1] such as 0.1, got {number}")
    values = {}
    for projection in sorted({site.projection for site in sites}):
        group = projection.partition(".")[0]
        if projection not in given and group not in given:
            raise SnrfError(f"{rule} gives no value for {projection}; add {group} or {projection}")
        values[projection] = given.get(projection, given.get(group, 0.0))
    return values


def _check_same_sites(profiles: Sequence[Profile]) -> None:
    first = profiles[0]
    for other in profiles[1:]:
        for site in sorted({*first.sites, *other.sites}):
            a, b = (p.sites[site].neurons if site in p.sites else 0 for p in (first, other))
            if a != b:
                raise SnrfError(
                    f"{site}: {first.path} has {a} neurons there and {other.path} has {b}; "
                    f"shared neurons need profiles of models with the same decoder shape"
                )
