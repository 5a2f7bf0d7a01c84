"""The results of studies as data: what ``evidence.results`` writes and reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_snrf.files.shown import Plotted

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
"""Of all parts of results: unknown fields are errors."""


class _Part(BaseModel):
    model_config = STRICT


class Interval(_Part):
    """A number with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


class Measured(_Part):
    """One metric of one condition: its mean, its paired change to the reference, and its share of malformed answers."""

    mean: Interval
    change: Interval | None = None
    malformed: float | None = None


class Condition(_Part):
    """One row of a study: a model as it is, or with ``neurons`` edited, averaged over ``draws`` seeds.

    A point of a sweep has its ``curve``, such as ``linear``, and its ``strength``. ``settings`` says how to repeat it
    (beta, rank, seeds, ...).
    """

    name: str
    role: Literal["reference", "claim", "control"]
    draws: int = 1
    neurons: int = 0
    curve: str | None = None
    strength: float | None = None
    settings: dict[str, Any] = {}
    metrics: dict[str, Measured]


class Contrast(_Part):
    """A paired difference between two conditions of a study on one metric, ``left - right``."""

    left: str
    right: str
    metric: str
    difference: Interval


class Study(Plotted, _Part):
    """Conditions compared on the same items: an ablation (Table 3) or a comparison of merges (Tables 1 and 2).

    Attributes:
        neurons_sha256: ``NeuronSet.sha256`` of the mask.
        items: number of items of each metric.
        roles: of the metrics: what a merge should improve, and what it should preserve.
        level: of all intervals.
        seed: of the bootstrap and the first draw.
        verdict: sentences that say what the intervals support.
        notes: sentences on what was left out, and why.
    """

    format: Literal["snrf-study"] = "snrf-study"
    version: Literal[1] = 1
    kind: Literal["ablation", "comparison"]
    model: str
    mask: str | None = None
    mask_sha256: str | None = None
    neurons_sha256: str | None = None
    evaluation: str
    items: dict[str, int]
    roles: dict[str, Literal["gain", "keep"]] = {}
    level: float = 0.95
    seed: int = 0
    conditions: list[Condition]
    contrasts: list[Contrast] = []
    verdict: list[str] = []
    notes: list[str] = []
    settings: dict[str, Any] = {}

    def __repr__(self) -> str:
        items = ", ".join(f"{metric} ({count} items)" for metric, count in self.items.items())
        return f"<Study: {self.kind} of {len(self.conditions)} conditions on {items}>"


class DomainStudy(_Part):
    """The ablation of one domain's neurons in one module: decoder, vision, projector, or all."""

    domain: str
    module: str
    study: Study


class DomainAblation(_Part):
    """Each domain's neurons off on every metric, one ablation for each domain and module.

    ``verdict`` says what happens on a domain's own items: the metric of its name.
    """

    format: Literal["snrf-domain-ablation"] = "snrf-domain-ablation"
    version: Literal[1] = 1
    domains: list[str]
    studies: list[DomainStudy] = Field(min_length=1)
    verdict: list[str] = []
    settings: dict[str, Any] = {}
