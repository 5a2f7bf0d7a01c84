"""Cards of masks: all they say is in the file, and nothing in a file can break out of its cell."""

from __future__ import annotations

import hashlib
import tempfile
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

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.files import references
from mergekit_snrf.merge import install
from mergekit_snrf.merge.cards import mask_card, merge_card, portable, provenance_rows
from mergekit_snrf.merge.plan import plan_merge
from mergekit_snrf.merge.recipe import default
from mergekit_snrf.merge.recipefile import load_recipe
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance, Provenance, read_mask, write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site

ROOT = Path(__file__).resolve().parents[2]
NEURONS = NeuronSet({Site(0, "attn.k"): torch.tensor([True, False, True, False])})


def front_of(card: str) -> dict[str, object]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def rows_of(card: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]


def test_published_mask_has_the_card_that_the_command_writes() -> None:
    mask = ROOT / "neuron_masks" / "board.safetensors"
    result = CliRunner().invoke(snrf, ["mask", "card", str(mask)])
    assert result.exit_code == 0, result.output
    assert (ROOT / "neuron_masks" / "board.md").read_text() == result.output


def test_card_says_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    target = ModelProvenance(path="owner/vlm", revision="abc", model_type="llava", probes={"count": 7, "sha256": "12"})
    source = ModelProvenance(path="owner/llm")
    write_mask(path, NEURONS, Provenance(target=target, source=source, selection={"top_ratio": 0.1}, seed=3))
    card = mask_card(read_mask(path), sha256=references.sha256(path))
    assert front_of(card)["base_model"] == ["owner/vlm", "owner/llm"]
    rows = rows_of(card)
    assert ["attn.k", "1", "2", "4", "50.00 %"] in rows
    assert ["sha256", f"`{references.sha256(path)}`"] in rows
    assert ["target", "owner/vlm, revision abc, llava"] in rows
    assert ["target's probes", "count 7, sha256 12"] in rows
    assert ["selection", "top_ratio 0.1"] in rows
    assert ["seed", "3"] in rows
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["base_model"] == "owner/vlm"
    (source_entry,) = recipe["models"]
    assert source_entry == {"model": "owner/llm", "parameters": {"beta": 0.5, "rank": 4}}
    assert source_entry["parameters"] == {name: default(name) for name in ("beta", "rank")}
    assert recipe["parameters"] == {"masks": "m.safetensors", "masks_sha256": references.sha256(path)}


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
    install()
    for command, name in (
        ((mergekit_yaml, ()), "merged"),
        ((snrf, ("patch",)), "patched"),
        ((snrf, ("lora",)), "lora"),
    ):
        words = [*command[1], str(folder / "snrf.yml"), str(folder / name), "--quiet"]
        result = CliRunner().invoke(command[0], words)
        assert result.exit_code == 0, result.output
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
    command = (mergekit_yaml, ()) if name == "merged" else (snrf, ("lora",)) if name == "lora" else (snrf, ("patch",))
    words = [*command[1], str(tmp_path / "snrf.yml"), str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(command[0], words)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(merged) not in card
    assert str(tmp_path) not in card
    assert "with this as `snrf.yml`, its absolute paths cut to their last part" in card
    written = card.split("```yaml\n")[1].split("```")[0]
    assert written.startswith(f"merge_method: snrf  # {name}\nbase_model: target\n")
    recipe = yaml.safe_load(written)
    assert recipe["models"] == [{"model": "source", "parameters": {"beta": 0.5}}]
    assert recipe["parameters"] == {"masks": "mask: 1.safetensors"}
    assert ["target", "target"] in rows_of(card)
    assert ["target's probes", "dataset probes.jsonl, count 7"] in rows_of(card)
    if name != "lora":
        assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text


def test_absolute_paths_are_cut_in_the_card_of_a_mask() -> None:
    target = ModelProvenance(path="/home/someone/models/vlm", probes={"dataset": "/home/someone/probes.jsonl"})
    source = ModelProvenance(path="C:\\Users\\someone\\llm")
    inputs = [{"path": "/home/someone/other.safetensors"}]
    mask = Mask(NEURONS, Provenance(target=target, source=source, operation="union", inputs=inputs))
    card = mask_card(mask, sha256="0" * 64)
    assert "someone" not in card
    assert "base_model: vlm\n" in card
    assert "- model: llm\n" in card
    assert ["target's probes", "dataset probes.jsonl"] in rows_of(card)
    assert ["made by", "union of other.safetensors"] in rows_of(card)


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


def test_card_of_another_merge_is_mergekits_own(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "linear.yml").write_text(
        f"merge_method: passthrough\nmodels:\n  - model: {merged / 'source'}\ndtype: bfloat16\n"
    )
    result = CliRunner().invoke(mergekit_yaml, [str(tmp_path / "linear.yml"), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "This is a merge of pre-trained language models" in (tmp_path / "out" / "README.md").read_text()


def test_hub_models_are_named_in_the_front_matter(merged: Path) -> None:
    config = load_recipe(str(merged / "snrf.yml"))
    plan = plan_merge(config, MergeOptions(), recipe_folder=str(merged))
    assert plan.target is not None
    plan.references = [ModelReference.parse("owner/vlm@abc"), ModelReference.parse("owner/llm+owner/adapter")]
    card = merge_card(plan, "merged", "recipe: 1", cast="float16")
    assert front_of(card)["base_model"] == ["owner/vlm", "owner/llm", "owner/adapter"]
    assert "[owner/vlm](https://huggingface.co/owner/vlm)" in card
    assert "with an update from `owner/llm + owner/adapter`" in card
    assert "all others are the target's, cast to float16." in card
    assert ["owner/vlm", "abc", f"`{plan.target.config_sha256}`"] in rows_of(card)
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


def test_card_to_a_file_and_missing_mask(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.safetensors", NEURONS)
    result = CliRunner().invoke(
        snrf, ["mask", "card", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "card.md")]
    )
    assert result.exit_code == 0, result.output
    assert "A mask of 2 neurons" in (tmp_path / "card.md").read_text()
    result = CliRunner().invoke(snrf, ["mask", "card", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 1
    assert "no such file" in result.output


@given(st.text(max_size=40), st.text(max_size=40))
def test_text_of_a_file_stays_in_its_cell(path: str, rule: str) -> None:
    provenance = Provenance(target=ModelProvenance(path=path), selection={rule: f"<script>|\n# {rule}"})
    card = mask_card(Mask(NEURONS, provenance), sha256="0" * 64)
    assert "<script>" not in card
    assert card.count("```") == 2
    lines = card.splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert sum(line.startswith("## ") for line in lines) == 1
    front_of(card)


def test_a_path_cannot_leave_the_recipe_of_a_card() -> None:
    path = "x\n```\n\n[click](https://evil.example) <b>hi</b>"
    provenance = Provenance(target=ModelProvenance(path=path), source=ModelProvenance(path="examples/board/source/x"))
    card = mask_card(Mask(NEURONS, provenance), sha256="0" * 64)
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```yaml", "```"]
    outside = card.split("```yaml")[0] + card.split("```")[-1]
    assert "<b>" not in outside
    assert "https://evil" not in outside
    assert "base_model" not in front_of(card)


def test_rows_of_an_empty_provenance() -> None:
    assert provenance_rows(Mask(NEURONS)) == []


@pytest.mark.parametrize("disjoint", [False, True])
def test_disjoint_draws_share_nothing(disjoint: bool) -> None:
    members = {Site(layer, "fwd.up"): torch.arange(50) % 5 < 2 for layer in range(5)}
    mask = NeuronSet(members)
    drawn = [mask.random(seed, disjoint=disjoint) for seed in range(5)]
    assert all(draw.count(site) == mask.count(site) for draw in drawn for site in mask)
    assert all((draw & mask).count() == 0 for draw in drawn) == disjoint
