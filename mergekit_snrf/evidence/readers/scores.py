"""Scores of samples: numbers, and the objects that a task's own aggregation reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.readers.base import UnknownMetricError

_MAX_SCORE = 1e9
_NO_MEAN = re.compile(r"(precision|recall|f1|f1_score|yes_ratio)$", re.IGNORECASE)
_MME = re.compile(r"mme_(perception|percetion|cognition)_score")


@dataclass(frozen=True)
class Value:
    """What a sample has for a metric, and where that is."""

    sample: str
    value: Any
    place: str


def items_of(metric: str, values: Sequence[Value], aggregation: str | None = None) -> Items:
    """Return the items of a metric; ``aggregation`` is how the tool sums it up, where that is known.

    Raises:
        UnknownMetricError: a value is not understood, or the metric is not a mean over samples.
    """
    if aggregation is not None and aggregation != "mean" and not aggregation.startswith("<"):
        raise UnknownMetricError(f"which is summed up by {printable(aggregation)}, not by the mean")
    if aggregation != "mean" and _NO_MEAN.search(metric):
        raise UnknownMetricError("which is not a mean over samples")
    if _MME.fullmatch(metric):
        return _mme(values)
    return Items(tuple(score(one.value, one.place) for one in values), ids=tuple(one.sample for one in values))


def score(value: Any, place: str) -> float:
    """Return the score that a value is or holds.

    Raises:
        UnknownMetricError: it is none that is understood.
    """
    for found in (value, value.get("score"), value.get("true_false")) if isinstance(value, dict) else (value,):
        found = found[0] if isinstance(found, list) and len(found) == 1 and found is not value else found
        found = int(found) if found in ("0", "1") and found is not value else found
        # An int may be too large for a float, and NaN is not below anything.
        if isinstance(found, bool | int | float) and abs(found) <= _MAX_SCORE:
            return float(found)
    if isinstance(value, dict):
        if "parsed_pred" in value and "score" not in value:
            return _mmmu(value, place)
        names = printable(", ".join(list(value)[:5]))[:100]
        what = f"an object without a score that is understood (it has {names})"
    else:
        number = isinstance(value, int | float)
        what = "not finite or too large" if number else f"{type(value).__name__}, not a number"
    raise UnknownMetricError(f"whose value in {place} is {what}")


def _mmmu(value: Mapping[str, Any], place: str) -> float:
    """Score one answer of MMMU: a choice must be the answer; an open one must have the answer among its candidates."""
    answer, parsed = value.get("answer"), value["parsed_pred"]
    answers = answer if isinstance(answer, list) else [answer]
    candidates = parsed if isinstance(parsed, list) else [parsed]
    candidates = [one for entry in candidates for one in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(one, str | int | float) for one in (*answers, *candidates)):
        raise UnknownMetricError(f"whose value in {place} holds an answer that is neither text nor a number")
    if isinstance(answer, list) and value.get("question_type") is None:
        raise UnknownMetricError(f"whose value in {place} has several answers at once")
    if value.get("question_type", "multiple-choice") == "multiple-choice":
        return float(any(candidate in answers for candidate in candidates))
    wanted = [form for one in answers for form in _forms(str(one))]
    texts = [form for form in wanted if isinstance(form, str)]
    return float(any(any(t in one for t in texts) if isinstance(one, str) else one in wanted for one in candidates))


def _forms(text: str) -> list[str | float]:
    """Return an open answer as MMMU compares it: a number to two places, or text, a single letter as a word's end."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mme(values: Sequence[Value]) -> Items:
    answers = []
    for one in values:
        named = one.value if isinstance(one.value, dict) else {}
        category, picture = named.get("category"), named.get("question_id")
        if not isinstance(category, str) or not isinstance(picture, str):
            what = "is not an object with category, question_id and score"
            raise UnknownMetricError(f"whose value in {one.place} {what}")
        answers.append((category, picture, one))
    return mme_items(answers)


def mme_items(answers: Sequence[tuple[str, str, Value]]) -> Items:
    """Return a picture an item: accuracy plus accuracy+ of its two questions, so that the mean is MME's score.

    ``answers`` are category, picture and value of every question. ``UnknownMetricError``: a value is not understood,
    or a picture does not have two questions.
    """
    pictures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for category, picture, one in answers:
        pictures[category, picture].append(score(one.value, one.place))
    uneven = sum(len(scores) != 2 for scores in pictures.values())
    if uneven:
        raise UnknownMetricError(f"where {uneven} of {len(pictures)} pictures do not have two questions")
    categories = len({category for category, _ in pictures})
    return Items(
        tuple(categories * 100 * (sum(scores) / 2 + (sum(scores) == 2)) for scores in pictures.values()),
        ids=tuple(printable(f"{category}/{picture}") for category, picture in pictures),
        groups=tuple(printable(category) for category, _ in pictures),
    )
