"""Output folders: what may lie in one, and building a new one elsewhere so that it appears whole or not at all.

While ``snrf patch`` or ``snrf lora`` is at work, the folder ``.out.partial`` lies beside ``out``: ``new`` is what it
builds, ``old`` the earlier output for the moment between two renames. A merge of mergekit, which may go into a folder
with other files, is built in ``out/.snrf-unfinished``; ``moved.txt`` there names the files that are about to move up.
The next run removes what a killed one left.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Literal

from mergekit_snrf.errors import SnrfError, os_reason
from mergekit_snrf.files.markdown import front_matter
from mergekit_snrf.files.reading import load_yaml, read_text
from mergekit_snrf.models.checkpoint import Checkpoint

try:
    import fcntl
except ImportError:  # On Windows nothing keeps two runs into one folder apart.
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
Kind = Literal["merge", "adapter"]
PARTIAL, UNFINISHED, MOVED = ".partial", ".snrf-unfinished", "moved.txt"
LAST = {"merge": "config.json", "adapter": "adapter_config.json"}
"""The file that is written last: without it, nothing loads the folder."""

# What mergekit writes itself when the recipe sets a chat template.
CHAT_TEMPLATE_FILES = {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}
TOKENIZER_FILES = CHAT_TEMPLATE_FILES | {
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
}
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
KIT = "snrf"
"""The folder that ``snrf card --with-mask`` writes into an output."""
_MERGE_FILES = {"mergekit_config.yml", "README.md", "config.json", "generation_config.json"}
_MERGED_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def path_problem(out_path: str, *, aside: bool = False) -> SnrfError | None:
    """Return why nothing can be written to a path, whatever it holds, or None; ``aside``: it is built in the parent."""
    if not out_path:
        return SnrfError(None, "the output path is empty", "give a folder")
    # What does not exist yet may lead to a folder that does: ``new/..``.
    out = os.path.realpath(out_path)
    try:
        mode = os.stat(out).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        return SnrfError(out_path, f"cannot be an output folder ({os_reason(error)})", "choose another folder")
    if mode is not None and not stat.S_ISDIR(mode):
        return SnrfError(out_path, "the output path is a file", "give a folder")
    above = next(str(folder) for folder in Path(out).parents if os.path.lexists(folder))
    needed = ([] if mode is None else [out]) + ([above] if aside or mode is None else [])
    for folder in needed:
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            return SnrfError(out_path, f"cannot be written, {folder} is not a writable folder", "choose another folder")
    return None


def output_problem(
    out_path: str, kind: Kind, *, overwrite: bool, inputs: Iterable[str], target: Checkpoint | None
) -> SnrfError | None:
    """Return why ``built_aside`` cannot put a folder at ``out_path``, or None.

    With ``overwrite`` it may hold an earlier output of this kind, whose side files are the target's, but none of the
    ``inputs``, which the merge reads.
    """
    if problem := path_problem(out_path, aside=True):
        return problem
    out = os.path.realpath(out_path)
    work = _work_folder(Path(out))
    if work.is_dir() and not work.is_symlink():
        try:
            with _locked(work):
                _clear(work)
                work.rmdir()
        except SnrfError as error:
            return error
        except OSError as error:
            return SnrfError(work, f"cannot be removed ({os_reason(error)})", "remove it, or choose another folder")
    if not os.path.exists(out):
        return None
    if os.listdir(out):
        if not overwrite:
            remedy = "choose a new folder, or --overwrite an earlier output"
            return SnrfError(out_path, "the output folder is not empty", remedy)
        needed = next((path for path in inputs if Path(path).resolve().is_relative_to(out)), None)
        if needed is not None:
            what = f"the output folder holds {needed}, which the recipe reads"
            return SnrfError(out_path, what, "choose another folder")
        other = _not_of_a_merge(target, out) if kind == "merge" else _not_of_an_adapter(out)
        if other is not None:
            return SnrfError(out_path, f"{other}, so it is not replaced", "choose another folder")
    if os.path.ismount(out) or os.path.samefile(out, os.curdir):
        what = "a mount point or the working folder cannot be replaced, and the output is moved into place as a whole"
        return SnrfError(out_path, what, "choose a new folder below it")
    return None


def _not_of_a_merge(target: Checkpoint | None, folder: str) -> str | None:
    """Return how a folder differs from the output of an earlier merge, or None."""
    try:
        recipe = load_yaml(Path(folder, "mergekit_config.yml"))
    except SnrfError:
        recipe = None
    if not isinstance(recipe, dict) or recipe.get("merge_method") != "snrf":
        return "holds no mergekit_config.yml of an earlier snrf merge"
    weights = set(filter(is_merged_weights, os.listdir(folder)))
    side_files = target.side_files() if target is not None else ()
    return _foreign(folder, {*weights, *side_files, *TOKENIZER_FILES, *_MERGE_FILES})


def _not_of_an_adapter(folder: str) -> str | None:
    """Return how a folder differs from the output of an earlier ``snrf lora``, or None."""
    try:
        tags = front_matter(read_text(Path(folder, "README.md"))).get("tags")
    except SnrfError:
        tags = None
    if not isinstance(tags, list) or not {"snrf", "lora"} <= set(map(str, tags)):
        return "holds no README.md of an earlier 'snrf lora'"
    return _foreign(folder, _ADAPTER_FILES)


def _foreign(folder: str, known: set[str]) -> str | None:
    parents = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    for entry in sorted(Path(folder).rglob("*")):
        name, is_folder = entry.relative_to(folder).as_posix(), entry.is_dir() and not entry.is_symlink()
        if name.split("/")[0] == KIT:
            continue
        if name not in (parents if is_folder else known) or not (is_folder or entry.is_file()):
            return f"holds {name}, which does not belong to an earlier run"
    return None


def copy_files(names: Iterable[str], folder: Path, into: Path) -> None:
    """Copy small files of a checkpoint, those in sub-folders too."""
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, into / name)


@contextmanager
def built_aside(out_path: str, kind: Kind, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``out_path``, replaced with ``overwrite``, when the block is done.

    If the block fails, the new folder is removed and ``out_path`` stays as it was. ``SnrfError``: a file cannot be
    written, files came into ``out_path``, or another run builds the same folder.
    """
    # A link to a folder stays a link.
    out = Path(os.path.realpath(out_path))
    work = _work_folder(out)
    missing = [folder for folder in work.parents if not folder.exists()]
    try:
        if work.is_symlink():
            work.unlink()
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            try:
                _clear(work)
                new = work / "new"
                new.mkdir()
                yield new
                _put_into_place(new, out, work / "old", overwrite)
            finally:
                # What cannot be removed now is removed by the next run.
                with suppress(OSError):
                    _clear(work)
                    work.rmdir()
    except BaseException as error:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if not isinstance(error, OSError):
            raise
        file = error.filename2 or error.filename
        what = f"the {kind} could not be written ({os_reason(error)}{f', {file}' if file else ''})"
        raise SnrfError(out_path, what, "make room, or choose another folder") from None


def is_merged_weights(name: str) -> bool:
    """Return whether mergekit gives weights this file name."""
    return _MERGED_WEIGHTS.fullmatch(name) is not None


def left_by_killed_run(folder: Path) -> list[str]:
    """Return the weight files that a run of mergekit was moving into a folder when it was killed."""
    if (folder / LAST["merge"]).exists():
        return []
    try:
        moved = read_text(folder / UNFINISHED / MOVED).splitlines()
    except SnrfError:
        return []
    return [name for name in moved if is_merged_weights(name) and (folder / name).is_file()]


@contextmanager
def built_inside(out_path: str) -> Iterator[Path]:
    """Give a folder inside ``out_path`` whose files move up, over those of the same names, when the block is done.

    Recipe and card of an earlier merge do not stay beside new weights. If the block fails, ``out_path`` is as before.
    """
    out = Path(out_path)
    existed, work = out.exists(), out / UNFINISHED
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        try:
            for name in left_by_killed_run(out):
                (out / name).unlink()
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            yield work
            built = [file.relative_to(work) for file in work.rglob("*") if file.is_file()]
            # In between nothing loads the folder.
            (out / LAST["merge"]).unlink(missing_ok=True)
            (work / MOVED).write_text("\n".join(map(str, built)), encoding="utf-8")
            for name in ("README.md", "mergekit_config.yml"):
                (out / name).unlink(missing_ok=True)
            for file in sorted(built, key=lambda file: (file.name == LAST["merge"], file.suffix != ".yml")):
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                (work / file).replace(out / file)
        except BaseException:
            # A thread of mergekit may be in the middle of a shard; the interpreter waits for it before it calls this.
            atexit.register(shutil.rmtree, work, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    out.rmdir()


def _work_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}{PARTIAL}")


def _put_into_place(new: Path, out: Path, old: Path, overwrite: bool) -> None:
    if out.is_dir() and not os.listdir(out):
        out.rmdir()
    elif overwrite and out.is_dir():
        out.rename(old)
    elif out.exists():
        raise SnrfError(out, "files came into the output folder meanwhile", "move them away and start again")
    new.rename(out)


def _clear(work: Path) -> None:
    """Empty the folder of a run; an earlier output between two renames goes back first."""
    out, old = work.with_name(work.name[1 : -len(PARTIAL)]), work / "old"
    if old.is_dir() and not os.path.lexists(out):
        old.rename(out)
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, where the system can lock folders; raise ``SnrfError`` if one is at work."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnrfError(folder, "another run writes there", "wait for it, or choose another folder") from None
        except OSError as error:
            LOG.debug("%s: cannot be locked (%s)", folder, error)
        yield
    finally:
        os.close(descriptor)
