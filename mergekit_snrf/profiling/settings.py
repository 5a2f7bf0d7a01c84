"""The keys of profile.yml: which probes go through which model, what is measured and what is selected."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from mergekit_snrf.errors import SnrfError, invalid
from mergekit_snrf.files.reading import load_yaml
from mergekit_snrf.files.settings import Settings
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.profiling.measure.meter import Measure
from mergekit_snrf.profiling.probes.source import (
    DATA_SUFFIXES,
    AnswerRule,
    Count,
    Name,
    ProbeColumns,
    ProbeSource,
    Seed,
    Template,
    check_prompt,
)
from mergekit_snrf.profiling.result.selection import Selection

SideName = Literal["target", "source"]
SIDES: tuple[SideName, ...] = ("target", "source")


class SideConfig(Settings):
    """One of the two models, the target or the source, with its probes."""

    model: Name = Field(description="A folder or a hub id.")
    revision: Name | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    gguf_file: Name | None = Field(default=None, description="The file in the model to load if it is GGUF.")
    probes: ProbeColumns = Field(description="The data set and its columns.")
    template: Template | None = Field(default=None, description="Replaces the model's chat template.")

    @model_validator(mode="after")
    def _prompts_differ(self) -> SideConfig:
        check_prompt(self.probes.question, self.template)
        return self


class KeepConfig(ProbeColumns):
    """One kind of probes that a merge keeps (``update: regmean``), such as counting, OCR or general questions."""

    name: Name | None = Field(default=None, description="For messages and results; default: the data set's.")
    template: Template | None = Field(default=None, description="Replaces the model's chat template.")
    limit: Count | None = Field(default=None, description="Rows drawn; default: limit of the profile.")
    max_new_tokens: Count | None = Field(default=None, description="Default: that of answer.")

    @model_validator(mode="after")
    def _prompts_differ(self) -> KeepConfig:
        check_prompt(self.question, self.template)
        return self


class ProfileConfig(Settings):
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
    answer: AnswerRule = Field(default=AnswerRule(), description="What follows every question.")
    select: Selection = Field(default=Selection(top_ratio=0.1), description="The rule of Eq. 5.")
    limit: Count | None = Field(default=None, description="Rows drawn from each data set; default: all.")
    seed: Seed = Field(default=0, description="Seed of the draw of the rows.")
    template: Template | None = Field(default=None, description="For a side without a template of its own.")
    tokens: Literal["all", "answer"] = Field(default="all", description="The positions that count.")
    scoring: Literal["exact", "released"] = Field(
        default="exact", description="The exact impact (Eq. 14), or the score of the paper's released code."
    )
    weight: Literal["paper", "residual", "gradient"] = Field(
        default="paper", description="Weight of the positions: one, by the residual stream, or by a gradient."
    )
    site: Literal["pre_o", "post_o"] = Field(
        default="pre_o", description="Compare the attention output before or after o_proj."
    )
    backend: Literal["auto", "blocked", "sdpa"] = Field(
        default="auto", description="Kernel of attn.q and attn.k; the results agree up to rounding."
    )
    batch_size: Count = Field(default=8, description="Probes in a batch.")
    token_limit: Count | None = Field(
        default=None,
        description="A longer probe is left out and counted, never cut; default: the model's limit.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        default="auto", description="Dtype of the weights; auto: that of the checkpoint."
    )
    device: Name | None = Field(default=None, description="Such as cuda, cuda:1 or cpu; default: cuda if there is one.")
    device_map: Literal["auto"] | None = Field(default=None, description="auto: spread the layers over all devices.")
    trust_remote_code: bool = Field(default=False, strict=True, description="Run code of the checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _share_template(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("template"), str):
            return values
        shared = dict(values)
        for side in SIDES:
            if isinstance(shared.get(side), Mapping):
                shared[side] = {"template": values["template"], **shared[side]}
        if isinstance(shared.get("keep"), list):
            shared["keep"] = [
                {"template": values["template"], **kind} if isinstance(kind, Mapping) else kind
                for kind in shared["keep"]
            ]
        return shared

    @model_validator(mode="after")
    def _check_combinations(self) -> ProfileConfig:
        if self.device is not None and self.device_map is not None:
            raise ValueError("device and device_map exclude each other; device_map: auto uses all devices")
        if self.answer.by == "column":
            sources = {f"{name}.probes": self.probes_of(name) for name in self.sides}
            sources |= {f"keep.{index}": self.keep_source(index) for index in range(len(self.keep))}
            lacking = next((key for key, source in sources.items() if source.answer is None), None)
            if lacking is not None:
                raise ValueError(
                    f"answer is {{by: column}}, but no column is named for {lacking}; add column to answer, or "
                    f"answer to {lacking}"
                )
        for key in ("weight", "site", "backend"):
            if self.scoring == "released" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no meaning with scoring: released; remove it")
        return self

    @property
    def sides(self) -> tuple[SideName, ...]:
        """The sides that are written."""
        return SIDES if self.source is not None else ("target",)

    def side(self, name: SideName) -> SideConfig:
        """Return one of the two sides, as it is written.

        Raises:
            SnrfError: the source is not written.
        """
        side = self.target if name == "target" else self.source
        if side is None:
            raise SnrfError(None, f"key {name!r} is missing", "add it")
        return side

    def keep_source(self, index: int) -> ProbeSource:
        """Return the probe source of one kind of probes to keep."""
        kind = self.keep[index]
        columns = {key: getattr(kind, key) for key in ProbeColumns.model_fields}
        columns["answer"] = kind.answer or self.answer.column
        return ProbeSource(**columns, template=kind.template, limit=kind.limit or self.limit, seed=self.seed)

    def keep_rule(self, index: int) -> AnswerRule:
        """Return where the answers of one kind of probes to keep come from."""
        tokens = self.keep[index].max_new_tokens
        if tokens is None or self.answer.by == "column":
            return self.answer
        return AnswerRule(max_new_tokens=tokens)

    def keep_name(self, index: int) -> str:
        """Return the name of one kind of probes to keep."""
        return self.keep[index].name or Path(self.keep[index].dataset).stem

    def model_of(self, name: SideName) -> ModelRef:
        """Return the model of a side."""
        side = self.side(name)
        return ModelRef(
            model=side.model,
            revision=side.revision,
            gguf_file=side.gguf_file,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )

    def probes_of(self, name: SideName) -> ProbeSource:
        """Return the probe source of a side."""
        side = self.side(name)
        columns = {**side.probes.model_dump(), "answer": side.probes.answer or self.answer.column}
        return ProbeSource(**columns, template=side.template, limit=self.limit, seed=self.seed)

    @property
    def measure(self) -> Measure:
        """What counts as the impact of a neuron."""
        return Measure(scoring=self.scoring, weight=self.weight, site=self.site, tokens=self.tokens)

    def override(self, **values: Any) -> ProfileConfig:
        """Return a copy with some top-level keys replaced and everything checked again; a None changes nothing.

        Raises:
            SnrfError: a value is not allowed.
        """
        given = {key: value for key, value in values.items() if value is not None}
        return _validated({**self.model_dump(exclude_unset=True), **given}, "profile options")


def model_keys(side: SideName) -> dict[str, str]:
    """Return the keys of profile.yml that set the fields of a side's model, for ``errors.naming``."""
    keys = {field: f"{side}.{field}" for field in ("model", "revision", "gguf_file")}
    return {**keys, "images": f"{side}.probes.images"}


def probe_keys(side: SideName) -> dict[str, str]:
    """Return the keys of profile.yml that set the fields of a side's probes and answers, for ``errors.naming``."""
    keys = {field: f"{side}.probes.{field}" for field in ProbeColumns.model_fields}
    return {**keys, "template": f"{side}.template", **{key: f"answer.{key}" for key in AnswerRule.model_fields}}


def keep_keys(index: int) -> dict[str, str]:
    """Return the keys of profile.yml that set the fields of one kind of probes to keep, for ``errors.naming``."""
    keys = {field: f"keep.{index}.{field}" for field in KeepConfig.model_fields}
    return {**{key: f"answer.{key}" for key in AnswerRule.model_fields}, **keys}


def load_profile_config(path: str | os.PathLike[str]) -> ProfileConfig:
    """Return the checked content of a profile.yml.

    Relative paths of models and data files are looked for in the working folder, then beside the file.

    Raises:
        SnrfError: the file cannot be read, is not YAML, or a key is unknown, missing or has a value that is not
            allowed.
    """
    path = Path(path)
    raw = load_yaml(path, remedy="use the path of a profile.yml")
    if not isinstance(raw, dict):
        raise SnrfError(path, "must be a mapping with the keys target and source", "see the examples folder")
    config = _validated(raw, path)
    located: dict[str, Any] = {name: _located(config.side(name), path, name) for name in config.sides}
    located["keep"] = tuple(
        kind.model_copy(update={"dataset": _find(kind.dataset, path, f"keep.{index}.dataset", "dataset")})
        for index, kind in enumerate(config.keep)
    )
    return config.model_copy(update=located)


def _located(side: SideConfig, path: Path, name: str) -> SideConfig:
    model = _find(side.model, path, f"{name}.model", "model")
    dataset = _find(side.probes.dataset, path, f"{name}.probes.dataset", "dataset")
    probes = side.probes.model_copy(update={"dataset": dataset})
    return side.model_copy(update={"model": model, "probes": probes})


def _find(value: str, path: Path, key: str, what: str) -> str:
    """Return ``value`` itself if it is in the working folder or a hub id, else its path beside profile.yml."""
    places = [Path(value).expanduser()]
    if not places[0].is_absolute():
        places.append(path.parent / value)
    for place in places:
        if place.exists():
            return value if str(place) == value else str(place)
    looks_local = value.startswith(("/", ".", "~")) or value.count("/") > 1 or Path(value).suffix in DATA_SUFFIXES
    if looks_local or (what == "model" and value.count("/") != 1):
        looked = " and ".join(str(place.absolute()) for place in places)
        raise SnrfError(
            path,
            f"{value!r} does not exist, looked for {looked}",
            f"correct the path, or use a hub id such as owner/{what}",
            field=f"key {key!r}",
        )
    return value


def _validated(raw: Mapping[str, Any], where: object) -> ProfileConfig:
    try:
        return ProfileConfig.model_validate(raw)
    except ValidationError as error:
        problems = list({str(problem): problem for problem in map(_problem, error.errors())}.values())
        if len(problems) == 1:
            raise problems[0].at(where) from None
        raise SnrfError.several(f"{where}: the keys are not valid", problems) from None


def _problem(entry: Mapping[str, Any]) -> SnrfError:
    keys = [str(part) for part in entry["loc"]]
    section: Any = ProfileConfig
    for key in keys[:-1]:
        field = section.model_fields.get(key) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = None if field is None else field.annotation
    fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()
    return invalid(None, [entry], fields=fields, keys=keys)
