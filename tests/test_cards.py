"""Cards of masks: all they say is in the file, and nothing in a file can break out of its cell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mergekit_snrf import safefile
from mergekit_snrf.cards import mask_card, provenance_rows
from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.maskfile import Mask, ModelProvenance, Provenance, read_mask, write_mask
from mergekit_snrf.neurons import NeuronSet, Site

ROOT = Path(__file__).resolve().parents[1]
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
    card = mask_card(read_mask(path), sha256=safefile.sha256(path))
    assert front_of(card)["base_model"] == ["owner/vlm", "owner/llm"]
    rows = rows_of(card)
    assert ["attn.k", "1", "2", "4", "50.00 %"] in rows
    assert ["sha256", f"`{safefile.sha256(path)}`"] in rows
    assert ["target", "owner/vlm, revision abc, llava"] in rows
    assert ["target's probes", "count 7, sha256 12"] in rows
    assert ["selection", "top_ratio 0.1"] in rows
    assert ["seed", "3"] in rows
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["base_model"] == "owner/vlm"
    assert recipe["models"] == [{"model": "owner/llm"}]
    assert recipe["parameters"] == {"masks": "m.safetensors", "masks_sha256": safefile.sha256(path)}


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
    lines = card.splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert sum(line.startswith("## ") for line in lines) == 1
    front_of(card)


def test_rows_of_an_empty_provenance() -> None:
    assert provenance_rows(Mask(NEURONS)) == []


@pytest.mark.parametrize("disjoint", [False, True])
def test_disjoint_draws_share_nothing(disjoint: bool) -> None:
    members = {Site(layer, "fwd.up"): torch.rand(50) < 0.4 for layer in range(5)}
    mask = NeuronSet(members)
    drawn = [mask.random(seed, disjoint=disjoint) for seed in range(5)]
    assert all(draw.count(site) == mask.count(site) for draw in drawn for site in mask)
    assert all((draw & mask).count() == 0 for draw in drawn) == disjoint
