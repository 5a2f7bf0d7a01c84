"""Patch mode: copy the target's shards and rewrite only the bytes of the masked neurons.

The result holds the same tensors and side files as ``mergekit-yaml`` without ``dtype``, bit for bit, in the
target's own shards (with ``--cuda``, mergekit's last digits can round otherwise). The folder is built beside the output
under a temporary name, with temporary shard names, and moved into place as a whole: a killed run leaves no output, and
nothing that loads before it is complete.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event
from typing import BinaryIO

import tqdm
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.folders import PARTIAL, built_aside, folder_problem
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit, plan_merge
from mergekit_snrf.merge.tally import Tally
from mergekit_snrf.merge.tensors import Tensors, fuse_tensor, threads
from mergekit_snrf.models.shards import overwrite_neurons

LOG = logging.getLogger(__name__)
_FICLONE = 0x40049409
# Measured: file systems with large folios take four times as long for blocks of 128 kB to 1 MB.
_BLOCK = 2**16


@dataclass(frozen=True)
class Patched:
    """What a patch run did: bytes rewritten, and shards by how they were taken over."""

    bytes_written: int
    reflinked: int
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
    plan = plan_merge(config, options, recipe_folder=recipe_folder, merge_adapter=True)
    _check_patchable(plan, config)
    problem = folder_problem(plan, out_path, recipe_folder, "merge" if overwrite else None)
    plan.problems += [problem] if problem else []
    plan.raise_problems()
    assert plan.target is not None
    for warning in plan.warnings:
        LOG.warning(warning)
    tensors = Tensors(plan, options)
    target_folder = tensors.target_folder
    tally = Tally(len(plan.edits))
    with built_aside(out_path, "merge", replace=overwrite) as building:
        patched = _write_shards(plan, tensors, building, hard_links, workers, options.quiet, tally)
        for name in plan.target.side_files():
            shutil.copy(target_folder / name, building / name)
        if options.write_model_card:
            card = merge_card(plan, Path(out_path).absolute().name, config_source, changed=tally.changed)
            (building / "README.md").write_text(card, encoding="utf-8")
            (building / "mergekit_config.yml").write_text(config_source, encoding="utf-8")
        for shard in building.glob(f"*{PARTIAL}"):
            shard.rename(shard.with_suffix(""))
        index = target_folder / "model.safetensors.index.json"
        if index.is_file():
            shutil.copy(index, building / index.name)
    return patched


def _check_patchable(plan: MergePlan, config: MergeConfiguration) -> None:
    for key in ("dtype", "out_dtype"):
        if getattr(config, key) is not None:
            plan.problems.append(
                f"{key} is set, but a patch keeps every dtype; remove it from the recipe or merge with mergekit-yaml"
            )
    if config.chat_template:
        plan.problems.append("chat_template is set, but a patch copies the tokenizer; merge with mergekit-yaml")
    for checkpoint in plan.checkpoints:
        if any(t.file.endswith(".bin") for t in checkpoint.tensors.values()):
            plan.problems.append(
                f"{checkpoint.name}: is stored as .bin; a patch reads byte ranges of safetensors, "
                f"convert it or merge with mergekit-yaml"
            )


def _write_shards(
    plan: MergePlan, tensors: Tensors, building: Path, hard_links: bool, workers: int, quiet: bool, tally: Tally
) -> Patched:
    assert plan.target is not None
    file_of = {edit: plan.target.tensors[edit.target_name].file for edit in plan.edits}
    shards = sorted({tensor.file for tensor in plan.target.tensors.values()})
    copies = {shard: _Copy(tensors.target_folder / shard, building / f"{shard}{PARTIAL}") for shard in shards}
    linked = set(shards) - set(file_of.values()) if hard_links else set()
    edits = sorted(plan.edits, key=lambda edit: (file_of[edit], tensors.place(edit).offset))
    written = 0
    progress = tqdm.tqdm(total=len(plan.edits), desc="Patching", unit="tensor", disable=quiet)

    def copy_all() -> Counter[str]:
        try:
            return Counter(copy.run(stop, link=shard in linked) for shard, copy in copies.items())
        finally:
            for copy in copies.values():
                copy.close()

    def apply(edit: PlannedEdit) -> int:
        return _apply(plan, edit, tensors, copies[file_of[edit]], tally)

    # Copying and computing go on at once and in the same order.
    stop = Event()
    with one_thread(), progress, threads(1, stop) as copier, threads(workers, stop) as pool:
        copied = copier.submit(copy_all)
        try:
            for count in pool.map(apply, edits):
                if copied.done():
                    # A copy that has failed need not wait for tensors of other shards.
                    copied.result()
                written += count
                progress.update()
        except CancelledError:
            # The copy has ended, and knows why.
            copied.result()
            raise
        ways = copied.result()
    return Patched(written, *(ways[way] for way in ("reflinked", "copied", "linked")))


def _apply(plan: MergePlan, edit: PlannedEdit, tensors: Tensors, copy: _Copy, tally: Tally) -> int:
    assert plan.mask is not None
    member, place = plan.mask.neurons[edit.site], tensors.place(edit)
    fused, certificate, rounding = fuse_tensor(*tensors.read(edit), member, edit.site, edit.fusion, edit.target_name)
    tally.add(edit.target_name, certificate, rounding)
    copy.wait_for(place.offset + place.bytes)
    return overwrite_neurons(place, copy.path, fused, member, edit.site.axis)


class _Copy:
    """A shard that is being copied; who rewrites a part of it waits for that part only."""

    def __init__(self, original: Path, path: Path) -> None:
        self.path = path
        self._original = original
        self._advanced = Condition()
        self._copied = 0.0
        self._closed = False

    def run(self, stop: Event, *, link: bool) -> str:
        """Link, reflink or copy the shard; return which.

        Raises:
            SnrfError: it cannot be linked, or the original cannot be read.
            CancelledError: ``stop`` was set meanwhile.
        """
        way = self._take_over(stop, link=link)
        self._advance(math.inf)
        return way

    def close(self) -> None:
        """Say that nothing more will be copied."""
        with self._advanced:
            self._closed = True
            self._advanced.notify_all()

    def wait_for(self, end: int) -> None:
        """Wait until the bytes before ``end`` are there.

        Raises:
            CancelledError: they never will be; ``run`` has raised why.
        """
        with self._advanced:
            self._advanced.wait_for(lambda: self._closed or self._copied >= end)
            if self._copied < end:
                raise CancelledError

    def _advance(self, copied: float) -> None:
        with self._advanced:
            self._copied = copied
            self._advanced.notify_all()

    def _take_over(self, stop: Event, *, link: bool) -> str:
        # A shard in the hub's cache is a symbolic link to a blob, which a hard link would not follow everywhere.
        real = self._original.resolve()
        if link:
            try:
                os.link(real, self.path)
                return "linked"
            except OSError as error:
                raise SnrfError(
                    f"{self._original}: cannot be hard-linked to {self.path.parent} ({error.strerror}); leave out "
                    f"--hard-links"
                ) from None
        with real.open("rb", buffering=0) as source, self.path.open("wb") as target:
            try:
                fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
                return "reflinked"
            except OSError as error:
                # File systems refuse in many ways; a real fault shows again when the bytes are copied.
                LOG.debug("%s: not reflinked (%s)", self._original, error)
            for copied in _copy(source, target):
                if stop.is_set():
                    raise CancelledError
                self._advance(copied)
        return "copied"


def _copy(source: BinaryIO, target: BinaryIO) -> Iterator[int]:
    """Copy a file block by block; yield how many bytes are in the copy, where others may now overwrite them.

    Raises:
        SnrfError: the file cannot be read.
    """
    buffer = memoryview(bytearray(_BLOCK))
    copied = 0
    while True:
        try:
            count = source.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            raise SnrfError(f"{source.name}: cannot be read ({error.strerror or error}); get the file again") from None
        if not count:
            return
        target.write(buffer[:count])
        target.flush()
        copied += count
        yield copied
