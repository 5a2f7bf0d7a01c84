"""The merge method as mergekit sees it: its parameters, and the fusion of one tensor."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import click
import torch
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

if TYPE_CHECKING:
    from mergekit_snrf.merge.tally import Tally

# Gradients interpolate between whole numbers; a rank in between is rounded to the nearest.
_Rank = Annotated[int, BeforeValidator(lambda value: round(value) if isinstance(value, float) else value)]

SPEC = MergeMethodSpec(
    name="snrf",
    pretty_name="Shared Neuron Low-Rank Fusion",
    reference_url="https://arxiv.org/abs/2602.19058",
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=1, max_non_base=2),
    parameters=(
        ParameterSpec("masks", str, ParameterScope.SHARED, description="mask file, or hf://owner/repo@revision/path"),
        ParameterSpec(
            "masks_sha256", str, ParameterScope.SHARED, "", description="refuse a mask file with another sha256"
        ),
        ParameterSpec(
            "order", str, ParameterScope.SHARED, "svd-then-mask", description="or mask-then-svd (Appendix B)"
        ),
        ParameterSpec(
            "update", str, ParameterScope.SHARED, "low-rank", description="or dare, elements dropped at random"
        ),
        ParameterSpec(
            "drop_rate", float, ParameterScope.NON_BASE, 0.5, description="share of the elements that dare drops"
        ),
        ParameterSpec("seed", int, ParameterScope.SHARED, 0, description="of the draw of dare"),
        ParameterSpec(
            "rescale", bool, ParameterScope.SHARED, True, description="dare multiplies the rest by 1 / (1 - drop_rate)"
        ),
        ParameterSpec("biases", bool, ParameterScope.SHARED, False, description="the neurons' biases move, too"),
        ParameterSpec(
            "source_base",
            str,
            ParameterScope.SHARED,
            "",
            description="a model: Delta = W_source - W_source_base in place of W_source - W_target",
        ),
        ParameterSpec(
            "allow_noop", bool, ParameterScope.SHARED, False, description="accept a merge that changes nothing"
        ),
        ParameterSpec(
            "allow_family_mismatch",
            bool,
            ParameterScope.SHARED,
            False,
            description="accept a source of another model family with equal shapes; neurons then pair by index only",
        ),
        ParameterSpec("beta", float, ParameterScope.NON_BASE, 0.5, description="strength of the update (Eq. 11)"),
        ParameterSpec("rank", _Rank, ParameterScope.NON_BASE, 4, description="rank of the update, 0 for full rank"),
    ),
)


class SnrfMethod(MergeMethod):
    """Fuses the decoder weights that have masked neurons, and hands every other tensor through untouched.

    The neurons come from the mask file by the tensor's name, so the method keeps no state between tensors.
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
        results = []
        for group, values in zip(groups, parameters, strict=True):
            try:
                result = merge_group(group, **values)
            except SnrfError as error:
                raise as_click_error(error) from None
            results.append(result if out_dtype is None else result.to(out_dtype))
        return tuple(results)


_command: click.Context | None = None


def remember_command(context: click.Context) -> None:
    """Let ``as_click_error`` find the running command from mergekit's worker threads, where click does not know it."""
    global _command

    def forget() -> None:
        global _command
        _command = None

    _command = context
    context.call_on_close(forget)


def as_click_error(error: SnrfError) -> Exception:
    """Return the error as the running click command shows it: in one sentence, or as it is with -vv or no command."""
    context = click.get_current_context(silent=True) or _command
    if context is None or context.params.get("verbosity", 0) > 1:
        return error
    return click.ClickException(str(error))


def merge_group(group: TensorGroup, *, masks: str, **parameters: Any) -> torch.Tensor:
    """Return the fused tensor of one group: base alone, or base, source and, where the recipe has it, source_base.

    Args:
        group: ``metadata.name`` is the base's name of the weight or bias.
        masks: local path of the mask file.
        parameters: those of ``SPEC``; the ones by model are the source's.

    Raises:
        SnrfError: the tensor is no decoder weight, the mask does not fit it, or a weight is not finite.
    """
    from mergekit_snrf.fusion.threads import one_thread
    from mergekit_snrf.merge.recipe import fusion_of
    from mergekit_snrf.merge.tensors import fuse_tensor
    from mergekit_snrf.models.decoder import site_of

    base = group.base
    if base is None:
        raise SnrfError(f"{group.metadata.name}: the merge method snrf needs the base's tensor")
    if not group.non_base:
        return base.tensor
    source, *others = group.non_base
    name = group.metadata.name or ""
    site = site_of(f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name)
    member = _MASKS.get(masks).neurons.get(site)
    if member is None or not bool(member.any()):
        return base.tensor
    of_source = {p.name: parameters[p.name][source.id] for p in SPEC.input_parameters if p.name in parameters}
    fusion = fusion_of(parameters, of_source)
    source_base = others[0].tensor if others else None
    with one_thread():
        fused, certificate, rounding = fuse_tensor(base.tensor, source.tensor, source_base, member, site, fusion, name)
    tally = _tally
    if tally is not None and tally.add(name, certificate, rounding):
        start_tally(0)
    return fused


_tally: Tally | None = None


def start_tally(tensors: int) -> Tally:
    """Begin to count the edited tensors of a merge, which speaks when the last one is done; one merge at a time."""
    global _tally
    from mergekit_snrf.merge.tally import Tally

    tally = Tally(tensors)
    _tally = tally if tensors else None
    return tally


class _MaskCache:
    """The last mask file read, so that one merge reads its mask once; shared by mergekit's worker threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, int, int] | None = None
        self._mask: Any = None

    def get(self, path: str) -> Any:
        from mergekit_snrf.neurons.maskfile import read_mask

        try:
            status = os.stat(path)
        except OSError as error:
            raise SnrfError(f"{path}: cannot be read ({error.strerror or error})") from None
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            if self._key != key:
                self._mask, self._key = read_mask(path), key
            return self._mask


_MASKS = _MaskCache()

METHOD = SnrfMethod()
