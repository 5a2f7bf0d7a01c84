"""Every mistake that a merge refuses, made as a user makes it: one sentence, exit code 1, and nothing is written."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.multigpu_executor as multi_gpu
import pytest
import torch
import yaml
from checkpoints import make_source, make_target, read, write
from click.testing import CliRunner
from mergekit.io.tensor_writer import TensorWriter
from pair import (
    Pair,
    assert_same,
    files,
    merge,
    one,
    plan,
    run,
    same_bits,
    source_name,
    target_name,
    write_recipe,
)
from safetensors import SafetensorError

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge.session import MergeSession
from mergekit_snrf.neurons.maskfile import ModelProvenance, Provenance, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

UP = "model.layers.0.mlp.up_proj.weight"


def test_sha256_of_the_mask(pair: Pair, tmp_path: Path) -> None:
    import hashlib

    right = hashlib.sha256(pair.mask.read_bytes()).hexdigest()
    message = one(pair.recipe(parameters={"masks_sha256": "0" * 64}), tmp_path / "out")
    assert message.startswith(f"{pair.mask}: masks_sha256: the file has {right}, not {'0' * 64}; ")
    merge(pair.recipe(parameters={"masks_sha256": right.upper()}), tmp_path / "out")


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


def test_mask_of_another_model(pair: Pair, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    write_mask(mask, NeuronSet({Site(layer, f"attn.{p}"): ones(8) for layer in range(3) for p in "qkv"}))
    problem = one(pair.recipe(parameters={"masks": str(mask)}), tmp_path / "out")
    assert problem.startswith(f"{mask}: tensor layers.0.attn.k of shape [8] does not fit {pair.target}, ")


def test_empty_mask(pair: Pair, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    write_mask(mask, NeuronSet({}))
    message = one(pair.recipe(parameters={"masks": str(mask)}), tmp_path / "out")
    assert message == (
        f"{mask}: the mask has no neurons, so the merge changes nothing; "
        "give a mask with neurons, or set allow_noop: true"
    )
    for number, changes in enumerate(({"masks": str(mask)}, {"beta": 0.0})):
        recipe = pair.recipe(parameters={"allow_noop": True, **changes}, source={"beta": None})
        assert_same(merge(recipe, tmp_path / f"out{number}"), read(pair.target))


def test_provenance_that_contradicts_the_recipe_is_a_warning(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = tmp_path / "mask.safetensors"
    made_from = Provenance(
        target=ModelProvenance(model_type="idefics3", config_sha256="ab" * 32), source=ModelProvenance(path="x/source")
    )
    write_mask(mask, pair.neurons, made_from)
    merge(pair.recipe(parameters={"masks": str(mask)}), tmp_path / "out")
    warnings = [record.message for record in caplog.records if record.name.startswith("mergekit_snrf")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{mask}: was made for another target: model_type 'idefics3' against 'llava'; config")


def test_source_of_another_family(pair: Pair, tmp_path: Path) -> None:
    make_source(tmp_path / "source", "qwen2")
    recipe = pair.recipe(models=[{"model": str(tmp_path / "source")}])
    message = one(recipe, tmp_path / "out")
    assert f"text decoder is 'llama' ({pair.target}/config.json), the source's 'qwen2' ({tmp_path}/sou" in message
    assert "allow_family_mismatch: " in message
    recipe["parameters"]["allow_family_mismatch"] = True
    out, base = merge(recipe, tmp_path / "out"), read(pair.target)
    edited = {target_name(site) for site in pair.neurons}
    assert {name for name in base if not same_bits(out[name], base[name])} == edited


def rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    return lambda folder: write(folder, change(read(folder)))


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "integer weights": (
        rewrite(lambda t: t | {UP: t[UP].to(torch.int8)}),
        f"{UP} is stored as I8, not as F16, BF16",
    ),
    "another depth than config.json": (
        edit_config(num_hidden_layers=4),
        "config.json says 4 layers of width 64, but the tensors model.layers.* are 3 layers",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", os.path.getsize(f / "model.safetensors") - 1),
        "model.safetensors: cannot be read (",
    ),
}


@pytest.mark.parametrize("role", ["source", "base_model"])
@pytest.mark.parametrize("kind", SOURCES)
def test_model_that_cannot_be_used(kind: str, role: str, pair: Pair, tmp_path: Path) -> None:
    damage, message = SOURCES[kind]
    shutil.copytree(pair.source, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    model = str(tmp_path / "damaged")
    changes: dict[str, Any] = {"models": [{"model": model}]} if role == "source" else {"base_model": model}
    (problem,) = map(str, plan(pair.recipe(**changes)).problems)
    assert model in problem
    assert message in problem


def test_remote_code_only_when_allowed(pair: Pair, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", "minicpmv", "hub")
    recipe = pair.recipe(base_model=str(target))
    message = one(recipe, tmp_path / "out")
    assert message.startswith(f"{target}: model_type 'minicpmv' is defined by code in the checkpoint")
    assert message.endswith("look at the code, then pass --trust-remote-code")
    merge(recipe, tmp_path / "out", "--trust-remote-code")


@pytest.mark.parametrize(("key", "dtype"), [("dtype", torch.bool), ("out_dtype", torch.float8_e4m3fn)])
def test_dtype_with_a_buffer_that_it_would_spoil(dtype: torch.dtype, key: str, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    write(target, {**read(target), "vision_tower.buffer": torch.tensor([1.0]).to(dtype)})
    (problem,) = plan(pair.recipe(base_model=str(target), **{key: "float32"})).problems
    assert (problem.where, key in str(problem.remedy)) == (str(target), True)
    assert "tensor vision_tower.buffer of shape [1]" in problem.what


def test_output_folder(pair: Pair, tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(pair.target)
    assert "is a model of the recipe" in one(write_out(pair, tmp_path), pair.source)
    for out, what in (
        (pair.target, "is a model of the recipe"),
        (link, "is a model of the recipe"),
        (file, "is a file"),
        (file / "out", f"{file} is not a writable folder"),
    ):
        (problem,) = plan(pair.recipe(), out).problems
        assert (problem.where, what in problem.what) == (str(out), True)


def write_out(pair: Pair, folder: Path) -> Path:
    """A recipe in a folder of its own, so that none appears beside the models."""
    return write_recipe(folder / "recipe" / "snrf.yml", pair.recipe())


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_output_folder_with_other_weights(name: str, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("other")
    (problem,) = plan(pair.recipe(), out).problems
    assert (problem.where, "other weights" in problem.what) == (str(out / name), True)


def test_a_model_that_is_no_earlier_merge_is_not_replaced(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.target, tmp_path / "other")
    before = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert "model.safetensors: would be replaced, but the folder has no" in one(pair.recipe(), tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("flags", ["--out-shard-size 20000", "--no-safe-serialization"])
def test_output_folder_with_an_earlier_merge_of_another_layout(flags: str, pair: Pair, tmp_path: Path) -> None:
    before = merge(pair.recipe(source={"beta": 1.0}), tmp_path / "out")
    assert "holds other weights" in one(pair.recipe(), tmp_path / "out", *flags.split())
    assert_same(read(tmp_path / "out"), before)


def test_adapter(pair: Pair, tmp_path: Path) -> None:
    adapted = f"{pair.source}+{tmp_path / 'adapter'}"
    message = one(pair.recipe(models=[{"model": adapted}]), tmp_path / "out")
    assert message.startswith(f"{adapted}: the source has a LoRA adapter")
    assert message.endswith("pass --lora-merge-cache DIR")
    (tmp_path / "adapter").mkdir()
    message = one(
        pair.recipe(models=[{"model": adapted}]), tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache")
    )
    assert message.startswith(f"{adapted}: mergekit cannot merge the adapter into the source (")
    assert message.endswith(f"check the adapter, and empty {tmp_path / 'cache'} before the next run")
    message = one(pair.recipe(base_model=f"{pair.target}+{tmp_path / 'adapter'}"), tmp_path / "out")
    assert "merge the adapter into a folder of its own first and name that folder" in message


def test_a_plus_in_the_name_of_a_folder(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.source, tmp_path / "a+b")
    message = one(pair.recipe(models=[{"model": str(tmp_path / "a+b")}]), tmp_path / "out")
    assert message.startswith(f"{tmp_path}/a+b: has a '+' in its name")


@pytest.mark.parametrize("chat_template", [None, "chatml"])
def test_a_tokenizer_that_cannot_be_read(chat_template: str | None, pair: Pair, tmp_path: Path) -> None:
    """Without a chat template mergekit copies its files; with one it loads them."""
    target = shutil.copytree(pair.target, tmp_path / "target")
    (target / "tokenizer.json").unlink()
    if chat_template is None:
        (target / "tokenizer.json").symlink_to("tokenizer.json")
    else:
        (target / "tokenizer.json").write_text("{")
    message = one(pair.recipe(base_model=str(target), chat_template=chat_template), tmp_path / "out")
    assert message.startswith(f"{target}/tokenizer.json" if chat_template is None else f"{target}: the tokenizer")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: No space left on device"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
    ],
)
def test_a_full_disk(error: Exception, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(MergeSession, "merged", full)
    message = one(pair.recipe(), tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'out'}: the merge could not be written (")
    assert "No space left on device" in message


@pytest.fixture
def damaged(pair: Pair, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose source has a NaN in the last tensor that a merge computes."""
    source = tmp_path / "source"
    shutil.copytree(pair.source, source)
    tensors, name = read(source), source_name(Site(2, "fwd.up"))
    tensors[name][3, 3] = float("nan")
    write(source, tensors)
    return pair.recipe(models=[{"model": str(source)}])


NAN = f"{target_name(Site(2, 'fwd.up'))}: the source's tensor of shape [96, 64] holds NaN or infinite weights"


@pytest.mark.parametrize("flags", ["", "--no-safe-serialization --out-shard-size 10000"])
def test_weights_that_are_not_finite(flags: str, damaged: dict[str, Any], tmp_path: Path) -> None:
    """Only a merge that is under way can see it: then no shard stays, nor a folder that was not there before."""
    assert one(damaged, tmp_path / "out", *flags.split()).startswith(NAN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert one(damaged, tmp_path / "out", *flags.split()).startswith(NAN)


@pytest.mark.usefixtures("two_accelerators")
def test_weights_that_are_not_finite_in_a_worker_thread(damaged: dict[str, Any], tmp_path: Path) -> None:
    assert multi_gpu.get_torch_accelerator_count() == 2
    assert one(damaged, tmp_path / "out", "--multi-gpu", "--out-shard-size", "10000").startswith(NAN)


def test_traceback_only_with_vv(damaged: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    for recipe in (damaged, pair.recipe(base_model=None)):
        for flags, error in ((("-v",), SystemExit), (("-vv",), SnrfError)):
            result = run(recipe, tmp_path / "out", *flags)
            assert type(result.exception) is error
            assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["run_yaml", "multimerge"])
def test_recipe_that_cannot_be_read(script: str, tmp_path: Path) -> None:
    """mergekit's own commands; a FIFO without a writer would never end."""
    main = importlib.import_module(f"mergekit.scripts.{script}").main
    folders = ["--intermediate-dir", str(tmp_path / "stages")] if script == "multimerge" else [str(tmp_path / "out")]
    fifo, text, missing = tmp_path / "fifo.yml", tmp_path / "text.yml", tmp_path / "missing.yml"
    os.mkfifo(fifo)
    text.write_bytes(b"merge_method: snrf # \xff")
    reasons = {
        fifo: "is not a regular file",
        text: "is not UTF-8",
        missing: "not exist|No such file",
        tmp_path: "folder",
    }
    for path, reason in reasons.items():
        result = CliRunner().invoke(main, [str(path), *folders])
        assert result.exit_code in (1, 2)  # click's own answer is 2.
        assert re.search(f"Error: .*{path}.*({reason})", result.output)


def test_recipe_from_a_pipe(pair: Pair, tmp_path: Path) -> None:
    """The shell's ``mergekit-yaml <(...) out``."""
    reader, writer = os.pipe()
    os.write(writer, yaml.safe_dump(pair.recipe()).encode())
    os.close(writer)
    merge(Path(f"/dev/fd/{reader}"), tmp_path / "out")
    os.close(reader)


def test_shard_that_a_thread_is_writing_when_a_merge_fails(
    damaged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: shards under way do not stay in the folder."""
    saved: list[Path] = []
    save = TensorWriter._save_st

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        with contextlib.suppress(Exception):
            save(*arguments)
        saved.append(arguments[-1])

    monkeypatch.setattr(TensorWriter, "_save_st", slow)
    (tmp_path / "out").mkdir()
    assert one(damaged, tmp_path / "out", "--async-write", "--out-shard-size", "60000").startswith(NAN)
    deadline = time.monotonic() + 30
    while len(saved) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(saved) > 1
    assert files(tmp_path / "out") == {}
