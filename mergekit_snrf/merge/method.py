"""The merge method as mergekit sees it: its parameters, and each tensor from the session of its merge.

Parameters are those of ``Fusion``, and those that only a recipe has. Needs no more of mergekit than its registry, so it
can be imported in the middle of mergekit's own import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import BeforeValidator

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion, Setting, settings

ALL_NEURONS = "all"
"""In place of a mask file."""

OF_FUSION = tuple(entry.name for entry in fields(Fusion))

# Gradients interpolate between whole numbers; a number in between is rounded to the nearest.
_Whole = Annotated[int, BeforeValidator(lambda value: round(value) if isinstance(value, float) else value)]


def _shared(name: str, kind: type, default: Any, meaning: str) -> ParameterSpec:
    return ParameterSpec(name, kind, ParameterScope.SHARED, default, meaning)


def _of_fusion(name: str, known: Setting) -> ParameterSpec:
    kind = type(known.default)
    if not known.by_tensor:
        return _shared(name, kind, known.default, known.meaning)
    return ParameterSpec(name, _Whole if kind is int else kind, ParameterScope.NON_BASE, known.default, known.meaning)


SPEC = MergeMethodSpec(
    name="snrf",
    pretty_name="Shared Neuron Low-Rank Fusion",
    reference_url="https://arxiv.org/abs/2602.19058",
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=1, max_non_base=2),
    parameters=(
        # Required in most recipes; the recipe's own checks know in which.
        _shared(
            "masks",
            str,
            "",
            "mask file: a path, or hf://owner/repo@revision/path; all: every neuron, the default of regmean",
        ),
        _shared("masks_sha256", str, "", "the mask file must have this sha256"),
        _shared("moments", str, "", "moments file of the target for regmean: a path, or hf://owner/repo@revision/path"),
        _shared("source_base", str, "", "the model that the source was trained from: Delta = W_source - W_source_base"),
        _shared("biases", bool, False, "the biases of masked neurons move, too (attn.q, attn.k, attn.v of Qwen2)"),
        _shared("allow_noop", bool, False, "accept a merge that changes nothing"),
        _shared(
            "allow_family_mismatch",
            bool,
            False,
            "accept a source of another model family with equal shapes; neurons then pair by index only",
        ),
        *(_of_fusion(name, known) for name, known in settings().items()),
    ),
)


SESSIONS: dict[str, Any] = {}
"""The merges that run now, by their keys."""


def find_session(key: str) -> Any:
    """Return the running ``MergeSession`` of a key; ``SnrfError``: there is none."""
    if key not in SESSIONS:
        what = f"no snrf merge with masks {key!r} is running"
        raise SnrfError(None, what, "call mergekit_snrf.merge.install() before mergekit's run_merge")
    return SESSIONS[key]


class SnrfMethod(MergeMethod):
    """Fuses the decoder weights that have masked neurons, and returns every other tensor as it is.

    Inputs are not cast to a common dtype first: the difference is taken in float32 and the output has the base's dtype.
    """

    spec = SPEC
    supports_batching = False

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        results = [merge_group(group, str(values["masks"])) for group, values in zip(groups, parameters, strict=True)]
        return tuple(result if out_dtype is None else result.to(out_dtype) for result in results)


def merge_group(group: TensorGroup, key: str) -> torch.Tensor:
    """Return the output's tensor of one group: base alone, or base, source and, where the recipe has it, source_base.

    Args:
        group: ``metadata.name`` is the base's name of the tensor.
        key: of the session; mergekit carries it as the parameter ``masks``.

    Raises:
        SnrfError: no such merge is running, a weight is not finite, or a dtype of the recipe cannot hold it.
    """
    name = group.metadata.name or ""
    if group.base is None:
        raise SnrfError(name, "the merge method snrf needs the base's tensor")
    merged: torch.Tensor = find_session(key).merged(name, group.base, group.non_base)
    return merged


if SPEC.name not in registry._METHODS:
    registry.register(SnrfMethod())
