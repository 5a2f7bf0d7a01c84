"""Cards of merges and adapters: all they say is in the plan and its files, without the folders of this machine."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import make_source, make_target, read
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from outputs import done, front_of, rows_of
from pair import merge

from mergekit_snrf.files import references
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.merge.recipefile import load_recipe
from mergekit_snrf.neurons.maskfile import ModelProvenance, Provenance, read_mask, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

COMMANDS = ["merged", "patched", "lora"]


def make(name: str, recipe: Path, out: Path) -> str:
    """Return the card of what one of three commands makes of a recipe."""
    merge(recipe, out) if name == "merged" else done("lora" if name == "lora" else "patch", recipe, out)
    return (out / "README.md").read_text()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, its mask, the recipe, and what three commands make of it."""
    folder = tmp_path_factory.mktemp("merge")
    make_target(folder / "target", "llava", "hub")
    make_source(folder / "source", "llama")
    neurons = NeuronSet({Site(1, "attn.q"): torch.arange(64) < 7, Site(2, "fwd.down"): torch.arange(96) < 5})
    source = ModelProvenance(path="owner/llm", probes={"count": 7})
    write_mask(folder / "mask.safetensors", neurons, Provenance(source=source, selection={"top_ratio": 0.25}))
    (folder / "snrf.yml").write_text(
        "# A recipe.\nmerge_method: snrf\nbase_model: target\nmodels:\n  - model: source\n"
        "    parameters: {beta: 0.5, rank: 3}\nparameters: {masks: mask.safetensors}\n"
    )
    for name in COMMANDS:
        make(name, folder / "snrf.yml", folder / name)
    return folder


@pytest.mark.parametrize("name", ["merged", "patched", "lora"])
def test_card_of_a_merge_says_what_was_done(name: str, merged: Path) -> None:
    card = (merged / name / "README.md").read_text()
    front = front_of(card)
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["library_name"] == ("peft" if name == "lora" else "transformers")
    assert "base_model" not in front
    rows = rows_of(card)
    assert ["attn.q", "1", "7", "192", "3.65 %"] in rows
    assert ["fwd.down", "1", "5", "288", "1.74 %"] in rows
    assert ["sha256", f"`{references.sha256(merged / 'mask.safetensors')}`"] in rows
    assert ["source's probes", "count 7"] in rows
    assert ["selection", "top_ratio 0.25"] in rows
    assert "Update: beta 0.5, rank 3, svd-then-mask." in card
    assert (merged / "snrf.yml").read_text().strip() in card
    digest = hashlib.sha256((merged / "target" / "config.json").read_bytes()).hexdigest()
    assert ["target", "as of the merge", f"`{digest}`"] in rows
    assert str(merged) not in card
    if name != "lora":
        before, after = read(merged / "target"), read(merged / name)
        changed = sum(int((after[tensor] != before[tensor]).sum()) for tensor in before)
        assert 0 < changed < 7 * 64 + 5 * 64
        covered = f"covers {7 * 64 + 5 * 64} weights of the text decoder, {changed} of which differ from the target's"
        assert covered in card


def test_what_out_dtype_rounds_is_not_counted(merged: Path, tmp_path: Path) -> None:
    text = (merged / "snrf.yml").read_text()
    for key, counted in (("dtype", True), ("out_dtype", False)):
        (merged / "cast.yml").write_text(f"{text}{key}: float16\n")
        result = CliRunner().invoke(mergekit_yaml, [str(merged / "cast.yml"), str(tmp_path / key), "--quiet"])
        assert result.exit_code == 0, result.output
        card = (tmp_path / key / "README.md").read_text()
        assert ("of which differ from the target's" in card) == counted
        assert "the target's, cast to float16." in card


@pytest.mark.parametrize("name", ["merged", "patched", "lora"])
def test_absolute_paths_are_cut_in_cards(name: str, merged: Path, tmp_path: Path) -> None:
    mask = read_mask(merged / "mask.safetensors")
    probes = {"dataset": str(merged / "probes.jsonl"), "count": 7}
    target = ModelProvenance(path=str(merged / "target"), probes=probes)
    (tmp_path / "masks, mine").mkdir()
    mask_path = tmp_path / "masks, mine" / "mask: 1.safetensors"
    write_mask(mask_path, mask.neurons, Provenance(target=target))
    text = (
        f"merge_method: snrf  # {name}\nbase_model: {merged}/target\n"
        f"models: [{{model: '{merged}/source', parameters: {{beta: 0.5}}}}]\nparameters: {{masks: \"{mask_path}\"}}\n"
    )
    (tmp_path / "snrf.yml").write_text(text)
    card = make(name, tmp_path / "snrf.yml", tmp_path / "out")
    assert str(merged) not in card
    assert str(tmp_path) not in card
    assert "Save this as `snrf.yml` (local paths are cut to their last part)" in card
    written = card.split("```yaml\n")[1].split("```")[0]
    assert written.startswith(f"merge_method: snrf  # {name}\nbase_model: target\n")
    recipe = yaml.safe_load(written)
    assert recipe["models"] == [{"model": "source", "parameters": {"beta": 0.5}}]
    assert recipe["parameters"] == {"masks": "mask: 1.safetensors"}
    assert ["target", "target"] in rows_of(card)
    assert ["target's probes", "dataset probes.jsonl, count 7"] in rows_of(card)
    if name != "lora":
        assert (tmp_path / "out" / "mergekit_config.yml").read_text() == written


def test_relative_paths_are_cut_in_cards(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(merged)
    text = (merged / "snrf.yml").read_text()
    for name in ("target", "source"):
        text = text.replace(f"model: {name}", f"model: ../{merged.name}/./{name}")
    (tmp_path / "snrf.yml").write_text(text)
    card = make("patched", tmp_path / "snrf.yml", tmp_path / "out")
    assert merged.name not in card
    assert (merged / "snrf.yml").read_text().strip() in card


NAMES = st.text(alphabet="ab01.,:{}[]#'\" -_+@&!*%é", min_size=1, max_size=12)


@given(NAMES.map(str.strip).filter(lambda name: name not in ("", ".", "..")), st.sampled_from([None, True, False]))
def test_a_cut_name_is_read_as_it_is(name: str, flow: bool | None) -> None:
    """Whatever a file is called, in block and in flow style."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).touch()
        for path, expected in ((f"{folder}/{name}", name), (f"{folder}/no/{name}", f"{folder}/no/{name}")):
            recipe = {"parameters": {"masks": path, "beta": [0.5, 1]}, "models": [path]}
            again = yaml.safe_load(portable(yaml.safe_dump(recipe, default_flow_style=flow)))
            assert again == {"parameters": {"masks": expected, "beta": [0.5, 1]}, "models": [expected]}


@pytest.mark.parametrize("name", ["true", "No", "null", "y", "1e3", "12", "0x1f", "~", "vlm"])
def test_a_cut_name_is_text_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    text = "base_model: {} # a comment\nmodel: '{}@main+{}' \n"
    path = f"{tmp_path}/{name}"
    again = portable(text.format(path, path, path))
    assert yaml.safe_load(again) == {"base_model": name, "model": f"{name}@main+{name}"}
    assert " # a comment\nmodel: " in again
    assert again.endswith(" \n")


@pytest.mark.parametrize("style", [">-", "|-", ">", "|"])
def test_a_cut_block_scalar_keeps_its_line(style: str, tmp_path: Path) -> None:
    (tmp_path / "vlm").mkdir()
    again = portable(f"base_model: {style}\n  {tmp_path}/vlm\nmodels: []\n")
    # The line break that > and | keep was no part of a path that exists.
    expected = "vlm" if style.endswith("-") else f"{tmp_path}/vlm\n"
    assert yaml.safe_load(again) == {"base_model": expected, "models": []}


def test_cut_paths_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/model", "b/model", "b/😀"):
        (tmp_path / name).mkdir(parents=True)
    recipe = {"x": f"{tmp_path}/a/model", "y": f"{tmp_path}/b/model+{tmp_path}/b/😀@main", "z": "/"}
    again = yaml.safe_load(portable(yaml.safe_dump(recipe, allow_unicode=True)))
    assert again == {"x": "a/model", "y": "b/model+😀@main", "z": "/"}


def test_hub_models_are_named_in_the_front_matter(merged: Path) -> None:
    config = load_recipe(str(merged / "snrf.yml"))
    plan = draft_merge(config, MergeOptions(), recipe_folder=str(merged)).finish()
    target = replace(plan.target, reference=ModelReference.parse("owner/vlm@abc"))
    source = replace(plan.models["source"], reference=ModelReference.parse("owner/llm+owner/adapter"))
    plan = replace(plan, models={"target": target, "source": source})
    card = merge_card(plan, "recipe: 1", cast="float16")
    assert front_of(card)["base_model"] == ["owner/vlm", "owner/llm", "owner/adapter"]
    assert "[owner/vlm](https://huggingface.co/owner/vlm)" in card
    assert "with an update from `owner/llm + owner/adapter`" in card
    assert "all others are the target's, cast to float16." in card
    assert ["owner/vlm", "abc", f"`{plan.target.checkpoint.config_sha256}`"] in rows_of(card)
    assert any(row[:2] == ["owner/llm + owner/adapter", "as of the merge"] for row in rows_of(card))


def test_a_merge_through_mergekits_python_api_has_the_recipe_in_its_card(merged: Path, tmp_path: Path) -> None:
    config = load_recipe(str(merged / "snrf.yml"))
    config.base_model = ModelReference.parse(str(merged / "target"))
    config.models[0].model = ModelReference.parse(str(merged / "source"))
    config.parameters["masks"] = str(merged / "mask.safetensors")
    run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    card = (tmp_path / "out" / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["merge_method"] == "snrf"
    assert recipe["models"][0]["model"] == "source"
    assert not recipe.get("modules")
