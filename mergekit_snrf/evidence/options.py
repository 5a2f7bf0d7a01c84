"""What the analyses take, from Python and as options of the commands: names, defaults, limits and help in one place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from mergekit_snrf.errors import did_you_mean
from mergekit_snrf.files.settings import Settings, construct, own_first
from mergekit_snrf.models.reference import Dtype, ModelRef

_F = TypeVar("_F", bound=Callable[..., Any])

ROWS = ("random", "equal-norm", "least", "linear", "regmean", "dare", "frank", "base")
LINEAR_BETAS = (0.1, 0.25, 0.5, 0.75, 1.0)
KEEPS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0)
_MOST_KEEP = 1e6


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _files(value: Any) -> tuple[Any, ...]:
    return tuple(map(_file, _several(value)))


def _file(value: Any) -> Any:
    """Return the path of a file as text; what was read from one passes, and is checked where it is used."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parts(value: Any) -> tuple[Any, ...]:
    """Return what commas separate, or a list, as it is."""
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else _several(value)
    )


def _rows(value: Any) -> tuple[Any, ...]:
    rows = _parts(value)
    for row in rows:
        if row not in ROWS:
            raise ValueError(f"{row!r} is not a row; {did_you_mean(str(row), ROWS, 'rows are')}")
    return rows


def _rising(most: float) -> BeforeValidator:
    def read(value: Any) -> tuple[float, ...]:
        try:
            numbers = sorted({float(part) for part in _parts(value)})
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} is not a list of numbers; write 0.25,0.5,1.0") from None
        if not numbers or not all(0 < number <= most for number in numbers):
            what = f"{value!r} has a number that is not above 0 and at most {most:g}"
            raise ValueError(f"{what}; write 0.25,0.5,1.0")
        return tuple(numbers)

    return BeforeValidator(read)


Text = Annotated[str, BeforeValidator(_file)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_files)]
Files = Annotated[tuple[Any, ...], BeforeValidator(_files)]
Betas = Annotated[tuple[float, ...], _rising(1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Draws = Annotated[int, Field(ge=1)]

_seed: Any = Field(default=0, description="Seed of the first draw, and of the intervals.")
_draws: Any = Field(default=3, description="Number of random draws of a control.")
_betas: Any = Field(default=LINEAR_BETAS, title="BETAS", description="Strengths of the linear merge of all neurons.")


class Loading(Settings):
    """How a model is loaded."""

    device: str | None = ModelRef.model_fields["device"]  # type: ignore[assignment]
    dtype: Dtype = ModelRef.model_fields["dtype"]  # type: ignore[assignment]
    trust_remote_code: bool = ModelRef.model_fields["trust_remote_code"]  # type: ignore[assignment]

    def ref(self, model: str | os.PathLike[str]) -> ModelRef:
        """Return a folder or hub id with how it is loaded; ``SnrfError``: a value is not allowed."""
        return construct(ModelRef, {"model": os.fspath(model), **self.model_dump(include=set(Loading.model_fields))})


class Reading(Loading):
    """How the models of a recipe are read, and its target is loaded."""

    transformers_cache: Text | None = Field(
        default=None, title="PATH", description="Storage path for downloaded models."
    )
    lora_merge_cache: Text | None = Field(default=None, title="PATH", description="Path to store merged LoRA models.")


class AblationOptions(Loading):
    """Options of an ablation."""

    profile: Any = Field(default=None, title="PROFILE", description="Of MODEL, to find its least important neurons.")
    draws: Draws = _draws
    seed: Seed = _seed


class SweepOptions(Reading):
    """Options of a sweep."""

    linear_betas: Betas = _betas
    keep_drop: float = Field(
        default=1.0,
        ge=0,
        description="The best recipe gains most while no metric to keep falls by more than this, in points where it is "
        "a share.",
    )
    seed: Seed = _seed


class ComparisonOptions(Reading):
    """Options of the comparison of a merge with its controls."""

    rows: Annotated[tuple[str, ...], BeforeValidator(_rows)] = Field(
        default=ROWS,
        title="ROWS",
        description="The controls, separated by commas. least needs --profile, frank and base need --base, regmean "
        "needs --moments.",
    )
    draws: Draws = _draws
    seed: Seed = _seed
    profile: Files = Field(
        default=(),
        title="PROFILE",
        description="Of the target, to find its least important neurons; repeat for several.",
    )
    base: Text | None = Field(
        default=None, title="MODEL", description="The model that target and source were both trained from."
    )
    rival: Texts = Field(
        default=(),
        title="RECIPE.yml",
        description="Another recipe of the same target, as one more row; repeat for several.",
    )
    linear_betas: Betas = _betas
    moments: Any = Field(
        default=None,
        title="MOMENTS",
        description="Of the target, for RegMean; default: those of a recipe with update: regmean.",
    )
    keeps: Annotated[tuple[float, ...], _rising(_MOST_KEEP)] = Field(
        default=KEEPS, title="KEEPS", description="Strengths of RegMean."
    )
    drop_rate: float = Field(default=0.5, ge=0, lt=1, description="Share of the elements that DARE drops.")


class SamplesOptions(Settings):
    """Options of the comparison of samples that an evaluation tool wrote."""

    task: Texts = Field(default=(), description="With --from: only this task; repeat for several.")
    metric: Texts = Field(default=(), description="With --from: only this metric, or task/metric.")
    keep: Texts = Field(default=(), title="METRIC", description="With --from: a metric, or task, to keep, not to gain.")
    seed: Seed = _seed


def takes(*types: type[Settings]) -> Callable[[_F], _F]:
    """Let help and completion show the fields of some types as the keywords of a function with ``**options``."""

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {name: of.model_fields[name] for of in types for name in own_first(of)}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            for name, field in fields.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate
