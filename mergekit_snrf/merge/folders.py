"""Output folders that appear as a whole or not at all, and what an earlier run may leave in one."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import yaml

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge.adapter import TOKENIZER_FILES
from mergekit_snrf.merge.checks import path_problem
from mergekit_snrf.merge.plan import MergePlan, located

LOG = logging.getLogger(__name__)
PARTIAL = ".partial"
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
_MERGE_FILES = {"mergekit_config.yml", "README.md", "config.json", "generation_config.json"}
_MERGED_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# renameat2 of the Linux kernel, which Python does not offer: two folders change places in one step.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def folder_problem(
    plan: MergePlan, out_path: str, recipe_folder: str | None, replaceable: Literal["merge", "adapter"] | None
) -> str | None:
    """Return why nothing can be written to ``out_path``, or None.

    Args:
        replaceable: what the folder may hold; None: nothing.
    """
    problem = path_problem(out_path)
    # What is not there yet may lead to a folder that is: ``new/..``.
    out = os.path.realpath(out_path)
    if problem is not None or not os.path.exists(out):
        return problem
    if os.listdir(out):
        if replaceable is None:
            return f"{out_path}: the output folder is not empty; choose a new folder, or --overwrite an earlier output"
        needed = next((path for path in _inputs(plan, recipe_folder) if _holds(out, path)), None)
        if needed is not None:
            return f"{out_path}: the output folder holds {needed}, which the recipe reads; choose another folder"
        other = _not_of_a_merge(plan, out) if replaceable == "merge" else _not_of_an_adapter(out)
        if other is not None:
            return f"{out_path}: {other}, so it is not replaced; choose another folder"
    if os.path.ismount(out) or os.path.samefile(out, os.curdir):
        return (
            f"{out_path}: the output is moved into place as a whole, which a mount point or the working folder does "
            f"not allow; choose a new folder below it"
        )
    return None


def _inputs(plan: MergePlan, recipe_folder: str | None) -> list[str]:
    paths = [str(checkpoint.folder) for checkpoint in plan.checkpoints if checkpoint.folder]
    if plan.recipe is not None:
        models = [plan.recipe.source, plan.recipe.source_base]
        adapters = [located(type(m)(model=m.lora), recipe_folder) for m in models if m is not None and m.lora]
        paths += [path for path in adapters if os.path.isdir(path)]
    return [*paths, *([str(plan.mask_path)] if plan.mask_path else [])]


def _holds(folder: str, path: str) -> bool:
    inside = Path(path).resolve()
    return Path(folder).resolve() in (inside, *inside.parents)


def _not_of_a_merge(plan: MergePlan, folder: str) -> str | None:
    """Return what tells a folder from the output of an earlier merge, or None."""
    try:
        recipe = yaml.safe_load(Path(folder, "mergekit_config.yml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict) or recipe.get("merge_method") != "snrf":
        return "holds no mergekit_config.yml of an earlier snrf merge"
    assert plan.target is not None
    weights = {name for name in os.listdir(folder) if _MERGED_WEIGHTS.fullmatch(name)}
    return _foreign(folder, {*weights, *plan.target.side_files(), *TOKENIZER_FILES, *_MERGE_FILES})


def _not_of_an_adapter(folder: str) -> str | None:
    """Return what tells a folder from the output of an earlier ``snrf lora``, or None."""
    try:
        card = Path(folder, "README.md").read_text(encoding="utf-8")
        front = next(iter(yaml.safe_load_all(card.split("\n---\n")[0])))
    except (OSError, ValueError, yaml.YAMLError, StopIteration):
        front = None
    tags = front.get("tags") if isinstance(front, dict) else None
    if not isinstance(tags, list) or not {"snrf", "lora"} <= set(map(str, tags)):
        return "holds no README.md of an earlier 'snrf lora'"
    return _foreign(folder, _ADAPTER_FILES)


def _foreign(folder: str, known: set[str]) -> str | None:
    others = sorted(n for n in os.listdir(folder) if n not in known or not os.path.isfile(os.path.join(folder, n)))
    return f"holds {others[0]}, which is not of an earlier run" if others else None


@contextmanager
def built_aside(out_path: str, what: str, *, replace: bool) -> Iterator[Path]:
    """Give an empty folder beside ``out_path`` that takes its place, at once, when the block is done.

    The folder has a temporary name; if the block fails it is removed, and ``out_path`` is as it was.

    Args:
        what: is written, for messages.
        replace: what ``out_path`` holds is replaced; without it, it must be empty to the end.

    Raises:
        SnrfError: a file cannot be written, ``out_path`` is not empty, or another run is at work in the temporary
            folder.
    """
    # A link to a folder stays a link.
    out = Path(os.path.realpath(out_path))
    building = out.with_name(f".{out.name}{PARTIAL}")
    missing = [folder for folder in building.parents if not folder.exists()]
    try:
        try:
            building.mkdir(parents=True, exist_ok=True)
            with _locked(building):
                try:
                    for entry in building.iterdir():
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                    yield building
                    _put_into_place(building, out, replace)
                except BaseException:
                    shutil.rmtree(building, ignore_errors=True)
                    raise
        except BaseException:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        reason = f"{error.strerror or error}" + (f", {error.filename}" if error.filename else "")
        raise SnrfError(
            f"{out_path}: the {what} could not be written ({reason}); make room, or choose another folder"
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnrfError(f"{folder}: another run writes there; wait for it, or choose another folder") from None
        except OSError as error:
            LOG.debug("%s: cannot be locked (%s)", folder, error)
        yield
    finally:
        os.close(descriptor)


def _put_into_place(building: Path, out: Path, replace: bool) -> None:
    if not (out.is_dir() and os.listdir(out)):
        building.rename(out)
    elif replace:
        _exchange(building, out)
        shutil.rmtree(building, ignore_errors=True)
    else:
        raise SnrfError(f"{out}: files came into the output folder meanwhile; move them away, and begin again")


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places; in one step where the file system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(one), os.fsencode(other))
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        LOG.debug("%s: cannot be exchanged in one step (%s)", other, os.strerror(ctypes.get_errno()))
    aside = one.with_name(f"{one.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)
