"""The parameters of a recipe, as mergekit declares them: those of ``Fusion``, and those that only a recipe has.

Needs no more of mergekit than the types of its registry, so it can be imported in the middle of mergekit's own import.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Annotated, Any

from mergekit.merge_methods.base import BasePolicy, InputContract, MergeMethodSpec, ParameterScope, ParameterSpec
from pydantic import BeforeValidator

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

sys.modules[__name__.rpartition(".")[0]].install()
