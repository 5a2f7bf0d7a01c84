"""The results of studies, sweeps and of the choice of keep as data: what ``evidence.results`` writes and reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergekit_snrf.evidence.items import Items
from mergekit_snrf.files.shown import Plotted


class Part(BaseModel):
    """A part of a result: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Interval(Part):
    """A number with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


class Measured(Part):
    """One metric of one condition: its mean, its paired change to the reference, and its share of malformed answers."""

    mean: Interval
    change: Interval | None = None
    malformed: float | None = None


class Condition(Part):
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


class Contrast(Part):
    """A paired difference between two conditions of a study on one metric, ``left - right``."""

    left: str
    right: str
    metric: str
    difference: Interval


class Study(Plotted, Part):
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


class DomainStudy(Part):
    """The ablation of one domain's neurons in one module: decoder, vision, projector, or all."""

    domain: str
    module: str
    study: Study


class DomainAblation(Part):
    """Each domain's neurons off on every metric, one ablation for each domain and module.

    ``verdict`` says what happens on a domain's own items: the metric of its name.
    """

    format: Literal["snrf-domain-ablation"] = "snrf-domain-ablation"
    version: Literal[1] = 1
    domains: list[str]
    studies: list[DomainStudy] = Field(min_length=1)
    verdict: list[str] = []
    settings: dict[str, Any] = {}


class ScoredRow(Part):
    """What one row of a sweep scored; ``settings`` are those of its row."""

    name: str
    settings: dict[str, Any] = {}
    scores: dict[str, Items]


class Sweep(Plotted, Part):
    """A sweep, whether complete or interrupted.

    Attributes:
        key: sha256 of what the scores depend on; an interrupted sweep continues only with the same.
        rows: what was scored.
        best: name of the chosen row; None until all rows are scored.
        recipe: the content of the best recipe.
        study: the rows as a comparison with the best one as its claim.
    """

    format: Literal["snrf-sweep"] = "snrf-sweep"
    version: Literal[1] = 1
    key: str
    rows: tuple[ScoredRow, ...] = ()
    best: str | None = None
    recipe: dict[str, Any] | None = None
    study: Study | None = None

    def __repr__(self) -> str:
        return f"<Sweep: {len(self.rows)} rows, {'interrupted' if self.best is None else f'best is {self.best}'}>"


class TunedPoint(Part):
    """A strength of RegMean that was tried.

    Attributes:
        kl: mean KL(target || merge) over the kinds of probes to keep, in nats a token.
        changed: share of changed answers, mean over the kinds.
        kinds: KL and share of changed answers by kind.
        scores: means of the evaluation's metrics, where one was given.
    """

    keep: float = Field(gt=0)
    kl: float
    changed: float
    kinds: dict[str, tuple[float, float]] = Field(min_length=1)
    scores: dict[str, float] = {}

    @property
    def worst(self) -> str:
        """The kind that moved most."""
        return max(self.kinds, key=lambda name: self.kinds[name][0])


class Tuning(Part):
    """How the ``keep`` of RegMean was chosen: the smallest tried one with a KL of at most ``max_kl``.

    Attributes:
        points: what was tried, by rising keep.
        probes: held-out probes by kind.
        target: means of the evaluation's metrics on the target.
        settings: whatever else is needed to repeat it.
    """

    format: Literal["snrf-tuning"] = "snrf-tuning"
    version: Literal[1] = 1
    keep: float
    max_kl: float
    points: tuple[TunedPoint, ...]
    probes: dict[str, int]
    target: dict[str, float] = {}
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> Tuning:
        if self.keep not in (point.keep for point in self.points):
            raise ValueError(f"keep {self.keep:g} is none of the points")
        for point in self.points:
            if (point.kinds.keys(), point.scores.keys()) != (self.probes.keys(), self.target.keys()):
                raise ValueError(f"the point keep {point.keep:g} has other kinds or metrics than the probes and target")
        return self

    @property
    def chosen(self) -> TunedPoint:
        """The point of the choice."""
        return next(point for point in self.points if point.keep == self.keep)
