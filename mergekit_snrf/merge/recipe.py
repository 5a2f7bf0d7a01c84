"""A recipe's own rules: what mergekit accepts silently and SNRF must refuse."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, InputModelDefinition, MergeConfiguration, ParameterSetting
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.parameter_resolver import resolve_parameters
from pydantic import ValidationError

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge.method import SPEC

_SPECS: Mapping[str, ParameterSpec] = {parameter.name: parameter for parameter in SPEC.parameters}
# These hold for the whole merge: one value, no gradient and no filter.
_PLAIN = tuple(parameter.name for parameter in SPEC.shared_parameters)
_FUSION = tuple(entry.name for entry in fields(Fusion))
_OF_DARE = ("drop_rate", "seed", "rescale")
_OF_LOW_RANK = ("rank", "order")


@dataclass(frozen=True)
class Recipe:
    """A checked SNRF recipe.

    Attributes:
        target: mergekit's base_model.
        source: the one other model.
        source_parameters: as written under ``models``.
        parameters: as written at the top level.
        source_base: the model that Delta is taken from; None: the target.
    """

    target: ModelReference
    source: ModelReference
    source_parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)
    parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)
    source_base: ModelReference | None = None

    def value(self, name: str) -> Any:
        """Return a parameter that holds for the whole merge."""
        spec = _SPECS[name]
        return spec.validate(self.parameters.get(name, spec.default))

    def fusion(self, tensor_name: str, t: float) -> Fusion:
        """Resolve what ``Fusion`` holds for one tensor exactly as mergekit will.

        Args:
            tensor_name: on the target; ``filter`` entries match parts of it.
            t: position of the layer in the stack, in [0, 1], for gradients.

        Raises:
            SnrfError: a value is of the wrong type or out of range.
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
        except (ValidationError, ValueError, RuntimeError) as error:
            raise SnrfError(f"{tensor_name}: {_first_line(error)}") from None
        return fusion_of(shared, by_source[self.source])

    def _sources(self, model: ModelReference | None = None) -> Iterable[Mapping[str, ParameterSetting]]:
        if model == self.source:
            yield self.source_parameters
        yield self.parameters

    def filters(self) -> list[str]:
        """Return every ``filter`` text of the recipe."""
        settings = [*self.parameters.values(), *self.source_parameters.values()]
        return [entry.filter for setting in settings for entry in _conditionals(setting) if entry.filter]


def fusion_of(shared: Mapping[str, Any], of_source: Mapping[str, Any]) -> Fusion:
    """Return what the parameters of one tensor say, those of the whole merge and those of the source.

    A parameter that is left out has its default.

    Raises:
        SnrfError: a value is out of range, or values exclude each other.
    """
    values = {**shared, **of_source}
    return Fusion(**{name: values[name] for name in _FUSION if name in values})


def default(name: str) -> Any:
    """Return the default of a parameter."""
    return _SPECS[name].default


def read_recipe(config: MergeConfiguration, problems: list[str]) -> Recipe | None:
    """Check a mergekit configuration against SNRF's rules.

    Args:
        config: as mergekit parsed it.
        problems: takes one sentence for every rule that is broken.

    Returns:
        The recipe, or None if target and source cannot be told.
    """
    if config.merge_method != SPEC.name:
        problems.append(f"merge_method is {config.merge_method!r}; this command is for recipes with merge_method: snrf")
    if config.slices or config.modules:
        used = "slices" if config.slices else "modules"
        problems.append(
            f"'{used}' is not supported by snrf; list the source under 'models' and the target as base_model"
        )
    if config.tokenizer_source is not None or config.tokenizer is not None:
        used = "tokenizer_source" if config.tokenizer_source is not None else "tokenizer"
        problems.append(
            f"'{used}' is not supported by snrf: embeddings and tokenizer stay the target's; remove it from the recipe"
        )
    models = list(config.models or [])
    target = config.base_model if config.base_model and config.base_model.model.path else None
    if target is None:
        problems.append(
            "base_model is missing; set it to the vision-language model that shall gain reasoning (the target)"
        )
    sources = [entry for entry in models if entry.model != config.base_model]
    if models and len(sources) != 1:
        names = ", ".join(str(entry.model) for entry in sources) or "only the base_model itself"
        problems.append(f"'models' must list exactly one source besides the base_model, got {names}")
    for entry in models:
        if entry.model == config.base_model and entry.parameters:
            problems.append(
                f"parameters under the base_model {entry.model} ({', '.join(entry.parameters)}) have no effect; "
                f"move them to the source"
            )
    if any(not entry.model.model.path for entry in models):
        problems.append("a model under 'models' has no name; write a folder or a hub id such as owner/model")
    count = len(problems)
    _check_parameters(config.parameters or {}, sources, problems)
    if len(problems) == count:
        _check_combinations([config.parameters or {}, *(entry.parameters or {} for entry in sources)], problems)
    source_base = _source_base((config.parameters or {}).get("source_base"), problems)
    if target is None or len(sources) != 1 or not sources[0].model.model.path:
        return None
    return Recipe(target, sources[0].model, sources[0].parameters or {}, config.parameters or {}, source_base)


def _source_base(setting: object, problems: list[str]) -> ModelReference | None:
    if setting is None or not isinstance(setting, str):
        return None
    try:
        if not setting.strip():
            raise ValueError("it names no model")
        return ModelReference.parse(setting)
    except (ValueError, RuntimeError) as error:
        problems.append(
            f"parameter 'source_base' in parameters: {setting!r} is not valid ({_first_line(error)}); give the folder "
            f"or hub id of the model that the source was trained from, or remove it"
        )
        return None


def _check_combinations(places: list[Mapping[str, ParameterSetting]], problems: list[str]) -> None:
    """Refuse parameters that would be without effect beside the others; each is valid by itself."""

    def written(name: str) -> list[Any]:
        return [value for place in places if name in place for value in _scalars(place[name])]

    def value(name: str) -> Any:
        return _SPECS[name].validate((written(name) or [_SPECS[name].default])[0])

    by_filter = any(_conditionals(place["rank"]) for place in places if "rank" in place)
    full_rank = bool(written("rank")) and not any(map(float, written("rank"))) and not by_filter
    if value("update") == "dare":
        for name in filter(written, _OF_LOW_RANK):
            problems.append(f"parameter {name!r} has no effect with update: dare, which truncates nothing; remove it")
        return
    for name in filter(written, _OF_DARE):
        problems.append(f"parameter {name!r} has no effect without update: dare; remove it, or write update: dare")
    if full_rank and value("order") == "mask-then-svd":
        problems.append(
            "parameter 'order' has no effect with rank: 0, which truncates nothing; remove it, or give a rank"
        )


def stray_keys(content: Any) -> list[str]:
    """Return a sentence for every key outside the parameters that mergekit would drop in silence.

    Args:
        content: the recipe as YAML gives it.
    """
    if not isinstance(content, Mapping):
        return []
    found = _strays(content, MergeConfiguration.model_fields, "at the top of the recipe")
    models = content.get("models")
    for entry in models if isinstance(models, list) else []:
        if isinstance(entry, Mapping):
            where = f"beside the model {entry.get('model', '')}".strip()
            found += _strays(entry, InputModelDefinition.model_fields, where)
    return found


def _strays(content: Mapping[Any, Any], known: Iterable[str], where: str) -> list[str]:
    sentences = []
    for key in content:
        if key in known:
            continue
        if key in _SPECS:
            sentences.append(f"{key!r} stands {where}, where mergekit ignores it; move it under 'parameters:'")
            continue
        close = difflib.get_close_matches(str(key), list(known), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"mergekit knows {', '.join(known)}"
        sentences.append(f"unknown key {key!r} {where}; {hint}")
    return sentences


def _check_parameters(
    top_level: Mapping[str, ParameterSetting], sources: list[InputModelDefinition], problems: list[str]
) -> None:
    if "masks" not in top_level and not any("masks" in (entry.parameters or {}) for entry in sources):
        problems.append(
            "parameter 'masks' is missing; write the path of a mask file under the recipe's top-level parameters"
        )
    for name, setting in top_level.items():
        _check_parameter(name, setting, "parameters", problems)
    for entry in sources:
        for name, setting in (entry.parameters or {}).items():
            spec = _SPECS.get(name)
            if spec is not None and spec.scope == ParameterScope.SHARED:
                problems.append(
                    f"parameter {name!r} is written under the model {entry.model}, where mergekit ignores it; "
                    f"move it to the recipe's top-level parameters"
                )
            else:
                _check_parameter(name, setting, f"the parameters of {entry.model}", problems)


def _check_parameter(name: str, setting: ParameterSetting, where: str, problems: list[str]) -> None:
    spec = _SPECS.get(name)
    if spec is None:
        close = difflib.get_close_matches(name, _SPECS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"snrf knows {', '.join(_SPECS)}"
        problems.append(f"unknown parameter {name!r} in {where}; {hint}")
        return
    if name in _PLAIN and not isinstance(setting, (str, bool, int, float)):
        problems.append(f"parameter {name!r} in {where} must be one plain value, not a gradient or a list of filters")
        return
    values = list(_scalars(setting))
    if not values:
        problems.append(f"parameter {name!r} in {where} is an empty list; give a value, or remove it")
    for value in values:
        try:
            _check_value(spec, value)
        except SnrfError as error:
            problems.append(f"parameter {name!r} in {where}: {error}")
            return
        except (ValidationError, ValueError) as error:
            problems.append(f"parameter {name!r} in {where}: {value!r} is not valid ({_first_line(error)})")
            return


def _check_value(spec: ParameterSpec, value: Any) -> None:
    if isinstance(value, bool) and spec.value_type is not bool:
        raise SnrfError(f"expected a number or text, got {value!r}")
    if spec.name == "rank" and isinstance(value, float) and not value.is_integer():
        raise SnrfError(f"rank must be a whole number, got {value}")
    checked = spec.validate(value)
    if spec.name in _FUSION:
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


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"]
    return str(error).strip().splitlines()[0]
