r"""The built-in evaluation: greedy answers to the rows of local data files, right where they equal the row's answer.

    metrics:
      reasoning: {data: calc.jsonl, question: question, images: image, answer: answer, answer_regex: '# (\d)'}
      perception: {data: read.jsonl, template: '<image> read :', images: image, answer: answer, role: keep}
    max_new_tokens: 64
    batch_size: 16

Files are looked for beside the YAML. Prompts are rendered as the profiler renders probes: by the model's chat template,
or by ``template``, a format string over the row's columns.

With ``answer_regex`` an answer is what the last match of the expression holds: its first group, or all of it. An answer
without a match is malformed, which is wrong and is also counted. The row's own answer goes through the same
expression where that matches. Answers are compared after normalisation: white space, case, and the spelling of
decimal numbers (7, 7.0, 1,000) make no difference.

Within a batch prompts are padded on the left. Padding changes sums in their last bits, so another batch size can turn
the rare answer whose two best tokens are as good as equal: never more than the rounding of the model's dtype can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import regex
from pydantic import Field, ValidationError, field_validator, model_validator

from mergekit_snrf.errors import SnrfError, invalid, naming
from mergekit_snrf.evidence.items import Items, Role
from mergekit_snrf.files.reading import load_yaml
from mergekit_snrf.files.settings import Settings
from mergekit_snrf.profiling.probes.batches import prepare, probe_batches
from mergekit_snrf.profiling.probes.rows import Rows, load_rows
from mergekit_snrf.profiling.probes.source import (
    DATA_SUFFIXES,
    AnswerRule,
    Count,
    Images,
    Name,
    ProbeSource,
    Prompting,
    Seed,
    check_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_PATTERN = 1_000
_MAX_EXPANDED = 100_000
"""Parts of an expression with its repeats written out, as the compiler does: each takes about 300 bytes."""
_SEARCHED = 20_000
"""Characters at the end of an answer that its expression sees."""
_SECONDS = 2.0
_PART = regex.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d*)(?:,(\d*))?\}|.", regex.DOTALL)
"""An escape, a set of characters, a repeat with its counts, or one character of an expression."""
_NUMBER = regex.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?", regex.ASCII)
_THOUSANDS = regex.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", regex.ASCII)


class MetricConfig(Prompting):
    """One metric of an exact-match evaluation."""

    data: Name = Field(description="A .jsonl, .json, .parquet or .csv file.")
    question: Name | None = Field(default=None, description="Column of the question; optional with a template.")
    images: Images | None = Field(
        default=None, description="Column of the images, one or several in a row; or a list of columns."
    )
    answer: Name = Field(description="Column of the right answer.")
    answer_regex: Annotated[str, Field(min_length=1, max_length=_MAX_PATTERN)] | None = Field(
        default=None, description="Expression that finds the answer in what the model writes; default: all of it."
    )
    role: Role = Field(default="gain", description="Whether a merge should improve the metric (gain) or preserve it.")

    @field_validator("answer_regex")
    @classmethod
    def _check_regex(cls, pattern: str | None) -> str | None:
        if pattern is not None and _expanded(pattern) > _MAX_EXPANDED:
            raise ValueError(f"repeats more than {_MAX_EXPANDED} parts; use smaller counts in braces")
        try:
            regex.compile(pattern or "")
        except (regex.error, RecursionError) as error:
            raise ValueError(f"is not a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _check_question(self) -> MetricConfig:
        check_prompt(self.question, self.template)
        return self


class ExactMatchConfig(Settings):
    """A checked YAML file of an exact-match evaluation."""

    metrics: Annotated[dict[Name, MetricConfig], Field(min_length=1)] = Field(description="By name.")
    max_new_tokens: Count = Field(default=512, description="At most as many tokens are generated for an answer.")
    batch_size: Count = Field(default=8, description="Prompts in a batch.")
    limit: Count | None = Field(default=None, description="Rows drawn from each file; default: all.")
    seed: Seed = Field(default=0, description="Seed of the draw.")


@dataclass(frozen=True)
class _Metric:
    rule: AnswerRule
    batch_size: int
    rows: Rows
    pattern: regex.Pattern[str] | None
    expected: Mapping[int, str | Decimal]


def load_exact_match(path: str | os.PathLike[str]) -> tuple[Callable[[Any, Any], dict[str, Items]], dict[str, Role]]:
    """Read the YAML file of an exact-match evaluation and the data files that it names; all rows must be usable.

    Returns:
        A function of a loaded model and its processor, and the role of every metric.
    """
    path = Path(path)
    config = _read_config(path)
    metrics = {}
    for name, metric in config.metrics.items():
        with _naming(name, path):
            metrics[name] = _load_metric(metric, config, path.parent)

    def ask(model: PreTrainedModel, processor: Any) -> dict[str, Items]:
        found = {}
        for name, metric in metrics.items():
            with _naming(name, path):
                found[name] = _ask(metric, model, processor)
        return found

    return ask, {name: metric.role for name, metric in config.metrics.items()}


def extract(pattern: regex.Pattern[str] | None, text: str) -> str | None:
    """Return the answer in the last 20 000 characters of a text: the last match's first group, or all of the match.

    None without a match, or where that group took no part in it. ``SnrfError``: it takes more than two seconds.
    """
    if pattern is None:
        return text
    try:
        matches = list(pattern.finditer(text[-_SEARCHED:], timeout=_SECONDS))
    except TimeoutError:
        what = f"{pattern.pattern!r} takes more than {_SECONDS:g} seconds on an answer of {len(text)} characters"
        raise SnrfError(None, what, "write it without nested repetition", field="answer_regex") from None
    if not matches:
        return None
    last = matches[-1]
    return last[1] if pattern.groups else last[0]


def normalised(answer: str) -> str | Decimal:
    """Return a form that equals another answer's where they mean the same: a number, or text without case."""
    text = " ".join(answer.split()).casefold()
    plain = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    return Decimal(plain) if _NUMBER.fullmatch(plain) else text


def _ask(metric: _Metric, model: PreTrainedModel, processor: Any) -> Items:
    probes = prepare(metric.rows, processor, rule=metric.rule, batch_size=metric.batch_size, config=model.config)
    _check_usable(probes.bad, metric.rows.source.dataset)
    answers: dict[int, str] = {}
    for batch in probe_batches(probes, model, processor, rule=metric.rule, device=model.device):
        answers |= zip(batch.numbers, batch.answers, strict=True)
    found = {number: extract(metric.pattern, text) for number, text in sorted(answers.items())}
    right = [text is not None and normalised(text) == metric.expected[number] for number, text in found.items()]
    malformed = tuple(text is None for text in found.values()) if metric.pattern is not None else None
    return Items(tuple(map(float, right)), malformed, ids=tuple(map(str, found)))


def _load_metric(metric: MetricConfig, config: ExactMatchConfig, folder: Path) -> _Metric:
    data = folder / Path(metric.data).expanduser()
    if data.suffix not in DATA_SUFFIXES:
        remedy = f"use a file that ends in {', '.join(DATA_SUFFIXES)}"
        raise SnrfError(None, f"{metric.data!r} is not a data file", remedy, field="data")
    if not os.path.isfile(data):
        remedy = "correct the path, which is relative to the evaluation's file"
        raise SnrfError(None, f"there is no file {data}", remedy, field="data")
    columns = metric.model_dump(include={"question", "images", "answer", *Prompting.model_fields})
    rows = load_rows(ProbeSource(dataset=str(data), limit=config.limit, seed=config.seed, **columns), answers=True)
    _check_usable(rows.bad, rows.source.dataset)
    pattern = regex.compile(metric.answer_regex) if metric.answer_regex is not None else None
    expected = {}
    for row in rows.rows:
        answer = row.answer or ""
        found = extract(pattern, answer)
        expected[row.number] = normalised(answer if found is None else found)
    asked = replace(rows, rows=tuple(replace(row, answer=None) for row in rows.rows))
    rule = AnswerRule(max_new_tokens=config.max_new_tokens)
    return _Metric(rule, config.batch_size, asked, pattern, expected)


def _read_config(path: Path) -> ExactMatchConfig:
    raw = load_yaml(path, remedy="give the YAML file, not the data")
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else "is not a mapping of keys to values"
        raise SnrfError(path, found, "an evaluation begins with metrics:, see docs/evidence.md")
    try:
        return ExactMatchConfig.model_validate(raw)
    except ValidationError as error:
        fields = (MetricConfig if error.errors()[0]["loc"][:1] == ("metrics",) else ExactMatchConfig).model_fields
        raise invalid(path, error.errors(), fields=fields) from None


def _check_usable(bad: Mapping[int, SnrfError], name: str) -> None:
    for number, error in bad.items():
        remedy = error.remedy or "correct or remove the row; models are compared on all rows"
        raise SnrfError(error.where or name, f"row {number}: {error.what}", remedy, field=error.field)


def _naming(metric: str, path: Path) -> AbstractContextManager[None]:
    """Name the fields of errors as the keys of the evaluation's file."""

    def key(field: str) -> str:
        if field in ExactMatchConfig.model_fields:
            return field
        return f"metrics.{metric}.{'data' if field == 'dataset' else field}"

    return naming(key, path)


def _expanded(pattern: str) -> float:
    """Return about how many parts an expression has with its counted repeats written out."""
    groups, last = [0.0], 0.0
    for match in _PART.finditer(pattern):
        if match[0] == "(":
            groups.append(0.0)
        elif match[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif match[1] or match[2]:
            times = max(1.0, *(float(count or 0) for count in match.groups()))
            groups[-1] += last * (times - 1)
            last *= times
        else:
            last = 1.0
            groups[-1] += 1
    return sum(groups)
