"""How much the neurons of several profiles overlap, next to what chance would give (Fig. 3, 4, 8, 9, 10).

Chance: of n neurons, two sets of a and b neurons are drawn at random. The number that both hold is hypergeometric,
with mean a b / n and variance a b (n - a) (n - b) / (n^2 (n - 1)).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.results import Overlap, OverlapPairs, OverlapPoint, SiteOverlap
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS
from mergekit_snrf.profiling.result.profilefile import AnyProfile, Profile, profile_of
from mergekit_snrf.profiling.result.selection import Selection, check_same_sites, select

CURVE_RATIOS: tuple[float, ...] = tuple(percent / 100 for percent in range(1, 51))
"""Top ratios of a curve."""


def chance(neurons: int, first: int, second: int) -> tuple[float, float]:
    """Return mean and standard deviation of how many neurons random sets of ``first`` and ``second`` neurons share."""
    mean = first * second / neurons
    if neurons == 1:
        return mean, 0.0
    return mean, math.sqrt(mean * (neurons - first) * (neurons - second) / (neurons * (neurons - 1)))


def overlap_of(
    first: NeuronSet,
    second: NeuronSet,
    names: tuple[str, str],
    rule: Mapping[str, Any],
    curve: Sequence[OverlapPoint] = (),
) -> Overlap:
    """Return the overlap of two sets of neurons, site by site."""
    sites = []
    for site, shared in (first & second).items():
        a, b, both = first.count(site), second.count(site), int(shared.sum())
        mean, deviation = chance(len(shared), a, b)
        place: dict[str, Any] = {"layer": site.layer, "projection": site.projection, "neurons": len(shared)}
        only = (a - both, b - both)
        sites.append(SiteOverlap(**place, shared=both, only=only, chance=mean, deviation=deviation))
    return Overlap(names=names, rule=dict(rule), sites=sites, curve=list(curve))


def total(sites: Sequence[SiteOverlap], rule: Mapping[str, Any] | None = None) -> OverlapPoint:
    """Add up sites.

    Sites count as independent, except that fwd.up and fwd.down of a layer count as one draw: a profile ranks both by
    the same impacts. Their deviations therefore add, which is exact if both have the same sets and never too small.
    """
    deviations: defaultdict[tuple[int, str], float] = defaultdict(float)
    for site in sites:
        draw = "fwd" if site.projection.startswith("fwd.") else site.projection
        deviations[site.layer, draw] += site.deviation
    shared, *only = _counts(sites)
    return OverlapPoint(
        rule=dict(rule or {}),
        neurons=sum(site.neurons for site in sites),
        shared=shared,
        only=(only[0], only[1]),
        chance=math.fsum(site.chance for site in sites),
        deviation=math.sqrt(math.fsum(deviation**2 for deviation in deviations.values())),
        projections={name: _counts(group) for name, group in _grouped(sites).items()},
    )


def _counts(sites: Sequence[SiteOverlap]) -> tuple[int, int, int]:
    return sum(s.shared for s in sites), sum(s.only[0] for s in sites), sum(s.only[1] for s in sites)


def _grouped(sites: Sequence[SiteOverlap]) -> dict[str, list[SiteOverlap]]:
    groups = {name: [site for site in sites if site.projection == name] for name in PROJECTIONS}
    return {name: group for name, group in groups.items() if group}


def site_order(site: SiteOverlap) -> tuple[int, int]:
    """Return the key that orders sites by layer, then as ``PROJECTIONS``."""
    return site.layer, list(PROJECTIONS).index(site.projection)


def by_projection(overlap: Overlap) -> dict[str, OverlapPoint]:
    """Return the sums over layers by projection, and under ``all`` those over everything."""
    groups = {**_grouped(overlap.sites), "all": overlap.sites}
    return {name: total(group, overlap.rule) for name, group in groups.items()}


def overlap(*profiles: AnyProfile, curve: bool = False, **rule: Any) -> Overlap | OverlapPairs:
    """Return which neurons the models of two profiles share, and what chance would give (Fig. 3, 4, 8).

    More than two profiles are compared two by two. No model is loaded.

    Args:
        profiles: two or more, or the paths of their files.
        curve: add top ratios from 0.01 to 0.5.
        rule: the fields of a ``Selection``; none: ``top_ratio=0.1``.

    Raises:
        SnrfError: a file or a value of the rule is wrong, or the models differ in shape.
    """
    if len(profiles) < 2:
        raise SnrfError(
            None, f"an overlap needs at least two profiles, got {len(profiles)}", "give those of both models"
        )
    if rule.get("sigma") is None and rule.get("top_ratio") is None:
        rule["top_ratio"] = 0.1
    pairs = overlaps([profile_of(profile) for profile in profiles], curve=curve, **rule)
    return pairs[0] if len(pairs) == 1 else OverlapPairs(pairs=pairs)


def overlaps(
    profiles: Sequence[Profile], selection: Selection | None = None, *, curve: bool = False, **rule: Any
) -> list[Overlap]:
    """Return the overlap of every two profiles, in order, under a selection or its fields as ``rule``.

    ``curve`` adds the overlap over top ratios. With ``at_least`` these are the bin edges up to 0.5 that the profiles
    have in common, since hits are counted between edges; otherwise ``CURVE_RATIOS``.
    """
    selection = selection or Selection.of(**rule)
    check_same_sites(profiles)
    names = names_of(profiles)
    chosen = [select([profile], selection) for profile in profiles]
    points = _curves(profiles, selection.at_least) if curve else {}
    return [
        overlap_of(chosen[i], chosen[j], (names[i], names[j]), selection.rule, points.get((i, j), ()))
        for i, j in combinations(range(len(profiles)), 2)
    ]


def _curves(profiles: Sequence[Profile], at_least: float | None) -> dict[tuple[int, int], list[OverlapPoint]]:
    ratios: Sequence[float] = CURVE_RATIOS
    if at_least is not None:
        common = set.intersection(*({float(edge) for edge in profile.edges} for profile in profiles))
        ratios = sorted(edge for edge in common if edge <= CURVE_RATIOS[-1])
    points: defaultdict[tuple[int, int], list[OverlapPoint]] = defaultdict(list)
    for ratio in ratios:
        selection = Selection(top_ratio=ratio, at_least=at_least)
        chosen = [select([profile], selection) for profile in profiles]
        for i, j in combinations(range(len(profiles)), 2):
            sites = overlap_of(chosen[i], chosen[j], ("", ""), selection.rule).sites
            points[i, j].append(total(sites, selection.rule))
    return points


def names_of(profiles: Sequence[Profile]) -> list[str]:
    """Return a name for every profile: its model's, with the file's name added where two would be equal."""
    paths = [model.path if (model := profile.provenance.model) is not None else None for profile in profiles]
    # A folder of this machine is named by its last part, a hub id in full.
    names = [
        path if path and not Path(path).is_absolute() else Path(path or profile.path).name
        for path, profile in zip(paths, profiles, strict=True)
    ]
    counts = Counter(names)
    return [
        f"{name} ({Path(profile.path).name})" if counts[name] > 1 and name != Path(profile.path).name else name
        for name, profile in zip(names, profiles, strict=True)
    ]
