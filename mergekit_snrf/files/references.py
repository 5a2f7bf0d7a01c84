"""References to files: local paths and ``hf://owner/repo@revision/path``, and their sha256."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePath
from urllib.parse import unquote

from mergekit_snrf.errors import SnrfError, first_line, unexpected
from mergekit_snrf.files.reading import open_regular

# As in huggingface_hub's file system: a slash in a revision is %2F, except in its own refs/pr/N and refs/convert/NAME.
_HUB = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?/(?P<file>[^@]+\.[\w]+)",
    re.ASCII,
)
_FORM = "hf://owner/repo@revision/path"
_CACHED = re.compile(r"(?:.*/)?models--(?P<repo>[^/]+)/snapshots/(?P<revision>[^/]+)(?:/(?P<file>.+))?")


def cached_place(path: str | os.PathLike[str]) -> tuple[str, str, str | None] | None:
    """Return (repository, revision, file or None) of a path in the hub's cache, None for any other path."""
    match = _CACHED.fullmatch(PurePath(path).as_posix())
    # No name on the hub has two dashes in a row.
    return match and (match["repo"].replace("--", "/", 1), match["revision"], match["file"])


def local_path(reference: str | os.PathLike[str], folders: tuple[str | os.PathLike[str], ...] = ()) -> Path:
    """Return the local file that a path, or ``hf://owner/repo@revision/path`` after a download, names.

    A relative path is looked for in the working folder, then in ``folders``. ``SnrfError``: there is no such file.
    """
    if not isinstance(reference, str | os.PathLike):
        raise unexpected("path", reference, f"a path, or {_FORM}")
    reference = os.fspath(reference)
    if not reference:
        raise SnrfError(None, "the path of a file is empty", f"give a path, or {_FORM}")
    return _downloaded(reference) if reference.startswith("hf://") else _found(reference, folders)


def _found(reference: str, folders: tuple[str | os.PathLike[str], ...]) -> Path:
    candidates = [Path(os.path.expanduser(reference))]
    if not candidates[0].is_absolute():
        candidates += [Path(folder) / reference for folder in folders]
    candidates = list(dict.fromkeys(candidate.absolute() for candidate in candidates))
    if found := next(filter(os.path.isfile, candidates), None):
        return found.resolve()
    if other := next(filter(os.path.exists, candidates), None):
        what = "is a folder" if os.path.isdir(other) else "is not a regular file"
        raise SnrfError(reference, f"{what} ({other})", "give the path of a file")
    what = f"no such file, looked for {' and '.join(map(str, candidates))}"
    raise SnrfError(reference, what, "correct the path, or make the file first")


def _downloaded(reference: str) -> Path:
    match = _HUB.fullmatch(reference)
    if match is None:
        raise SnrfError(reference, "not a hub reference", f"the form is {_FORM}")
    from huggingface_hub import hf_hub_download

    revision = match["revision"] and unquote(match["revision"])
    try:
        return Path(hf_hub_download(match["repo"], match["file"], revision=revision))
    except Exception as error:
        # What huggingface_hub, httpx and the file system raise has no common base; the type says what was not found.
        what = f"cannot be downloaded ({type(error).__name__}: {first_line(error)})"
        remedy = "check owner, repo, revision and path, or download the file and give its path"
        raise SnrfError(reference, what, remedy) from None


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: str | os.PathLike[str], expected: str) -> None:
    """Raise ``SnrfError`` where a file is not the expected one."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
        what = f"must be 64 hexadecimal digits, got {expected!r}"
        raise SnrfError(None, what, "'snrf mask show' prints those of a mask", field="sha256")
    found = sha256(path)
    if found != expected.lower():
        remedy = "get the file that was meant, or correct the sha256"
        raise SnrfError(path, f"the file has {found}, not {expected}", remedy, field="sha256")
