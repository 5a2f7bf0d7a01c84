"""The tensors of a planned merge, read from the models' shards, and their fusion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import tqdm
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fused, fuse_neurons, masked_update, put_neurons
from mergekit_snrf.fusion.threads import Memory, look_ahead
from mergekit_snrf.fusion.updates import Update
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
from mergekit_snrf.models.moments import Filters, filter_at
from mergekit_snrf.models.shards import ITEM_BYTES, ByteRange, read_tensor
from mergekit_snrf.models.weights import stored_ranges


def kernel_options(edit: PlannedEdit, filters: Filters | None) -> dict[str, Any]:
    """Return what a function of ``fusion.fuse`` takes for a planned edit besides the weights."""
    return {
        "neurons": edit.member,
        "axis": edit.site.axis,
        "fusion": edit.fusion,
        "name": edit.target_name,
        "site": edit.site,
        "moments": filter_at(edit.site, edit.fusion, filters),
    }


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


@dataclass(frozen=True)
class _CastTensor:
    """A stored tensor that is read in a dtype; raises as ``check_cast``."""

    where: ByteRange
    cast: torch.dtype | None
    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.cast or self.where.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.where.shape

    def __getitem__(self, rows: slice) -> Tensor:
        panel = self.where[rows].to(self.device)
        try:
            return cast(panel, self.dtype, self.name)
        except SnrfError:
            # The message names the largest weight of the whole tensor.
            check_cast(read_tensor(self.where), self.dtype, self.name)
            raise


class Tensors:
    """The tensors of a plan's edits, of target, source and the source's base, and their fusion.

    Each byte is read once. At most the target's tensor and a difference in float32 (float64 where a tensor is) are in
    memory for an edit. The device of the options computes; what is returned is on the CPU.

    Attributes:
        filters: of the plan's moments, for ``update: regmean``; None: it has none.

    Raises:
        SnrfError: a model cannot be downloaded, or the header of a shard is damaged.
    """

    def __init__(self, plan: MergePlan, options: MergeOptions) -> None:
        self.filters = None if plan.moments is None else Filters(plan.moments)
        folders = {role: one.local(options.transformers_cache) for role, one in plan.checkpoints.items()}
        self.target_folder = folders["target"]
        self._recipe, self._device = plan.recipe, torch.device(options.device or "cpu")
        self._ranges = {
            role: stored_ranges(one, folders[role], [edit.names[role] for edit in plan.edits])
            for role, one in plan.checkpoints.items()
        }

    def workers(self, wanted: int | None) -> int | None:
        """Return how many tensors are computed at once: by default one on an accelerator, None on the CPU."""
        return wanted or (None if self._device.type == "cpu" else 1)

    def place(self, edit: PlannedEdit) -> ByteRange:
        """Return where the target's tensor lies."""
        return self._ranges["target"][edit.target_name]

    def update(self, edit: PlannedEdit) -> Update:
        """Return the update of an edit, without the factor beta.

        ``SnrfError``: a shard ends early, a weight is not finite, or a dtype of the recipe cannot hold it.
        """
        update = masked_update(**self._inputs(edit))
        left = None if update.left is None else update.left.cpu()
        return replace(update, selected=update.selected.cpu(), left=left, right=update.right.cpu())

    def neurons(self, edit: PlannedEdit) -> Fused:
        """Return the fused neurons of an edit, [selected, ...]; raises as ``update``, or where they overflow."""
        fused = fuse_neurons(**self._inputs(edit))
        return fused._replace(tensor=fused.tensor.cpu())

    def whole(self, edit: PlannedEdit) -> Fused:
        """Return the whole fused tensor of an edit; raises as ``neurons``."""
        inputs = self._inputs(edit)
        weight = inputs["target"][:]
        fused = fuse_neurons(**{**inputs, "target": weight})
        return fused._replace(tensor=put_neurons(weight, fused.tensor, edit.member, edit.site.axis))

    def _inputs(self, edit: PlannedEdit) -> dict[str, Any]:
        """Return the arguments of a kernel."""
        dtype = dtype_from_name(self._recipe.working_dtype(edit.dtype))
        matrices = {
            role: _CastTensor(self._ranges[role][name], dtype, name, self._device) for role, name in edit.names.items()
        }
        return {**kernel_options(edit, self.filters), **matrices}

    def memory(self, edit: PlannedEdit, *, whole: bool = False) -> Memory:
        """Return what ``whole``, or ``neurons``, of an edit takes.

        That is Delta and a quarter of it for its factors, the neurons of the mask in the working dtype and in the
        target's, for ``whole`` the target's tensor, and F.
        """
        size, item = math.prod(edit.shape), ITEM_BYTES[edit.dtype]
        stored = (self._ranges[role][name].dtype for role, name in edit.names.items())
        work = 8 if torch.float64 in stored else 4
        neurons = edit.parameters * item
        kept = size * item if whole else neurons
        factors = 5 * size * work // 4 + edit.parameters * work + neurons
        regmean = self.filters is not None and edit.fusion.update == "regmean"
        filter_bytes = self.filters.bytes(edit.site) if self.filters is not None and regmean else 0
        return Memory(factors + filter_bytes + (kept if whole else 0), kept)


def certify(plan: MergePlan, options: MergeOptions) -> Iterator[tuple[PlannedEdit, Fused]]:
    """Fuse every edited tensor as the merge would, write nothing, and yield the result of each."""
    tensors = Tensors(plan, options)
    out = dtype_from_name(plan.recipe.out_dtype)

    def fuse(edit: PlannedEdit) -> Fused:
        fused = tensors.whole(edit)
        check_cast(fused.tensor, out, edit.target_name)
        return fused._replace(tensor=torch.empty(0))

    def memory(edit: PlannedEdit) -> Memory:
        return Memory(tensors.memory(edit, whole=True).working, 0)

    progress = tqdm.tqdm(total=len(plan.edits), desc="Certifying", unit="tensor", disable=options.quiet)
    with progress, look_ahead(plan.edits, fuse, memory, workers=options.num_threads) as ahead:
        for edit, fused in ahead:
            yield edit, fused
            progress.update()
