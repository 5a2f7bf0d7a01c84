"""The merge method as mergekit sees it: each tensor is looked up in the session of its merge and fused as planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import BatchOptions, MergeMethod, TensorGroup

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge.parameters import SPEC


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
    from mergekit_snrf.merge.session import find_session

    name = group.metadata.name or ""
    if group.base is None:
        raise SnrfError(name, "the merge method snrf needs the base's tensor")
    return find_session(key).merged(name, group.base, group.non_base)


METHOD = SnrfMethod()
if SPEC.name not in registry._METHODS:
    registry.register(METHOD)
