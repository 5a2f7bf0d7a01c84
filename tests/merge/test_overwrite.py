"""`--overwrite` of `snrf patch` and `snrf lora`: an earlier output is replaced as a whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_target, read
from click.testing import CliRunner, Result
from pair import Pair, assert_same, merge, write_recipe
from peft import LoraConfig

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.merge import folders
from mergekit_snrf.merge import patch as patch_module

COMMANDS = ["patch", "lora"]


def run(command: str, recipe: dict[str, Any], out: Path, *flags: str) -> Result:
    path = write_recipe(out.parent / "recipes" / f"{out.name}.yml", recipe)
    return CliRunner().invoke(snrf, [command, str(path), str(out), "--quiet", *flags])


def done(command: str, recipe: dict[str, Any], out: Path, *flags: str) -> Path:
    result = run(command, recipe, out, *flags)
    assert result.exit_code == 0, result.output
    assert not list(out.parent.glob(".*")), "nothing temporary is left"
    return out


def refused(command: str, recipe: dict[str, Any], out: Path, *texts: str) -> None:
    """Refuse with one sentence, and leave the folder as it was."""
    before = hashes(out)
    result = run(command, recipe, out, "--overwrite")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.output.strip().splitlines()
    for text in (f"Error: {out}: ", *texts):
        assert text in line
    assert hashes(out) == before
    assert not list(out.parent.glob(".*"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_earlier_output_is_replaced(
    command: str, in_one_step: bool, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = done(command, pair.recipe(), tmp_path / "out")
    (out.parent / "link").symlink_to("out")
    old, inode = hashes(out), out.stat().st_ino
    if not in_one_step:
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    recipe = pair.recipe(source={"beta": 1.0})
    assert run(command, recipe, out).exit_code == 1
    assert hashes(out) == old
    done(command, recipe, out, "--overwrite")
    assert hashes(out) == hashes(done(command, recipe, tmp_path / "fresh" / "out"))
    assert hashes(out) != old
    assert out.stat().st_ino != inode
    done(command, pair.recipe(), tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    weights = {name for name in old if name.endswith(".safetensors")}
    assert {name: hashes(out)[name] for name in weights} == {name: old[name] for name in weights}
    # A folder that is not there, or empty, needs nothing to be replaced.
    done(command, pair.recipe(), tmp_path / "new", "--overwrite")
    (tmp_path / "empty").mkdir()
    done(command, pair.recipe(), tmp_path / "empty", "--overwrite")


def test_output_of_mergekit_yaml_in_other_shards_is_replaced(pair: Pair, tmp_path: Path) -> None:
    merge(pair.recipe(), tmp_path / "out", "--out-shard-size", "20000")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    done("patch", pair.recipe(source={"beta": 1.0}), tmp_path / "out", "--overwrite")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(read(tmp_path / "out"), merge(pair.recipe(source={"beta": 1.0}), tmp_path / "other"))


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("out", ["", ".", "new/..", "new/../../here"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_working_folder_is_never_replaced(
    command: str, out: str, flags: list[str], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``snrf patch recipe.yml "$OUT"`` where OUT is not set."""
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    result = CliRunner().invoke(snrf, [command, str(recipe), out, "--quiet", *flags])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {out}: " if out else "Error: the output path is empty; give a folder")
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", "here"}
    assert hashes(tmp_path / "here").keys() == {"thesis.txt"}


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_come_while_a_run_is_at_work_are_kept(
    command: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write_text = tmp_path / "out", Path.write_text

    def come(self: Path, *words: Any, **names: Any) -> int:
        if self.name == "README.md":
            out.mkdir()
            (out / "thesis.txt").touch()
        return write_text(self, *words, **names)

    monkeypatch.setattr(Path, "write_text", come)
    result = run(command, pair.recipe(), out)
    assert result.exit_code == 1
    assert f"{out}: files came into the output folder meanwhile" in result.output
    assert os.listdir(out) == ["thesis.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_folder_that_cannot_be_made_is_known_before_the_work(command: str, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    for out, reason in (
        (tmp_path / "file" / "out", f"cannot be made, {tmp_path}/file is not a writable folder; choose another folder"),
        (tmp_path / ("x" * 300), f"the {'adapter' if command == 'lora' else 'merge'} could not be written (File name"),
    ):
        result = CliRunner().invoke(snrf, [command, str(recipe), str(out)])
        assert result.exit_code == 1
        assert f"Error: {out}: {reason}" in result.output
        assert "%" not in result.output, "a progress bar was begun"
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", "file"}


def of_another_method(folder: Path) -> None:
    text = (folder / "mergekit_config.yml").read_text()
    (folder / "mergekit_config.yml").write_text(text.replace("merge_method: snrf", "merge_method: linear"))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def add(name: str, text: str = "mine") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return change


FOREIGN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "merge without its recipe": ("patch", remove("mergekit_config.yml"), "holds no mergekit_config.yml of an earlier"),
    "merge of another method": ("patch", of_another_method, "holds no mergekit_config.yml of an earlier snrf merge"),
    "merge with a damaged recipe": ("patch", add("mergekit_config.yml", "a: ["), "holds no mergekit_config.yml"),
    "merge with a file of the user's": ("patch", add("scores.csv"), "holds scores.csv, which is not of an earlier run"),
    "merge with the user's results": (
        "patch",
        add("results.json"),
        "holds results.json, which is not of an earlier run",
    ),
    "merge with a converted model": ("patch", add("model.Q4_K_M.gguf"), "holds model.Q4_K_M.gguf, which is not"),
    "merge with other weights": ("patch", add("old.safetensors"), "holds old.safetensors, which is not of an earlier"),
    "merge with a folder of the user's": ("patch", add("logs/one.txt"), "holds logs, which is not of an earlier run"),
    "merge with a folder called like a file": ("patch", add("notes.json/one.txt"), "holds notes.json, which is not"),
    "merge with a hidden file": ("patch", add(".gitattributes"), "holds .gitattributes, which is not of an earlier"),
    "adapter without its card": ("lora", remove("README.md"), "holds no README.md of an earlier 'snrf lora'"),
    "adapter with another card": ("lora", add("README.md", "---\ntags: [lora]\n---\nMine."), "holds no README.md"),
    "adapter with a card of no tags": ("lora", add("README.md", "Mine."), "holds no README.md of an earlier"),
    "adapter with a file of the user's": ("lora", add("scores.csv"), "holds scores.csv, which is not of an earlier"),
    "adapter in a folder's place": ("lora", add("checkpoint-1/x.json"), "holds checkpoint-1, which is not of an earl"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_folders_are_refused(case: str, pair: Pair, tmp_path: Path) -> None:
    command, change, message = FOREIGN[case]
    out = done(command, pair.recipe(), tmp_path / "out")
    change(out)
    refused(command, pair.recipe(), out, message, "so it is not replaced; choose another folder")


def test_outputs_of_the_other_command_are_refused(pair: Pair, tmp_path: Path) -> None:
    refused("lora", pair.recipe(), done("patch", pair.recipe(), tmp_path / "merge"), "of an earlier 'snrf lora'")
    refused("patch", pair.recipe(), done("lora", pair.recipe(), tmp_path / "adapter"), "of an earlier snrf merge")
    trained = tmp_path / "trained"
    trained.mkdir()
    LoraConfig(target_modules=["q_proj"]).save_pretrained(trained)
    refused("lora", pair.recipe(), trained, "holds no README.md of an earlier 'snrf lora'")
    (tmp_path / "file").write_text("")
    result = run("patch", pair.recipe(), tmp_path / "file", "--overwrite")
    assert "the output path is a file; give a folder" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_recipe_reads_is_not_replaced(command: str, pair: Pair, tmp_path: Path) -> None:
    """The target, the source's base and the mask may themselves lie in an earlier output."""
    out = done("patch", pair.recipe(), tmp_path / "runs" / "out")
    reason = "which the recipe reads; choose another folder"
    refused(command, pair.recipe(base_model=str(out)), out, f"the output folder holds {out}, {reason}")
    base = pair.recipe(parameters={"source_base": str(out)})
    refused(command, base, out, f"the output folder holds {out}, {reason}")
    shutil.copy(pair.mask, out / "mask.safetensors")
    inside = pair.recipe(parameters={"masks": str(out / "mask.safetensors")})
    refused(command, inside, out, f"the output folder holds {out}/mask.safetensors, {reason}")
    refused(command, pair.recipe(base_model=str(out)), out.parent, f"the output folder holds {out}, {reason}")


@pytest.mark.parametrize("command", COMMANDS)
def test_failure_leaves_the_earlier_output(
    command: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = done(command, pair.recipe(), tmp_path / "out")
    before = hashes(out)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    path = tmp_path / "recipes" / "out.yml"
    result = CliRunner().invoke(snrf, [command, str(path), str(out), "--quiet", "--overwrite"])
    assert result.exit_code == 1
    assert "could not be written (No space left on device" in result.output
    assert hashes(out) == before
    assert not list(tmp_path.glob(".*"))


def test_interrupt_leaves_the_earlier_output(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = done("patch", pair.recipe(), tmp_path / "out")
    before = hashes(out)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_module, "merge_card", interrupt)
    assert run("patch", pair.recipe(), out, "--overwrite").output.strip() == "Aborted!"
    assert hashes(out) == before
    assert not list(tmp_path.glob(".*"))


def test_second_rename_that_fails_is_undone(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders cannot change places in one step."""
    out = done("lora", pair.recipe(), tmp_path / "out")
    before, rename = hashes(out), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(folders.PARTIAL):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    monkeypatch.setattr(Path, "rename", fail)
    result = run("lora", pair.recipe(), out, "--overwrite")
    assert "could not be written (Input/output error" in result.output
    assert hashes(out) == before
    assert not list(tmp_path.glob(".*"))


def test_another_target_leaves_nothing_of_the_old_one(pair: Pair, tmp_path: Path) -> None:
    out = done("patch", pair.recipe(), tmp_path / "out")
    other = make_target(tmp_path / "other", "llava_next", "hub")
    done("patch", pair.recipe(base_model=str(other)), out, "--overwrite")
    assert (out / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert set(os.listdir(out)) == {*os.listdir(other), "README.md", "mergekit_config.yml"}
