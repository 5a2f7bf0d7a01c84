"""A recipe: read from YAML, and checked against what mergekit ignores and SNRF must refuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    MergeConfiguration,
    ParameterSetting,
    evaluate_setting,
)
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.parameter_resolver import resolve_parameters
from pydantic import ValidationError

from mergekit_snrf.errors import SnrfError, did_you_mean, first_line, invalid
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge.method import ALL_NEURONS, OF_FUSION, SPEC
from mergekit_snrf.models.shards import FLOAT_DTYPES

_SPECS = {parameter.name: parameter for parameter in SPEC.parameters}
_OF_DARE = ("drop_rate", "seed", "rescale")
_OF_LOW_RANK = ("rank", "order")
_OF_REGMEAN = ("moments", "keep")
_TOP = "parameters"


@dataclass(frozen=True)
class Recipe:
    """A checked SNRF recipe; its target is mergekit's base_model.

    Attributes:
        source_parameters: as written under ``models``.
        parameters: as written at the top level.
        source_base: the model that Delta is taken from; None: the target.
        dtype: every tensor is read in it; None: as stored.
        out_dtype: every tensor is written in it; None: as it was computed.
    """

    target: ModelReference
    source: ModelReference
    source_parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)
    parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)
    source_base: ModelReference | None = None
    dtype: str | None = None
    out_dtype: str | None = None

    def value(self, name: str) -> Any:
        """Return a parameter that holds for the whole merge; its default where the recipe's value is invalid."""
        spec = _SPECS[name]
        try:
            return spec.validate(self.parameters.get(name, spec.default))
        except ValueError:
            return spec.default

    def fusion(self, tensor_name: str, t: float) -> Fusion:
        """Resolve what ``Fusion`` holds for one tensor as mergekit would; ``SnrfError``: a value is not allowed.

        ``filter`` entries match parts of its name on the target; ``t`` in [0, 1] is its layer's place, for gradients.
        """
        try:
            shared, by_source = resolve_parameters(
                SPEC,
                tensor_name=tensor_name,
                inputs={self.target: tensor_name, self.source: tensor_name},
                sources=self._sources,
                base_model=self.target,
                t=t,
            )
        except ValidationError as error:
            raise invalid(tensor_name, error.errors()) from None
        except (ValueError, RuntimeError) as error:
            raise SnrfError(tensor_name, first_line(error)) from None
        values = {**shared, **by_source[self.source]}
        # What no part of the recipe sets for this tensor has the default of its update.
        return Fusion(**{name: values[name] for name in OF_FUSION if self._is_set(name, tensor_name, t)})

    def _is_set(self, name: str, tensor_name: str, t: float) -> bool:
        written = [scope[name] for scope in self._sources(self.source) if name in scope]
        validate = _SPECS[name].validate
        return any(evaluate_setting(tensor_name, one, t, validate=validate) is not None for one in written)

    def _sources(self, model: ModelReference | None = None) -> Iterable[Mapping[str, ParameterSetting]]:
        if model == self.source:
            yield self.source_parameters
        yield self.parameters

    def filters(self) -> list[str]:
        """Return every ``filter`` text of the recipe."""
        written = [*self.parameters.values(), *self.source_parameters.values()]
        return [entry.filter for setting in written for entry in _conditionals(setting) if entry.filter]

    def wider_dtype(self, stored: str) -> str | None:
        """Return ``out_dtype`` where it is wider than what the maths would be rounded to before it is applied.

        ``stored`` is the dtype of the target's tensor in its file, such as ``BF16``.
        """
        working = dtype_from_name(self.dtype or FLOAT_DTYPES[stored])
        out: torch.dtype | None = dtype_from_name(self.out_dtype)
        return self.out_dtype if out is not None and out.itemsize > working.itemsize else None

    def working_dtype(self, stored: str) -> str | None:
        """Return the dtype that an edited tensor is computed in, None for the stored one."""
        return self.wider_dtype(stored) or self.dtype


def stray_keys(content: Any) -> list[SnrfError]:
    """Return a problem for every key outside the parameters of an snrf recipe that mergekit would ignore.

    ``name`` (of a stage of mergekit-multi) and keys that begin with ``x-`` (anchors) are allowed at the top.
    """
    if not isinstance(content, Mapping) or content.get("merge_method") != SPEC.name:
        return []
    own = {key: value for key, value in content.items() if key != "name" and not str(key).startswith("x-")}
    found = _strays(own, MergeConfiguration.model_fields, "at the top of the recipe")
    models = content.get("models")
    for entry in models if isinstance(models, list) else []:
        if isinstance(entry, Mapping):
            where = f"beside the model {entry.get('model', '')}".strip()
            found += _strays(entry, InputModelDefinition.model_fields, where)
    return found


def _strays(content: Mapping[Any, Any], known: Iterable[str], where: str) -> list[SnrfError]:
    problems = []
    for key in content:
        if key in _SPECS:
            problems.append(SnrfError(None, f"{key!r} {where} has no effect", f"move it under '{_TOP}:'"))
        elif key not in known:
            hint = did_you_mean(str(key), known, "the keys there are")
            problems.append(SnrfError(None, f"unknown key {key!r} {where}", hint))
    return problems


def read_recipe(config: MergeConfiguration, problems: list[SnrfError]) -> Recipe | None:
    """Return the recipe of a mergekit configuration, None if it does not name one target and one source.

    ``problems`` receives one entry for every rule that is broken.
    """
    _check_keys(config, problems)
    models = list(config.models or [])
    target = config.base_model if config.base_model and config.base_model.model.path else None
    if target is None:
        what = "set it to the vision-language model that receives the update (the target)"
        problems.append(SnrfError(None, "is missing", what, field="base_model"))
    sources = [entry for entry in models if entry.model != config.base_model]
    if models and len(sources) != 1:
        names = ", ".join(str(entry.model) for entry in sources) or "only the base_model itself"
        what = f"must list exactly one source besides the base_model, got {names}"
        problems.append(SnrfError(None, what, field="models"))
    for entry in models:
        if entry.model == config.base_model and entry.parameters:
            what = f"parameters of the base_model have no effect ({', '.join(entry.parameters)})"
            problems.append(SnrfError(entry.model, what, "move them to the source"))
    if any(not entry.model.model.path for entry in models):
        what = "a model has no name"
        problems.append(SnrfError(None, what, "write a folder or a hub id such as owner/model", field="models"))
    written = config.parameters or {}
    count = len(problems)
    _check_parameters(written, sources, problems)
    if len(problems) == count:
        _check_combinations([written, *(entry.parameters or {} for entry in sources)], problems)
    base = _source_base(written.get("source_base"), problems)
    if target is None or len(sources) != 1 or not sources[0].model.model.path:
        return None
    source = sources[0]
    return Recipe(target, source.model, source.parameters or {}, written, base, config.dtype, config.out_dtype)


def _check_keys(config: MergeConfiguration, problems: list[SnrfError]) -> None:
    if config.merge_method != SPEC.name:
        what, remedy = f"must be {SPEC.name}, got {config.merge_method!r}", "use a recipe of that method"
        problems.append(SnrfError(None, what, remedy, field="merge_method"))
    if config.slices or config.modules:
        remedy = "list the source under 'models' and the target as base_model"
        used = "slices" if config.slices else "modules"
        problems.append(SnrfError(None, "is not supported by snrf", remedy, field=used))
    if config.tokenizer_source is not None or config.tokenizer is not None:
        what = "is not supported by snrf: embeddings and tokenizer stay those of the target"
        used = "tokenizer_source" if config.tokenizer_source is not None else "tokenizer"
        problems.append(SnrfError(None, what, "remove it", field=used))


def _source_base(setting: object, problems: list[SnrfError]) -> ModelReference | None:
    if not isinstance(setting, str):
        return None
    try:
        if not setting.strip():
            raise ValueError("it names no model")
        return ModelReference.parse(setting)
    except (ValueError, RuntimeError) as error:
        what = f"{setting!r} is not valid ({first_line(error)})"
        remedy = "give the folder or hub id of the model that the source was trained from, or remove it"
        problems.append(SnrfError(_TOP, what, remedy, field="source_base"))
        return None


def _check_combinations(places: list[Mapping[str, ParameterSetting]], problems: list[SnrfError]) -> None:
    """Refuse parameters that have no effect beside the others; each is valid by itself."""

    def written(name: str) -> list[Any]:
        return [value for place in places if name in place for value in _scalars(place[name])]

    def value(name: str) -> Any:
        return _SPECS[name].validate((written(name) or [_SPECS[name].default])[0])

    def without_effect(name: str, why: str, remedy: str) -> None:
        problems.append(SnrfError(_TOP, f"has no effect {why}", remedy, field=name))

    if written("masks_sha256") and value("masks") == ALL_NEURONS:
        without_effect("masks_sha256", "with masks: all", "remove it, or write the path of a mask file")
    if value("update") == "regmean":
        for name in filter(written, (*_OF_DARE, "biases")):
            without_effect(name, "with update: regmean, which moves weights as their inputs say", "remove it")
        if not written("moments"):
            problems.append(SnrfError(_TOP, "is missing", "write the path of a moments file", field="moments"))
    for name in filter(written, _OF_REGMEAN if value("update") != "regmean" else ()):
        without_effect(name, "without update: regmean", "remove it, or write update: regmean")
    if value("update") == "dare":
        for name in filter(written, _OF_LOW_RANK):
            without_effect(name, "with update: dare, which truncates nothing", "remove it")
        return
    for name in filter(written, _OF_DARE if value("update") == "low-rank" else ()):
        without_effect(name, "without update: dare", "remove it, or write update: dare")
    by_filter = any(_conditionals(place["rank"]) for place in places if "rank" in place)
    full_rank = bool(written("rank")) and not any(map(float, written("rank"))) and not by_filter
    if full_rank and value("order") == "mask-then-svd":
        without_effect("order", "with rank: 0, which truncates nothing", "remove it, or give a rank")


def _check_parameters(
    top_level: Mapping[str, ParameterSetting], sources: list[InputModelDefinition], problems: list[SnrfError]
) -> None:
    needed = top_level.get("update") != "regmean"
    if needed and "masks" not in top_level and not any("masks" in (entry.parameters or {}) for entry in sources):
        problems.append(SnrfError(_TOP, "is missing", "write the path of a mask file, or all", field="masks"))
    for name, setting in top_level.items():
        _check_parameter(name, setting, _TOP, problems)
    for entry in sources:
        where = f"{_TOP} of {entry.model}"
        for name, setting in (entry.parameters or {}).items():
            spec = _SPECS.get(name)
            if spec is not None and spec.scope == ParameterScope.SHARED:
                what = "has no effect under a model"
                problems.append(SnrfError(where, what, "move it to the recipe's top-level parameters", field=name))
            else:
                _check_parameter(name, setting, where, problems)


def _check_parameter(name: str, setting: ParameterSetting, where: str, problems: list[SnrfError]) -> None:
    spec = _SPECS.get(name)
    if spec is None:
        hint = did_you_mean(name, _SPECS, "the parameters are")
        problems.append(SnrfError(where, f"unknown parameter {name!r}", hint))
        return
    if spec.scope == ParameterScope.SHARED and not isinstance(setting, (str, bool, int, float)):
        what = "must be one plain value, not a gradient or a list of filters"
        problems.append(SnrfError(where, what, field=name))
        return
    values = list(_scalars(setting))
    if not values:
        problems.append(SnrfError(where, "is an empty list", "give a value, or remove it", field=name))
    for value in values:
        try:
            _check_value(spec, value)
        except SnrfError as error:
            problems.append(error.at(where, field=name))
            return


def _check_value(spec: ParameterSpec, value: Any) -> None:
    if isinstance(value, bool) and spec.value_type is not bool:
        raise SnrfError(None, f"must be a number or text, got {str(value).lower()}")
    if spec.name == "rank" and isinstance(value, float) and not value.is_integer():
        raise SnrfError(None, f"must be a whole number, got {value}")
    try:
        checked = spec.validate(value)
    except ValidationError as error:
        raise invalid(None, error.errors()) from None
    if spec.name in OF_FUSION:
        Fusion(**{spec.name: checked})


def _conditionals(setting: ParameterSetting) -> list[ConditionalParameter]:
    entries = setting if isinstance(setting, list) else [setting]
    return [entry for entry in entries if isinstance(entry, ConditionalParameter)]


def _scalars(setting: ParameterSetting) -> Iterator[Any]:
    if isinstance(setting, ConditionalParameter):
        yield from _scalars(setting.value)
    elif isinstance(setting, list):
        for entry in setting:
            yield from _scalars(entry)
    else:
        yield setting
