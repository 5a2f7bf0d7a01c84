"""The results of the analyses as data: what the commands write as JSON and the report reads back.

Every file is one JSON object with a ``format`` and a ``version``; unknown fields are errors, so that a file of another
program or version is named instead of misread.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mergekit_snrf import safefile
from mergekit_snrf.errors import SnrfError

_MAX_BYTES = 50_000_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Interval(_Part):
    """A number with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


class Measured(_Part):
    """One metric of one condition.

    Attributes:
        mean: over the items (and draws), higher is better, usually in [0, 1].
        change: paired difference to the study's reference; None for the reference itself.
        malformed: share of the answers that could not be read; None where the evaluation does not tell.
    """

    mean: Interval
    change: Interval | None = None
    malformed: float | None = None


class Condition(_Part):
    """One row of a study: a model as it is, edited, or merged.

    Attributes:
        name: as the tables show it, ``random neurons``.
        role: ``reference`` is what the others are compared with, ``claim`` what the study is about.
        draws: how many seeds the numbers are averaged over.
        neurons: how many are edited.
        settings: what was done (beta, rank, seeds, ...), to repeat it.
        metrics: by name.
    """

    name: str
    role: Literal["reference", "claim", "control"]
    draws: int = 1
    neurons: int = 0
    settings: dict[str, Any] = {}
    metrics: dict[str, Measured]


class Contrast(_Part):
    """A paired difference between two conditions of a study on one metric, ``left - right``."""

    left: str
    right: str
    metric: str
    difference: Interval


class Study(_Part):
    """Conditions compared on the same items: an ablation (Table 3) or a comparison of merges (Tables 1 and 2).

    Attributes:
        model: name of the target.
        mask: path of the mask file.
        mask_sha256: its sha256.
        evaluation: what ``--eval`` named.
        items: number of items of each metric.
        level: of all intervals, 0.95.
        seed: of the bootstrap and the first draw.
        verdict: sentences that say what the intervals support.
        settings: whatever else is needed to repeat the study.
    """

    format: Literal["snrf-study"] = "snrf-study"
    version: Literal[1] = 1
    kind: Literal["ablation", "comparison"]
    model: str
    mask: str | None = None
    mask_sha256: str | None = None
    evaluation: str
    items: dict[str, int]
    level: float = 0.95
    seed: int = 0
    conditions: list[Condition]
    contrasts: list[Contrast] = []
    verdict: list[str] = []
    settings: dict[str, Any] = {}


class SiteOverlap(_Part):
    """Two sets of neurons at one layer and projection.

    Attributes:
        neurons: how many the site has.
        only: those in the first set alone, and in the second alone.
        chance: shared neurons to expect of two random sets of these sizes.
    """

    layer: int
    projection: str
    neurons: int
    shared: int
    only: tuple[int, int]
    chance: float


class OverlapPoint(_Part):
    """The overlap over all sites, and by projection, at one selection rule."""

    rule: dict[str, Any]
    shared: int
    only: tuple[int, int]
    chance: float
    neurons: int
    projections: dict[str, tuple[int, int, int]]


class Overlap(_Part):
    """How much two profiles share (Fig. 3, 4, 8, 9, 10).

    Attributes:
        names: of the two models.
        rule: the selection that ``sites`` is for.
        projections: in ``OverlapPoint``: (shared, only first, only second).
        curve: over top ratios.
    """

    format: Literal["snrf-overlap"] = "snrf-overlap"
    version: Literal[1] = 1
    names: tuple[str, str]
    rule: dict[str, Any]
    sites: list[SiteOverlap]
    curve: list[OverlapPoint] = []


class TokenOdds(_Part):
    """How much more often a token is generated with the neuron amplified.

    Attributes:
        log_odds: log of the odds ratio, with 0.5 added to every count.
        amplified: count in the amplified generations.
        plain: count in the plain ones.
    """

    token: str
    log_odds: float
    amplified: int
    plain: int


class AmplifiedNeuron(_Part):
    """What amplifying one neuron does to the generated tokens.

    Attributes:
        tokens: ranked by log-odds, the strongest first.
        totals: generated tokens with the neuron amplified, and plain.
        math_share: share of math tokens among the leading ones; None where no classifier was given.
    """

    neuron: str
    tokens: list[TokenOdds]
    totals: tuple[int, int]
    math_share: float | None = None


class Amplification(_Part):
    """Amplified generations against plain ones (Eq. 7, 8; Fig. 6, 11, 12).

    Attributes:
        classifier: what counts as a math token.
        math_neuron_ratio: share of the neurons most of whose leading tokens are math tokens (Fig. 12).
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
    settings: dict[str, Any] = {}


Result = Annotated[Study | Overlap | Amplification, Field(discriminator="format")]
_RESULT: TypeAdapter[Study | Overlap | Amplification] = TypeAdapter(Result)


def write_result(path: str | os.PathLike[str], result: Study | Overlap | Amplification) -> None:
    """Write a result as JSON; equal results give equal bytes, and an existing file is replaced at once or not at all.

    Raises:
        SnrfError: the file cannot be written.
    """
    text = json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    with safefile.replacing(path) as file:
        file.write(text.encode())


def read_result(path: str | os.PathLike[str]) -> Study | Overlap | Amplification:
    """Read a result file.

    Raises:
        SnrfError: the file is missing, too large, not JSON, or not a result.
    """
    try:
        size = os.path.getsize(path)
        if size > _MAX_BYTES:
            raise SnrfError(f"{path}: {size} bytes are too many for a result file")
        content = Path(path).read_bytes()
    except OSError as error:
        raise SnrfError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    try:
        return _RESULT.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise SnrfError(
            f"{path}: {where}: {first['msg']}; expected a file that 'snrf ablate', 'snrf compare', 'snrf overlap' or "
            f"'snrf amplify' wrote with --json"
        ) from None
