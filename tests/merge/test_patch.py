"""``snrf patch`` against ``mergekit-yaml``, byte for byte, and what is left when it is refused, fails or is killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import SOURCE_OF, load, make_source, make_target, read, write
from forked import forked, start_forked
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from outputs import assert_refused, done, hashes, run, tree
from pair import Pair, assert_same, merge, plan, source_name, target_name, write_recipe

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion import threads as threads_module
from mergekit_snrf.merge import folders
from mergekit_snrf.merge import patch as patch_module
from mergekit_snrf.merge.patch import patch_merge
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.merge.tensors import Tensors
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet

SHARD = 80_000


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


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def assert_like_mergekit(out: Path, expected: Path) -> None:
    """Equal tensors and equal other files."""
    assert_same(read(out), read(expected))
    mine, theirs = ({name: h for name, h in hashes(f).items() if not is_weights(name)} for f in (out, expected))
    assert mine == theirs
    assert {"config.json", "README.md", "mergekit_config.yml", "tokenizer.json"} <= mine.keys()


# The source's names differ from the target's, and gemma3's embeddings are tied.
@pytest.mark.parametrize(
    ("family", "layout", "shard"),
    [
        ("qwen2_5_vl", "nested", SHARD),
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
    before = hashes(target), hashes(source)

    out = done("patch", path, tmp_path / "patch" / "out", *flags)
    merge(path, tmp_path / "mergekit" / "out", *flags)
    assert_like_mergekit(out, tmp_path / "mergekit" / "out")
    assert (hashes(target), hashes(source)) == before
    assert {n for n in os.listdir(out) if is_weights(n)} == {n for n in os.listdir(target) if is_weights(n)}
    assert len(list(out.glob("*.safetensors"))) >= (3 if shard else 1)
    changed = [name for name, tensor in read(out).items() if not torch.equal(tensor, read(target)[name])]
    assert sorted(changed) == sorted(decoder.weight_name(site) for site in decoder.shape.sites())
    if not flags:
        load(out)


@pytest.mark.parametrize(
    ("dtype", "source_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
)
def test_dtypes(dtype: torch.dtype, source_dtype: torch.dtype, pair: Pair, tmp_path: Path) -> None:
    for name, wanted in (("target", dtype), ("source", source_dtype)):
        shutil.copytree(getattr(pair, name), tmp_path / name)
        tensors = read(tmp_path / name)
        write(tmp_path / name, {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()})
    recipe = Pair(tmp_path, tmp_path / "target", tmp_path / "source", pair.mask, pair.neurons).recipe()
    assert_same(read(done("patch", recipe, tmp_path / "out")), merge(recipe, tmp_path / "mergekit" / "out"))


def test_card(pair: Pair, tmp_path: Path) -> None:
    out = done("patch", pair.recipe(), tmp_path / "patched-model")
    assert "\n# target with an update from source\n" in (out / "README.md").read_text()
    out = done("patch", pair.recipe(), tmp_path / "out", "--no-write-model-card")
    assert not {"README.md", "mergekit_config.yml"} & set(os.listdir(out))


def test_mask_that_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(source={"beta": 0}, parameters={"allow_noop": True})
    out = done("patch", recipe, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (pair.target / "model.safetensors").read_bytes()
    assert_refused(run("patch", pair.recipe(source={"beta": 0}), tmp_path / "noop"), "changes nothing", "allow_noop")


def test_workers_and_memory_do_not_change_the_bytes(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    one, two, five = (
        hashes(done("patch", sharded.recipe(), tmp_path / workers / "out", "--workers", workers)) for workers in "125"
    )
    monkeypatch.setattr(threads_module, "memory_limit", lambda: 0)
    bounded = hashes(done("patch", sharded.recipe(), tmp_path / "bounded" / "out"))
    assert one == two == five == bounded
    assert torch.get_num_threads() == threads


def test_untouched_bytes_are_those_of_the_base(sharded: Pair, tmp_path: Path) -> None:
    """Shard by shard: same names, sizes and headers, and all bytes outside the masked rows."""
    result = run("patch", sharded.recipe(), tmp_path / "out")
    edited = {target_name(site): site for site in sharded.neurons}
    rewritten, shards = 0, list(sharded.target.glob("*.safetensors"))
    for shard in shards:
        before, after = shard.read_bytes(), bytearray((tmp_path / "out" / shard.name).read_bytes())
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
                    rewritten += width
        assert after == before
    assert f"{rewritten / 1000:.3g} kB rewritten; shards: {len(shards)} copied, 0 linked" in result.output


@pytest.mark.parametrize("as_in_the_cache", [False, True])
def test_hard_links(as_in_the_cache: bool, sharded: Pair, tmp_path: Path) -> None:
    """Only shards without edits are linked; of a base of symbolic links, the blobs are."""
    blobs = base = tmp_path / "blobs"
    shutil.copytree(sharded.target, blobs)
    if as_in_the_cache:
        base = tmp_path / "snapshot"
        base.mkdir()
        for blob in blobs.iterdir():
            blob.chmod(0o444)
            (base / blob.name).symlink_to(os.path.relpath(blob, base))
    before = hashes(blobs)
    recipe = sharded.recipe(base_model=str(base))
    out = done("patch", recipe, tmp_path / "out", "--hard-links")
    assert hashes(blobs) == before
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    edited = {weight_map[target_name(site)] for site in sharded.neurons}
    linked = {name for name in before if (blobs / name).samefile(out / name)}
    assert linked == {path.name for path in blobs.glob("*.safetensors")} - edited
    assert linked
    assert not any(path.is_symlink() for path in out.iterdir())
    assert_same(read(out), merge(recipe, tmp_path / "mergekit" / "out"))


def test_hard_links_that_the_file_system_refuses(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", fails_at(0, os.link, errno.EXDEV))
    result = run("patch", sharded.recipe(), tmp_path / "out", "--hard-links")
    assert_refused(result, "cannot be hard-linked", "Invalid cross-device link", "leave out --hard-links")
    assert tree(tmp_path) == []


def fails_at(call: int, function: Callable[..., Any], code: int = errno.ENOSPC) -> Callable[..., Any]:
    """The function, but from the `call`-th call on the system refuses."""
    calls = iter(range(call))

    def limited(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return limited


def test_file_systems_that_the_kernel_does_not_copy_on(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashes(done("patch", sharded.recipe(), tmp_path / "expected" / "out"))
    monkeypatch.setattr(patch_module, "_STEP", 1000)
    for call, code in ((0, errno.EXDEV), (1, errno.EINVAL)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "copy_file_range", fails_at(call, os.copy_file_range, code))
            assert hashes(done("patch", sharded.recipe(), tmp_path / str(call) / "out")) == expected
    monkeypatch.delattr(os, "copy_file_range")
    assert hashes(done("patch", sharded.recipe(), tmp_path / "without" / "out")) == expected


def test_a_target_that_shrinks_while_it_is_copied(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, copy = sorted(sharded.target.glob("*.safetensors")), os.copy_file_range

    def shrunk(source: int, target: int, count: int, *offsets: int) -> int:
        last = os.path.samefile(f"/proc/self/fd/{source}", shards[-1])
        return 0 if last and os.fstat(target).st_size else copy(source, target, 1000 if last else count, *offsets)

    monkeypatch.setattr(os, "copy_file_range", shrunk)
    assert_refused(run("patch", sharded.recipe(), tmp_path / "out"), f"{shards[-1]}: changed while it was copied")
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"dtype": "float32"}, ("dtype: a patch keeps every dtype", "mergekit-yaml")),
        ({"out_dtype": "bfloat16"}, ("out_dtype: a patch keeps every dtype", "mergekit-yaml")),
        ({"chat_template": "chatml"}, ("chat_template: a patch copies the tokenizer", "mergekit-yaml")),
        ({"base_model": "bin"}, ("bin: is stored as .bin", "convert it, or merge with mergekit")),
        ({"models": "bin"}, ("bin: is stored as .bin", "convert it, or merge with mergekit")),
    ],
)
def test_refused_recipe(changes: dict[str, Any], texts: tuple[str, ...], pair: Pair, tmp_path: Path) -> None:
    if "bin" in changes.values():
        folder, of = tmp_path / "recipes" / "bin", pair.target if "base_model" in changes else pair.source
        shutil.copytree(of, folder)
        write(folder, read(of), safe=False)
        changes = {"base_model": str(folder)} if "base_model" in changes else {"models": [{"model": str(folder)}]}
    assert_refused(run("patch", pair.recipe(**changes), tmp_path / "out"), *texts)
    assert tree(tmp_path) == []


def test_output_folder_that_exists_or_not(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("elsewhere")
    expected = read(done("patch", pair.recipe(), tmp_path / "a" / "b" / "out"))
    for name in ("link", "dangling"):
        assert_same(read(done("patch", pair.recipe(), tmp_path / name)), expected)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "folder" / "README.md").exists()
    mode = stat.S_IMODE(os.stat(tmp_path / "folder" / "model.safetensors").st_mode)
    (tmp_path / "plain").write_text("")
    assert mode == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def test_error_in_the_middle_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    """The source's last masked tensor holds a NaN."""
    site = list(pair.neurons.nonempty())[-1]
    source = tmp_path / "source"
    shutil.copytree(pair.source, source)
    tensors = read(source)
    tensors[source_name(site)][3, 5] = float("nan")
    write(source, tensors)
    recipe = pair.recipe()
    recipe["models"][0]["model"] = str(source)
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    for out in ("out", "empty", "new/folders/out"):
        assert_refused(run("patch", path, tmp_path / "runs" / out, "--workers", "3"), target_name(site))
        assert tree(tmp_path / "runs") in ([], ["empty"])


def test_a_signal_does_not_wait_for_the_copy(pair: Pair, tmp_path: Path) -> None:
    recipe, log = write_recipe(tmp_path / "recipes" / "recipe.yml", pair.recipe()), tmp_path / "recipes" / "log"
    steps = (pair.target / "model.safetensors").stat().st_size / 1000
    copy = os.copy_file_range

    def slow(*arguments: int) -> int:
        with log.open("a") as file:
            file.write(".")
        time.sleep(0.02 if log.stat().st_size <= 20 else 0.5)
        return copy(*arguments)

    def run() -> None:
        patch_module._STEP, os.copy_file_range = 1000, slow
        snrf(["patch", str(recipe), str(tmp_path / "out"), "--quiet"])

    child = start_forked(run)
    while not (log.exists() and log.stat().st_size > 20):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert 20 < log.stat().st_size < steps / 2, "a copy in these steps would take minutes"
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (patch_module, "_copy", 1),
        (patch_module, "overwrite_neurons", 3),
        (shutil, "copy", 2),
        (Path, "write_text", 1),
    ],
)
def test_disk_full(
    module: Any, name: str, call: int, sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipes" / "recipe.yml", sharded.recipe())
    monkeypatch.setattr(module, name, fails_at(call, getattr(module, name)))
    result = run("patch", recipe, tmp_path / "out")
    assert_refused(result, f"{tmp_path}/out: the merge could not be written (No space left on device", "make room")
    assert tree(tmp_path) == []
    monkeypatch.undo()
    done("patch", recipe, tmp_path / "out")


def test_two_runs_do_not_mix(pair: Pair, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    (work / "new").mkdir(parents=True)
    (work / "new" / "stale.json").write_text("of the other run")
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert_refused(run("patch", pair.recipe(), tmp_path / "out"), f"{work}: another run writes there")
    assert tree(tmp_path) == [".out.partial", ".out.partial/new", ".out.partial/new/stale.json"]
    os.close(descriptor)
    out = done("patch", pair.recipe(), tmp_path / "out")
    assert set(os.listdir(out)) == {*os.listdir(pair.target), "README.md", "mergekit_config.yml"}


@pytest.mark.parametrize("locks", [False, None])
def test_systems_without_locks(locks: bool | None, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if locks is None:
        monkeypatch.setattr(folders, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", fails_at(0, fcntl.flock, errno.ENOLCK))
    done("patch", pair.recipe(), tmp_path / "out")


def loads(folder: Path) -> bool:
    try:
        load(folder)
    except Exception:
        return False
    return True


def watched(events: list[str], limit: int | None) -> None:
    """Let every step of a patch be noted, and the process kill itself before the one of a number."""

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if len(events) == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            events.append(name)
            return function(*args, **kwargs)

        return step

    for module, name in (
        (os, "copy_file_range"),
        (patch_module, "overwrite_neurons"),
        (shutil, "copy"),
        (patch_module, "merge_card"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "rmdir"),
    ):
        setattr(module, name, watch(name, getattr(module, name)))


def test_killed_run(sharded: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", sharded.recipe())

    def attempt(out: Path, limit: int | None = None) -> int:
        def run() -> None:
            events: list[str] = []
            watched(events, limit)
            snrf(["patch", str(recipe), str(out), "--quiet", "--workers", "1"], standalone_mode=False)
            # What came before this is what the run did.
            with (tmp_path / "log.json").open("w") as log:
                json.dump(events, log)

        out.parent.mkdir()
        return forked(run)

    assert attempt(tmp_path / "whole" / "out") == 0
    merge(recipe, tmp_path / "mergekit" / "out")
    assert_like_mergekit(tmp_path / "whole" / "out", tmp_path / "mergekit" / "out")
    whole, events = hashes(tmp_path / "whole" / "out"), json.loads((tmp_path / "log.json").read_text())
    move = events.index("rename")
    assert events[move:] == ["rename", "rmdir"]
    copies, writes = (
        [i for i, name in enumerate(events) if name == kind] for kind in ("copy_file_range", "overwrite_neurons")
    )
    points = {events.index(name) for name in ("merge_card", "write_text", "copy", "rename", "rmdir")}
    for point in sorted({*points, copies[0], copies[-1], move - 1, *writes[:: len(writes) // 4]}):
        folder = tmp_path / f"at-{point}"
        assert attempt(folder / "out", point) == -signal.SIGKILL
        if point > move:
            assert hashes(folder / "out") == whole
            done("patch", recipe, folder / "out", "--overwrite")
            continue
        assert os.listdir(folder) == [".out.partial"], point
        new = folder / ".out.partial" / "new"
        assert (hashes(new) == whole) if point == move else not loads(new), events[point]
        assert hashes(done("patch", recipe, folder / "out")) == whole


def test_python_api(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe()
    config, text = MergeConfiguration.model_validate(recipe), f"# A comment.\n{yaml.safe_dump(recipe)}"
    done = patch_merge(config, text, MergeOptions(quiet=True), str(tmp_path / "out"))
    assert (done.copied, done.linked) == (1, 0)
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == portable(text)
    with pytest.raises(SnrfError, match="is not empty"):
        patch_merge(MergeConfiguration.model_validate(recipe), text, MergeOptions(), str(tmp_path / "out"))


@pytest.mark.parametrize("command", ["patch", "lora"])
def test_devices(command: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not there is an error before anything is written; the tensors are moved to another."""
    for flags, said in (
        (["--cuda"], "--device: 'cuda' is not available, torch "),
        (["--device", "cuda:7"], "--device: 'cuda:7' is not available, torch "),
        (["--device", "gpu"], "--device: 'gpu' is not a torch device"),
    ):
        assert_refused(run(command, pair.recipe(), tmp_path / "out", *flags), said)
        assert not (tmp_path / "out").exists()
    done(command, pair.recipe(), tmp_path / "plain")
    files = hashes(tmp_path / "plain")
    done(command, pair.recipe(), tmp_path / "plain", "--device", "cpu", "--overwrite")
    assert hashes(tmp_path / "plain") == files
    tensors = Tensors(plan(pair.recipe()).finish(), MergeOptions(device="meta"))
    edit = plan(pair.recipe()).edits[0]
    assert {tensors._inputs(edit)[role][:1].device.type for role in edit.names} == {"meta"}
    assert (tensors.workers(None), tensors.workers(3)) == (1, 3)
