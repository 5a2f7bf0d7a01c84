"""`snrf init`: what it writes is taken by the other commands, and its figures are those of real files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import make_source, make_target
from click.testing import CliRunner, Result
from made_moments import sizes_of, write_random_moments

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.costs import Costs
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.profiling.settings import load_profile_config

STEM = "vlm--llm"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_target(folder / "vlm", "qwen2_5_vl", "hub")
    make_source(folder / "llm", "qwen2", dtype=torch.float32)
    make_source(folder / "tuned", "qwen2")
    make_source(folder / "llama", "llama")
    return folder


def init(folder: Path, *arguments: str, where: pytest.MonkeyPatch) -> Result:
    where.chdir(folder)
    return CliRunner().invoke(snrf, ["init", *arguments])


def test_files_are_taken_by_the_other_commands(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = init(models, "vlm", "llm", str(tmp_path / "merge"), where=monkeypatch)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "merge"
    config = load_profile_config(folder / "profile.yml")
    assert Path(config.kind("target").model.model).samefile(models / "vlm")
    assert config.kind("target").source.images == "images"
    assert [kind.name for kind in config.kept()] == ["vqa", "ocr", "count", "objects"]
    assert (config.limit, config.answer.max_new_tokens, config.kept()[0].rule.max_new_tokens) == (100, 512, 64)
    mask = ["mask", "random", "--model", str(models / "vlm"), "--ratio", "1", str(folder / f"{STEM}.safetensors")]
    assert CliRunner().invoke(snrf, mask).exit_code == 0
    shape = find_decoder(open_checkpoint(str(models / "vlm"))).shape
    sizes = sizes_of(shape.layers, shape.hidden_size, shape.intermediate_size)
    moments = write_random_moments(folder / f"{STEM}.moments.safetensors", sizes)
    plans = {}
    for name in ("snrf.yml", "regmean.yml"):
        planned = CliRunner().invoke(snrf, ["plan", str(folder / name), "--json"])
        assert planned.exit_code == 0, planned.output
        plans[name] = json.loads(planned.stdout)
    assert {(edit["rank"], edit["beta"]) for edit in plans["snrf.yml"]["tensors"]["edited"]} == {(4, 0.5)}
    target, source = (replace(open_checkpoint(str(models / name)), folder=None) for name in ("vlm", "llm"))
    costs = Costs.of(target, source, rank=4, limit=100, batch=8, answer=512, keep=[64] * 4)
    assert costs.read == plans["snrf.yml"]["source_bytes_read"]
    assert costs.download == plans["snrf.yml"]["target"]["bytes"] + plans["snrf.yml"]["source"]["bytes"]
    assert costs.moments == pytest.approx(moments.stat().st_size, abs=10_000)
    adapter = CliRunner().invoke(snrf, ["lora", str(folder / "snrf.yml"), str(tmp_path / "adapter"), "--quiet"])
    assert adapter.exit_code == 0, adapter.output
    assert costs.adapter == pytest.approx((tmp_path / "adapter/adapter_model.safetensors").stat().st_size, abs=10_000)


def test_llm_into_llm_with_own_probes(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "What is 2 + 2?", "image": "a.png"}\n')
    given = [f"target={tmp_path / 'mine.jsonl'}", f"keep={tmp_path / 'mine.jsonl'}", "keep=code"]
    options = [part for one in given for part in ("--probes", one)]
    result = init(models, "llm", "tuned", str(tmp_path / "merge"), *options, where=monkeypatch)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "merge/profile.yml").read_text())
    mine = {"dataset": str(tmp_path / "mine.jsonl"), "question": "prompt"}
    assert written["target"]["probes"] == mine
    assert written["source"]["probes"]["dataset"] == "openai/gsm8k"
    assert written["keep"][0] == {"name": "mine", **mine, "max_new_tokens": 64}
    assert len(written["keep"]) == 2
    again = init(models, "llm", "tuned", str(tmp_path / "merge"), where=monkeypatch)
    assert "already holds profile.yml, snrf.yml, regmean.yml, README.md" in again.output
    (tmp_path / "merge/README.md").write_text("my project")
    foreign = init(models, "llm", "tuned", str(tmp_path / "merge"), "--overwrite", where=monkeypatch)
    assert "README.md: is not a page of snrf init" in foreign.output
    (tmp_path / "merge/README.md").unlink()
    none = init(models, "llm", "tuned", str(tmp_path / "merge"), "--overwrite", "--probes", "keep=", where=monkeypatch)
    assert none.exit_code == 0
    assert load_profile_config(tmp_path / "merge/profile.yml").keep == ()
    assert "regmean" not in (tmp_path / "merge/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llm", "vlm"], r"exchange them: snrf init vlm llm"),
        (["vlm", "llama"], r"the source's 'llama'"),
        (["vlm", "llm", "--probes", "sorce=gsm8k"], r"--probes: 'sorce=gsm8k' is not ROLE=PROBES"),
        (["vlm", "llm", "--probes", "source=gsm8k", "--probes", "source=code"], r"is not ROLE=PROBES"),
        (["vlm", "llm", "--probes", "source=ocr"], r"ocr: asks about pictures"),
        (["vlm", "llm", "--probes", "keep=ocrr"], r"ocrr: is neither .*; did you mean 'ocr'\?"),
        (["vlm", "llm", "--probes", "keep=code", "--probes", "keep=code"], r"two kinds to keep are called code"),
        (["vlm", "llm", "--probes", "keep=odd.csv"], r"odd.csv: has no column called .* its columns are a, b"),
        (["vlm", "llm", "odd.csv/merge"], r"odd.csv/merge: cannot be made"),
    ],
)
def test_mistakes(models: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    (models / "odd.csv").write_text("a,b\n1,2\n")
    before = set(models.iterdir())
    folder = [] if "odd.csv/merge" in arguments else ["merge"]
    result = init(models, *arguments[:2], *folder, *arguments[2:], where=monkeypatch)
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert set(models.iterdir()) == before
