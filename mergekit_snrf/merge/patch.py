"""Patch mode: copy the target's shards and rewrite only the bytes of the masked neurons.

The result holds the same tensors and side files as ``mergekit-yaml`` without ``dtype``, bit for bit, in the
target's own shards (with ``--cuda``, mergekit's last digits can round otherwise). One thread copies shards in the
kernel while others fuse the edits ahead (``fusion/threads.py``); of an edit they hold Delta and the changed neurons.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO

import torch
import tqdm
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open

from mergekit_snrf.errors import SnrfError, first_line, os_reason
from mergekit_snrf.fusion.threads import look_ahead, memory_limit
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.draft import plan_output
from mergekit_snrf.merge.folders import LAST, built_aside, copy_files
from mergekit_snrf.merge.plan import MergePlan, PlanDraft
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.merge.tally import Tally
from mergekit_snrf.merge.tensors import Tensors
from mergekit_snrf.models.shards import ByteRange, overwrite_neurons

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
# Between two steps a copy can be cancelled.
_STEP = 2**26
# Bytes of fused neurons that may wait for their shard while all workers are busy with the largest tensors.
_WAITING = 2**25
# From linux/fs.h.
_FICLONE = 0x40049409


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
    workers: int | None = None,
    overwrite: bool = False,
) -> Patched:
    """Merge by copying the target's shards and rewriting the masked neurons.

    Args:
        config_source: the recipe's text, written beside the model as mergekit does.
        out_path: must not exist, or be empty; missing parents are made.
        overwrite: it may also hold an earlier merge, which is replaced when the new one is complete.
        hard_links: link shards without edits instead of copying them; changing one later changes both.
        workers: tensors that are computed at once, each on one thread; None: as many as torch has threads.

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
            card = merge_card(plan, config_source, changed=tally.changed)
            (building / "README.md").write_text(card, encoding="utf-8")
            (building / "mergekit_config.yml").write_text(portable(config_source, plan.inputs), encoding="utf-8")
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
    plan: MergePlan,
    tensors: Tensors,
    building: Path,
    hard_links: bool,
    workers: int | None,
    quiet: bool,
    tally: Tally,
) -> Patched:
    """Copy the shards one by one and write the edits of each when its copy is complete; return what was done."""
    stored = plan.target.checkpoint.tensors
    files = {edit: stored[edit.target_name].file for edit in plan.edits}
    shards = sorted({tensor.file for tensor in stored.values()})
    linked = set(shards) - set(files.values()) if hard_links else set()
    edits = sorted(plan.edits, key=lambda edit: (files[edit], tensors.place(edit).offset))
    # Columns are written as whole tensors.
    rewritten = {shard: [tensors.place(e) for e in edits if files[e] == shard and e.site.axis == 1] for shard in shards}
    stop, written = Event(), 0

    def take_over(shard: str) -> None:
        original, copy = tensors.target_folder / shard, building / shard
        if shard in linked:
            _link(original, copy)
        else:
            _copy(original, copy, stop, rewritten[shard])

    progress = tqdm.tqdm(total=len(edits), desc="Patching", unit="tensor", disable=quiet)
    count = tensors.workers(workers)
    largest = max((tensors.memory(edit).working for edit in edits), default=0)
    # While a shard is copied its edits wait; they are not needed before.
    limit = min(memory_limit(), (torch.get_num_threads() if count is None else count) * largest + _WAITING)
    ahead = look_ahead(edits, tensors.neurons, tensors.memory, workers=count, limit=limit)
    with progress, ThreadPoolExecutor(1) as copier, _set_after(stop), ahead as fused_edits:
        copies = {shard: copier.submit(take_over, shard) for shard in shards}
        for edit, fused in fused_edits:
            tally.add(edit.target_name, fused)
            for copy in copies.values():
                # A copy that has failed need not wait for tensors of other shards.
                if copy.done():
                    copy.result()
            copies[files[edit]].result()
            copy_path, place = building / files[edit], tensors.place(edit)
            written += overwrite_neurons(place, copy_path, fused.tensor, edit.member, edit.site.axis)
            progress.update()
        for copy in copies.values():
            copy.result()
    return Patched(written, len(shards) - len(linked), len(linked))


@contextmanager
def _set_after(event: Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


def _link(original: Path, copy: Path) -> None:
    try:
        # A shard in the hub's cache is a symbolic link to a blob, which a hard link would not follow everywhere.
        os.link(original.resolve(), copy)
    except OSError as error:
        what = f"cannot be hard-linked to {copy.parent} ({os_reason(error)})"
        raise SnrfError(original, what, "leave out --hard-links") from None


def _copy(original: Path, copy: Path, stop: Event, rewritten: Sequence[ByteRange]) -> None:
    """Copy a shard, but not what is written as a whole anyway; file systems that can share its blocks do.

    Raises:
        SnrfError: the copy is not as long as its header promises.
        CancelledError: ``stop`` was set meanwhile.
    """
    if not _copied_by_kernel(original, copy, stop, rewritten):
        shutil.copyfile(original, copy)
    try:
        with safe_open(copy, framework="pt"):
            pass
    except SafetensorError as error:
        what = f"changed while it was copied ({first_line(error)})"
        raise SnrfError(original, what, "let other programs finish with it, and start again") from None


def _copied_by_kernel(original: Path, copy: Path, stop: Event, rewritten: Sequence[ByteRange]) -> bool:
    if not hasattr(os, "copy_file_range"):
        return False
    with original.open("rb") as source, copy.open("wb") as target:
        try:
            if _shares_blocks(source, target):
                return True
            begins = [0, *(place.offset + place.bytes for place in rewritten)]
            for begin, end in zip(begins, [*(place.offset for place in rewritten), None], strict=True):
                size = os.fstat(source.fileno()).st_size
                end = size if end is None else end
                while begin < end:
                    if stop.is_set():
                        raise CancelledError
                    count = os.copy_file_range(source.fileno(), target.fileno(), min(_STEP, end - begin), begin, begin)
                    if not count:
                        break
                    begin += count
            if rewritten:
                target.truncate(os.fstat(source.fileno()).st_size)
        except OSError as error:
            # File systems refuse in many ways; a real fault shows again when the file is copied otherwise.
            LOG.debug("%s: not copied by the kernel (%s)", original, error)
            return False
    return True


def _shares_blocks(source: BinaryIO, target: BinaryIO) -> bool:
    """Let both files share their blocks until one of them is written; return whether the file system can."""
    if fcntl is None:
        return False
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    return True
