"""The keys of profile.yml: which probes go through which model, what is measured and what is selected."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.sets import PROJECTIONS
from mergekit_snrf.profiling.probes.template import template_fields

DATA_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Local data files and the ``datasets`` builder that reads them."""


def _number(value: Any) -> Any:
    # PyYAML reads 1e-3 as text, for want of the dot in 1.0e-3.
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"expected a number, got {value!r}") from None
    return value


_Number = Annotated[float, BeforeValidator(_number)]
_Ratio = Annotated[_Number, Field(gt=0, le=1)]
_Count = Annotated[int, Field(ge=1, strict=True)]
_Name = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ProbesConfig(_Section):
    """Where the probes of one model come from.

    Attributes:
        dataset: a hub id, a local .jsonl, .json, .parquet or .csv file, or a folder that ``datasets`` can read.
        config: the dataset's configuration, such as ``main``.
        split: such as ``train`` or ``train[:500]``; may be left out where there is only one.
        revision: of the hub id.
        question: the column that holds the question; may be left out if ``template`` names the columns.
        images: the column that holds the images, one or several a row.
        answer: the column that holds the answer; used with ``answer: {by: column}``.
    """

    dataset: _Name
    config: _Name | None = None
    split: _Name | None = None
    revision: _Name | None = None
    question: _Name | None = None
    images: _Name | None = None
    answer: _Name | None = None


class SideConfig(_Section):
    """One of the two models, the target or the source.

    Attributes:
        model: a folder or a hub id.
        revision: of the hub id.
        gguf_file: the file in ``model`` to load where the weights are GGUF.
        template: a format string over the row's columns that takes the place of the model's chat template;
            ``<image>`` stands where an image goes.
    """

    model: _Name
    revision: _Name | None = None
    gguf_file: _Name | None = None
    probes: ProbesConfig
    template: _Name | None = None

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            template_fields(template)
        return template

    @model_validator(mode="after")
    def _check_question(self) -> SideConfig:
        if self.template is None and self.probes.question is None:
            raise ValueError(
                "probes.question is missing; name the column that holds the question, or write a template over the "
                "columns, such as template: '{question}'"
            )
        return self


class AnswerConfig(_Section):
    """Where the answer that is appended to a question comes from.

    Attributes:
        by: ``model``: generated greedily by the profiled model itself; ``column``: read from the dataset.
        max_new_tokens: at most as many tokens are generated.
        column: the column of both datasets; ``probes.answer`` says it for one of them.
    """

    by: Literal["model", "column"] = "model"
    max_new_tokens: _Count = 512
    column: _Name | None = None

    @model_validator(mode="after")
    def _check_keys(self) -> AnswerConfig:
        if self.by == "model" and self.column is not None:
            raise ValueError("column goes with by: column, not with by: model; remove one of them")
        if self.by == "column" and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_new_tokens goes with by: model, not with by: column; remove one of them")
        return self


class SelectConfig(_Section):
    """Which neurons count as activated (Eq. 5): a share of every layer and projection, or a threshold.

    Attributes:
        top_ratio: a share in (0, 1], or one for each of ``attn`` and ``fwd`` or of single projections.
        sigma: the smallest impact that counts.
        at_least: with ``top_ratio``, the share of the probes on which a neuron must be in the top; None: all.
    """

    top_ratio: _Ratio | dict[str, _Ratio] | None = None
    sigma: Annotated[_Number, Field(ge=0, allow_inf_nan=False)] | None = None
    at_least: _Ratio | None = None

    @model_validator(mode="after")
    def _check_rule(self) -> SelectConfig:
        if (self.top_ratio is None) == (self.sigma is None):
            raise ValueError("give one rule, top_ratio or sigma, such as {top_ratio: 0.1}")
        if self.at_least is not None and self.top_ratio is None:
            raise ValueError("at_least goes with top_ratio, not with sigma")
        if isinstance(self.top_ratio, dict):
            allowed = [*_KINDS, *PROJECTIONS]
            for name in self.top_ratio:
                if name not in allowed:
                    raise ValueError(f"top_ratio has no {name!r}; allowed are {', '.join(allowed)}")
            for name in PROJECTIONS:
                if name not in self.top_ratio and _kind(name) not in self.top_ratio:
                    raise ValueError(f"top_ratio says nothing of {name}; add {_kind(name)!r} or {name!r}")
        return self

    def ratio(self, projection: str) -> float | None:
        """Return the top ratio of a projection, or None where the rule is ``sigma``."""
        if isinstance(self.top_ratio, dict):
            return self.top_ratio.get(projection, self.top_ratio.get(_kind(projection)))
        return self.top_ratio


def _kind(projection: str) -> str:
    return projection.split(".")[0]


_KINDS = tuple(dict.fromkeys(map(_kind, PROJECTIONS)))


class ProfileConfig(_Section):
    """A checked profile.yml.

    Attributes:
        target: the vision-language model and its probes.
        source: the text-only model and its probes.
        answer: what is appended to every question.
        select: the rule of Eq. 5.
        limit: rows taken from each dataset; None: all.
        seed: of the draw of the rows, in [0, 2**32).
        template: for a side that has none of its own.
        tokens: impact over the whole sequence, or over the answer's tokens.
        scoring: the exact impact (Eq. 14), or the score of the paper's released code.
        weight: weight of the positions: all one, by the residual stream, or by a gradient.
        site: compare the attention output before or after o_proj.
        backend: what computes the impacts of attn.q and attn.k: ``blocked``, ``sdpa``, or ``auto`` for the one that
            suits the device. They agree up to rounding.
        batch_size: probes in a batch.
        token_limit: a probe of more tokens is left out and counted, never cut.
        dtype: of the model's weights; ``auto`` is that of the checkpoint.
        device: such as ``cuda``, ``cuda:1`` or ``cpu``; None: cuda if there is one.
        device_map: ``auto`` spreads a model over all devices.
        trust_remote_code: run code that lies in the checkpoint.
    """

    target: SideConfig
    source: SideConfig
    answer: AnswerConfig = AnswerConfig()
    select: SelectConfig = SelectConfig(top_ratio=0.1)
    limit: _Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    template: _Name | None = None
    tokens: Literal["all", "answer"] = "all"
    scoring: Literal["exact", "released"] = "exact"
    weight: Literal["paper", "residual", "gradient"] = "paper"
    site: Literal["pre_o", "post_o"] = "pre_o"
    backend: Literal["auto", "blocked", "sdpa"] = "auto"
    batch_size: _Count = 8
    token_limit: _Count | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    device: _Name | None = None
    device_map: Literal["auto"] | None = None
    trust_remote_code: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="before")
    @classmethod
    def _share_template(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("template"), str):
            return values
        shared = dict(values)
        for side in ("target", "source"):
            if isinstance(shared.get(side), Mapping):
                shared[side] = {"template": values["template"], **shared[side]}
        return shared

    @model_validator(mode="after")
    def _check_combinations(self) -> ProfileConfig:
        if self.device is not None and self.device_map is not None:
            raise ValueError("device and device_map exclude each other; device_map: auto uses every device there is")
        if self.answer.by == "column":
            for name, side in (("target", self.target), ("source", self.source)):
                if answer_column(side, self) is None:
                    raise ValueError(
                        f"answer is {{by: column}}, but no column is named for the {name}; add column to answer, or "
                        f"answer to {name}.probes"
                    )
        for key in ("weight", "site", "backend"):
            if self.scoring == "released" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no meaning with scoring: released; remove it")
        return self

    def override(self, **values: Any) -> ProfileConfig:
        """Return a copy with some top-level keys replaced and everything checked again; a None changes nothing.

        Raises:
            SnrfError: a value is not allowed.
        """
        given = {key: value for key, value in values.items() if value is not None}
        return _validated({**self.model_dump(exclude_unset=True), **given}, "profile options")


def model_ref(side: SideConfig, **options: Any) -> ModelRef:
    """Return the model of a side, with dtype, device, device_map and trust_remote_code as given."""
    return ModelRef(model=side.model, revision=side.revision, gguf_file=side.gguf_file, **options)


def answer_column(side: SideConfig, config: ProfileConfig) -> str | None:
    """Return the column with this side's answers, or None where the model generates them."""
    if config.answer.by == "model":
        return None
    return side.probes.answer or config.answer.column


def load_profile_config(path: str | os.PathLike[str]) -> ProfileConfig:
    """Read and check a profile.yml.

    Relative paths of models and data files are looked for in the working folder, then beside the file.

    Raises:
        SnrfError: the file cannot be read, is not YAML, or a key is unknown, missing or has a value that is not
            allowed; the message names the file, the key and what is allowed.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SnrfError(f"{path}: cannot be read ({error.strerror or error}); give the path of a profile.yml") from None
    except UnicodeDecodeError:
        raise SnrfError(f"{path}: is not a text file; give the path of a profile.yml") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise SnrfError(f"{path}: not valid YAML{where} ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(raw, dict):
        raise SnrfError(f"{path}: must be a mapping with the keys target and source, see the examples folder")
    config = _validated(raw, str(path))
    sides = {name: _located(getattr(config, name), path, name) for name in ("target", "source")}
    return config.model_copy(update=sides)


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
            f"{path}: key {key!r}: {value!r} does not exist, looked for {looked}; correct the path, or give a hub id "
            f"such as owner/{what}"
        )
    return value


def _validated(raw: Mapping[str, Any], where: str) -> ProfileConfig:
    try:
        return ProfileConfig.model_validate(raw)
    except ValidationError as error:
        # A value that fits neither branch of "a number or a mapping" is told of the branch it was meant for.
        entries = [
            entry for entry in error.errors() if isinstance(entry["input"], dict) or entry["type"] != "dict_type"
        ]
        entries = [entry for entry in entries if not (isinstance(entry["input"], dict) and "float" in entry["type"])]
        problems = dict.fromkeys(map(_problem, entries))
        raise SnrfError(f"{where}: {'; '.join(problems)}") from None


_SECTIONS: dict[str, type[_Section]] = {
    "target": SideConfig,
    "source": SideConfig,
    "probes": ProbesConfig,
    "answer": AnswerConfig,
    "select": SelectConfig,
}


def _problem(entry: Mapping[str, Any]) -> str:
    # pydantic adds the branch of a union to the place, such as 'float' or 'constrained-float'.
    keys = [str(part) for part in entry["loc"] if not _is_branch(str(part))]
    key = ".".join(keys)
    if entry["type"] == "extra_forbidden":
        section = _SECTIONS[keys[-2]] if len(keys) > 1 else ProfileConfig
        close = difflib.get_close_matches(keys[-1], section.model_fields, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}the keys there are {', '.join(section.model_fields)}"
    if entry["type"] == "missing":
        return f"key {key!r} is missing"
    message = str(entry["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    got = f", got {entry['input']!r}" if isinstance(entry["input"], (str, int, float, bool)) else ""
    message = message[0].lower() + message[1:]
    return f"key {key!r}: {message}" + (got if "got " not in message and entry["type"] != "value_error" else "")


def _is_branch(part: str) -> bool:
    return part.startswith(("dict[", "float", "function-", "constrained-"))
