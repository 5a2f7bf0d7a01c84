"""Profiles made by hand from the impacts that a test needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_snrf.neurons.sites import Site
from mergekit_snrf.profiling.result.profilefile import EDGES, Profile, SiteProfile


def impact_profile(impacts: Mapping[Site, Tensor], count: int = 1, **of_profile: Any) -> Profile:
    """Return a profile with these mean impacts, and no neuron among the strongest of a probe."""
    sites = {}
    for site, impact in impacts.items():
        size = len(impact)
        hits = torch.zeros(size, len(EDGES), dtype=torch.int32)
        hits[:, -1] = count
        sites[site] = SiteProfile(torch.zeros(size), torch.ones(size), impact.float(), hits)
    return Profile(sites, count, **of_profile)
