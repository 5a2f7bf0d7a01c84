"""The adapter against the merge: loaded by PEFT on the target, and merged by PEFT into it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import SOURCE_OF, TARGETS, example_inputs, load, make_source, make_target
from outputs import assert_refused, done, run
from pair import merge
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mergekit_snrf.fusion.fuse import ORDERS
from mergekit_snrf.fusion.updates import Update
from mergekit_snrf.merge import lora
from mergekit_snrf.merge.lora import factors, live_prefix
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet

CASES = [("llava", "hub"), ("qwen2_5_vl", "hub"), ("idefics3", "hub"), ("qwen2", "hub")]


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


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_adapter_equals_merge(family: str, layout: str, tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, family, layout)
    merge(recipe, tmp_path / "merged")
    done("lora", recipe, tmp_path / "adapter")

    merged, inputs = load(tmp_path / "merged"), example_inputs(tmp_path / "target")
    with torch.no_grad():
        expected = merged(**inputs).logits
        adapted = PeftModel.from_pretrained(load(tmp_path / "target"), tmp_path / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(tmp_path / "target")(**inputs).logits, expected, rtol=1e-2, atol=1e-2)
    unloaded = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(unloaded[name], tensor, rtol=1e-5, atol=1e-6)


def test_one_line_loads_it_beta_is_live_and_adapters_mix(tmp_path: Path) -> None:
    """What the documentation says of transformers and PEFT, against merges of other strengths."""
    recipe = make_merge(tmp_path, "qwen2_5_vl", "hub")
    done("lora", recipe, tmp_path / "adapter")
    make_source(tmp_path / "other", "qwen2", seed=9, dtype=torch.float32)
    texts = {"merged": recipe.read_text(), "half": recipe.read_text().replace("beta: 0.7", "beta: 0.35")}
    texts["second"] = texts["merged"].replace("model: source", "model: other")
    for name, text in texts.items():
        recipe.write_text(text)
        merge(recipe, tmp_path / name)
    done("lora", recipe, tmp_path / "second-adapter")
    inputs = example_inputs(tmp_path / "target")
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        expected = {name: load(tmp_path / name)(**inputs).logits for name in ("target", *texts)}
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        torch.testing.assert_close(model(**inputs).logits, expected["merged"], **close)
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(model(**inputs).logits, expected["half"], **close)
        torch.testing.assert_close(model(**inputs).logits, expected["merged"], **close)

        mixed = PeftModel.from_pretrained(load(tmp_path / "target"), tmp_path / "adapter", adapter_name="one")
        mixed.load_adapter(tmp_path / "second-adapter", "two")
        sums = {}
        for combination in ("cat", "linear"):
            mixed.add_weighted_adapter(["one", "two"], [1.0, 0.5], combination, combination_type=combination)
            mixed.set_adapter(combination)
            sums[combination] = mixed(**inputs).logits
        weights = {name: load(tmp_path / name).state_dict() for name in ("target", "merged", "second")}
        both = load(tmp_path / "target")
        both.load_state_dict(
            {
                key: weights["merged"][key] + 0.5 * (weights["second"][key] - plain)
                for key, plain in weights["target"].items()
            }
        )
        torch.testing.assert_close(sums["cat"], both(**inputs).logits, **close)
        assert not torch.allclose(sums["linear"], both(**inputs).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("rank", "order"), [(0, ORDERS[0]), (1, ORDERS[1]), (32, ORDERS[0])])
def test_ranks_and_orders(rank: int, order: str, tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub", rank=rank, order=order)
    merge(recipe, tmp_path / "merged")
    done("lora", recipe, tmp_path / "adapter")
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


def test_one_rank_for_all_modules_of_the_text_decoder(tmp_path: Path) -> None:
    """Sites of one neuron have as many ranks as the others, zero ones; unmasked sites are absent."""
    recipe = make_merge(tmp_path, "llava", "nested")
    done("lora", recipe, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all(".language_model.layers." in name for name in tensors)
    assert not any(".layers.1.self_attn.v_proj." in name for name in tensors)
    assert {t.shape[0] if "lora_A" in name else t.shape[1] for name, t in tensors.items()} == {4}
    first = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"
    a, b = tensors[first.format("A")], tensors[first.format("B")]
    assert b.any(dim=1).sum() == b.any(dim=0).sum() == 1
    assert a[0].any()
    assert not a[1:].any()


def test_padded_adapter_of_a_hub_model(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    done("lora", recipe, tmp_path / "plain")
    done("lora", recipe, tmp_path / "padded", "--rank", "16", "--base-model", "owner/llm")
    plain, padded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "padded"))
    for name, tensor in padded.items():
        kept, rest = tensor.split([4, 12], dim=0 if "lora_A" in name else 1)
        assert torch.equal(kept, plain[name])
        assert not rest.any()
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/llm", None)
    assert len(config["target_modules"]) > 5
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "base_model:\n- owner/llm\n" in (tmp_path / "padded" / "README.md").read_text()


@pytest.mark.parametrize(("family", "layout"), TARGETS)
def test_modules_have_the_names_of_the_live_model(
    family: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are read off a text model's files without transformers' code; they are those that it gives."""
    target = open_checkpoint(str(make_target(tmp_path / "target", family, layout)), trust_remote_code=True)
    found, plain = live_prefix(target), lora._is_plain_text(target)
    assert plain == (family in ("qwen2", "qwen3", "llama", "mistral"))
    monkeypatch.setattr(lora, "_is_plain_text", lambda _: False)
    assert found == live_prefix(target)


def test_disk_that_is_full(tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        result = run("lora", recipe, tmp_path / "new" / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(result, f"{tmp_path}/new/adapter: the adapter could not be written (File too large")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "change", "text"),
    [
        (["--rank", "3"], {}, "--rank: 3 is smaller than the rank 4 of the update; give at least 4"),
        ([], {"rank: 4": "rank: 4000"}, "4000"),
        ([], {"masks: mask": "allow_noop: true, masks: empty"}, "the merge changes nothing"),
        ([], {"masks:": "biases: true, masks:"}, "biases: a LoRA adapter"),
    ],
)
def test_refusals(flags: list[str], change: dict[str, str], text: str, tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "qwen2_5_vl", "hub")
    write_mask(tmp_path / "empty.safetensors", NeuronSet({}))
    for old, new in change.items():
        recipe.write_text(recipe.read_text().replace(old, new))
    assert_refused(run("lora", recipe, tmp_path / "adapter", *flags), text)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("named", [{}, {"architectures": []}])
def test_target_that_names_no_class(named: dict[str, list[str]], tmp_path: Path) -> None:
    recipe = make_merge(tmp_path, "llama", "hub")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "target" / "config.json").write_text(json.dumps(config | named))
    assert_refused(run("lora", recipe, tmp_path / "adapter"), "target: transformers cannot build it", "'architectures'")
