"""`--overwrite` of `snrf patch` and `snrf lora`: an earlier output is replaced as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_target, read
from forked import forked
from mergekit.scripts.run_yaml import main as mergekit_yaml
from outputs import assert_refused, done, hashes, run
from pair import Pair, assert_same, merge, write_recipe
from peft import LoraConfig

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge import install
from mergekit_snrf.merge.folders import UNFINISHED, built_inside, path_problem
from mergekit_snrf.merge.session import MergeSession

COMMANDS = ["patch", "lora"]


def refused(command: str, recipe: dict[str, Any], out: Path, *texts: str) -> None:
    """Refuse with one sentence, and leave the folder as it was."""
    before = hashes(out)
    assert_refused(run(command, recipe, out, "--overwrite"), f"Error: {out}: ", *texts)
    assert hashes(out) == before
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_earlier_output_is_replaced(command: str, pair: Pair, tmp_path: Path) -> None:
    """Through a link too, and without writing through the links that a backup of it is made of."""
    out = done(command, pair.recipe(), tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    shutil.copytree(out, tmp_path / "backup", copy_function=os.link)
    old = hashes(out)
    recipe = pair.recipe(source={"beta": 1.0})
    assert_refused(run(command, recipe, out), f"{out}: the output folder is not empty", "--overwrite")
    assert hashes(out) == old
    done(command, recipe, tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    expected = hashes(done(command, recipe, tmp_path / "fresh" / "link", "--overwrite"))
    assert hashes(out) == expected != old
    assert hashes(tmp_path / "backup") == old
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
def test_the_working_folder_is_never_replaced(
    out: str, flags: list[str], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``snrf patch recipe.yml "$OUT"`` where OUT is not set."""
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_refused(run("patch", recipe, out, *flags), f"Error: {out}: " if out else "the output path is empty")
    (tmp_path / "here" / "thesis.txt").write_text("mine")
    assert_refused(run("patch", recipe, out, *flags), f"Error: {out}: " if out else "the output path is empty")
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
    assert_refused(run(command, pair.recipe(), out), f"{out}: files came into the output folder meanwhile")
    assert os.listdir(out) == ["thesis.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_path_that_cannot_be_written_is_known_before_the_work(command: str, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    for name, reason in (
        ("file", "the output path is a file"),
        ("file/out", f"{tmp_path}/file is not a writable folder"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/out", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
        ("new/" + "x" * 247, "File name too long"),
    ):
        assert_refused(run(command, recipe, tmp_path / name), f"Error: {tmp_path / name}: ", reason)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", "file", "loop"}


def test_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is built aside needs a writable parent, one that is written in place only itself."""
    out = tmp_path / "out"
    out.mkdir()
    for closed, aside, allowed in (
        (out, False, False),
        (out, True, False),
        (tmp_path, False, True),
        (tmp_path, True, False),
    ):
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: Path(path) != closed)
        problem = path_problem(str(out), aside=aside)
        assert (problem is None) == allowed
        assert problem is None or f"{closed} is not a writable folder" in problem.what


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
    "merge with the user's results": ("patch", add("results.json"), "holds results.json, which does not belong"),
    "merge with other weights": ("patch", add("old.safetensors"), "holds old.safetensors, which does not"),
    "merge with a folder called like a file": ("patch", add("merges.txt/one.txt"), "holds merges.txt, which does not"),
    "merge with a hidden file": ("patch", add(".gitattributes"), "holds .gitattributes, which does not belong"),
    "adapter without its card": ("lora", remove("README.md"), "holds no README.md of an earlier 'snrf lora'"),
    "adapter with another card": ("lora", add("README.md", "---\ntags: [lora]\n---\nMine."), "holds no README.md"),
    "adapter with a checkpoint": ("lora", add("checkpoint-1/x.json"), "holds checkpoint-1, which does not belong"),
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


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("command", COMMANDS)
def test_failure_leaves_the_earlier_output(
    command: str, error: BaseException, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = done(command, pair.recipe(), tmp_path / "out")
    before = hashes(out)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "write_text", fail)
    result = run(command, tmp_path / "recipes" / "out.yml", out, "--overwrite")
    code, said = (1, "No space left on device") if isinstance(error, OSError) else (130, "Interrupted.")
    assert result.exit_code == code
    assert said in result.output
    assert hashes(out) == before
    assert not list(tmp_path.glob(".*"))


def test_second_rename_that_fails_is_undone(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = done("lora", pair.recipe(), tmp_path / "out")
    before, rename = hashes(out), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert_refused(run("lora", pair.recipe(), out, "--overwrite"), "could not be written (Input/output error")
    assert hashes(out) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_kill_between_the_two_renames(flags: list[str], pair: Pair, tmp_path: Path) -> None:
    """The next run puts the earlier output back first."""
    earlier = hashes(done("patch", pair.recipe(), tmp_path / "out"))
    work = tmp_path / ".out.partial"
    work.mkdir()
    shutil.copytree(tmp_path / "out", work / "new")
    (tmp_path / "out").rename(work / "old")
    result = run("patch", pair.recipe(source={"beta": 1.0}), tmp_path / "out", *flags)
    assert result.exit_code == (0 if flags else 1), result.output
    assert (hashes(tmp_path / "out") == earlier) == (not flags)
    assert not list(tmp_path.glob(".*"))


def test_another_target_leaves_nothing_of_the_old_one(pair: Pair, tmp_path: Path) -> None:
    out = done("patch", pair.recipe(), tmp_path / "out")
    other = make_target(tmp_path / "other", "llava_next", "hub")
    done("patch", pair.recipe(base_model=str(other)), out, "--overwrite")
    assert (out / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert set(os.listdir(out)) == {*os.listdir(other), "README.md", "mergekit_config.yml"}


def earlier_merge(folder: Path) -> Path:
    """A folder that is made of links, one of them to nothing."""
    backup = folder / "backup"
    for name in ("model.safetensors", "mergekit_config.yml", "README.md", "config.json", "sub/a.jinja"):
        add(name)(backup)
    shutil.copytree(backup, folder / "out", copy_function=os.link)
    (folder / "out" / "vocab.json").symlink_to("nowhere")
    return folder / "out"


def test_nothing_is_written_through_links_in_place(tmp_path: Path) -> None:
    out = earlier_merge(tmp_path)
    before = hashes(tmp_path / "backup")
    (out / "thesis.txt").write_text("mine")
    with built_inside(str(out)) as building:
        with pytest.raises(SnrfError, match="another run"), built_inside(str(out)):
            pass
        for name in ("config.json", "sub/a.jinja", "vocab.json", "README.md"):
            (building / name).parent.mkdir(exist_ok=True)
            (building / name).write_text("new")
    assert hashes(tmp_path / "backup") == before
    assert not (out / "nowhere").exists()
    assert hashes(out).keys() == {
        "config.json",
        "model.safetensors",
        "sub/a.jinja",
        "vocab.json",
        "README.md",
        "thesis.txt",
    }
    assert (out / "config.json").read_text() == "new"


@pytest.mark.parametrize("existed", [False, True])
def test_a_merge_in_place_that_fails_changes_nothing(existed: bool, tmp_path: Path) -> None:
    out = earlier_merge(tmp_path) if existed else tmp_path / "out"
    before = hashes(out)
    with pytest.raises(KeyboardInterrupt), built_inside(str(out)) as building:  # noqa: PT012
        (building / "model.safetensors").write_text("new")
        raise KeyboardInterrupt
    assert hashes(out) == before
    assert out.exists() == existed


def killed(moment: str, number: int, recipe: Path, out: Path) -> int:
    """Merge in a fork that kills itself when it comes to a method of the session."""

    def run() -> None:
        setattr(MergeSession, moment, lambda *words: os.kill(os.getpid(), number))
        install()
        mergekit_yaml([str(recipe), str(out), "--quiet"])

    return forked(run)


def test_kill_of_a_merge_into_an_earlier_one(pair: Pair, tmp_path: Path) -> None:
    """When all weights are written: the earlier merge stays, and the rerun works."""
    out, recipe = tmp_path / "out", write_recipe(tmp_path / "recipe.yml", pair.recipe(source={"beta": 1.0}))
    merge(pair.recipe(), out)
    before = hashes(out)
    assert killed("card", signal.SIGKILL, recipe, out) == -signal.SIGKILL
    assert {name: digest for name, digest in hashes(out).items() if UNFINISHED not in name} == before
    merge(recipe, out)
    merge(recipe, tmp_path / "fresh" / "out")
    assert hashes(out) == hashes(tmp_path / "fresh" / "out")


def test_kill_while_the_shards_move_up(pair: Pair, tmp_path: Path) -> None:
    """Nothing loads what is left, and the rerun works, even with other shards."""
    out, recipe = tmp_path / "out", write_recipe(tmp_path / "recipe.yml", pair.recipe())
    moves, move = iter(range(3)), Path.replace

    def replace(path: Path, to: Path) -> Path:
        if UNFINISHED in str(path) and next(moves, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(path, to)

    def run() -> None:
        Path.replace = replace  # type: ignore[assignment]
        install()
        mergekit_yaml([str(recipe), str(out), "--out-shard-size", "20000", "--quiet"])

    assert forked(run) == -signal.SIGKILL
    assert len(list(out.glob("*.safetensors"))) == 2
    assert not (out / "config.json").exists()
    merge(recipe, out, "--out-shard-size", "30000")
    merge(recipe, tmp_path / "fresh" / "out", "--out-shard-size", "30000")
    assert hashes(out) == hashes(tmp_path / "fresh" / "out")


def test_a_merge_that_is_terminated_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    assert killed("merged", signal.SIGTERM, recipe, tmp_path / "out") == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists()
