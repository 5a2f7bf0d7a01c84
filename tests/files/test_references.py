from __future__ import annotations

import hashlib
import os
import random
import re
from pathlib import Path

import pytest
from hub import ask_hub, hub_of

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.references import check_sha256, local_path, sha256


def test_sha256(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * 2**20 + 17)
    (tmp_path / "file").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert sha256(tmp_path / "file") == digest
    check_sha256(tmp_path / "file", digest.upper())


@pytest.mark.parametrize("name", ["missing", "", "x" * 300, "a\0b", "missing/file", "fifo"])
def test_sha256_of_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SnrfError) as caught:
        sha256(f"{tmp_path}/{name}")
    assert (caught.value.where or "").startswith(str(tmp_path))


@pytest.mark.parametrize("expected", ["", "0" * 63, "g" * 64, "0" * 64])
def test_another_file_than_the_expected_one(tmp_path: Path, expected: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SnrfError) as caught:
        check_sha256(tmp_path / "file", expected)
    assert caught.value.field == "sha256"
    assert caught.value.where == (str(tmp_path / "file") if expected == "0" * 64 else None)


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, beside, home = tmp_path / "work", tmp_path / "beside", tmp_path / "home"
    for folder in (work, beside, home):
        folder.mkdir()
    (beside / "m.safetensors").touch()
    (home / "h.safetensors").touch()
    (beside / "link.safetensors").symlink_to(beside / "m.safetensors")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    assert local_path("m.safetensors", (tmp_path, beside)) == beside / "m.safetensors"
    assert local_path("link.safetensors", (beside,)) == beside / "m.safetensors"
    assert local_path("../beside/m.safetensors") == beside / "m.safetensors"
    assert local_path(str(beside / "m.safetensors")) == beside / "m.safetensors"
    assert local_path("~/h.safetensors", (beside,)) == home / "h.safetensors"
    (work / "m.safetensors").touch()
    assert local_path("m.safetensors", (beside,)) == work / "m.safetensors"


def test_missing_local_paths_name_where_was_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SnrfError) as caught:
        local_path("m.safetensors", (tmp_path / "recipes", tmp_path))
    places = f"{tmp_path}/m.safetensors and {tmp_path}/recipes/m.safetensors"
    assert (
        str(caught.value)
        == f"m.safetensors: no such file, looked for {places}; correct the path, or make the file first"
    )


@pytest.mark.parametrize("reference", ["x" * 300, "x/" * 3000, "a\0b", "~no-such-user/m.safetensors"])
def test_paths_that_name_no_file(reference: str) -> None:
    with pytest.raises(SnrfError, match=r"no such file, looked for .*; correct the path, or make the file first"):
        local_path(reference)


def test_folders_and_empty_text_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "masks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for reference, folder in ((".", tmp_path), ("/", "/"), ("masks", tmp_path / "recipes" / "masks")):
        with pytest.raises(SnrfError) as caught:
            local_path(reference, ("recipes",))
        assert (caught.value.where, caught.value.what) == (reference, f"is a folder ({folder})")
    with pytest.raises(SnrfError, match=r"^the path of a file is empty; give a path, or hf://owner"):
        local_path("", (tmp_path,))


@pytest.mark.parametrize(
    "reference",
    [
        "hf://",
        "hf://owner",
        "hf://owner/repo",
        "hf://owner/repo/",
        "hf://owner/repo@main",
        "hf://owner/repo@/m.safetensors",
        "hf:///repo/m.safetensors",
        "hf://owner/re po/m.safetensors",
        "hf://owner/repo@a@b/m.safetensors",
        "hf://owner/repo/m@v1.safetensors",
        "hf://owner/repo/folder",
    ],
)
def test_malformed_hub_references(reference: str) -> None:
    with pytest.raises(SnrfError, match=rf"{re.escape(reference)}: not a hub reference; the form is hf://owner/repo@"):
        local_path(reference)


def test_files_on_a_hub(tmp_path: Path) -> None:
    old, new = b"old", b"new"
    revisions = {
        "main": {"masks/m.safetensors": new},
        "v1.0": {"masks/m.safetensors": old},
        "refs/pr/7": {"m.safetensors": old},
        "a/branch": {"m.safetensors": new},
    }
    found = {
        "hf://owner/repo/masks/m.safetensors": new,
        "hf://owner/repo@main/masks/m.safetensors": new,
        "hf://owner/repo@v1.0/masks/m.safetensors": old,
        "hf://owner/repo@refs/pr/7/m.safetensors": old,
        "hf://owner/repo@a%2Fbranch/m.safetensors": new,
    }
    failing = {
        "hf://owner/repo/masks/n.safetensors": "RemoteEntryNotFoundError: 404",
        "hf://owner/repo@v2/masks/m.safetensors": "RevisionNotFoundError: 404",
        "hf://owner/other/masks/m.safetensors": "RepositoryNotFoundError: 404",
        "hf://owner/--repo/m.safetensors": "HFValidationError: ",
        "hf://owner/repo/../../../m.safetensors": "cannot contain a '..'",
    }
    home = tmp_path / "home"
    with hub_of({"owner/repo": revisions}) as hub:
        answers = ask_hub(hub.endpoint, home, *found, *failing)
    for reference, content in found.items():
        assert Path(answers[reference]).is_relative_to(home)
        assert Path(answers[reference]).read_bytes() == content
    for reference, reason in failing.items():
        assert_one_sentence(answers[reference], reference, reason)

    new_file = "hf://owner/repo@main/masks/new.safetensors"
    unreachable = ask_hub(hub.endpoint, home, *found, new_file)
    assert {reference: unreachable[reference] for reference in found} == {r: answers[r] for r in found}
    assert_one_sentence(unreachable[new_file], new_file, "LocalEntryNotFoundError: ")


def assert_one_sentence(answer: str, reference: str, reason: str) -> None:
    assert answer.startswith(f"SnrfError: {reference}: cannot be downloaded (")
    assert reason in answer
    assert answer.endswith("check owner, repo, revision and path, or download the file and give its path")
    assert "\n" not in answer
