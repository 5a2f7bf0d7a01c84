"""Counts of active neurons against hooks on the linear layers in float64, whole runs, and the files that they write."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import LAYERS, example_inputs, load, make_source, make_target
from click.testing import CliRunner
from forked import forked_ranks
from safetensors.torch import load_file
from test_run import write_probes
from torch import Tensor, nn

from mergekit_snrf.cli.profile import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.profiling.domains import DomainsConfig, count_domains, load_config
from mergekit_snrf.profiling.measure.activations import ActivationCounter
from mergekit_snrf.profiling.probes.batches import ProbeBatch, prepare, probe_batches
from mergekit_snrf.profiling.probes.rows import load_rows
from mergekit_snrf.profiling.result.domains import read_domains

# The linear layer whose output an activation takes: of SiLU and all GELUs, the one is positive where the other is.
GATES = {
    "qwen2_5_vl": (r"visual\.blocks\.(\d)\.mlp\.gate_proj", r"visual\.merger\.mlp\.0"),
    "qwen2_vl": (r"visual\.blocks\.(\d)\.mlp\.fc1", r"visual\.merger\.mlp\.0"),
    "qwen3_vl": (r"visual\.blocks\.(\d)\.mlp\.linear_fc1", r"visual\.(merger|deepstack_merger_list\.0)\.linear_fc1"),
    "idefics3": (r"vision_model\.encoder\.layers\.(\d)\.mlp\.fc1", None),
    "smolvlm": (r"vision_model\.encoder\.layers\.(\d)\.mlp\.fc1", None),
    "llava": (r"vision_tower\.encoder\.layers\.(\d)\.mlp\.fc1", r"multi_modal_projector\.linear_1"),
    "llava_next": (r"vision_tower\.encoder\.layers\.(\d)\.mlp\.fc1", r"multi_modal_projector\.linear_1"),
    "internvl": (r"vision_tower\.encoder\.layer\.(\d)\.mlp\.fc1", r"multi_modal_projector\.linear_1"),
    "gemma3": (r"vision_tower\.encoder\.layers\.(\d)\.mlp\.fc1", None),
    "mistral3": (r"vision_tower\.transformer\.layers\.(\d)\.feed_forward\.gate_proj", r"projector\.linear_1"),
    "llama": (None, None),
    "minicpmv": (r"vpm\.encoder\.layers\.(\d)\.mlp\.fc1", None),
}
DECODERS = {"idefics3": "text_model", "smolvlm": "text_model", "llama": "model", "minicpmv": "llm.model"}
WITH_PROCESSOR = ("llava", "idefics3", "gemma3")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family == "llama":
            make_source(folder / "target", family, dtype=torch.float32)
        else:
            make_target(folder / "target", family, "hub", dtype=torch.float32)
        write_probes(folder)
        return folder

    return make


def gates_of(model: nn.Module, family: str) -> dict[str, nn.Module]:
    """Every such layer by the key of its counts."""
    vision, projector = GATES[family]
    patterns = {
        "text.layers.{}": rf"{DECODERS.get(family, 'language_model')}\.layers\.(\d)\.mlp\.gate_proj",
        "vision.layers.{}": vision,
    }
    found = {}
    for name, module in model.named_modules():
        for key, pattern in patterns.items():
            if pattern is not None and (match := re.search(f"{pattern}$", name)):
                found[key.format(match[1])] = module
        if projector is not None and re.search(f"{projector}$", name):
            found[f"projector.{sum(key.startswith('projector') for key in found)}"] = module
    return found


@contextmanager
def seen_by(gates: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def watch(key: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[key] = output.detach()

        return hook

    handles = [module.register_forward_hook(watch(key)) for key, module in gates.items()]
    yield seen
    for handle in handles:
        handle.remove()


def brute_force(
    model: nn.Module, gates: dict[str, nn.Module], inputs: Any, kinds: list[list[int]]
) -> dict[str, Tensor]:
    """Counts of one probe without padding, token by token; `kinds` are the positions of images, prompt and answer."""
    with seen_by(gates) as seen, torch.no_grad():
        model(**inputs, use_cache=False)
    found: dict[str, Tensor] = {"text.tokens": torch.tensor([len(kind) for kind in kinds])}
    for key, output in seen.items():
        assert output.dtype == torch.float64
        if key.startswith("text"):
            rows = [torch.stack([output[0, place] for place in kind]) if kind else output[0, :0] for kind in kinds]
            found[f"{key}.active"] = torch.stack([(row > 0).sum(0) for row in rows])
        else:
            tokens = output.reshape(-1, output.shape[-1])
            found[f"{key}.active"] = (tokens > 0).sum(0)
            found[f"{key.split('.')[0]}.tokens"] = torch.tensor(len(tokens))
    return found


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: sum((part[key] for part in parts[1:]), start=parts[0][key]) for key in parts[0]}


def kinds_of(ids: list[int], image: int | None, answer: int) -> list[list[int]]:
    start = len(ids) - answer
    images = [place for place, token in enumerate(ids[:start]) if token == image]
    return [images, [place for place in range(start) if place not in images], list(range(start, len(ids)))]


@pytest.mark.parametrize("family", GATES)
def test_counts_of_every_family_are_those_of_hooks_on_its_linear_layers(family, target):
    """One padded batch, put together by hand where no processor loads; the answer is three tokens."""
    folder = target(family)
    model = load(folder / "target").double()
    inputs = example_inputs(folder / "target")
    floats = {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}
    prompt = inputs["input_ids"].shape[1]
    per_token = {
        name: one for name, one in floats.items() if one.shape[:2] == (1, prompt) and not one.is_floating_point()
    }

    def longer(width: int, real: int) -> dict[str, Any]:
        tail = {
            "input_ids": torch.arange(5, 5 + width)[None],
            "attention_mask": (torch.arange(width) < real).long()[None],
        }
        extended = {
            name: torch.cat([one, tail.get(name, torch.zeros(1, width, dtype=one.dtype))], dim=1)
            for name, one in per_token.items()
        }
        return {**floats, **extended}

    gates = gates_of(model, family)
    names = ("image_token_id", "image_token_index", "img_token_id")
    image = next((getattr(model.config, name) for name in names if hasattr(model.config, name)), None)
    whole = longer(3, 3)
    kinds = kinds_of(whole["input_ids"][0].tolist(), image, 3)
    assert bool(kinds[0]) == (family != "llama")
    padded = longer(5, 3)
    answer_mask = (torch.arange(prompt + 5) >= prompt)[None] & (padded["attention_mask"] != 0)
    batch = ProbeBatch((0,), padded, padded["attention_mask"], answer_mask)
    counter = ActivationCounter(model, find_live_decoder(model))
    sums = counter.empty()
    expected = brute_force(model, gates, whole, kinds)
    counter.visit(sums, batch)
    counter.visit(sums, batch)
    assert sums.counts.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(sums.counts[key], 2 * tensor), key
        assert int(tensor.max()) > 0, key


def write_config(folder: Path, name: str = "domains.yml", images: bool = True, **keys: Any) -> Path:
    data = {"dataset": "image.jsonl", "images": "image"} if images else {"dataset": "text.jsonl"}
    domains = {
        "angles": {**data, "question": "question", "answer": "answer"},
        "area": {"dataset": "text.jsonl", "question": "answer", "answer": "answer"},
    }
    config = {"model": "target", "domains": domains, "batch_size": 3, "dtype": "float64", **keys}
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("family", WITH_PROCESSOR)
@pytest.mark.parametrize("answer", [None, {"by": "model", "max_new_tokens": 4}])
def test_a_run_counts_what_probes_count_one_by_one(family, answer, target, tmp_path):
    folder = target(family)
    path = write_config(folder, **({} if answer is None else {"answer": answer}))
    config = load_config(path)
    assert isinstance(config, DomainsConfig)
    found = count_domains(config, tmp_path / "d.safetensors", folder=folder, progress=False)
    assert found is not None
    stored = load_file(tmp_path / "d.safetensors")
    model, processor = load_model(config.kinds()[0].model, images=True)
    gates, image = gates_of(model, family), model.config.image_token_id
    for number, kind in enumerate(config.kinds()):
        rows = load_rows(kind.source, answers=False, folder=folder)
        probes = prepare(rows, processor, rule=kind.rule, batch_size=1, config=model.config)
        parts = []
        for batch in probe_batches(probes, model, processor, rule=kind.rule, device="cpu"):
            ids = batch.inputs["input_ids"][0].tolist()
            assert bool((batch.attention_mask != 0).all())
            kinds = kinds_of(ids, image, int(batch.answer_mask.sum()))
            parts.append(brute_force(model, gates, batch.inputs, kinds))
        assert (len(kinds[2]) > 0) == (answer is not None)
        expected = added(parts)
        for key, tensor in stored.items():
            assert torch.equal(tensor[number], expected.get(key, torch.zeros_like(tensor[number]))), (kind.name, key)
    assert found.names == ["angles", "area"]
    assert [one["count"] for one in found.provenance.probes or []] == [8, 8]
    assert int(stored["text.tokens"][1, 0]) == int(stored["vision.tokens"][1]) == 0


def test_padded_patches_do_not_count(target, tmp_path):
    """Two images of different sizes in one batch of idefics3, the smaller one padded, against each alone."""
    folder = target("idefics3")
    model = load(folder / "target").double()
    inputs = example_inputs(folder / "target")
    pixels = inputs["pixel_values"].double()
    mask = torch.ones(*pixels.shape[:2], *pixels.shape[-2:], dtype=torch.bool)
    mask[:, 0, 8:] = False
    pixels[:, 0, :, 8:] = 0
    floats = {**inputs, "pixel_values": pixels, "pixel_attention_mask": mask}
    counter = ActivationCounter(model, find_live_decoder(model))
    sums = counter.empty()
    tokens = inputs["attention_mask"]
    counter.visit(sums, ProbeBatch((0,), floats, tokens, torch.zeros_like(tokens).bool()))
    gate = model.model.vision_model.encoder.layers[0].mlp.fc1
    with seen_by({"gate": gate}) as seen, torch.no_grad():
        model(**floats, use_cache=False)
    # Patches are 4 x 4 pixels: the lower half of the first tile is padding.
    kept = torch.cat([seen["gate"][0, :8], seen["gate"][1:].flatten(0, 1)])
    assert int(sums.counts["vision.tokens"]) == len(kept) == seen["gate"].shape[:2].numel() - 8
    assert torch.equal(sums.counts["vision.layers.0.active"], (kept > 0).sum(0))


class Glu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (nn.Softmax(-1), r"model\.layers\.1\.mlp\.act_fn, Softmax, is not elementwise"),
        (Glu(), r"model\.layers\.1\.mlp\.act_fn, Glu, is not elementwise"),
        (None, r"the activation of model\.layers\.1\.mlp is not a module"),
    ],
)
def test_an_activation_that_is_not_elementwise_is_refused_by_name(act, message, target):
    model = load(target("llama") / "target")
    model.model.layers[1].mlp.act_fn = act
    with pytest.raises(SnrfError, match=message):
        ActivationCounter(model, find_live_decoder(model))


def test_a_shared_activation_nan_and_a_layer_that_did_not_run_are_refused(target):
    model = load(target("llava") / "target")
    inputs = example_inputs(target("llava") / "target")
    mask = inputs["attention_mask"]
    batch = ProbeBatch((0,), inputs, mask, torch.zeros_like(mask).bool())
    counter = ActivationCounter(model, find_live_decoder(model))
    counter._images = ()
    with pytest.raises(SnrfError, match="does not name the token that stands for an image"):
        counter.visit(counter.empty(), batch)
    layers = model.model.vision_tower.encoder.layers
    own = layers[1].mlp.activation_fn
    layers[1].mlp.activation_fn = layers[0].mlp.activation_fn
    with pytest.raises(SnrfError, match="several layers share one activation module"):
        ActivationCounter(model, find_live_decoder(model))
    layers[1].mlp.activation_fn = own
    counter = ActivationCounter(model, find_live_decoder(model))
    original = layers[1].mlp.forward
    layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(SnrfError, match=r"it did not run: model\.vision_tower\.encoder\.layers\.1\.mlp"):
        counter.visit(counter.empty(), batch)
    layers[1].mlp.forward = original
    with torch.no_grad():
        layers[2].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(SnrfError, match=r"layers\.2\.mlp\.activation_fn gives NaN"):
        counter.visit(counter.empty(), batch)
    assert not any(one.act._forward_hooks for one in counter.activations)


def test_an_interrupted_run_resumes_to_the_same_bytes(target, tmp_path, monkeypatch):
    folder = target("llava")
    config = load_config(write_config(folder))
    assert isinstance(config, DomainsConfig)

    def counted(out: Path, **options: Any) -> bytes:
        count_domains(config, out, folder=folder, progress=False, journal_seconds=0, **options)
        return out.read_bytes()

    whole = counted(tmp_path / "whole.safetensors")
    visit, calls = ActivationCounter.visit, []

    def failing(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        visit(self, *arguments)

    out = tmp_path / "d.safetensors"
    monkeypatch.setattr(ActivationCounter, "visit", failing)
    with pytest.raises(KeyboardInterrupt):
        counted(out)
    assert [path.name for path in sorted(tmp_path.glob("d.*"))] == [
        f"d.domain-{n}.journal-0.safetensors" for n in (0, 1)
    ]
    with pytest.raises(SnrfError, match="is the journal of an unfinished run"):
        counted(out)
    assert counted(out, resume=True) == whole
    # Six groups, one of which was interrupted and is counted again.
    assert len(calls) == 7
    assert [path.name for path in tmp_path.glob("d.*")] == ["d.safetensors"]
    monkeypatch.setattr("mergekit_snrf.profiling.groups.load_model", lambda *a, **k: pytest.fail("loaded"))
    assert counted(out, resume=True) == whole
    config = config.override(seed=5)
    with pytest.raises(SnrfError, match="were made with other settings") as caught:
        counted(out, resume=True)
    assert caught.value.field == "resume"


def test_two_processes_write_the_bytes_of_one(target, tmp_path):
    path = write_config(target("llama"), images=False)
    one = CliRunner().invoke(main, [str(path), str(tmp_path / "one.safetensors"), "--quiet"])
    assert one.exit_code == 0, one.output
    assert "one.safetensors: 2 domains, " in one.output
    assert forked_ranks(lambda: main([str(path), str(tmp_path / "two.safetensors")])) == [0, 0]
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_dry_run_shows_the_probes_of_every_domain(target):
    shown = CliRunner().invoke(main, [str(write_config(target("llama"), images=False)), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("--- answer: (none)") == 6
    assert "area: 8 probes of" in shown.output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"domains": {"a": {"dataset": "text.jsonl", "question": "question"}}}, "must have at least 2 entries, got 1"),
        ({"domains": {"a/b": {"dataset": "text.jsonl", "question": "q"}, "c": {}}}, "'a/b' is not a name of letters"),
        ({"answer": {"by": "none", "max_new_tokens": 3}}, "max_new_tokens goes with by: model, not with by: none"),
        ({"target": {"model": "x"}}, "unknown key 'target'"),
        ({"model": "nowhere"}, "'nowhere' does not exist"),
        ({"answer": "column", "domains": {n: {"dataset": "text.jsonl", "question": "q"} for n in "ab"}}, "domains.a"),
    ],
)
def test_settings_that_are_not_valid_are_named(keys, message, target):
    path = write_config(target("llama"), "bad.yml", images=False, **keys)
    result = CliRunner().invoke(main, [str(path), "out.safetensors"])
    assert result.exit_code == 1
    assert message in result.output


def test_damaged_files_are_refused(target, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "d.safetensors"
    config = load_config(write_config(target("llama"), images=False))
    assert isinstance(config, DomainsConfig)
    count_domains(config, path, folder=target("llama"), progress=False)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    key = f"text.layers.{LAYERS - 1}.active"
    changes: list[tuple[dict[str, Tensor | None], str]] = [
        ({"text.layers.0.active": tensors["text.layers.0.active"].float()}, "must be int64 of 3 axes"),
        ({"text.layers.0.active": tensors["text.layers.0.active"][:1]}, r"must have the shape \[2, 3, None\]"),
        ({"text.tokens": None}, "tensor 'text.tokens' must be int64"),
        ({key: tensors[key] + 10**6}, r"has a count that is not in \[0, tokens\]"),
        ({key: -tensors[key] - 1}, r"has a count that is not in \[0, tokens\]"),
        ({"other": torch.zeros(2, dtype=torch.int64)}, "tensor 'other' is unknown"),
        ({"text.layers.1.active": None}, "tensor 'text.layers.1.active' must be int64"),
        ({name: None for name in tensors if "layers" in name}, "'text.tokens' is unknown"),
    ]
    for change, message in changes:
        kept = {name: one for name, one in {**tensors, **change}.items() if one is not None}
        save_file(kept, tmp_path / "bad.safetensors", metadata=metadata)
        with pytest.raises(SnrfError, match=message):
            read_domains(tmp_path / "bad.safetensors")
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnrfError, match="already exists and is not a snrf-domains file"):
        count_domains(config, tmp_path / "other.safetensors", folder=target("llama"), progress=False)
    assert os.path.getsize(tmp_path / "other.safetensors") > 0
