"""The tensors of a planned merge, read from the models' shards, and their fusion."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch
import tqdm
from jaxtyping import Bool
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_snrf.fusion.fuse import Fused, Fusion, Rounding, fuse_and_report
from mergekit_snrf.fusion.lowrank import Certificate
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
from mergekit_snrf.models.checkpoint import FLOAT_DTYPES, Checkpoint
from mergekit_snrf.models.shards import ByteRange, read_tensor
from mergekit_snrf.models.weights import stored_ranges
from mergekit_snrf.neurons.sets import Site


def fuse_tensor(
    target: Tensor,
    source: Tensor,
    source_base: Tensor | None,
    member: Bool[Tensor, " neurons"],
    site: Site,
    fusion: Fusion,
    name: str,
) -> Fused:
    """Fuse a weight, or the bias beside it; all arguments as in ``fuse_and_report``.

    Raises:
        SnrfError: as ``fuse_and_report``.
    """
    return fuse_and_report(target, source, member, site.axis, fusion, name=name, source_base=source_base, site=site)


def local_folder(checkpoint: Checkpoint, options: MergeOptions) -> Path:
    """Return the folder of a checkpoint's shards and side files, downloaded if they are only on the hub.

    Raises:
        SnrfError: the download fails.
    """
    return checkpoint.local(options.transformers_cache)


class Tensors:
    """What the edits of a plan read: of the source, and of its base, nothing else.

    Args:
        plan: without problems.

    Raises:
        SnrfError: a model cannot be downloaded, or the header of a shard is damaged.
    """

    def __init__(self, plan: MergePlan, options: MergeOptions) -> None:
        assert plan.target is not None
        assert plan.source is not None
        self.target_folder = local_folder(plan.target, options)
        self._target = stored_ranges(plan.target, self.target_folder, [edit.target_name for edit in plan.edits])
        self._source = stored_ranges(
            plan.source, local_folder(plan.source, options), [e.source_name for e in plan.edits]
        )
        self._source_base: dict[str, ByteRange] = {}
        if plan.source_base is not None:
            names = [edit.source_base_name for edit in plan.edits if edit.source_base_name is not None]
            self._source_base = stored_ranges(plan.source_base, local_folder(plan.source_base, options), names)

    def place(self, edit: PlannedEdit) -> ByteRange:
        """Return where the target's tensor lies."""
        return self._target[edit.target_name]

    def read(self, edit: PlannedEdit) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the tensor of target and source, and that of the source's base where the recipe has one.

        Raises:
            SnrfError: a shard ends early.
        """
        base = None if edit.source_base_name is None else read_tensor(self._source_base[edit.source_base_name])
        return read_tensor(self._target[edit.target_name]), read_tensor(self._source[edit.source_name]), base


@contextmanager
def threads(count: int, stop: Event | None = None) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads. When the block fails, what waits is not begun any more, and ``stop`` is set."""
    with ThreadPoolExecutor(max(1, count)) as pool:
        try:
            yield pool
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def certify(
    plan: MergePlan, config: MergeConfiguration, options: MergeOptions
) -> Iterator[tuple[PlannedEdit, Certificate | None, Rounding]]:
    """Fuse every edited tensor as the merge would, write nothing, and yield what is known of each.

    Args:
        plan: of ``config``.

    Raises:
        SnrfError: the merge cannot run, or a weight is not finite.
    """
    plan.raise_problems()
    assert plan.mask is not None
    tensors = Tensors(plan, options)
    for edit in tqdm.tqdm(plan.edits, desc="Certifying", unit="tensor", disable=options.quiet):
        dtype = dtype_from_name(wider_dtype(config, edit.dtype) or config.dtype)
        target, source, base = (
            tensor if tensor is None or dtype is None else tensor.to(dtype) for tensor in tensors.read(edit)
        )
        assert target is not None
        assert source is not None
        member = plan.mask.neurons[edit.site]
        with one_thread():
            _, certificate, rounding = fuse_tensor(
                target, source, base, member, edit.site, edit.fusion, edit.target_name
            )
        yield edit, certificate, rounding


def wider_dtype(config: MergeConfiguration, dtype: str) -> str | None:
    """Return ``out_dtype`` where it is wider than what the maths would be rounded to before it is applied."""
    working = dtype_from_name(config.dtype or FLOAT_DTYPES[dtype])
    out: torch.dtype | None = dtype_from_name(config.out_dtype)
    return config.out_dtype if out is not None and out.itemsize > working.itemsize else None
