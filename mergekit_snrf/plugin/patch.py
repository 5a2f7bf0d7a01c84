"""Patch mode: copy the target's shards and rewrite only the bytes of the masked neurons.

The result holds the same tensors and side files as ``mergekit-yaml`` without ``dtype``, bit for bit, in the
target's own shards. (Here a tensor is computed on one thread; where mergekit takes several, the order of their sums
can round a last digit otherwise.) The folder is built beside the output under a temporary name, with temporary shard
names, and moved into place as a whole: a killed run leaves no output, and nothing that loads before it is complete.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tqdm
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.checkpoint import Checkpoint
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion import fuse_and_report
from mergekit_snrf.plugin import install
from mergekit_snrf.plugin.adapter import rewrite
from mergekit_snrf.plugin.plan import Edit, MergePlan, plan_merge
from mergekit_snrf.plugin.tally import Tally
from mergekit_snrf.shards import ByteRange, byte_ranges, overwrite_neurons, read_tensor
from mergekit_snrf.threads import one_thread

LOG = logging.getLogger(__name__)
_FICLONE = 0x40049409
_PARTIAL = ".partial"


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
) -> Patched:
    """Merge by copying the target's shards and rewriting the masked neurons.

    Args:
        config_source: the recipe's text, written beside the model as mergekit does.
        out_path: must not exist, or be empty; missing parents are made.
        hard_links: link shards without edits instead of copying them; changing one later changes both.
        workers: tensors that are computed at once, each on one thread and with one float32 copy of its tensor.

    Raises:
        SnrfError: the merge cannot run as a patch, or fails; nothing is left of it.
    """
    # The model card asks mergekit for the method's name.
    install()
    plan = plan_merge(config, options, recipe_folder=recipe_folder, merge_adapter=True)
    _check_patchable(plan, config, out_path)
    plan.raise_problems()
    assert plan.target is not None
    assert plan.source is not None
    for warning in plan.warnings:
        LOG.warning(warning)
    target_folder, source_folder = local_folder(plan.target, options), local_folder(plan.source, options)
    # A link to an empty folder stays a link.
    out = Path(os.path.realpath(out_path))
    building = out.with_name(f".{out.name}{_PARTIAL}")
    try:
        with _claimed(building):
            patched = _write_shards(plan, target_folder, source_folder, building, hard_links, workers, options.quiet)
            for name in plan.target.side_files():
                shutil.copy(target_folder / name, building / name)
            if options.write_model_card:
                rewrite(config, plan, recipe_folder)
                card = generate_card(config=config, config_yaml=config_source, name=Path(out_path).absolute().name)
                (building / "README.md").write_text(card, encoding="utf-8")
                (building / "mergekit_config.yml").write_text(config_source, encoding="utf-8")
            for shard in building.glob(f"*{_PARTIAL}"):
                shard.rename(shard.with_suffix(""))
            index = target_folder / "model.safetensors.index.json"
            if index.is_file():
                shutil.copy(index, building / index.name)
            building.rename(out)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f", {error.filename}" if error.filename else "")
        raise SnrfError(
            f"{out_path}: the merge could not be written ({reason}); make room, or choose another folder"
        ) from None
    return patched


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make ``folder``, or empty it of what a killed run left; remove it if the block fails.

    Raises:
        SnrfError: another run is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnrfError(f"{folder}: another run writes there; wait for it, or choose another folder") from None
        except OSError as error:
            LOG.debug("%s: cannot be locked (%s)", folder, error)
        try:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _check_patchable(plan: MergePlan, config: MergeConfiguration, out_path: str) -> None:
    for key in ("dtype", "out_dtype"):
        if getattr(config, key) is not None:
            plan.problems.append(
                f"{key} is set, but a patch keeps every dtype; remove it from the recipe or merge with mergekit-yaml"
            )
    if config.chat_template:
        plan.problems.append("chat_template is set, but a patch copies the tokenizer; merge with mergekit-yaml")
    for checkpoint in (plan.target, plan.source):
        if checkpoint is not None and any(t.file.endswith(".bin") for t in checkpoint.tensors.values()):
            plan.problems.append(
                f"{checkpoint.name}: is stored as .bin; a patch reads byte ranges of safetensors, "
                f"convert it or merge with mergekit-yaml"
            )
    if not os.path.exists(out_path):
        return
    if not os.path.isdir(out_path):
        plan.problems.append(f"{out_path}: the output path is a file; give a folder")
    elif os.listdir(out_path):
        plan.problems.append(f"{out_path}: the output folder is not empty; choose a new folder")
    elif os.path.ismount(out_path) or os.path.samefile(out_path, os.curdir):
        plan.problems.append(
            f"{out_path}: a patch moves its output into place as a whole, which a mount point or the working folder "
            f"does not allow; choose a new folder below it"
        )


def local_folder(checkpoint: Checkpoint, options: MergeOptions) -> Path:
    """Return the folder of a checkpoint's shards and side files, downloaded if they are only on the hub."""
    if checkpoint.folder is not None:
        return checkpoint.folder
    import huggingface_hub

    shards = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    try:
        return Path(
            huggingface_hub.snapshot_download(
                checkpoint.name,
                revision=checkpoint.revision,
                cache_dir=options.transformers_cache,
                allow_patterns=[*shards, *checkpoint.side_files(), "*.index.json"],
            )
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise SnrfError(f"{checkpoint.name}: cannot be downloaded ({reason}); check network and disk") from None


def _write_shards(
    plan: MergePlan,
    target_folder: Path,
    source_folder: Path,
    building: Path,
    hard_links: bool,
    workers: int,
    quiet: bool,
) -> Patched:
    assert plan.target is not None
    assert plan.source is not None
    by_shard: dict[str, list[Edit]] = defaultdict(list)
    for edit in plan.edits:
        by_shard[plan.target.tensors[edit.target_name].file].append(edit)
    source_ranges: dict[str, dict[str, ByteRange]] = {}
    for edit in plan.edits:
        file = plan.source.tensors[edit.source_name].file
        if file not in source_ranges:
            source_ranges[file] = byte_ranges(source_folder / file)
    ways = dict.fromkeys(("reflinked", "copied", "linked"), 0)
    written = 0
    tally = Tally(len(plan.edits))
    progress = tqdm.tqdm(total=len(plan.edits), desc="Patching", unit="tensor", disable=quiet)
    with one_thread(), progress, ThreadPoolExecutor(max(1, workers)) as pool:
        for shard in sorted({tensor.file for tensor in plan.target.tensors.values()}):
            original, copy = target_folder / shard, building / f"{shard}{_PARTIAL}"
            edits = by_shard.get(shard, [])
            ways[_take_over(original, copy, link=hard_links and not edits)] += 1
            ranges = byte_ranges(original) if edits else {}

            def apply(edit: Edit, ranges: Mapping[str, ByteRange] = ranges, copy: Path = copy) -> int:
                source_file = plan.source.tensors[edit.source_name].file  # type: ignore[union-attr]
                source = source_ranges[source_file][edit.source_name]
                return _apply(plan, edit, ranges[edit.target_name], source, copy, tally)

            for count in pool.map(apply, edits):
                written += count
                progress.update()
    return Patched(written, **ways)


def _apply(plan: MergePlan, edit: Edit, target: ByteRange, source: ByteRange, copy: Path, tally: Tally) -> int:
    assert plan.mask is not None
    member = plan.mask.neurons[edit.site]
    fused, certificate, rounding = fuse_and_report(
        read_tensor(target), read_tensor(source), member, edit.site.axis, edit.fusion, name=edit.target_name
    )
    tally.add(edit.target_name, certificate, rounding)
    return overwrite_neurons(target, copy, fused, member, edit.site.axis)


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
