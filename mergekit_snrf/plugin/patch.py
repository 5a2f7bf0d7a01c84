"""Patch mode: copy the target's shards and rewrite only the bytes of the masked neurons.

The result holds the same tensors and side files as ``mergekit-yaml`` without ``dtype``, bit for bit, in the
target's own shards (with ``--cuda``, mergekit's last digits can round otherwise). The folder is built beside the output
under a temporary name, with temporary shard names, and moved into place as a whole: a killed run leaves no output, and
nothing that loads before it is complete.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tqdm
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.cards import merge_card
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.plugin.folders import PARTIAL, built_aside, folder_problem
from mergekit_snrf.plugin.plan import Edit, MergePlan, plan_merge
from mergekit_snrf.plugin.tally import Tally
from mergekit_snrf.plugin.tensors import Tensors, fuse_tensor
from mergekit_snrf.shards import overwrite_neurons
from mergekit_snrf.threads import one_thread

LOG = logging.getLogger(__name__)
_FICLONE = 0x40049409


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
    try:
        with built_aside(out_path) as building:
            patched = _write_shards(plan, tensors, building, hard_links, workers, options.quiet)
            for name in plan.target.side_files():
                shutil.copy(target_folder / name, building / name)
            if options.write_model_card:
                card = merge_card(plan, Path(out_path).absolute().name, config_source)
                (building / "README.md").write_text(card, encoding="utf-8")
                (building / "mergekit_config.yml").write_text(config_source, encoding="utf-8")
            for shard in building.glob(f"*{PARTIAL}"):
                shard.rename(shard.with_suffix(""))
            index = target_folder / "model.safetensors.index.json"
            if index.is_file():
                shutil.copy(index, building / index.name)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f", {error.filename}" if error.filename else "")
        raise SnrfError(
            f"{out_path}: the merge could not be written ({reason}); make room, or choose another folder"
        ) from None
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
    plan: MergePlan, tensors: Tensors, building: Path, hard_links: bool, workers: int, quiet: bool
) -> Patched:
    assert plan.target is not None
    by_shard: dict[str, list[Edit]] = defaultdict(list)
    for edit in plan.edits:
        by_shard[plan.target.tensors[edit.target_name].file].append(edit)
    ways = dict.fromkeys(("reflinked", "copied", "linked"), 0)
    written = 0
    tally = Tally(len(plan.edits))
    progress = tqdm.tqdm(total=len(plan.edits), desc="Patching", unit="tensor", disable=quiet)
    # Copying and computing go on at once; a tensor waits for its shard only when it is written.
    with one_thread(), progress, ThreadPoolExecutor(1) as copier, ThreadPoolExecutor(max(1, workers)) as pool:
        for shard in sorted({tensor.file for tensor in plan.target.tensors.values()}):
            original, copy = tensors.target_folder / shard, building / f"{shard}{PARTIAL}"
            edits = by_shard.get(shard, [])
            copied = copier.submit(_take_over, original, copy, link=hard_links and not edits)

            def apply(edit: Edit, copy: Path = copy, copied: Future[str] = copied) -> int:
                return _apply(plan, edit, tensors, copy, copied, tally)

            for count in pool.map(apply, edits):
                written += count
                progress.update()
            ways[copied.result()] += 1
    return Patched(written, **ways)


def _apply(plan: MergePlan, edit: Edit, tensors: Tensors, copy: Path, copied: Future[str], tally: Tally) -> int:
    assert plan.mask is not None
    member = plan.mask.neurons[edit.site]
    fused, certificate, rounding = fuse_tensor(*tensors.read(edit), member, edit.site, edit.fusion, edit.target_name)
    tally.add(edit.target_name, certificate, rounding)
    copied.result()
    return overwrite_neurons(tensors.place(edit), copy, fused, member, edit.site.axis)


def _take_over(original: Path, copy: Path, *, link: bool) -> str:
    """Link, reflink or copy a shard; return which."""
    # A shard in the hub's cache is a symbolic link to a blob, which a hard link would not follow everywhere.
    real = original.resolve()
    if link:
        try:
            os.link(real, copy)
            return "linked"
        except OSError as error:
            raise SnrfError(
                f"{original}: cannot be hard-linked to {copy.parent} ({error.strerror}); leave out --hard-links"
            ) from None
    with real.open("rb") as source, copy.open("wb") as target:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
            return "reflinked"
        except OSError as error:
            # File systems refuse in many ways; a real fault shows again when the bytes are copied.
            LOG.debug("%s: not reflinked (%s)", original, error)
    shutil.copyfile(real, copy)
    return "copied"
