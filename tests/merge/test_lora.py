"""The adapter against the merge: loaded by PEFT on the target, and merged by PEFT into it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import SOURCE_OF, example_inputs, load, make_source, make_target
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from peft import PeftModel
from safetensors.torch import load_file

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.fusion.fuse import ORDERS
from mergekit_snrf.fusion.updates import Update
from mergekit_snrf.merge import install
from mergekit_snrf.merge.lora import factors
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet

CASES = [("llava", "hub"), ("qwen2_5_vl", "hub"), ("idefics3", "hub"), ("llama", "hub")]


def make_merge(folder: Path, family: str, layout: str, *, rank: int = 4, order: str = "svd-then-mask") -> Path:
    """A float32 pair, a mask with sites of one neuron, of a third and of none, and the recipe."""
    make_target(folder / "target", family, layout, dtype=torch.float32)
    make_source(folder / "source", SOURCE_OF[family], dtype=torch.float32)
    shape = find_decoder(open_checkpoint(str(folder / "target"))).shape
    generator = torch.Generator().manual_seed(3)
    members = {s: torch.rand(shape.neurons(s.projection), generator=generator) < 1 / 3 for s in shape.sites()}
    for site, member in members.items():
        if site.layer == 1:
            member[:] = False
            member[site.axis] = site.projection != "attn.v"
    write_mask(folder / "mask.safetensors", NeuronSet(members))
    (folder / "snrf.yml").write_text(
        f"merge_method: snrf\nbase_model: target\nmodels:\n  - model: source\n"
        f"    parameters: {{beta: 0.7, rank: {rank}}}\nparameters: {{masks: mask.safetensors, order: {order}}}\n"
    )
    return folder / "snrf.yml"


def invoke(command: object, *arguments: str | Path) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_adapter_equals_merge(family: str, layout: str, tmp_path: Path) -> None:
    install()
    recipe = make_merge(tmp_path, family, layout)
    invoke(mergekit_yaml, recipe, tmp_path / "merged", "--quiet")
    assert "modules" in invoke(snrf, "lora", recipe, tmp_path / "adapter", "--quiet")

    merged, inputs = load(tmp_path / "merged"), example_inputs(tmp_path / "target")
    with torch.no_grad():
        expected = merged(**inputs).logits
        adapted = PeftModel.from_pretrained(load(tmp_path / "target"), tmp_path / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(tmp_path / "target")(**inputs).logits, expected, rtol=1e-2, atol=1e-2)
    unloaded = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(unloaded[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank", "order"), [(0, ORDERS[0]), *((rank, order) for rank in (1, 40) for order in ORDERS)])
def test_ranks_and_orders(rank: int, order: str, tmp_path: Path) -> None:
    install()
    recipe = make_merge(tmp_path, "llama", "hub", rank=min(rank, 32), order=order)
    invoke(mergekit_yaml, recipe, tmp_path / "merged", "--quiet")
    invoke(snrf, "lora", recipe, tmp_path / "adapter", "--quiet")
    unloaded = PeftModel.from_pretrained(load(tmp_path / "target"), tmp_path / "adapter").merge_and_unload()
    merged = load(tmp_path / "merged").state_dict()
    for name, tensor in unloaded.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("neurons", [3, 5, 6, 9])
@pytest.mark.parametrize("rank", [None, 2, 4])
def test_factors_are_as_narrow_as_the_update(rank: int | None, neurons: int, axis: int) -> None:
    """Nine neurons of length five, some of them selected, as rows or as a product."""
    generator = torch.Generator().manual_seed(0)
    selected = torch.randperm(9, generator=generator)[:neurons].sort().values
    left = None if rank is None else torch.randn(neurons, rank, generator=generator)
    right = torch.randn(neurons if rank is None else rank, 5, generator=generator)
    a, b = factors(Update(selected, left, right), 9, axis, 0.25)
    whole = torch.zeros(9, 5)
    whole[selected] = 0.25 * (right if left is None else left @ right)
    torch.testing.assert_close(b @ a, whole if axis == 0 else whole.mT)
    assert len(a) == b.shape[1] == min(neurons, 5, rank or 5)


def test_adapter_touches_masked_neurons_of_the_text_decoder_only(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llava", "nested")
    invoke(snrf, "lora", recipe, tmp_path / "adapter", "--quiet")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all(".language_model.layers." in name for name in tensors)
    assert not any(".layers.1.self_attn.v_proj." in name for name in tensors)
    first = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"
    assert tensors[first.format("B")].any(dim=1).sum() == 1
    assert len(tensors[first.format("A")]) == 1
    assert "base_model" in (tmp_path / "adapter" / "README.md").read_text()


def test_configuration_is_the_same_in_every_run(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    invoke(snrf, "lora", recipe, tmp_path / "adapter", "--quiet")
    modules = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 5
    assert modules == sorted(modules)


def test_disk_that_is_full(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        result = CliRunner().invoke(snrf, ["lora", str(recipe), str(tmp_path / "new" / "adapter"), "--quiet"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path}/new/adapter: the adapter could not be written (File too large")
    assert not (tmp_path / "new").exists()


def test_refusals(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    result = CliRunner().invoke(snrf, ["lora", str(recipe), str(tmp_path / "adapter")])
    assert result.exit_code == 1
    assert "not empty" in result.output
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 4000"))
    result = CliRunner().invoke(snrf, ["lora", str(recipe), str(tmp_path / "other")])
    assert result.exit_code == 1
    assert "4000" in result.output
    assert not (tmp_path / "other").exists()


def test_target_that_names_no_class(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    for named in ({}, {"architectures": []}):
        content = {key: value for key, value in config.items() if key != "architectures"} | named
        (tmp_path / "target" / "config.json").write_text(json.dumps(content))
        result = CliRunner().invoke(snrf, ["lora", str(recipe), str(tmp_path / "adapter"), "--quiet"])
        assert result.exit_code == 1
        assert "its config.json names no class under 'architectures'" in result.output
