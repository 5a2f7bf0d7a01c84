"""The keys of profile.yml: which probes go through which model, what is measured and what is selected."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mergekit_snrf.errors import SnrfError, invalid
from mergekit_snrf.files.reading import load_yaml
from mergekit_snrf.files.settings import Settings
from mergekit_snrf.models.reference import Loading, ModelName, ModelRef
from mergekit_snrf.profiling.measure.meter import Measure
from mergekit_snrf.profiling.probes.source import (
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
    found_beside,
)
from mergekit_snrf.profiling.result.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Self

SideName = Literal["target", "source"]
SIDES: tuple[SideName, ...] = ("target", "source")

_Config = TypeVar("_Config", bound="RunConfig")
_Part = TypeVar("_Part", bound=Settings)
ANSWER_KEYS = {field: f"answer.{field}" for field in AnswerRule.model_fields}


class LocatedModel(ModelName):
    """A model whose folder may lie beside the file that names it."""

    _beside = field_validator("model")(found_beside)


class SideConfig(LocatedModel, Prompting):
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

    def kind_of(
        self,
        name: str,
        model: tuple[ModelName, str],
        columns: ProbeColumns,
        prompting: Prompting,
        keys: dict[str, str],
        **own: Any,
    ) -> Kind:
        """Return probes with what all share.

        ``model`` comes with what precedes its keys, ``own`` are a limit and a rule of their own.
        """
        written = part_of(ProbeColumns, columns)
        found = {**dict(written), "answer": columns.answer or self.answer.column, **dict(part_of(Prompting, prompting))}
        source = ProbeSource(**found, limit=own.get("limit") or self.limit, seed=self.seed)
        model_keys = {**{field: f"{model[1]}{field}" for field in ModelName.model_fields}, "images": keys["images"]}
        ref = ModelRef(**dict(part_of(ModelName, model[0])), **dict(part_of(Loading, self)))
        return Kind(name, ref, written, source, own.get("rule", self.answer), {**ANSWER_KEYS, **keys}, model_keys)

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
        sides = {"target": self.target} if self.source is None else {"target": self.target, "source": self.source}
        written: dict[str, ProbeColumns] = {f"{name}.probes": side.probes for name, side in sides.items()}
        return written | {f"keep.{index}": kind for index, kind in enumerate(self.keep)}

    def kinds(self) -> tuple[Kind, ...]:
        """Return the probes of both sides, with their models."""
        return tuple(self.kind(name) for name in SIDES)

    def kind(self, name: SideName) -> Kind:
        """Return the probes and the model of a side; an error if the source is missing."""
        side = self.target if name == "target" else self.source
        if side is None:
            raise SnrfError(None, f"key {name!r} is missing", "add it")
        keys = {field: f"{name}.probes.{field}" for field in ProbeColumns.model_fields}
        keys |= {field: f"{name}.{field}" for field in Prompting.model_fields}
        return self.kind_of(name, (side, f"{name}."), side.probes, side, keys)

    def kept(self) -> tuple[Kind, ...]:
        """Return the kinds of probes to keep, which go through the target."""
        found = []
        for index, kind in enumerate(self.keep):
            rule, prompting = self.answer, kind
            if kind.max_new_tokens is not None and rule.by == "model":
                rule = AnswerRule(max_new_tokens=kind.max_new_tokens)
            if kind.template is None and kind.chat_template_kwargs is None:
                # Chat templates get the variables that the target's side sets.
                prompting = kind.model_copy(update={"chat_template_kwargs": self.target.chat_template_kwargs})
            name, keys = kind.name or Path(kind.dataset).stem, keep_keys(index)
            own = {"limit": kind.limit, "rule": rule}
            found.append(self.kind_of(name, (self.target, "target."), kind, prompting, keys, **own))
        return tuple(found)

    @property
    def measure(self) -> Measure:
        """What counts as the impact of a neuron."""
        return part_of(Measure, self)


def keep_keys(index: int) -> dict[str, str]:
    """Return the keys of profile.yml that set the fields of one kind of probes to keep, for ``errors.naming``."""
    return {**ANSWER_KEYS, **{field: f"keep.{index}.{field}" for field in KeepConfig.model_fields}}


def part_of(of: type[_Part], value: Any) -> _Part:
    """Return the fields of one type out of a value that has more."""
    return of.model_construct(**{field: getattr(value, field) for field in of.model_fields})


def load_profile_config(path: str | os.PathLike[str]) -> ProfileConfig:
    """Return the checked content of a profile.yml; ``SnrfError`` names the key at fault.

    Relative paths of models and data files are looked for in the working folder, then beside the file.
    """
    return validated(ProfileConfig, read_settings(path, "target and source"), path, beside=Path(path).parent)


def read_settings(path: str | os.PathLike[str], keys: str) -> dict[str, Any]:
    """Return the content of a profile.yml, a mapping."""
    raw = load_yaml(path, remedy="use the path of a profile.yml")
    if not isinstance(raw, dict):
        raise SnrfError(path, f"must be a mapping with the keys {keys}", "see the examples folder")
    return raw


def validated(config: type[_Config], raw: Mapping[str, Any], where: object, beside: Path | None = None) -> _Config:
    """Return checked settings; ``SnrfError`` names every key that is unknown, missing or not allowed."""
    try:
        return config.model_validate(raw, context=beside)
    except ValidationError as error:
        found = [_problem(config, entry) for entry in error.errors()]
        problems = list({str(problem): problem for problem in found}.values())
        if len(problems) == 1:
            raise problems[0].at(where) from None
        raise SnrfError.several(f"{where}: the keys are not valid", problems) from None


def _problem(config: type[BaseModel], entry: Mapping[str, Any]) -> SnrfError:
    keys = [str(part) for part in entry["loc"]]
    raised = (entry.get("ctx") or {}).get("error")
    if isinstance(raised, SnrfError):
        return raised.at(field=".".join(keys))
    section: Any = config
    for key in keys[:-1]:
        field = section.model_fields.get(key) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = None if field is None else field.annotation
    fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()
    return invalid(None, [entry], fields=fields, keys=keys)
