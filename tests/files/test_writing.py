from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.writing import check_writable, replacing, write_text


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (tmp_path / "example").write_bytes(b"old")
    return tmp_path / "example"


def test_a_symlink_stays_and_its_target_is_replaced(example: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, backup = tmp_path / "elsewhere" / "link", tmp_path / "backup"
    link.symlink_to("../example")
    backup.hardlink_to(example)
    write(link)
    assert link.is_symlink()
    assert (example.read_bytes(), backup.read_bytes()) == (b"new", b"old")
    (tmp_path / "dangling").symlink_to("created")
    write_text(tmp_path / "dangling", "é")
    assert (tmp_path / "created").read_bytes() == "é".encode()
    assert sorted(os.listdir(tmp_path)) == ["backup", "created", "dangling", "elsewhere", "example"]


def test_devices_and_fifos_are_written_to(tmp_path: Path) -> None:
    write(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    write(tmp_path / "null")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SnrfError):
        write(tmp_path / "fifo")
    found: list[bytes] = []
    descriptor = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    reader = threading.Thread(target=lambda: found.append(os.read(descriptor, 10)))
    write(tmp_path / "fifo")
    reader.start()
    reader.join()
    os.close(descriptor)
    assert found == [b"new"]
    assert sorted(os.listdir(tmp_path)) == ["fifo", "null"]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "file")
    check_writable("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "missing" / "file", tmp_path / "loop"):
        with pytest.raises(SnrfError) as caught:
            check_writable(path)
        assert caught.value.where == str(path)


def test_an_exception_leaves_the_old_file(example: Path) -> None:
    before = example.read_bytes()

    def interrupted() -> None:
        with replacing(example) as file:
            file.write(b"half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert example.read_bytes() == before
    assert os.listdir(example.parent) == [example.name]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    def left() -> list[str]:
        return sorted(path.name.split(".")[1] for path in tmp_path.glob(".*"))

    for name in (".a[1].yml.x.partial", ".a.yml.x.partial"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "a[1].yml"):
        write(tmp_path / "a[1].yml")
        assert left() == ["a", "a[1]"]  # What is being written stays.
    assert left() == ["a"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_the_old_file(example: Path) -> None:
    before = example.read_bytes()
    with file_size_limit(4096), pytest.raises(SnrfError) as caught:
        write(example, bytes(200_000))
    assert str(caught.value).startswith(f"{example}: cannot be written ({os.strerror(errno.EFBIG)})")
    assert example.read_bytes() == before
    assert os.listdir(example.parent) == [example.name]


def test_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SnrfError, match=r"taken: cannot be written \(Is a directory\)"):
        write(tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]
    assert (tmp_path / "taken").is_dir()


@pytest.mark.parametrize("path", ["missing/file", "file/file", "x" * 300, "a\0b", "", "/proc/mask.safetensors"])
def test_places_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SnrfError, match=r"cannot be written \(.+\); choose a file in a folder that is writable"):
        write(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write(tmp_path / "file")
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
