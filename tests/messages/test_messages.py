"""The wording of errors, in one golden file: ``pytest tests/messages --update-messages`` writes it anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.asked import AskedOptions, load_asked
from mergekit_snrf.files import reading, references, writing
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.lists import read_neurons
from mergekit_snrf.neurons.maskfile import load_mask, read_mask, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import DecoderShape, check_fit
from mergekit_snrf.neurons.sites import Neuron, Site
from mergekit_snrf.profiling.result.selection import Selection
from mergekit_snrf.profiling.settings import load_profile_config

GOLDEN = Path(__file__).parent / "messages.yml"
SHAPE = DecoderShape(layers=3, hidden_size=8, heads=4, kv_heads=2, head_dim=3, intermediate_size=10)


def of(site: str, count: int) -> NeuronSet:
    return NeuronSet({Site.from_key(site): torch.ones(count, dtype=torch.bool)})


def written(text: str, read: Callable[[str], Any]) -> None:
    Path("file").write_text(text)
    read("file")


def fit(neurons: Any) -> None:
    check_fit(neurons, SHAPE, where="mask.safetensors", model="owner/model")


def command(*arguments: str) -> None:
    result = CliRunner().invoke(main, list(arguments))
    raise SnrfError(None, result.output.strip().splitlines()[-1])


CASES: dict[str, Callable[[], Any]] = {
    "files: duplicate key": lambda: written("a: 1\na: 2", reading.load_yaml),
    "files: bad date": lambda: written("a: 2020-13-45", reading.load_yaml),
    "files: deep YAML": lambda: written("[" * 200, reading.load_yaml),
    "files: bad JSON": lambda: written("{", reading.load_json),
    "files: missing": lambda: reading.read_text("missing"),
    "files: folder": lambda: reading.read_text("."),
    "files: device": lambda: reading.read_text("/dev/zero"),
    "files: too large": lambda: written("12345", lambda path: reading.read_text(path, 3)),
    "files: hub reference": lambda: references.local_path("hf://owner"),
    "files: no such file": lambda: references.local_path("/absent/mask.safetensors"),
    "files: sha256": lambda: written("", lambda path: references.check_sha256(path, "0" * 64)),
    "files: no folder to write": lambda: writing.check_writable("/absent/out.json"),
    "neurons: projection": lambda: Site(0, "attn.o"),
    "neurons: key": lambda: Site.from_key("layers.0"),
    "neurons: name": lambda: Neuron.parse("fwd.up.14"),
    "neurons: not a mask": lambda: written("text", read_mask),
    "neurons: another file": lambda: written("text", lambda path: load_mask(path, sha256="f" * 64)),
    "neurons: replaces": lambda: written("text", lambda path: write_mask(path, NeuronSet({}))),
    "neurons: combine": lambda: of("layers.0.attn.k", 6) & of("layers.0.attn.k", 7),
    "neurons: fit length": lambda: fit(of("layers.0.attn.q", 6)),
    "neurons: fit layer": lambda: fit(of("layers.3.attn.q", 12)),
    "neurons: fit heads": lambda: fit(of("layers.0.attn.k", 12)),
    "neurons: fit neuron": lambda: fit([Neuron.parse("fwd.up.L9.N1")]),
    "neurons: released": lambda: written('{"attn_x": {}}', lambda path: read_neurons(path, SHAPE)),
    "models: no folder": lambda: open_checkpoint("/absent/model"),
    "profiling: unknown key": lambda: written("target: {modle: a}\nsource: {model: b}", load_profile_config),
    "profiling: selection": lambda: Selection.of(top_ratio=2),
    "evidence: columns": lambda: written(
        "", lambda path: load_asked(f"{path}.yml", ModelRef(model="m"), AskedOptions(question="q"))
    ),
    "cli: no recipe": lambda: command("plan", "absent.yml"),
    "cli: not a recipe": lambda: written("[]", lambda path: command("plan", path)),
    "cli: selection": lambda: command("mask", "select", "a", "b", "c", "--top-ratio", "x"),
    "cli: neuron": lambda: command("amplify", "m", "--neuron", "x", "--probes", "p.jsonl"),
    "cli: empty option": lambda: command("amplify", "m", "--neuron", "x", "--probes", "p.jsonl", "--template", ""),
}


def message_of(case: Callable[[], Any]) -> str:
    with pytest.raises(SnrfError) as caught:
        case()
    return str(caught.value).replace(os.getcwd(), "FOLDER")


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {name: message_of(case) for name, case in CASES.items()}
    if request.config.getoption("--update-messages"):
        GOLDEN.write_text(yaml.safe_dump(found, sort_keys=False, width=1000, allow_unicode=True))
    assert found == yaml.safe_load(GOLDEN.read_text())
    assert all(len(message) < 500 for message in found.values())
