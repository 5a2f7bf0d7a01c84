"""How the ``keep`` of RegMean was chosen, as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from mergekit_snrf.files.settings import Settings


class TunedPoint(Settings):
    """A strength of RegMean that was tried.

    Attributes:
        kl: mean KL(target || merge) over the kinds of probes to keep, in nats a token.
        changed: share of changed answers, mean over the kinds.
        kinds: KL and share of changed answers by kind.
        scores: means of the evaluation's metrics, where one was given.
    """

    keep: FiniteFloat = Field(gt=0)
    kl: FiniteFloat
    changed: FiniteFloat
    kinds: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(min_length=1)
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The kind that moved most."""
        return max(self.kinds, key=lambda name: self.kinds[name][0])


class Tuning(Settings):
    """How the ``keep`` of RegMean was chosen: the smallest tried one with a KL of at most ``max_kl``.

    Attributes:
        points: what was tried, by rising keep.
        probes: held-out probes by kind.
        target: means of the evaluation's metrics on the target.
        settings: whatever else is needed to repeat it.
    """

    format: Literal["snrf-tuning"] = "snrf-tuning"
    version: Literal[1] = 1
    keep: FiniteFloat
    max_kl: FiniteFloat
    points: tuple[TunedPoint, ...]
    probes: dict[str, int]
    target: dict[str, FiniteFloat] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

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
