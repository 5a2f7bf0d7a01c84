"""Edits of loaded models and state dicts against mergekit's own merge and against weights zeroed by hand."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from checkpoints import SOURCE_OF, example_inputs, load, make_source, make_target, read, write
from click.testing import CliRunner
from made_moments import sizes_of, write_random_moments
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor, nn

import mergekit_snrf as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge import install
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.edits import Edit, deactivate, fuse_model, fuse_state_dict
from mergekit_snrf.models.live import LiveDecoder, find_live_decoder
from mergekit_snrf.models.weights import state_weights, stored_weights, weights_of
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site

FAMILIES = [("llava", "hub"), ("qwen2_5_vl", "hub"), ("idefics3", "hub"), ("gemma3", "hub")]
FUSION = Fusion(beta=0.7, rank=3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a pair of a family once: its folder and a mask of a third of the neurons."""
    made: dict[str, tuple[Path, NeuronSet]] = {}

    def pair(family: str, layout: str = "hub") -> tuple[Path, NeuronSet]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            make_target(folder / "target", family, layout)
            make_source(folder / "source", SOURCE_OF[family])
            shape = find_decoder(open_checkpoint(str(folder / "target"))).shape
            generator = torch.Generator().manual_seed(3)
            members = {s: torch.rand(shape.neurons(s.projection), generator=generator) < 1 / 3 for s in shape.sites()}
            members[Site(1, "attn.v")][:] = False
            write_mask(folder / "mask.safetensors", NeuronSet(members))
            made[family] = folder, NeuronSet(members)
        return made[family]

    return pair


def run_merge(folder: Path, out: str) -> None:
    install()
    (folder / "snrf.yml").write_text(
        f"merge_method: snrf\nbase_model: target\nmodels:\n  - model: source\n"
        f"    parameters: {{beta: {FUSION.beta}, rank: {FUSION.rank}}}\nparameters: {{masks: mask.safetensors}}\n"
    )
    result = CliRunner().invoke(mergekit_yaml, [str(folder / "snrf.yml"), str(folder / out), "--quiet"])
    assert result.exit_code == 0, result.output


def merge(folder: Path, out: str) -> nn.Module:
    run_merge(folder, out)
    return load(folder / out)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "layout", "kind"),
    [*((*case, "checkpoint") for case in FAMILIES), ("llava", "hub", "model"), ("llava", "hub", "state dict")],
)
def test_fused_model_is_the_merged_folder_and_undo_restores_it(family, layout, kind, pairs, tmp_path):
    folder, neurons = pairs(family, layout)
    merged = merge(folder, "merged") if not (folder / "merged").exists() else load(folder / "merged")
    model = load(folder / "target")
    before = copy_of(model)
    source: Any = {
        "checkpoint": lambda: stored_weights(open_checkpoint(str(folder / "source"))),
        "model": lambda: load(folder / "source"),
        "state dict": lambda: load(folder / "source").state_dict(),
    }[kind]()
    edit = fuse_model(model, source, neurons, FUSION)
    assert_same(copy_of(model), copy_of(merged))
    inputs = example_inputs(folder / "target")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, merged(**inputs).logits)
    edit.undo()
    assert_same(copy_of(model), before)
    edit.undo()
    assert_same(copy_of(model), before)


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_fused_state_dict_is_the_merged_folder(family, layout, pairs):
    folder, neurons = pairs(family, layout)
    target, source = read(folder / "target"), read(folder / "source")
    result = fuse_state_dict(target, source, neurons, FUSION)
    if not (folder / "merged").exists():
        merge(folder, "merged")
    assert_same(result, read(folder / "merged"))
    changed = {name for name in target if result[name] is not target[name]}
    assert len(changed) == len(neurons.nonempty())
    assert_same(fuse_state_dict(target, source, neurons), fuse_state_dict(target, source, neurons, Fusion()))


def test_biases_and_source_base_move_as_float64_says(pairs):
    folder, neurons = pairs("qwen2_5_vl")
    target, source = read(folder / "target"), read(folder / "source")
    base = {name: tensor + 0.25 for name, tensor in source.items()}
    fusion = Fusion(beta=0.5, rank=0)
    result = fuse_state_dict(target, source, neurons, fusion, source_base=base, biases=True)
    mine, theirs = state_weights(target), state_weights(source)
    for site, member in neurons.nonempty().items():
        for name, other in (
            (mine.name(site), theirs.name(site)),
            (mine.name(site)[:-6] + "bias", theirs.name(site)[:-6] + "bias"),
        ):
            if name not in target or (name.endswith("bias") and site.axis == 1):
                continue
            expected = target[name].double()
            step = 0.5 * (source[other].double() - base[other].double())
            keep = member if name.endswith("bias") or site.axis == 1 else member[:, None]
            expected = torch.where(keep, expected + step, expected)
            torch.testing.assert_close(result[name].double(), expected, rtol=2**-8, atol=1e-6)
            assert not torch.equal(result[name], target[name])


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_deactivated_is_zeroed_by_hand(family, layout, pairs):
    folder, neurons = pairs(family, layout)
    model, other = load(folder / "target"), load(folder / "target")
    before = copy_of(model)
    layers = find_live_decoder(other).layers
    with torch.no_grad():
        for neuron in neurons.neurons():
            linear: Any = layers[neuron.site.layer].get_submodule(neuron.site.module)
            if neuron.site.projection == "fwd.down":
                linear.weight[:, neuron.index] = 0
            else:
                linear.weight[neuron.index] = 0
                if linear.bias is not None:
                    linear.bias[neuron.index] = 0
    with deactivate(model, neurons):
        assert_same(copy_of(model), copy_of(other))
    assert_same(copy_of(model), before)


def test_restored_after_an_interrupt_in_the_middle(pairs, monkeypatch):
    folder, neurons = pairs("llava")
    model = load(folder / "target")
    before, write, calls = copy_of(model), Edit.write, iter([None] * 5)

    def interrupted(edit: Edit, *arguments: Any) -> None:
        write(edit, *arguments)
        if next(calls, "late") == "late":
            raise KeyboardInterrupt

    monkeypatch.setattr(Edit, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deactivate(model, neurons)
    assert_same(copy_of(model), before)


def test_edits_nest(pairs):
    folder, neurons = pairs("llava")
    model, source = load(folder / "target"), read(folder / "source")
    before = copy_of(model)
    with fuse_model(model, source, neurons, FUSION):
        between = copy_of(model)
        with deactivate(model, neurons.random(1)):
            pass
        assert_same(copy_of(model), between)
    assert_same(copy_of(model), before)
    first = fuse_model(model, source, neurons, FUSION)
    second = deactivate(model, neurons)
    with pytest.raises(SnrfError, match="a later edit of the same weights"):
        first.undo()
    second.undo()
    first.undo()
    assert_same(copy_of(model), before)


def test_a_path_is_no_source(pairs):
    folder, neurons = pairs("llava")
    with pytest.raises(SnrfError, match="is a path; give open_checkpoint"):
        fuse_model(load(folder / "target"), str(folder / "source"), neurons)  # type: ignore[arg-type]


def test_a_damaged_source_leaves_the_model_as_it_was(pairs):
    folder, neurons = pairs("llava")
    model, source = load(folder / "target"), read(folder / "source")
    before = copy_of(model)
    source[state_weights(source).name(Site(2, "fwd.down"))][0, 0] = torch.nan
    with pytest.raises(SnrfError, match=r"layers\.2\.mlp\.down_proj\.weight: the source's .* NaN"):
        fuse_model(model, source, neurons, FUSION)
    assert_same(copy_of(model), before)


def test_fusion_by_site(pairs):
    folder, neurons = pairs("llava")
    model, source = load(folder / "target"), read(folder / "source")
    before = copy_of(model)
    fuse_model(model, source, neurons, lambda site: Fusion(beta=float(site.layer == 2), rank=0))
    after = copy_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers.2." in name for name in changed)


def test_masks_of_other_models_are_refused(pairs):
    folder, _ = pairs("llava")
    model = load(folder / "target")
    with pytest.raises(SnrfError, match=r"layers\.0\.attn\.q of shape \[7\]"):
        deactivate(model, NeuronSet({Site(0, "attn.q"): torch.ones(7, dtype=torch.bool)}))
    with pytest.raises(SnrfError, match=r"layers\.9\.attn\.q"):
        deactivate(model, NeuronSet({Site(9, "attn.q"): torch.ones(64, dtype=torch.bool)}))


def test_models_that_are_not_in_memory_are_refused(pairs):
    folder, neurons = pairs("llava")
    model = load(folder / "target").to("meta")
    with pytest.raises(SnrfError, match="not in memory; load it whole"):
        deactivate(model, neurons)


def test_a_model_that_was_cast_is_not_undone_wrongly():
    linear = nn.Linear(3, 2)
    edit = Edit()
    edit.write(linear.weight, 0, torch.tensor([0]), 0.0)
    linear.to(torch.bfloat16)
    with pytest.raises(SnrfError, match=r"float32 on cpu is now torch.bfloat16"):
        edit.undo()


def test_missing_biases_and_decoders_are_named(pairs):
    folder, neurons = pairs("qwen2_5_vl")
    target, source = read(folder / "target"), read(folder / "source")
    without = {name: tensor for name, tensor in source.items() if not name.endswith("q_proj.bias")}
    with pytest.raises(SnrfError, match=r"q_proj\.bias: biases: the source has no such bias"):
        fuse_state_dict(target, without, neurons, FUSION, biases=True)
    with pytest.raises(SnrfError, match="no text decoder"):
        fuse_state_dict({}, source, neurons, FUSION)
    both = {**source, **{f"other.{name}": tensor for name, tensor in source.items()}}
    with pytest.raises(SnrfError, match=r"several text decoders \(model.layers., other.model.layers.\)"):
        weights_of(both)
    with pytest.raises(SnrfError, match="has no tensor"):
        state_weights(source).weight(Site(9, "attn.q"))
    stored = weights_of(open_checkpoint(str(folder / "source")))
    with pytest.raises(SnrfError, match="has no tensor"):
        stored.weight(Site(9, "attn.q"))
    with pytest.raises(SnrfError, match="only on the hub"):
        stored_weights(Checkpoint("owner/model", None, {}, {}, b""))


def test_weights_are_the_same_wherever_they_are(pairs):
    folder, _ = pairs("qwen2_5_vl")
    live = weights_of(load(folder / "source"))
    assert isinstance(live, LiveDecoder)
    for other in (weights_of(read(folder / "source")), weights_of(open_checkpoint(str(folder / "source")))):
        for site in live.shape.sites():
            assert torch.equal(live.weight(site), other.weight(site))
            mine, theirs = live.bias(site), other.bias(site)
            assert (mine is None) == (theirs is None)
            assert mine is None or (theirs is not None and torch.equal(mine, theirs))


def test_python_interface():
    public = [name for name in snrf.__all__ if name != "__version__"]
    assert all(getattr(snrf, name).__name__ == name for name in public)
    assert set(dir(snrf)) == set(snrf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = snrf.nothing


def test_profile_takes_what_a_processor_returns(pairs):
    folder, _ = pairs("llava")
    model, inputs = load(folder / "target"), example_inputs(folder / "target")
    once = snrf.profile(model, [inputs])
    twice = snrf.profile(model, [inputs, inputs])
    without = snrf.profile(model, [{k: v for k, v in inputs.items() if k != "attention_mask"}])
    site = Site(0, "attn.k")
    assert twice.count == 2 * once.count
    assert torch.equal(twice.sites[site].hits, 2 * once.sites[site].hits)
    top = snrf.select([once], top_ratio=0.1)
    assert top == snrf.select([twice], top_ratio=0.1) == snrf.select([without], top_ratio=0.1)
    assert top.count() > 0
    with pytest.raises(SnrfError, match="no tensor input_ids"):
        snrf.profile(model, [{"text": "no"}])


def test_profile_knows_what_was_measured(pairs, tmp_path):
    folder, _ = pairs("llava")
    model, inputs = load(folder / "target"), example_inputs(folder / "target")
    found = snrf.profile(model, [inputs], measure=snrf.Measure(site="post_o"))
    assert found.provenance.measure is not None
    assert found.provenance.measure["site"] == "post_o"
    snrf.write_profile(tmp_path / "p.safetensors", found)
    assert snrf.read_profile(tmp_path / "p.safetensors").provenance == found.provenance
    with pytest.raises(SnrfError, match="answer_mask"):
        snrf.profile(model, [inputs], measure=snrf.Measure(tokens="answer"))


def test_biases_of_an_offloaded_source(pairs):
    folder, neurons = pairs("qwen2_5_vl")
    target, source = load(folder / "target"), load(folder / "source")
    whole, offloaded = copy_of(target), cpu_offload(load(folder / "source"), torch.device("cpu"))
    fuse_model(target, source, neurons, FUSION, biases=True)
    expected = copy_of(target)
    target.load_state_dict(whole)
    fuse_model(target, offloaded, neurons, FUSION, biases=True)
    assert_same(copy_of(target), expected)


def test_python_page_runs(monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    result = doctest.testfile(str(root / "docs/python.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20
    assert result.failed == 0


def test_original_llava_is_merged_by_the_names_on_disk(pairs, tmp_path):
    """Its type has no class in transformers and no code in the checkpoint."""
    _, neurons = pairs("llava")
    target = make_source(tmp_path / "target", SOURCE_OF["llava"])
    tensors = {**read(target), "model.mm_projector.0.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    config = {**json.loads((target / "config.json").read_text()), "model_type": "llava_llama", "mm_vision_tower": "x"}
    (target / "config.json").write_text(json.dumps(config))
    write(target, {name: tensor * 1.5 for name, tensor in tensors.items()})
    make_source(tmp_path / "source", SOURCE_OF["llava"])
    write_mask(tmp_path / "mask.safetensors", neurons)
    run_merge(tmp_path, "merged")
    assert_same(read(tmp_path / "merged"), fuse_state_dict(read(target), read(tmp_path / "source"), neurons, FUSION))
    assert (tmp_path / "merged" / "config.json").read_bytes() == (target / "config.json").read_bytes()


def test_of_two_live_stacks_the_one_with_embeddings_and_norm_is_the_decoder(pairs):
    folder, _ = pairs("llava")
    model = load(folder / "target")
    path = find_live_decoder(model).path
    model.resampler = nn.Module()
    model.resampler.layers = nn.ModuleList(model.get_submodule(path))
    assert find_live_decoder(model).path == path
    assert "LlamaDecoderLayer" not in repr(find_live_decoder(model))
    tensors = model.state_dict()
    assert f"{path}." == state_weights(tensors).prefix
    assert "tensor(" not in repr(state_weights(tensors)) + repr(deactivate(model, NeuronSet({})))


def test_regmean_is_the_folder_that_mergekit_yaml_writes_and_is_undone(pairs):
    folder, neurons = pairs("llava")
    shape = find_decoder(open_checkpoint(str(folder / "target"))).shape
    sizes = sizes_of(shape.layers, shape.hidden_size, shape.intermediate_size)
    path = write_random_moments(folder / "moments.safetensors", sizes)
    install()
    (folder / "regmean.yml").write_text(
        "merge_method: snrf\nbase_model: target\nmodels: [{model: source}]\n"
        "parameters: {update: regmean, moments: moments.safetensors, keep: 2}\n"
    )
    result = CliRunner().invoke(mergekit_yaml, [str(folder / "regmean.yml"), str(folder / "regmean"), "--quiet"])
    assert result.exit_code == 0, result.output
    model, source = load(folder / "target"), load(folder / "source")
    before, fusion = copy_of(model), Fusion(update="regmean", keep=2)
    with snrf.fuse_model(model, source, None, fusion, moments=path):
        assert_same(copy_of(model), copy_of(load(folder / "regmean")))
    assert_same(copy_of(model), before)
    other = write_random_moments(folder / "other.safetensors", sizes_of(shape.layers, 8, shape.intermediate_size))
    for given, text in ((None, "moments: is missing"), (other, "has moments of 8 inputs at layers.0.attn")):
        with pytest.raises(SnrfError, match=text):
            snrf.fuse_model(model, source, neurons, fusion, moments=given)
    assert_same(copy_of(model), before)
