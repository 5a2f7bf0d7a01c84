"""The keys of profile.yml: which probes go through which model, what is measured and what is selected."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from mergekit_snrf.errors import SnrfError, invalid
from mergekit_snrf.files.reading import load_yaml
from mergekit_snrf.models.reference import Loading, ModelName, ModelRef
from mergekit_snrf.profiling.measure.meter import Measure
from mergekit_snrf.profiling.probes.source import (
    DATA_SUFFIXES,
    AnswerRule,
    Count,
    Name,
    ProbeColumns,
    ProbeSource,
    PromptColumns,
    Prompting,
    Seed,
    Template,
    check_prompt,
)
from mergekit_snrf.profiling.result.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Self

SideName = Literal["target", "source"]
SIDES: tuple[SideName, ...] = ("target", "source")

_Columns = TypeVar("_Columns", bound=ProbeColumns)
_Config = TypeVar("_Config", bound="RunConfig")
MODEL_FIELDS = tuple(ModelName.model_fields)
ANSWER_KEYS = {field: f"answer.{field}" for field in AnswerRule.model_fields}


class SideConfig(ModelName, Prompting):
    """One of the two models, the target or the source, with its probes."""

    probes: ProbeColumns = Field(description="The data set and its columns.")

    @model_validator(mode="after")
    def _prompts_differ(self) -> SideConfig:
        check_prompt(self.probes.question, self.template)
        return self


class KeepConfig(PromptColumns):
    """One kind of probes that a merge keeps (``update: regmean``), such as counting, OCR or general questions."""

    name: Name | None = Field(default=None, description="For messages and results; default: the data set's.")
    limit: Count | None = Field(default=None, description="Rows drawn; default: limit of the profile.")
    max_new_tokens: Count | None = Field(default=None, description="Default: that of answer.")


@dataclass(frozen=True)
class Kind:
    """Probes of one kind, and the model that they go through.

    ``columns`` are as written, ``source`` has the column of the answers, template, limit and seed. ``keys`` and
    ``model_keys`` are those of profile.yml for the fields of probes and model (``errors.naming``).
    """

    name: str
    model: ModelRef
    columns: ProbeColumns
    source: ProbeSource
    rule: AnswerRule
    keys: dict[str, str]
    model_keys: dict[str, str]


class RunConfig(Loading):
    """The keys that all runs have: how rows become probes, and how the model is loaded."""

    answer: AnswerRule = Field(default=AnswerRule(), description="What follows every question.")
    limit: Count | None = Field(default=None, description="Rows drawn from each data set; default: all.")
    seed: Seed = Field(default=0, description="Seed of the draw of the rows.")
    template: Template | None = Field(default=None, description="For probes without a template of their own.")
    batch_size: Count = Field(default=8, description="Probes in a batch.")
    token_limit: Count | None = Field(
        default=None,
        description="A longer probe is left out and counted, never cut; default: the model's limit.",
    )

    @model_validator(mode="before")
    @classmethod
    def _share_template(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(template := values.get("template"), str):
            return values

        def with_template(one: Any) -> Any:
            return {"template": template, **one} if isinstance(one, Mapping) else one

        shared: dict[str, Any] = {side: with_template(values[side]) for side in SIDES if side in values}
        if isinstance(values.get("keep"), list):
            shared["keep"] = list(map(with_template, values["keep"]))
        if isinstance(values.get("domains"), Mapping):
            shared["domains"] = {name: with_template(one) for name, one in values["domains"].items()}
        return {**values, **shared}

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if self.answer.by == "column":
            written = self.written().items()
            lacking = next((key for key, one in written if not (one.answer or self.answer.column)), None)
            if lacking is not None:
                raise ValueError(
                    f"answer is {{by: column}}, but no column is named for {lacking}; add column to answer, or "
                    f"answer to {lacking}"
                )
        return self

    @abstractmethod
    def written(self) -> dict[str, ProbeColumns]:
        """Return all probes by the key under which they are written."""

    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """Return the probes that the run measures, with their models."""

    @abstractmethod
    def located(self, path: Path) -> Self:
        """Return a copy whose relative paths are looked up in the working folder, then beside the file."""

    def source_of(self, columns: ProbeColumns, prompting: Prompting, limit: int | None = None) -> ProbeSource:
        """Return where probes come from, with what all probes share."""
        found = {field: getattr(columns, field) for field in ProbeColumns.model_fields}
        found["answer"] = columns.answer or self.answer.column
        found |= {field: getattr(prompting, field) for field in Prompting.model_fields}
        return ProbeSource(**found, limit=limit or self.limit, seed=self.seed)

    def reference(self, written: Any) -> ModelRef:
        """Return the model that ``written`` names, as it is loaded."""
        shared = {key: getattr(self, key) for key in Loading.model_fields}
        return ModelRef(**{key: getattr(written, key) for key in MODEL_FIELDS}, **shared)

    def override(self, **values: Any) -> Self:
        """Return a copy with some top-level keys replaced and everything checked again; a None changes nothing."""
        given = {key: value for key, value in values.items() if value is not None}
        return validated(type(self), {**self.model_dump(exclude_unset=True), **given}, "profile options")


class ProfileConfig(RunConfig, Measure):
    """A checked profile.yml."""

    target: SideConfig = Field(description="The vision-language model and its probes.")
    source: SideConfig | None = Field(
        default=None, description="The text model and its probes; optional for snrf moments."
    )
    keep: tuple[KeepConfig, ...] = Field(
        default=(), description="Probes of the target that a merge keeps; with them the moments are taken, too."
    )
    sketch: Count | None = Field(
        default=None,
        description="Eigenvectors of the moments; default: dense up to 4096 inputs, 512 eigenvectors beyond.",
    )
    select: Selection = Field(default=Selection(top_ratio=0.1), description="The rule of Eq. 5.")
    backend: Literal["auto", "blocked", "sdpa"] = Field(
        default="auto", description="Kernel of attn.q and attn.k; the results agree up to rounding."
    )

    def written(self) -> dict[str, ProbeColumns]:
        """Return all probes by the key under which they are written."""
        written: dict[str, ProbeColumns] = {f"{name}.probes": self.side(name).probes for name in self.sides}
        return written | {f"keep.{index}": kind for index, kind in enumerate(self.keep)}

    def located(self, path: Path) -> ProfileConfig:
        """Return a copy whose relative paths are looked up in the working folder, then beside the file."""
        found: dict[str, Any] = {name: _located(self.side(name), path, name) for name in self.sides}
        kept = enumerate(self.keep)
        found["keep"] = tuple(located_data(kind, path, f"keep.{index}") for index, kind in kept)
        return self.model_copy(update=found)

    @property
    def sides(self) -> tuple[SideName, ...]:
        """The sides that are written."""
        return SIDES if self.source is not None else ("target",)

    def side(self, name: SideName) -> SideConfig:
        """Return one of the two sides, as it is written; an error if the source is missing."""
        side = self.target if name == "target" else self.source
        if side is None:
            raise SnrfError(None, f"key {name!r} is missing", "add it")
        return side

    def kinds(self) -> tuple[Kind, ...]:
        """Return the probes of both sides, with their models."""
        return tuple(self.kind(name) for name in SIDES)

    def kind(self, name: SideName) -> Kind:
        """Return the probes and the model of a side."""
        side = self.side(name)
        keys = {field: f"{name}.probes.{field}" for field in ProbeColumns.model_fields}
        keys |= {**{field: f"{name}.{field}" for field in Prompting.model_fields}, **ANSWER_KEYS}
        return Kind(
            name,
            self.model_of(name),
            side.probes,
            self.source_of(side.probes, side),
            self.answer,
            keys,
            {**{field: f"{name}.{field}" for field in MODEL_FIELDS}, "images": keys["images"]},
        )

    def kept(self) -> tuple[Kind, ...]:
        """Return the kinds of probes to keep, which go through the target."""
        return tuple(self._kept(index, kind) for index, kind in enumerate(self.keep))

    def _kept(self, index: int, kind: KeepConfig) -> Kind:
        rule, tokens = self.answer, kind.max_new_tokens
        keys = keep_keys(index)
        return Kind(
            kind.name or Path(kind.dataset).stem,
            self.model_of("target"),
            ProbeColumns(**{field: getattr(kind, field) for field in ProbeColumns.model_fields}),
            self.source_of(kind, self._prompting(kind), kind.limit),
            rule if tokens is None or rule.by != "model" else AnswerRule(max_new_tokens=tokens),
            keys,
            {**{field: f"target.{field}" for field in MODEL_FIELDS}, "images": keys["images"]},
        )

    def _prompting(self, kind: KeepConfig) -> Prompting:
        """Return how probes to keep are rendered: chat templates get the variables that the target's side sets."""
        if kind.template is not None or kind.chat_template_kwargs is not None:
            return kind
        return kind.model_copy(update={"chat_template_kwargs": self.target.chat_template_kwargs})

    def model_of(self, name: SideName) -> ModelRef:
        """Return the model of a side."""
        return self.reference(self.side(name))

    @property
    def measure(self) -> Measure:
        """What counts as the impact of a neuron."""
        return Measure(**{key: getattr(self, key) for key in Measure.model_fields})


def keep_keys(index: int) -> dict[str, str]:
    """Return the keys of profile.yml that set the fields of one kind of probes to keep, for ``errors.naming``."""
    return {**ANSWER_KEYS, **{field: f"keep.{index}.{field}" for field in KeepConfig.model_fields}}


def load_profile_config(path: str | os.PathLike[str]) -> ProfileConfig:
    """Return the checked content of a profile.yml; ``SnrfError`` names the key at fault.

    Relative paths of models and data files are looked for in the working folder, then beside the file.
    """
    raw = read_settings(path, "target and source")
    return validated(ProfileConfig, raw, path).located(Path(path))


def read_settings(path: str | os.PathLike[str], keys: str) -> dict[str, Any]:
    """Return the content of a profile.yml, a mapping."""
    raw = load_yaml(path, remedy="use the path of a profile.yml")
    if not isinstance(raw, dict):
        raise SnrfError(path, f"must be a mapping with the keys {keys}", "see the examples folder")
    return raw


def _located(side: SideConfig, path: Path, name: str) -> SideConfig:
    model = find_beside(side.model, path, f"{name}.model", "model")
    return side.model_copy(update={"model": model, "probes": located_data(side.probes, path, f"{name}.probes")})


def located_data(columns: _Columns, path: Path, key: str) -> _Columns:
    """Return probes with their data looked up in the working folder, then beside the file."""
    return columns.model_copy(update={"dataset": find_beside(columns.dataset, path, f"{key}.dataset", "dataset")})


def find_beside(value: str, path: Path, key: str, what: str) -> str:
    """Return ``value`` itself if it is in the working folder or a hub id, else its path beside profile.yml."""
    places = [Path(os.path.expanduser(value))]
    if not places[0].is_absolute():
        places.append(path.parent / value)
    for place in places:
        if os.path.exists(place):
            return value if str(place) == value else str(place)
    looks_local = value.startswith(("/", ".", "~")) or value.count("/") > 1 or Path(value).suffix in DATA_SUFFIXES
    if looks_local or (what == "model" and value.count("/") != 1):
        looked = " and ".join(str(place.absolute()) for place in places)
        message = f"{value!r} does not exist, looked for {looked}"
        raise SnrfError(path, message, f"correct the path, or use a hub id such as owner/{what}", field=f"key {key!r}")
    return value


def validated(config: type[_Config], raw: Mapping[str, Any], where: object) -> _Config:
    """Return checked settings; ``SnrfError`` names every key that is unknown, missing or not allowed."""
    try:
        return config.model_validate(raw)
    except ValidationError as error:
        found = [_problem(config, entry) for entry in error.errors()]
        problems = list({str(problem): problem for problem in found}.values())
        if len(problems) == 1:
            raise problems[0].at(where) from None
        raise SnrfError.several(f"{where}: the keys are not valid", problems) from None


def _problem(config: type[BaseModel], entry: Mapping[str, Any]) -> SnrfError:
    keys = [str(part) for part in entry["loc"]]
    section: Any = config
    for key in keys[:-1]:
        field = section.model_fields.get(key) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = None if field is None else field.annotation
    fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()
    return invalid(None, [entry], fields=fields, keys=keys)
