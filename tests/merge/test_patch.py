"""``snrf patch`` against ``mergekit-yaml``, byte for byte, and what is left when it is refused, fails or is killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from checkpoints import SOURCE_OF, load, make_source, make_target, read, write
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pair import Pair, assert_same, make_pair, merge, source_name, target_name, write_recipe

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge import patch as patch_module
from mergekit_snrf.merge.patch import Patched, patch_merge
from mergekit_snrf.merge.tensors import local_folder
from mergekit_snrf.models.checkpoint import Checkpoint, TensorHeader, open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.shards import byte_ranges
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet

SHARD = 80_000
METHOD = "[Shared Neuron Low-Rank Fusion](https://arxiv.org/abs/2602.19058)"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def sharded(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The pair in shards, and a mask of layer 0 alone, so that some shards have no edit."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("target", "source"):
        shutil.copytree(getattr(pair, name), folder / name)
        write(folder / name, read(folder / name), max_shard_size=SHARD)
        assert len(list((folder / name).glob("*.safetensors"))) >= 3
    neurons = NeuronSet({site: member for site, member in pair.neurons.items() if site.layer == 0})
    write_mask(folder / "mask.safetensors", neurons)
    return Pair(folder, folder / "target", folder / "source", folder / "mask.safetensors", neurons)


def patch(recipe: dict[str, Any] | Path, out: Path, *flags: str) -> Result:
    """Run `snrf patch RECIPE OUT FLAGS` in this process; the recipe lies in a folder of its own."""
    path = recipe if isinstance(recipe, Path) else write_recipe(out.parent / "recipes" / f"{out.name}.yml", recipe)
    return CliRunner().invoke(snrf, ["patch", str(path), str(out), "--quiet", *flags])


def patched(recipe: dict[str, Any] | Path, out: Path, *flags: str) -> Path:
    result = patch(recipe, out, *flags)
    assert result.exit_code == 0, result.output
    assert not list(out.parent.glob(".*")), "nothing temporary is left"
    return out


def assert_refused(result: Result, *texts: str) -> None:
    """Exit code 1 and one sentence that holds the texts, no traceback."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.output.strip().splitlines()
    assert line.startswith("Error: ")
    for text in texts:
        assert text in line, line


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tree(folder: Path) -> list[str]:
    """Everything below a folder but the recipes."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if "recipes" not in path.relative_to(folder).parts
    )


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def assert_like_mergekit(out: Path, expected: Path) -> None:
    """Equal tensors and equal other files."""
    assert_same(read(out), read(expected))
    mine, theirs = ({name: h for name, h in hashes(f).items() if not is_weights(name)} for f in (out, expected))
    assert mine == theirs
    assert {"config.json", "README.md", "mergekit_config.yml", "tokenizer.json"} <= mine.keys()
    assert METHOD in (out / "README.md").read_text()


# In all but smolvlm the source's names differ from the target's; smolvlm's and gemma3's embeddings are tied.
@pytest.mark.parametrize(
    ("family", "layout", "shard"),
    [
        ("qwen2_5_vl", "nested", SHARD),
        ("smolvlm", "hub", None),
        ("llava_next", "hub", None),
        ("gemma3", "nested", SHARD),
        ("internvl_chat", "hub", None),
    ],
)
def test_family(family: str, layout: str, shard: int | None, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", family, layout, max_shard_size=shard)
    source = make_source(tmp_path / "source", SOURCE_OF[family])
    decoder = find_decoder(open_checkpoint(str(target)))
    generator = torch.Generator().manual_seed(3)
    draws = {s: torch.rand(decoder.shape.neurons(s.projection), generator=generator) for s in decoder.shape.sites()}
    write_mask(tmp_path / "mask.safetensors", NeuronSet({site: draw < 0.3 for site, draw in draws.items()}))
    recipe = Pair(tmp_path, target, source, tmp_path / "mask.safetensors", NeuronSet({})).recipe()
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    flags = ["--trust-remote-code"] if family == "internvl_chat" else []
    before = hashes(target) | {f"source/{name}": value for name, value in hashes(source).items()}

    out = patched(path, tmp_path / "patch" / "out", *flags)
    merge(path, tmp_path / "mergekit" / "out", *flags)
    assert_like_mergekit(out, tmp_path / "mergekit" / "out")
    assert hashes(target) | {f"source/{name}": value for name, value in hashes(source).items()} == before
    assert {n for n in os.listdir(out) if is_weights(n)} == {n for n in os.listdir(target) if is_weights(n)}
    assert len(list(out.glob("*.safetensors"))) >= (3 if shard else 1)
    changed = [name for name, tensor in read(out).items() if not torch.equal(tensor, read(target)[name])]
    assert sorted(changed) == sorted(decoder.weight_name(site) for site in decoder.shape.sites())
    if not flags:
        load(out)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": {"rank": 0, "beta": [0.0, 0.3, 1.0]}},
        {
            "source": {"beta": [{"filter": "mlp", "value": 0.2}, {"value": 0.9}]},
            "parameters": {"order": "mask-then-svd"},
        },
    ],
)
def test_recipes(changes: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe(**changes))
    merge(recipe, tmp_path / "mergekit" / "out")
    assert_like_mergekit(patched(recipe, tmp_path / "patch" / "out"), tmp_path / "mergekit" / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("source_dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, source_dtype: torch.dtype, pair: Pair, tmp_path: Path) -> None:
    for name, wanted in (("target", dtype), ("source", source_dtype)):
        shutil.copytree(getattr(pair, name), tmp_path / name)
        tensors = read(tmp_path / name)
        write(tmp_path / name, {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()})
    recipe = Pair(tmp_path, tmp_path / "target", tmp_path / "source", pair.mask, pair.neurons).recipe()
    assert_same(read(patched(recipe, tmp_path / "out")), merge(recipe, tmp_path / "mergekit" / "out"))


def test_title_is_the_folder_without_its_path(pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    merge(recipe, tmp_path / "merged-model")
    out = patched(recipe, tmp_path / "patched-model")
    mine, theirs = ((folder / "README.md").read_text().splitlines() for folder in (out, tmp_path / "merged-model"))
    assert [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b] == [("# patched-model", "# merged-model")]


def test_no_model_card(pair: Pair, tmp_path: Path) -> None:
    out = patched(pair.recipe(), tmp_path / "out", "--no-write-model-card")
    assert not {"README.md", "mergekit_config.yml"} & set(os.listdir(out))


def test_mask_that_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(source={"beta": 0}, parameters={"allow_noop": True})
    out = patched(recipe, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (pair.target / "model.safetensors").read_bytes()
    assert_refused(patch(pair.recipe(source={"beta": 0}), tmp_path / "noop"), "would change nothing")


def test_workers_give_the_same_bytes(sharded: Pair, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        one, two, five = (
            hashes(patched(sharded.recipe(), tmp_path / workers / "out", "--workers", workers)) for workers in "125"
        )
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    # The recipe's text is the same, so every file is.
    assert one == two == five


def test_summary(sharded: Pair, tmp_path: Path) -> None:
    result = patch(sharded.recipe(), tmp_path / "out")
    before, after = read(sharded.target), read(tmp_path / "out")
    rewritten = 0
    for site, member in sharded.neurons.items():
        weight = before[target_name(site)]
        share = int(member.sum()) / len(member) if site.axis == 0 else 1
        rewritten += round(weight.numel() * share) * weight.element_size()
        assert not torch.equal(weight, after[target_name(site)])
    shards = len(list(sharded.target.glob("*.safetensors")))
    assert f"{rewritten / 1000:.3g} kB rewritten; shards: " in result.output
    assert f"0 reflinked, {shards} copied, 0 linked" in result.output or f"{shards} reflinked" in result.output


def test_untouched_bytes_are_those_of_the_base(sharded: Pair, tmp_path: Path) -> None:
    """Shard by shard: same names, sizes and headers, and all bytes outside the masked rows."""
    out = patched(sharded.recipe(), tmp_path / "out")
    edited = {target_name(site): site for site in sharded.neurons}
    for shard in sharded.target.glob("*.safetensors"):
        before, after = shard.read_bytes(), bytearray((out / shard.name).read_bytes())
        start = 8 + int.from_bytes(before[:8], "little")
        for name, entry in json.loads(before[8:start]).items():
            if name not in edited:
                continue
            begin, end = (start + offset for offset in entry["data_offsets"])
            site = edited[name]
            width = (end - begin) // entry["shape"][0]
            for row in range(entry["shape"][0]):
                if site.axis == 1 or sharded.neurons[site][row]:
                    place = slice(begin + row * width, begin + (row + 1) * width)
                    assert after[place] != before[place]
                    after[place] = before[place]
        assert after == before


def test_hard_links(sharded: Pair, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(sharded.target, base)
    before = hashes(base)
    out = patched(sharded.recipe(base_model=str(base)), tmp_path / "out", "--hard-links")
    assert hashes(base) == before
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    edited = {weight_map[target_name(site)] for site in sharded.neurons}
    linked = {path.name for path in base.glob("*.safetensors") if path.samefile(out / path.name)}
    assert linked == {path.name for path in base.glob("*.safetensors")} - edited
    assert linked
    assert edited
    assert not any((base / name).samefile(out / name) for name in os.listdir(base) if name not in linked)
    assert_same(read(out), merge(sharded.recipe(base_model=str(base)), tmp_path / "mergekit" / "out"))


def test_hard_links_that_the_file_system_refuses(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    result = patch(sharded.recipe(), tmp_path / "out", "--hard-links")
    assert_refused(result, "cannot be hard-linked", "Invalid cross-device link", "leave out --hard-links")
    assert tree(tmp_path) == []


def test_base_of_links_as_in_the_hub_s_cache(sharded: Pair, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(sharded.target, blobs)
    snapshot.mkdir()
    for blob in blobs.iterdir():
        blob.chmod(0o444)
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    before = hashes(blobs)
    recipe = sharded.recipe(base_model=str(snapshot))
    out = patched(recipe, tmp_path / "out", "--hard-links")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert any(path.samefile(out / path.name) for path in blobs.glob("*.safetensors"))
    assert hashes(blobs) == before
    assert_same(read(out), merge(recipe, tmp_path / "mergekit" / "out"))


def test_reflinks(sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashes(patched(sharded.recipe(), tmp_path / "copied" / "out"))
    requests = []

    def clone(target: int, request: int, source: int) -> int:
        requests.append(request)
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(patch_module, "_copy", None)
    result = patch(sharded.recipe(), tmp_path / "cloned" / "out")
    shards = len(list(sharded.target.glob("*.safetensors")))
    assert f"shards: {shards} reflinked, 0 copied, 0 linked" in result.output
    # FICLONE of linux/fs.h: _IOW(0x94, 9, int).
    assert requests == [(1 << 30) | (4 << 16) | (0x94 << 8) | 9] * shards
    assert hashes(tmp_path / "cloned" / "out") == expected


@pytest.mark.parametrize(
    "code",
    [
        errno.EOPNOTSUPP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.EAGAIN,
        errno.EIO,
    ],
)
def test_reflink_refused(code: int, sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: int, request: int, source: int) -> int:
        os.pwrite(target, b"half a clone", 0)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    result = patch(sharded.recipe(source={"beta": 0}, parameters={"allow_noop": True}), tmp_path / "out")
    assert "0 reflinked" in result.output, result.output
    weights = {name: value for name, value in hashes(sharded.target).items() if is_weights(name)}
    assert {name: value for name, value in hashes(tmp_path / "out").items() if is_weights(name)} == weights


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"dtype": "float32"}, ("dtype is set, but a patch keeps every dtype", "mergekit-yaml")),
        ({"out_dtype": "bfloat16"}, ("out_dtype is set, but a patch keeps every dtype", "mergekit-yaml")),
        ({"chat_template": "chatml"}, ("chat_template is set", "mergekit-yaml")),
        ({"merge_method": "linear"}, ("merge_method is 'linear'",)),
        ({"tokenizer_source": "base"}, ("'tokenizer_source' is not supported",)),
    ],
)
def test_refused_recipe(changes: dict[str, Any], texts: tuple[str, ...], pair: Pair, tmp_path: Path) -> None:
    assert_refused(patch(pair.recipe(**changes), tmp_path / "out"), *texts)
    assert tree(tmp_path) == []


@pytest.mark.parametrize("name", ["target", "source"])
def test_refused_bin(name: str, pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(getattr(pair, name), tmp_path / "models" / name)
    write(tmp_path / "models" / name, read(getattr(pair, name)), safe=False)
    recipe = pair.recipe()
    if name == "target":
        recipe["base_model"] = str(tmp_path / "models" / name)
    else:
        recipe["models"][0]["model"] = str(tmp_path / "models" / name)
    assert_refused(
        patch(recipe, tmp_path / "runs" / "out"),
        f"models/{name}: is stored as .bin",
        "convert it or merge with mergekit",
    )
    assert tree(tmp_path / "runs") == []


def test_refused_output(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert_refused(
        patch(pair.recipe(), out),
        f"{out}: the output folder is not empty; choose a new folder, or --overwrite an earlier output",
    )
    assert hashes(out) == {"notes.txt": hashlib.sha256(b"mine").hexdigest()}
    assert_refused(patch(pair.recipe(), out / "notes.txt"), "notes.txt: the output path is a file")
    assert_refused(patch(write_recipe(tmp_path / "r.yml", pair.recipe()), pair.target), "is not empty")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_refused(
        patch(write_recipe(tmp_path / "r.yml", pair.recipe()), Path(".")), ".: the output is moved into place"
    )
    assert tree(tmp_path) == ["here", "out", "out/notes.txt", "r.yml"]


def test_output_below_missing_folders_is_made_as_by_mergekit(pair: Pair, tmp_path: Path) -> None:
    out = patched(pair.recipe(), tmp_path / "a" / "b" / "out")
    assert_same(read(out), merge(pair.recipe(), tmp_path / "c" / "d" / "out"))
    (tmp_path / "file").write_text("")
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    assert_refused(patch(recipe, tmp_path / "file" / "out"), f"{tmp_path}/file is not a writable folder; choose")


def test_output_folder_that_exists(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("elsewhere")
    expected = read(patched(pair.recipe(), tmp_path / "out"))
    assert_same(read(patched(pair.recipe(), tmp_path / "link")), expected)
    assert os.readlink(tmp_path / "link") == "folder"
    assert "\n# link\n" in (tmp_path / "folder" / "README.md").read_text()
    assert_same(read(patched(pair.recipe(), tmp_path / "dangling")), expected)
    assert_same(read(tmp_path / "elsewhere"), expected)
    mode = stat.S_IMODE(os.stat(tmp_path / "out" / "model.safetensors").st_mode)
    (tmp_path / "plain").write_text("")
    assert mode == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def damaged_source(pair: Pair, folder: Path) -> Path:
    """A source whose last masked tensor holds a NaN."""
    site = list(pair.neurons.nonempty())[-1]
    shutil.copytree(pair.source, folder)
    tensors = read(folder)
    tensors[source_name(site)][3, 5] = float("nan")
    write(folder, tensors)
    return folder


@pytest.mark.parametrize("workers", ["1", "3"])
def test_error_in_the_middle_leaves_nothing(workers: str, pair: Pair, tmp_path: Path) -> None:
    source = damaged_source(pair, tmp_path / "models" / "source")
    recipe = pair.recipe()
    recipe["models"][0]["model"] = str(source)
    name = target_name(list(pair.neurons.nonempty())[-1])
    result = patch(recipe, tmp_path / "runs" / "out", "--workers", workers)
    assert_refused(result, f"{name}: the source's tensor of shape")
    (tmp_path / "runs" / "empty").mkdir()
    assert_refused(patch(recipe, tmp_path / "runs" / "empty", "--workers", workers), name)
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    assert_refused(patch(path, tmp_path / "runs" / "new" / "folders" / "out", "--workers", workers), name)
    assert tree(tmp_path / "runs") == ["empty"]


def test_interrupt_leaves_nothing(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_module, "merge_card", interrupt)
    assert patch(pair.recipe(), tmp_path / "out").output.strip() == "Aborted!"
    assert tree(tmp_path) == []


# A test run in the background ignores the interrupt, and so would what it starts.
SLOW = """
import io, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
import torch
torch.set_num_threads(1)
from mergekit_snrf.cli.snrf import main
from mergekit_snrf.merge import patch

class Slow(io.FileIO):
    def readinto(self, buffer):
        with open(sys.argv[3], "a") as log:
            log.write(".")
            blocks = log.tell()
        time.sleep(0.02 if blocks <= 20 else 0.5)
        return super().readinto(buffer)

open_path = Path.open
Path.open = lambda self, *words, **names: Slow(self) if names == {"buffering": 0} else open_path(self, *words, **names)
patch._BLOCK = 1000
main(["patch", sys.argv[1], sys.argv[2], "--quiet"], prog_name="snrf")
"""


def test_ctrl_c_does_not_wait_for_the_copy(pair: Pair, tmp_path: Path) -> None:
    recipe, log = write_recipe(tmp_path / "recipes" / "recipe.yml", pair.recipe()), tmp_path / "recipes" / "log"
    blocks = (pair.target / "model.safetensors").stat().st_size / 1000
    arguments = [sys.executable, "-c", SLOW, str(recipe), str(tmp_path / "out"), str(log)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size > 20):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.strip().endswith("Aborted!"), errors
    assert 20 < log.stat().st_size < blocks / 2, "a copy of these blocks would take minutes"
    assert tree(tmp_path) == []


def test_tensors_are_written_while_the_rest_is_copied(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks smaller than a file's buffer: what a tensor has overwritten, no late flush of the copy writes again."""
    recipe = pair.recipe()
    expected = hashes(patched(recipe, tmp_path / "expected" / "out"))
    places = byte_ranges(pair.target / "model.safetensors")
    end = min(places[target_name(site)].offset + places[target_name(site)].bytes for site in pair.neurons)
    written, copy, overwrite = threading.Event(), patch_module._copy, patch_module.overwrite_neurons

    def recorded(*arguments: Any) -> int:
        count = overwrite(*arguments)
        written.set()
        return count

    def waiting(source: Any, target: Any) -> Iterator[int]:
        for copied in copy(source, target):
            yield copied
            assert copied < end or written.wait(60)

    monkeypatch.setattr(patch_module, "_BLOCK", 1000)
    monkeypatch.setattr(patch_module, "_copy", waiting)
    monkeypatch.setattr(patch_module, "overwrite_neurons", recorded)
    assert hashes(patched(recipe, tmp_path / "out")) == expected


def fails_at(call: int, function: Any) -> Any:
    """The function, but the `call`-th call finds the disk full after half of the work."""
    calls = iter(range(call + 1))

    def limited(*args: Any, **kwargs: Any) -> Any:
        if next(calls, call) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return limited


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(patch_module, "_copy", 1), (os, "pwrite", 0), (os, "pwrite", 5), (shutil, "copy", 2), (Path, "write_text", 1)],
)
def test_disk_full(
    module: Any, name: str, call: int, sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipes" / "recipe.yml", sharded.recipe())
    monkeypatch.setattr(module, name, fails_at(call, getattr(module, name)))
    result = patch(recipe, tmp_path / "out")
    assert_refused(result, f"{tmp_path}/out: the merge could not be written (No space left on device", "make room")
    assert tree(tmp_path) == []
    monkeypatch.undo()
    patched(recipe, tmp_path / "out")


def test_the_reason_of_a_failed_copy_is_told_however_late_its_thread_is(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = patch_module._Copy.close

    def slow(copy: Any) -> None:
        close(copy)
        time.sleep(0.02)

    monkeypatch.setattr(patch_module._Copy, "close", slow)
    monkeypatch.setattr(patch_module, "_copy", fails_at(0, patch_module._copy))
    assert_refused(patch(sharded.recipe(), tmp_path / "out"), "the merge could not be written (No space left on device")


def test_a_source_that_cannot_be_read_is_named(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    assert_refused(patch(pair.recipe(), tmp_path / "out"), "model.safetensors: cannot be read (Input/output error)")
    assert tree(tmp_path) == []


def test_parents_of_a_folder_with_too_long_a_name_do_not_stay(pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipes" / "recipe.yml", pair.recipe())
    result = patch(recipe, tmp_path / "new" / ("x" * 247))
    assert_refused(result, "the merge could not be written (File name too long")
    assert tree(tmp_path) == []


def test_file_size_limit_of_the_system(sharded: Pair, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe = write_recipe(tmp_path / "recipes" / "recipe.yml", sharded.recipe())
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, hard))
    try:
        result = patch(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(result, "out: the merge could not be written (File too large")
    assert tree(tmp_path) == []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_two_runs_do_not_mix(pair: Pair, tmp_path: Path) -> None:
    building = tmp_path / ".out.partial"
    building.mkdir()
    (building / "model.safetensors.partial").write_text("of the other run")
    with locked(building):
        assert_refused(patch(pair.recipe(), tmp_path / "out"), "another run writes there")
        assert tree(tmp_path) == [".out.partial", ".out.partial/model.safetensors.partial"]
    (building / "folder").mkdir()
    (building / "folder" / "stale.json").write_text("{}")
    out = patched(pair.recipe(), tmp_path / "out")
    assert_same(read(out), read(patched(pair.recipe(), tmp_path / "again")))
    assert not (out / "folder").exists()


def test_file_system_without_locks(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    patched(pair.recipe(), tmp_path / "out")


KILLER = """
import fcntl, json, os, shutil, signal, sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from mergekit_snrf.cli.snrf import main
from mergekit_snrf.merge import patch

recipe, runs = sys.argv[1], Path(sys.argv[2])
log, lock = [], threading.Lock()

def watch(module, name, limit):
    function = getattr(module, name)
    def watched(*args, **kwargs):
        with lock:
            if 0 <= limit <= len(log):
                os.kill(os.getpid(), signal.SIGKILL)
            log.append(name)
        return function(*args, **kwargs)
    setattr(module, name, watched)

def attempt(out, limit, report=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    for module, name in ((fcntl, "ioctl"), (patch, "_copy"), (os, "pwrite"), (shutil, "copy"),
                         (patch, "merge_card"), (Path, "write_text"), (Path, "rename")):
        watch(module, name, limit)
    try:
        main(["patch", recipe, str(out), "--quiet", "--workers", "1"], standalone_mode=False)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    report.write_text(json.dumps(log)) if report else None
    os._exit(0)

assert attempt(runs / "whole" / "out", -1, runs / "log.json") == 0
events = json.loads((runs / "log.json").read_text())
writes = [i for i, name in enumerate(events) if name == "pwrite"]
points = [i for i, name in enumerate(events) if name in ("ioctl", "rename", "merge_card")]
points += writes[:: len(writes) // 4] + [events.index("_copy"), events.index("copy"), events.index("write_text"),
                                         len(events) - 2]
statuses = {point: attempt(runs / f"at-{point}" / "out", point) for point in sorted(set(points))}
(runs / "log.json").write_text(json.dumps({"events": events, "statuses": statuses}))
"""


def loads(folder: Path) -> bool:
    try:
        load(folder)
    except Exception:
        return False
    return True


def test_killed_run(sharded: Pair, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    recipe = write_recipe(tmp_path / "recipe.yml", sharded.recipe())
    # Without the autoload: the command itself must teach mergekit the method, for the card.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    for folder in (runs, runs / "whole"):
        folder.mkdir()
    subprocess.run([sys.executable, "-c", KILLER, str(recipe), str(runs)], env=environment, check=True)
    log = json.loads((runs / "log.json").read_text())
    merge(recipe, tmp_path / "mergekit" / "out")
    assert_like_mergekit(runs / "whole" / "out", tmp_path / "mergekit" / "out")

    last = len(log["events"]) - 1
    assert log["events"][last] == "rename", "the move into place is the last thing that happens"
    assert len(log["statuses"]) >= 12
    whole = hashes(runs / "whole" / "out")
    for point, status in log["statuses"].items():
        folder = runs / f"at-{point}"
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert os.listdir(folder) == [".out.partial"], point
        if int(point) < last:
            assert not loads(folder / ".out.partial"), log["events"][int(point)]
        else:
            assert hashes(folder / ".out.partial") == whole
        assert hashes(patched(recipe, folder / "out")) == whole


def test_kill_before_the_index_of_an_unsharded_model(pair: Pair, tmp_path: Path) -> None:
    """The one file gets its name last of all, whatever the target's folder holds."""
    renamed: list[str] = []
    rename = Path.rename
    with pytest.MonkeyPatch.context() as monkeypatch:

        def watch(self: Path, target: Path) -> Path:
            renamed.append(Path(target).name)
            if len(renamed) == 1:
                assert not loads(self.parent)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", watch)
        patched(pair.recipe(), tmp_path / "out")
    assert renamed == ["model.safetensors", "out"]


def test_python_api(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe()
    config, text = MergeConfiguration.model_validate(recipe), yaml.safe_dump(recipe)
    done = patch_merge(config, text, MergeOptions(quiet=True), str(tmp_path / "out"))
    assert isinstance(done, Patched)
    assert done.reflinked + done.copied == 1
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text
    with pytest.raises(SnrfError, match="is not empty"):
        patch_merge(MergeConfiguration.model_validate(recipe), text, MergeOptions(), str(tmp_path / "out"))


def test_relative_paths_from_the_recipe_s_folder(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(base_model="target", parameters={"masks": "mask.safetensors"})
    recipe["models"][0]["model"] = "source"
    path = write_recipe(pair.folder / "relative.yml", recipe)
    merge(path, tmp_path / "mergekit" / "out")
    assert_like_mergekit(patched(path, tmp_path / "patch" / "out"), tmp_path / "mergekit" / "out")


def hub_checkpoint() -> Checkpoint:
    headers = {"w": TensorHeader("F32", (1, 1), "model-00001-of-00001.safetensors")}
    files = ("config.json", "tokenizer.json", "README.md", "model-00001-of-00001.safetensors", "model.onnx")
    return Checkpoint("owner/model", None, headers, {}, b"{}", files, revision="abc")


def test_model_on_the_hub_is_fetched_without_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k, name=name) or tmp_path)
    assert local_folder(hub_checkpoint(), MergeOptions(transformers_cache="cache")) == tmp_path
    assert asked.pop("allow_patterns") == [
        "model-00001-of-00001.safetensors",
        "config.json",
        "tokenizer.json",
        "*.index.json",
    ]
    assert asked == {"name": "owner/model", "revision": "abc", "cache_dir": "cache"}


def test_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SnrfError, match=r"owner/model: cannot be downloaded \(ConnectionError: no route\)"):
        local_folder(hub_checkpoint(), MergeOptions())
