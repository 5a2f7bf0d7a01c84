"""The tensors of a planned merge, read from the models' shards, and their fusion."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import torch
import tqdm
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fused, fuse
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
from mergekit_snrf.models.filters import Filters, filter_at
from mergekit_snrf.models.shards import ByteRange, read_tensor
from mergekit_snrf.models.weights import stored_ranges


def fuse_edit(
    edit: PlannedEdit, target: Tensor, source: Tensor, source_base: Tensor | None, filters: Filters | None = None
) -> Fused:
    """Fuse the tensor of a planned edit; ``filters`` are of the plan's moments, for ``update: regmean``."""
    return fuse(target, source, **kernel_options(edit, source_base, filters))


def kernel_options(edit: PlannedEdit, source_base: Tensor | None, filters: Filters | None) -> dict[str, Any]:
    """Return what a function of ``fusion.fuse`` takes for a planned edit besides target and source."""
    return {
        "neurons": edit.member,
        "axis": edit.site.axis,
        "fusion": edit.fusion,
        "name": edit.target_name,
        "source_base": source_base,
        "site": edit.site,
        "moments": filter_at(edit.site, edit.fusion, filters),
    }


def filters_of(plan: MergePlan) -> Filters | None:
    """Return the filters of a plan's moments; None where it has none."""
    return None if plan.moments is None else Filters(plan.moments)


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """Return a tensor in another dtype; None: as it is. Raises as ``check_cast``."""
    check_cast(tensor, dtype, name)
    return tensor if dtype is None else tensor.to(dtype)


def check_cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> None:
    """Raise ``SnrfError`` where a finite weight would become infinite in another dtype."""
    if dtype is None or not tensor.is_floating_point() or not tensor.numel():
        return
    if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return
    # Most tensors are judged by their ends alone.
    if all(bool(end.to(dtype).isfinite()) for end in tensor.aminmax()):
        return
    largest = tensor[tensor.isfinite()].abs()
    if largest.numel() and bool(largest.amax().to(dtype).isinf()):
        kind = str(dtype).removeprefix("torch.")
        what = f"holds weights up to {float(largest.amax()):.3g}, which are infinite in {kind}"
        raise SnrfError(name, what, f"merge in a wider dtype than {kind}")


class Tensors:
    """What the edits of a plan read of source and source_base, nothing else; and the ``filters`` of its moments."""

    def __init__(self, plan: MergePlan, options: MergeOptions) -> None:
        self.filters = filters_of(plan)
        names = {
            "target": [edit.target_name for edit in plan.edits],
            "source": [edit.source_name for edit in plan.edits],
            "source_base": [edit.source_base_name for edit in plan.edits if edit.source_base_name is not None],
        }
        folders = {role: one.local(options.transformers_cache) for role, one in plan.checkpoints.items()}
        self.target_folder = folders["target"]
        self._ranges = {role: stored_ranges(one, folders[role], names[role]) for role, one in plan.checkpoints.items()}

    def place(self, edit: PlannedEdit) -> ByteRange:
        """Return where the target's tensor lies."""
        return self._ranges["target"][edit.target_name]

    def read(self, edit: PlannedEdit) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the tensor of target and source, and that of the source's base where the recipe has one."""
        base = edit.source_base_name
        return (
            read_tensor(self._ranges["target"][edit.target_name]),
            read_tensor(self._ranges["source"][edit.source_name]),
            None if base is None else read_tensor(self._ranges["source_base"][base]),
        )


@contextmanager
def threads(count: int, stop: Event | None = None) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads. When the block fails, what waits is cancelled, and ``stop`` is set."""
    with ThreadPoolExecutor(max(1, count)) as pool:
        try:
            yield pool
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def certify(plan: MergePlan, options: MergeOptions) -> Iterator[tuple[PlannedEdit, Fused]]:
    """Fuse every edited tensor as the merge would, write nothing, and yield the result of each."""
    tensors = Tensors(plan, options)
    out = dtype_from_name(plan.recipe.out_dtype)
    for edit in tqdm.tqdm(plan.edits, desc="Certifying", unit="tensor", disable=options.quiet):
        dtype = dtype_from_name(plan.recipe.working_dtype(edit.dtype))
        target, source, base = tensors.read(edit)
        with one_thread():
            fused = fuse_edit(
                edit,
                cast(target, dtype, edit.target_name),
                cast(source, dtype, edit.source_name),
                None if base is None else cast(base, dtype, str(edit.source_base_name)),
                tensors.filters,
            )
        cast(fused.tensor, out, edit.target_name)
        yield edit, fused
