"""The selection of neurons from profiles: the strongest of each probe, or those above a threshold (Eq. 5, Eq. 6)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import reduce
from operator import and_
from typing import Any

from jaxtyping import Bool
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from mergekit_snrf.errors import SnrfError, did_you_mean, unexpected
from mergekit_snrf.files.settings import Settings, construct
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS
from mergekit_snrf.profiling.result.profilefile import AnyProfile, Profile, SiteProfile, edge_ranks, profile_of

GROUPS = tuple(dict.fromkeys(name.partition(".")[0] for name in PROJECTIONS))
"""``attn`` and ``fwd``: what a projection's name begins with."""

logger = logging.getLogger(__name__)


def _number(value: Any, most: float = math.inf) -> float:
    # PyYAML reads 1e-3 as text, since YAML wants the dot in 1.0e-3.
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        with suppress(ValueError, OverflowError):
            number = float(value)
            if 0 <= number <= most and math.isfinite(number):
                return number
    allowed = "a number of at least 0" if most == math.inf else "a share in [0, 1] such as 0.1"
    raise ValueError(f"must be {allowed}, got {value!r}")


def _per_projection(value: Any, most: float) -> float | dict[str, float]:
    if isinstance(value, str) and "=" in value:
        value = {name: number for name, _, number in (part.partition("=") for part in value.split(","))}
    if not isinstance(value, Mapping):
        return _number(value, most)
    known = (*GROUPS, *PROJECTIONS)
    numbers = {}
    for name, number in value.items():
        name = str(name).strip()
        if name not in known:
            raise ValueError(f"{name!r} is not a projection; {did_you_mean(name, known)}")
        try:
            numbers[name] = _number(number, most)
        except ValueError as error:
            raise ValueError(f"the value of {name} {error}") from None
    missing = [name for name in PROJECTIONS if name not in numbers and name.partition(".")[0] not in numbers]
    if missing:
        raise ValueError(f"has no value for {missing[0]}; add {missing[0].partition('.')[0]} or {missing[0]}")
    return numbers


def _share_or_count(value: Any) -> float:
    number: float = 0
    with suppress(ValueError):
        is_count = type(value) is int or (isinstance(value, str) and value.strip().isdigit())
        number = int(value) if is_count else _number(value, most=1.0)
    if number <= 0:
        raise ValueError(f"must be a share in (0, 1] such as 0.9, or a number of probes such as 90, got {value!r}")
    return number


class Selection(Settings):
    """When a neuron counts as active on a probe, and on how many probes it must be.

    A number holds for all projections. A mapping has one for each of the groups ``attn`` and ``fwd``, or for
    projections, which come before their group: ``{attn: 0.3, attn.v: 0.2, fwd: 0.1}``, or ``attn=0.3,fwd=0.1`` as text.

    >>> Selection(top_ratio="attn=0.3,fwd=1e-1").value("fwd.up")
    0.1
    """

    top_ratio: float | dict[str, float] | None = Field(
        default=None,
        description="Active are the floor(top_ratio * n) strongest of the n neurons of a layer and projection.",
    )
    sigma: float | dict[str, float] | None = Field(
        default=None, description="Active are neurons with an impact of at least sigma."
    )
    at_least: int | float | None = Field(
        default=None,
        description="With top_ratio: the share (0.9) or number (90) of probes that is enough; default: all.",
    )

    @field_validator("top_ratio", "sigma", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return None if value is None else _per_projection(value, 1.0 if info.field_name == "top_ratio" else math.inf)

    @field_validator("at_least", mode="before")
    @classmethod
    def _read_probes(cls, value: Any) -> Any:
        return None if value is None else _share_or_count(value)

    @model_validator(mode="after")
    def _check_rule(self) -> Selection:
        if (self.top_ratio is None) == (self.sigma is None):
            raise ValueError("give exactly one of top_ratio and sigma, such as top_ratio: 0.1")
        if self.at_least is not None and self.top_ratio is None:
            raise ValueError("at_least counts ranks, so it needs top_ratio; remove it, or sigma")
        return self

    @classmethod
    def of(cls, **rule: Any) -> Selection:
        """Return the selection with these fields, without those that are None; ``SnrfError`` names a field at fault."""
        return construct(cls, {name: value for name, value in rule.items() if value is not None})

    @property
    def rule(self) -> dict[str, Any]:
        """The fields that are set."""
        return self.model_dump(exclude_none=True)

    def value(self, projection: str) -> float:
        """Return the top ratio or sigma of a projection."""
        given = self.sigma if self.top_ratio is None else self.top_ratio
        if isinstance(given, Mapping):
            return given[projection] if projection in given else given[projection.partition(".")[0]]
        assert given is not None
        return given


def top_rank(ratio: float | str, neurons: int) -> int:
    """Return how many of ``neurons`` a top ratio keeps on one probe: ``floor(ratio * neurons)``.

    The ratio counts as the decimal number that prints it: 0.29 of 100 are 29, although the float 0.29 * 100 is below.
    """
    return math.floor(Fraction(str(ratio)) * neurons)


def select(profiles: Sequence[AnyProfile] | AnyProfile, selection: Selection | None = None, **rule: Any) -> NeuronSet:
    """Return the neurons that every profile finds active (Eq. 5 for each profile, Eq. 6 over all of them).

    With ``at_least`` the probes are counted from the hits, which hold ranks up to the edges of their bins only: a top
    ratio that cuts a bin in two is rounded down to the bin's lower edge, with a warning, so that every selected neuron
    is active on enough probes.

    >>> select([profile], top_ratio={"attn": 0.3, "fwd": 0.1}, at_least=0.9)          # doctest: +SKIP

    Args:
        profiles: of models with the same decoder shape, or their paths; one or several.
        rule: the fields of a ``Selection``, in place of one.

    Raises:
        SnrfError: a value is not allowed, the profiles are of different shapes, or one was screened.
    """
    if isinstance(profiles, Profile | str | os.PathLike):
        profiles = [profiles]
    if not isinstance(profiles, Sequence):
        raise unexpected("profiles", profiles, "profiles or their paths")
    read = [profile_of(one) for one in profiles]
    if not read:
        raise SnrfError(None, "a selection needs at least one profile")
    selection = selection or Selection.of(**rule)
    check_same_sites(read)
    return reduce(and_, [_of_profile(profile, selection) for profile in read])


def check_same_sites(profiles: Sequence[Profile]) -> None:
    """Check that profiles are of models with the same decoder shape. Raises ``SnrfError`` if they are not."""
    first = profiles[0]
    for other in profiles[1:]:
        for site in sorted({*first.sites, *other.sites}):
            a, b = (p.sites[site].neurons if site in p.sites else 0 for p in (first, other))
            if a != b:
                what = f"has {b} neurons at {site} where {first.path} has {a}"
                raise SnrfError(other.path, what, "give profiles of models with the same decoder shape")


def _of_profile(profile: Profile, selection: Selection) -> NeuronSet:
    if (screen := (profile.provenance.measure or {}).get("screen")) is not None:
        what = f"was made by an earlier version with screen: {screen}, which estimated impacts"
        raise SnrfError(profile.path, what, "make the profile again")
    needed = _needed(profile, selection.at_least)
    members = {}
    cut: dict[float, str] = {}
    for site, statistics in profile.sites.items():
        value = selection.value(site.projection)
        if selection.sigma is not None:
            members[site] = statistics.min_impact.double() >= value
        elif needed == profile.count:
            members[site] = statistics.ranks <= top_rank(value, statistics.neurons)
        else:
            members[site] = _often(profile.edges, statistics, value, needed, cut)
    for ratio, edge in cut.items():
        logger.warning(
            "%s: at_least counts rank shares up to %s, so top_ratio %s is rounded down to %s",
            profile.path, ", ".join(profile.edges), ratio, edge,
        )  # fmt: skip
    return NeuronSet(members)


def _often(
    edges: tuple[str, ...], statistics: SiteProfile, ratio: float, needed: int, cut: dict[float, str]
) -> Bool[Tensor, " neurons"]:
    """Return which neurons are in the top ratio on ``needed`` probes, and note in ``cut`` if it cuts a bin in two."""
    last = top_rank(ratio, statistics.neurons)
    bounds = edge_ranks(edges, statistics.neurons)
    covered = sum(bound <= last for bound in bounds)
    if last > 0 and last not in bounds:
        cut[ratio] = edges[covered - 1] if covered else "0"
    return statistics.hits[:, :covered].sum(1) >= needed


def _needed(profile: Profile, at_least: float | None) -> int:
    if at_least is None:
        return profile.count
    if isinstance(at_least, float):
        return math.ceil(Fraction(str(at_least)) * profile.count)
    if at_least > profile.count:
        what = f"has {profile.count} probes, fewer than {at_least}"
        raise SnrfError(profile.path, what, "lower it", field="at_least")
    return at_least
