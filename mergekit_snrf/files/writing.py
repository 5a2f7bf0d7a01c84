"""Writing a file as a whole or not at all."""

from __future__ import annotations

import glob
import os
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mergekit_snrf.errors import SnrfError, os_reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_REMEDY = "choose a file in a folder that is writable and has space"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its place when the block ends without an exception.

    Of a symlink, the file that it names is replaced. A device such as ``/dev/null`` or a FIFO is written to. Temporary
    files of killed writers are removed. ``SnrfError``: the folder cannot be written, or the disk is full.
    """
    target = _target(path)
    if target is None:
        with _through(path) as file:
            yield file
        return
    _remove_strays(target)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(OSError):
                _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        Path(name).unlink(missing_ok=True)


def _lock(file: BinaryIO) -> None:
    """Lock an open file, or raise ``OSError``: another process has locked it, or the system cannot."""
    if fcntl is None:
        raise OSError
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_strays(target: Path) -> None:
    for stray in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError), open(stray, "rb") as file:
            _lock(file)
            stray.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text as ``replacing`` does."""
    with replacing(path) as file:
        file.write(text.encode())


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``SnrfError`` where ``replacing`` could not write a file, before the work whose result it holds."""
    target = _target(path)
    if target is None:
        return
    if target.is_dir():
        raise SnrfError(path, "is a folder", "give the path of a file")
    if not target.parent.is_dir():
        raise SnrfError(path, f"cannot be written (there is no folder {target.parent})", _REMEDY)
    try:
        # Permissions alone do not say it: root may write anywhere, but not where the file system refuses.
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _not_written(path, error) from None


def _target(path: str | os.PathLike[str]) -> Path | None:
    """Return the file to replace, with symlinks resolved; None for a device or FIFO, which is written to."""
    if not os.fspath(path):
        raise SnrfError(None, "the path of the file to write is empty", "give one")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        raise SnrfError(path, "is not a regular file", _REMEDY)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return None
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


@contextmanager
def _through(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    try:
        # Without a reader, opening a FIFO would wait forever.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as file:
            yield file
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: str | os.PathLike[str], error: Exception) -> SnrfError:
    return SnrfError(path, f"cannot be written ({os_reason(error)})", _REMEDY)


@contextmanager
def cleaning_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, after its cleaning up."""
    of_python = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not of_python or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
