"""Patch mode: copy the target's shards and rewrite only the bytes of the masked neurons.

The result holds the same tensors and side files as ``mergekit-yaml`` without ``dtype``, bit for bit, in the
target's own shards (with ``--cuda``, mergekit's last digits can round otherwise).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
import tqdm
from jaxtyping import Bool
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_snrf.errors import SnrfError, first_line, os_reason
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.draft import plan_output
from mergekit_snrf.merge.folders import LAST, built_aside, copy_files
from mergekit_snrf.merge.plan import MergePlan, PlanDraft, PlannedEdit
from mergekit_snrf.merge.tally import Tally
from mergekit_snrf.merge.tensors import Tensors, fuse_edit, threads
from mergekit_snrf.models.headers import ITEM_BYTES
from mergekit_snrf.models.shards import ByteRange, overwrite_neurons, read_tensor

LOG = logging.getLogger(__name__)
# Between two steps a copy can be cancelled.
_STEP = 2**26
_MAX_WAITING = 2**29


@dataclass(frozen=True)
class Patched:
    """What a patch run did: bytes rewritten, shards copied, shards linked."""

    bytes_written: int
    copied: int
    linked: int


def patch_merge(
    config: MergeConfiguration,
    config_source: str,
    options: MergeOptions,
    out_path: str,
    *,
    recipe_folder: str | None = None,
    hard_links: bool = False,
    workers: int = 2,
    overwrite: bool = False,
) -> Patched:
    """Merge by copying the target's shards and rewriting the masked neurons.

    Args:
        config_source: the recipe's text, written beside the model as mergekit does.
        out_path: must not exist, or be empty; missing parents are made.
        overwrite: it may also hold an earlier merge, which is replaced when the new one is complete.
        hard_links: link shards without edits instead of copying them; changing one later changes both.
        workers: tensors that are computed at once, each on one thread and with one float32 copy of its tensor.

    Raises:
        SnrfError: the merge cannot run as a patch, or fails; nothing is left of it.
    """
    found = functools.partial(_problems, config)
    plan = plan_output(
        config, options, out_path, "merge", recipe_folder=recipe_folder, overwrite=overwrite, problems=found
    )
    tensors = Tensors(plan, options)
    folder, side_files = tensors.target_folder, plan.target.checkpoint.side_files()
    tally = Tally(len(plan.edits), allow_noop=plan.recipe.value("allow_noop"))
    with built_aside(out_path, "merge", overwrite=overwrite) as building:
        patched = _write_shards(plan, tensors, building, hard_links, workers, options.quiet, tally)
        if options.write_model_card:
            card = merge_card(plan, Path(out_path).absolute().name, config_source, changed=tally.changed)
            (building / "README.md").write_text(card, encoding="utf-8")
            (building / "mergekit_config.yml").write_text(config_source, encoding="utf-8")
        index = "model.safetensors.index.json"
        names = [*side_files, *([index] if (folder / index).is_file() else [])]
        copy_files(sorted(names, key=lambda name: name == LAST["merge"]), folder, building)
    return patched


def _problems(config: MergeConfiguration, draft: PlanDraft) -> Iterator[SnrfError]:
    for key in ("dtype", "out_dtype"):
        if getattr(config, key) is not None:
            yield SnrfError(None, "a patch keeps every dtype", "remove it, or merge with mergekit-yaml", field=key)
    if config.chat_template:
        yield SnrfError(None, "a patch copies the tokenizer", "merge with mergekit-yaml", field="chat_template")
    for checkpoint in draft.checkpoints.values():
        if any(tensor.file.endswith(".bin") for tensor in checkpoint.tensors.values()):
            what = "is stored as .bin, and a patch reads byte ranges of safetensors"
            yield SnrfError(checkpoint.name, what, "convert it, or merge with mergekit-yaml")


def _write_shards(
    plan: MergePlan, tensors: Tensors, building: Path, hard_links: bool, workers: int, quiet: bool, tally: Tally
) -> Patched:
    """Copy the shards one by one and write the edits of each when its copy is complete; return what was done."""
    stored = plan.target.checkpoint.tensors
    files = {edit: stored[edit.target_name].file for edit in plan.edits}
    shards = sorted({tensor.file for tensor in stored.values()})
    linked = set(shards) - set(files.values()) if hard_links else set()
    edits = sorted(plan.edits, key=lambda edit: (files[edit], tensors.place(edit).offset))
    stop, written = Event(), 0

    def take_over(shard: str) -> None:
        original, copy = tensors.target_folder / shard, building / shard
        if shard in linked:
            _link(original, copy)
        else:
            _copy(original, copy, stop)

    def fuse(edit: PlannedEdit) -> Tensor:
        fused = fuse_edit(edit, *tensors.read(edit), tensors.filters)
        tally.add(edit.target_name, fused)
        return fused.tensor[:, edit.member] if edit.site.axis else fused.tensor[edit.member]

    progress = tqdm.tqdm(total=len(edits), desc="Patching", unit="tensor", disable=quiet)
    with one_thread(), progress, threads(1, stop) as copier, threads(workers, stop) as pool:
        copies = {shard: copier.submit(take_over, shard) for shard in shards}
        for edit, changed in _computed_ahead(pool, fuse, edits):
            for copy in copies.values():
                # A copy that has failed need not wait for tensors of other shards.
                if copy.done():
                    copy.result()
            copies[files[edit]].result()
            written += _write(changed, tensors.place(edit), building / files[edit], edit.member, edit.site.axis)
            progress.update()
        for copy in copies.values():
            copy.result()
    return Patched(written, len(shards) - len(linked), len(linked))


def _computed_ahead(
    pool: ThreadPoolExecutor, fuse: Callable[[PlannedEdit], Tensor], edits: Iterable[PlannedEdit]
) -> Iterator[tuple[PlannedEdit, Tensor]]:
    """Yield each edit with its changed neurons, in order; the pool computes the next ones in a bounded memory."""
    waiting: deque[tuple[PlannedEdit, Future[Tensor]]] = deque()
    held = 0
    for edit in edits:
        while waiting and held + _bytes(edit) > _MAX_WAITING:
            held -= _bytes(waiting[0][0])
            first, future = waiting.popleft()
            yield first, future.result()
        held += _bytes(edit)
        waiting.append((edit, pool.submit(fuse, edit)))
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _bytes(edit: PlannedEdit) -> int:
    return edit.parameters * ITEM_BYTES[edit.dtype]


def _write(changed: Tensor, place: ByteRange, copy: Path, member: Bool[Tensor, " neurons"], axis: int) -> int:
    """Write the changed neurons of a weight into the copy of its shard; return the number of bytes written."""
    if axis == 0:
        # Only the rows of members are written, and so only they are filled.
        weight = torch.empty(place.shape, dtype=place.dtype)
        weight[member] = changed
    else:
        weight = read_tensor(place)
        weight[:, member] = changed
    return overwrite_neurons(place, copy, weight, member, axis)


def _link(original: Path, copy: Path) -> None:
    try:
        # A shard in the hub's cache is a symbolic link to a blob, which a hard link would not follow everywhere.
        os.link(original.resolve(), copy)
    except OSError as error:
        what = f"cannot be hard-linked to {copy.parent} ({os_reason(error)})"
        raise SnrfError(original, what, "leave out --hard-links") from None


def _copy(original: Path, copy: Path, stop: Event) -> None:
    """Copy a shard; file systems that can share its blocks do.

    Raises:
        SnrfError: the copy is not as long as its header promises.
        CancelledError: ``stop`` was set meanwhile.
    """
    if not _copied_by_kernel(original, copy, stop):
        shutil.copyfile(original, copy)
    try:
        with safe_open(copy, framework="pt"):
            pass
    except SafetensorError as error:
        what = f"changed while it was copied ({first_line(error)})"
        raise SnrfError(original, what, "let other programs finish with it, and start again") from None


def _copied_by_kernel(original: Path, copy: Path, stop: Event) -> bool:
    if not hasattr(os, "copy_file_range"):
        return False
    with original.open("rb") as source, copy.open("wb") as target:
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), _STEP):
                if stop.is_set():
                    raise CancelledError
        except OSError as error:
            # File systems refuse in many ways; a real fault shows again when the file is copied otherwise.
            LOG.debug("%s: not copied by the kernel (%s)", original, error)
            return False
    return True
