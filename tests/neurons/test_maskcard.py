"""Cards of masks: all they say is in the file, and nothing in a file can break out of its cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from outputs import front_of, rows_of

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.files import references
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.neurons.maskcard import mask_card, provenance_rows
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance, Provenance, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

ROOT = Path(__file__).resolve().parents[2]
NEURONS = NeuronSet({Site(0, "attn.k"): torch.tensor([True, False, True, False])})


def card_of(provenance: Provenance, path: str = "m.safetensors") -> str:
    return mask_card(Mask(NEURONS, provenance, path), sha256="0" * 64, fusion={"beta": 0.5, "rank": 4})


def test_published_mask_has_the_card_that_the_command_writes(tmp_path: Path) -> None:
    mask = str(ROOT / "neuron_masks" / "board.safetensors")
    result = CliRunner().invoke(snrf, ["mask", "card", mask])
    assert result.exit_code == 0, result.output
    assert (ROOT / "neuron_masks" / "board.md").read_text() == result.output
    assert CliRunner().invoke(snrf, ["mask", "card", mask, "-o", str(tmp_path / "card.md")]).exit_code == 0
    assert (tmp_path / "card.md").read_text() == result.output
    result = CliRunner().invoke(snrf, ["mask", "card", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 1
    assert "none.safetensors: no such file" in result.output


def test_a_card_needs_neither_mergekit_nor_transformers() -> None:
    code = (
        "import sys, mergekit_snrf.neurons.maskcard; sys.exit(not {'mergekit', 'transformers'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_card_says_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    target = ModelProvenance(path="owner/vlm", revision="abc", model_type="llava", probes={"count": 7, "sha256": "12"})
    source = ModelProvenance(path="owner/llm")
    write_mask(path, NEURONS, Provenance(target=target, source=source, selection={"top_ratio": 0.1}, seed=3))
    card = CliRunner().invoke(snrf, ["mask", "card", str(path)]).output
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
    fusion = {"beta": Fusion().beta, "rank": Fusion().rank}
    assert recipe["models"] == [{"model": "owner/llm", "parameters": fusion}]
    assert recipe["parameters"] == {"masks": "m.safetensors", "masks_sha256": references.sha256(path)}


@pytest.mark.parametrize(
    "folder", ["/home/someone/", "C:\\Users\\someone\\", "../someone/", "~/someone/x/", "work/someone/"]
)
def test_local_paths_are_cut(folder: str) -> None:
    target = ModelProvenance(path=f"{folder}models/vlm", probes={"dataset": f"{folder}probes.jsonl"})
    inputs = [{"path": f"{folder}other.safetensors"}, {"path": "hf://owner/masks/x.safetensors"}]
    card = card_of(Provenance(target=target, operation="union", inputs=inputs))
    assert "someone" not in card
    assert "base_model: vlm\n" in card
    assert ["target's probes", "dataset probes.jsonl"] in rows_of(card)
    assert ["made by", "union of other.safetensors, hf&#58;//owner/masks/x.safetensors"] in rows_of(card)


@given(st.text(max_size=40), st.text(max_size=40))
def test_text_of_a_file_stays_in_its_cell(path: str, rule: str) -> None:
    card = card_of(Provenance(target=ModelProvenance(path=path), selection={rule: f"<script>|\n# {rule}"}), path)
    assert "<script>" not in card
    assert card.count("```") == 2
    lines = card.splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert sum(line.startswith("## ") for line in lines) == 1
    front_of(card)


def test_a_path_cannot_leave_the_title_or_the_recipe() -> None:
    path = "x\n```\n\n[click](https://evil.example) <b>hi</b>"
    card = card_of(Provenance(target=ModelProvenance(path=path), source=ModelProvenance(path="a/b/x")), f"{path}.mask")
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```yaml", "```"]
    outside = card.split("\n```yaml")[0] + card.split("\n```")[-1]
    assert "<b>" not in outside
    assert "https://evil" not in outside
    assert "base_model" not in front_of(card)


def test_rows_of_an_empty_provenance() -> None:
    assert provenance_rows(Mask(NEURONS)) == []
