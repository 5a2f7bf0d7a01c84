"""The results of the analyses as data: what the commands write as JSON and the report reads back.

Every file is one JSON object with a ``format`` and a ``version``; unknown fields are errors, so that a file of another
program or version is named instead of misread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from mergekit_snrf.errors import SnrfError, invalid, printable
from mergekit_snrf.evidence.study_results import Condition as Condition
from mergekit_snrf.evidence.study_results import Contrast as Contrast
from mergekit_snrf.evidence.study_results import DomainAblation as DomainAblation
from mergekit_snrf.evidence.study_results import DomainStudy as DomainStudy
from mergekit_snrf.evidence.study_results import Interval as Interval
from mergekit_snrf.evidence.study_results import Measured as Measured
from mergekit_snrf.evidence.study_results import Part
from mergekit_snrf.evidence.study_results import Study as Study
from mergekit_snrf.evidence.study_results import Sweep as Sweep
from mergekit_snrf.evidence.study_results import Tuning as Tuning
from mergekit_snrf.files import writing
from mergekit_snrf.files.reading import read_bytes
from mergekit_snrf.files.shown import Plotted
from mergekit_snrf.neurons.sites import MAX_LAYERS, PROJECTIONS

_MAX_BYTES = 50_000_000


Count = Annotated[int, Field(ge=0, le=2**53)]


class Counts(Part):
    """How many of the ``neurons`` to choose from two sets share, and how many are in one ``only``.

    ``chance`` is how many random sets of these sizes share on average, with its standard ``deviation``.
    """

    neurons: Count
    shared: Count
    only: tuple[Count, Count]
    chance: float = Field(ge=0)
    deviation: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Counts:
        first, second = (self.shared + only for only in self.only)
        if self.union > self.neurons or self.chance > min(first, second) * (1 + 1e-9):
            raise ValueError(f"{self.union} of {self.neurons} neurons, {self.chance:g} shared by chance: impossible")
        return self

    @property
    def union(self) -> int:
        """Neurons in either set."""
        return self.shared + sum(self.only)

    @property
    def share(self) -> float | None:
        """Shared neurons as share of the union; None if both sets are empty."""
        return self.shared / self.union if self.union else None

    @property
    def chance_share(self) -> float | None:
        """Shared neurons to expect as share of the union to expect; None if both sets are empty."""
        expected_union = self.union + self.shared - self.chance
        return self.chance / expected_union if expected_union > 0 else None

    @property
    def z(self) -> float | None:
        """Standard deviations between the shared neurons and chance; None where the sizes leave no choice."""
        return (self.shared - self.chance) / self.deviation if self.deviation else None


class SiteOverlap(Counts):
    """Two sets of neurons at one layer and projection."""

    layer: int = Field(ge=0, lt=MAX_LAYERS)
    projection: str

    @field_validator("projection")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PROJECTIONS:
            raise ValueError(f"{name!r} is none of {', '.join(PROJECTIONS)}")
        return name


class OverlapPoint(Counts):
    """The overlap over all sites at one selection rule, and (shared, only first, only second) by projection."""

    rule: dict[str, Any]
    projections: dict[str, tuple[int, int, int]]


class Overlap(Plotted, Part):
    """How much two profiles share (Fig. 3, 4, 8, 9, 10): ``sites`` under ``rule``, ``curve`` over top ratios."""

    format: Literal["snrf-overlap"] = "snrf-overlap"
    version: Literal[1] = 1
    names: tuple[str, str]
    rule: dict[str, Any]
    sites: list[SiteOverlap]
    curve: list[OverlapPoint] = Field(default=[])

    def __repr__(self) -> str:
        shared, union = sum(site.shared for site in self.sites), sum(site.union for site in self.sites)
        return f"<Overlap of {printable(' and '.join(self.names))}: {shared} of {union} neurons shared>"

    @field_validator("curve")
    @classmethod
    def _over_ratios(cls, points: list[OverlapPoint]) -> list[OverlapPoint]:
        if not all(isinstance(point.rule.get("top_ratio"), int | float) for point in points):
            raise ValueError("every point of a curve needs a number top_ratio in its rule")
        return points


class OverlapPairs(Plotted, Part):
    """The overlaps of every two of several profiles."""

    format: Literal["snrf-overlap-pairs"] = "snrf-overlap-pairs"
    version: Literal[1] = 1
    pairs: list[Overlap]

    def __repr__(self) -> str:
        return f"<OverlapPairs: {len(self.pairs)}>"


class TokenOdds(Part):
    """How often a token was generated with the neuron amplified and plain, and the log of the odds ratio."""

    token: str
    log_odds: float
    amplified: int
    plain: int


class AmplifiedNeuron(Part):
    """What amplifying one neuron does to the generated tokens.

    Attributes:
        tokens: ranked by log-odds, the strongest first.
        totals: generated tokens with the neuron amplified, and plain.
        math_share: share of math tokens among the leading ones; None where no token leads.
        ended: answers that ended before max_new_tokens, with the neuron amplified, and plain.
        changed: answers that differ from the plain ones.
    """

    neuron: str
    tokens: list[TokenOdds]
    totals: tuple[int, int]
    math_share: float | None = None
    ended: tuple[int, int] | None = None
    changed: int | None = None


class Amplification(Part):
    """Amplified generations against plain ones (Eq. 7, 8; Fig. 6, 11, 12).

    ``math_neuron_ratio`` is the share of neurons most of whose leading tokens are math tokens by ``classifier``.
    """

    format: Literal["snrf-amplification"] = "snrf-amplification"
    version: Literal[1] = 1
    model: str
    factor: float
    probes: str
    count: int
    seed: int
    classifier: str | None = None
    neurons: list[AmplifiedNeuron]
    math_neuron_ratio: float | None = None
    plain_math_share: float | None = None
    settings: dict[str, Any] = Field(default={})


Kind = Literal["image", "prompt", "answer"]
KINDS: tuple[Kind, ...] = ("image", "prompt", "answer")
Curve = list[float]
"""A number before the first layer and after each."""


class LensKind(Part):
    """What the logit lens shows of one kind of positions, means over ``tokens`` of them; entropy and KL in nats.

    Attributes:
        kl: KL(last layer || this layer).
        agrees: share whose most probable token is that of the last layer.
        top: the most frequent of the most probable tokens by layer, with their counts.
    """

    kind: Kind
    tokens: Count
    entropy: Curve
    kl: Curve
    agrees: Curve
    top: list[list[tuple[str, Count]]]


class LensAnswer(Part):
    """Mean rank and probability of the answer's tokens by layer, and the share that are the most probable one."""

    rank: Curve
    probability: Curve
    hits: Curve


class Lens(Part):
    """What a model would predict after each layer; ``count`` probes, answered by itself.

    Attributes:
        layers: of the decoder; curves have one number more.
        image_attention: share of text tokens' attention that goes to images, a number a layer.
    """

    format: Literal["snrf-lens"] = "snrf-lens"
    version: Literal[1] = 1
    model: str
    probes: str
    count: int
    layers: int = Field(ge=1, lt=MAX_LAYERS)
    kinds: list[LensKind]
    answer: LensAnswer | None = None
    image_attention: list[float] | None = None
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _of_its_layers(self) -> Lens:
        curves = [curve for kind in self.kinds for curve in (kind.entropy, kind.kl, kind.agrees, kind.top)]
        curves += [] if self.answer is None else [self.answer.rank, self.answer.probability, self.answer.hits]
        if {*map(len, curves)} - {self.layers + 1} or len(self.image_attention or [0.0] * self.layers) != self.layers:
            raise ValueError(f"the curves are not of {self.layers} layers")
        return self


Result = Study | Overlap | OverlapPairs | Amplification | Lens | Tuning | DomainAblation
_RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="format")])


def write_result(path: str | os.PathLike[str], result: BaseModel) -> None:
    """Write a result as JSON; equal results give equal bytes, and an existing file is replaced at once or not at all.

    Raises:
        SnrfError: the file cannot be written.
    """
    writing.write_text(path, result_text(result) + "\n")


def result_text(result: BaseModel) -> str:
    """Return a result as JSON."""
    return json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False)


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read a result file.

    Raises:
        SnrfError: the file is missing, too large, not JSON, or not a result.
    """
    content = read_bytes(path, _MAX_BYTES)
    try:
        return _RESULT.validate_json(content)
    except ValidationError as error:
        raise _unreadable(path, error.errors()) from None


def _unreadable(path: object, entries: Sequence[Mapping[str, Any]]) -> SnrfError:
    kind, found = entries[0]["type"], entries[0].get("ctx") or {}
    remedy = "give a file that 'snrf lens', or another command with --json, wrote"
    if kind == "union_tag_invalid":
        what = f"must be one of {found['expected_tags']}, got {found['tag']!r}"
        return SnrfError(path, what, remedy, field="key 'format'")
    if kind in ("json_invalid", "union_tag_not_found"):
        what = "has no key 'format'" if kind == "union_tag_not_found" else f"is not JSON ({found['error']})"
        return SnrfError(path, what, remedy)
    # Of a union, the place begins with the format.
    error = invalid(path, entries, keys=entries[0]["loc"][1:])
    return SnrfError(path, error.what, remedy, field=error.field)
