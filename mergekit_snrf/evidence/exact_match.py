r"""The built-in evaluation: greedy answers to the rows of local data files, right where they equal the row's answer.

    metrics:
      reasoning: {data: calc.jsonl, question: question, images: image, answer: answer, answer_regex: '# (\d)'}
      perception: {data: read.jsonl, template: '<image> read :', images: image, answer: answer, role: keep}
    max_new_tokens: 64
    batch_size: 16

Files are looked for beside the YAML. Prompts are rendered as the profiler renders probes: by the model's chat template,
or by ``template``, a format string over the row's columns.

With ``answer_regex`` an answer is what the last match of the expression holds: its first group, or all of it. An answer
without a match is malformed, which is wrong, and is counted besides. The row's own answer goes through the same
expression where that matches. Answers are compared after normalisation: white space, case, and the spelling of
decimal numbers (7, 7.0, 1,000) make no difference.

Within a batch prompts are padded on the left. Padding changes sums in their last bits, so another batch size can turn
the rare answer whose two best tokens are as good as equal: never more than the rounding of the model's dtype can.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergekit_snrf.errors import SnrfError, problem
from mergekit_snrf.evidence.items import Items, Role
from mergekit_snrf.files.reading import load_yaml
from mergekit_snrf.profiling.probes.batches import prepare, probe_batches
from mergekit_snrf.profiling.probes.rows import Rows, load_rows
from mergekit_snrf.profiling.probes.source import DATA_SUFFIXES, AnswerRule, ProbeSource
from mergekit_snrf.profiling.probes.template import template_fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_MAX_BYTES = 1_000_000
_MAX_PATTERN = 1_000
_SEARCHED = 20_000
"""Characters at the end of an answer that its expression sees."""
_SECONDS = 2.0
_WORDS = {
    regex.compile(rf"(?<![\w./-]){theirs}"): ours
    for theirs, ours in {
        r"this side of profile\.yml": "this metric",
        r"profile\.yml": "the evaluation",
        r"probes\.dataset\b": "data",
        r"probes\.(question|images|split)\b": r"\1",
        r"answer\.max_new_tokens\b": "max_new_tokens",
    }.items()
}
"""What the profiler calls its keys, but not in the middle of a path, and the keys of an evaluation."""
_NUMBER = regex.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?", regex.ASCII)
_THOUSANDS = regex.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", regex.ASCII)

_Name = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricConfig(_Section):
    """One metric of an exact-match evaluation.

    Attributes:
        data: a .jsonl, .json, .parquet or .csv file.
        question: the column that holds the question; may be left out if ``template`` names the columns.
        images: the column that holds the images, one or several a row.
        answer: the column that holds the right answer.
        answer_regex: what to look for in an answer; None: the answer is all that the model writes.
        template: a format string in place of the chat template; ``<image>`` stands where an image goes.
        role: whether a merge shall gain or keep it.
    """

    data: _Name
    question: _Name | None = None
    images: _Name | None = None
    answer: _Name
    answer_regex: Annotated[str, Field(min_length=1, max_length=_MAX_PATTERN)] | None = None
    template: _Name | None = None
    role: Literal["gain", "keep"] = "gain"

    @field_validator("answer_regex")
    @classmethod
    def _check_regex(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                regex.compile(pattern)
            except (regex.error, RecursionError) as error:
                raise ValueError(f"is not a regular expression ({error})") from None
        return pattern

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            template_fields(template)
        return template

    @model_validator(mode="after")
    def _check_question(self) -> MetricConfig:
        if self.template is None and self.question is None:
            raise ValueError("question is missing; name the column that holds the question, or write a template")
        return self


class ExactMatchConfig(_Section):
    """A checked YAML file of an exact-match evaluation.

    Attributes:
        metrics: by name.
        max_new_tokens: at most as many tokens are generated for an answer.
        batch_size: prompts in a batch.
        limit: rows taken from each file, drawn by ``seed``; None: all.
    """

    metrics: Annotated[dict[_Name, MetricConfig], Field(min_length=1)]
    max_new_tokens: _Count = 512
    batch_size: _Count = 8
    limit: _Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0


@dataclass(frozen=True)
class _Metric:
    config: MetricConfig
    rule: AnswerRule
    batch_size: int
    rows: Rows
    pattern: regex.Pattern[str] | None
    expected: Mapping[int, str | Decimal]


@dataclass(frozen=True)
class ExactMatch:
    """An exact-match evaluation with its rows."""

    path: Path
    metrics: Mapping[str, _Metric]

    @property
    def roles(self) -> dict[str, Role]:
        """Role of every metric."""
        return {name: metric.config.role for name, metric in self.metrics.items()}

    def __call__(self, model: PreTrainedModel, processor: Any) -> dict[str, Items]:
        """Ask a model for its answers.

        Raises:
            SnrfError: a prompt cannot be rendered or is too long, the model cannot generate, or matching an answer
                takes too long.
        """
        found = {}
        for name, metric in self.metrics.items():
            with _located(f"{self.path}: metric {name!r}"):
                found[name] = _ask(metric, model, processor)
        return found


def load_exact_match(path: str | os.PathLike[str]) -> ExactMatch:
    """Read the YAML file of an exact-match evaluation and the data files that it names.

    Raises:
        SnrfError: a file cannot be read, a key is unknown, missing or of a value that is not allowed, a column does
            not exist, or a row cannot be used.
    """
    path = Path(path)
    config = _read_config(path)
    metrics = {}
    for name, metric in config.metrics.items():
        with _located(f"{path}: metric {name!r}"):
            metrics[name] = _load_metric(metric, config, path.parent)
    return ExactMatch(path, metrics)


def extract(pattern: regex.Pattern[str] | None, text: str) -> str | None:
    """Return the answer in a text: the last match's first group, all of it without a group, None without a match
    or where that group took no part in it.

    Only the last 20 000 characters of the text are searched.

    Raises:
        SnrfError: the search takes more than two seconds.
    """
    if pattern is None:
        return text
    try:
        matches = list(pattern.finditer(text[-_SEARCHED:], timeout=_SECONDS))
    except TimeoutError:
        raise SnrfError(
            f"answer_regex {pattern.pattern!r} takes more than {_SECONDS:g} seconds on an answer of {len(text)} "
            f"characters; write it without nested repetition"
        ) from None
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
    if probes.bad:
        raise SnrfError(f"{probes.bad[0]}; every row must be asked, or models are not comparable")
    answers: dict[int, str] = {}
    for batch in probe_batches(probes, model, processor, rule=metric.rule, device=model.device):
        answers |= zip(batch.numbers, batch.answers, strict=True)
    extracted = {number: extract(metric.pattern, text) for number, text in sorted(answers.items())}
    return Items(
        scores=tuple(
            float(text is not None and normalised(text) == metric.expected[number])
            for number, text in extracted.items()
        ),
        malformed=tuple(text is None for text in extracted.values()) if metric.pattern is not None else None,
        ids=tuple(map(str, extracted)),
    )


def _load_metric(metric: MetricConfig, config: ExactMatchConfig, folder: Path) -> _Metric:
    data = folder / Path(metric.data).expanduser()
    if data.suffix not in DATA_SUFFIXES:
        raise SnrfError(f"data: {metric.data!r} must end in one of {', '.join(DATA_SUFFIXES)}")
    if not data.is_file():
        raise SnrfError(f"data: there is no file {data}; correct the path, which is relative to the evaluation's file")
    source = ProbeSource(
        dataset=str(data),
        question=metric.question,
        images=metric.images,
        answer=metric.answer,
        template=metric.template,
        limit=config.limit,
        seed=config.seed,
    )
    rows = load_rows(source, answers=True)
    if rows.bad:
        raise SnrfError(f"{rows.name}: {rows.bad[0]}; mend or remove it")
    pattern = regex.compile(metric.answer_regex) if metric.answer_regex is not None else None
    expected = {}
    for row in rows.rows:
        answer = row.answer or ""
        found = extract(pattern, answer)
        expected[row.number] = normalised(answer if found is None else found)
    asked = replace(rows, rows=tuple(replace(row, answer=None) for row in rows.rows))
    rule = AnswerRule(max_new_tokens=config.max_new_tokens)
    return _Metric(metric, rule, config.batch_size, asked, pattern, expected)


def _read_config(path: Path) -> ExactMatchConfig:
    raw = load_yaml(path, remedy="give the YAML file, not the data")
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else "is no mapping of keys to values"
        raise SnrfError(f"{path}: {found}; an evaluation begins with metrics:, see docs/evidence.md")
    try:
        return ExactMatchConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        fields = (MetricConfig if first["loc"][:1] == ("metrics",) else ExactMatchConfig).model_fields
        raise SnrfError(f"{path}: {problem(first, fields=fields)}") from None


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except SnrfError as error:
        # The profiler, which reads and renders the rows, knows only its own file.
        message = str(error)
        for theirs, ours in _WORDS.items():
            message = theirs.sub(ours, message)
        raise SnrfError(f"{where}: {message}") from None
