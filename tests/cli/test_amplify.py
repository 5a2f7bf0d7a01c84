"""``snrf amplify`` as a user types it, on tiny models with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import INTERMEDIATE, LAYERS, make_source, make_target
from click.testing import CliRunner, Result

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.evidence.results import Amplification, read_result
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site

UP, KEY = "fwd.up.L1.N7", "attn.k.L0.N3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amplify")
    make_source(folder / "model", "qwen2", dtype=torch.float32)
    rows = [{"question": text, "image": "picture.png"} for text in ("What is 2 + 2?", "Hi!", "How many clips?")]
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "profile.yml").write_text(
        "target: {model: absent/target, probes: {dataset: probes.jsonl, question: question, images: image}}\n"
        "source: {model: model, probes: {dataset: probes.jsonl, question: question}}\n"
        "answer: {max_new_tokens: 5}\nlimit: 2\nseed: 4\nbatch_size: 3\n"
    )
    members = torch.zeros(INTERMEDIATE, dtype=torch.bool)
    members[::10] = True
    write_mask(folder / "mask.safetensors", NeuronSet({Site(1, "fwd.up"): members}))
    write_mask(folder / "other.safetensors", NeuronSet({Site(1, "fwd.up"): members[:50]}))
    return folder


def run(folder: Path, *arguments: str | Path, probes: str = "probes.jsonl") -> Result:
    options = ["--device", "cpu", "--quiet", "--probes", folder / probes]
    return CliRunner().invoke(main, [str(part) for part in ("amplify", folder / "model", *options, *arguments)])


def result_of(folder: Path, tmp_path: Path, *arguments: str | Path, probes: str = "probes.jsonl") -> Amplification:
    out = run(folder, *arguments, "--json", tmp_path / "out.json", probes=probes)
    assert out.exit_code == 0, out.output
    result = read_result(tmp_path / "out.json")
    assert isinstance(result, Amplification)
    return result


def test_table_json_and_figures_say_the_same(folder: Path, tmp_path: Path) -> None:
    arguments = ["--neuron", UP, "--neuron", KEY, "--factor", "50", "--max-new-tokens", "6"]
    out = run(folder, *arguments, "--json", tmp_path / "a.json", "--figures", tmp_path / "clouds")
    assert out.exit_code == 0, out.output
    result = read_result(tmp_path / "a.json")
    assert isinstance(result, Amplification)
    assert [neuron.neuron for neuron in result.neurons] == [UP, KEY]
    assert (result.factor, result.count, result.classifier) == (50, 3, "words")
    lines = [line.split()[-3:] for line in out.output.splitlines()]
    for neuron in result.neurons:
        assert f"{neuron.changed} of 3 answers changed." in out.output
        for token in neuron.tokens[:10]:
            row = [f"{token.log_odds:+.2f}", str(token.amplified), str(token.plain)]
            assert token.log_odds <= 0 or row in lines
        drawing, image = (tmp_path / "clouds" / f"{neuron.neuron}.{ending}" for ending in ("svg", "png"))
        assert drawing.read_text().startswith("<svg")
        assert image.read_bytes().startswith(b"\x89PNG")
        assert f"{neuron.neuron} of model amplified by 50" in drawing.read_text()
        assert not any(str(folder).encode() in file.read_bytes() for file in (drawing, image))
        assert f"{neuron.neuron}.svg" in out.output
    assert max(neuron.changed or 0 for neuron in result.neurons) > 0
    words = f"of 2 neurons ({100 * (result.math_neuron_ratio or 0):.1f} %) are math neurons"
    assert words in out.output
    assert set(result.settings) >= {"config_sha256", "probes_sha256", "classifier_sha256", "dtype", "max_new_tokens"}


def test_neurons_of_a_file_and_of_a_mask(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "neurons.txt").write_text(f"{KEY}\n\n{UP}\n")
    options = ["--limit", "1", "--max-new-tokens", "2"]
    result = result_of(folder, tmp_path, "--neurons", tmp_path / "neurons.txt", *options)
    assert [neuron.neuron for neuron in result.neurons] == [KEY, UP]
    result = result_of(folder, tmp_path, "--mask", folder / "mask.safetensors", *options)
    every = [f"fwd.up.L1.N{index}" for index in range(0, INTERMEDIATE, 10)]
    assert [neuron.neuron for neuron in result.neurons] == every
    picked = result_of(folder, tmp_path, "--mask", folder / "mask.safetensors", "--pick", "6", "--seed", "3", *options)
    assert len({neuron.neuron for neuron in picked.neurons} & set(every)) == 6
    out = run(folder, "--mask", folder / "mask.safetensors", "--pick", "6", "--seed", "3", *options)
    assert all(neuron.neuron in out.output for neuron in picked.neurons)
    assert "leading tokens" in out.output


def test_profile_says_how_unless_options_do(folder: Path, tmp_path: Path) -> None:
    result = result_of(folder, tmp_path, "--neuron", UP, probes="profile.yml")
    assert (result.count, result.seed, result.settings["max_new_tokens"]) == (2, 4, 5)
    options = ["--limit", "3", "--seed", "0", "--max-new-tokens", "2"]
    result = result_of(folder, tmp_path, "--neuron", UP, *options, probes="profile.yml")
    assert (result.count, result.seed, result.settings["max_new_tokens"]) == (3, 0, 2)


def test_a_vision_language_model_and_its_pictures(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    make_target(tmp_path / "model", "llava", "hub", dtype=torch.float32)
    Image.linear_gradient("L").resize((20, 30)).convert("RGB").save(tmp_path / "picture.png")
    (tmp_path / "probes.jsonl").write_text((folder / "probes.jsonl").read_text())
    options = ["--images", "image", "--max-new-tokens", "4", "--factor", "100"]
    result = result_of(tmp_path, tmp_path, "--neuron", UP, "--neuron", KEY, *options)
    assert result.count == 3
    assert result.neurons[0].totals[1] > 0


ERRORS: dict[str, list[str]] = {
    "'fwd.up.14'": ["--neuron", "fwd.up.14"],
    f"fwd.up.L{LAYERS}.N0 is not in": ["--neuron", f"fwd.up.L{LAYERS}.N0"],
    "absent.txt: ": ["--neurons", "{tmp}/absent.txt"],
    "empty.txt: ": ["--neurons", "{tmp}/empty.txt"],
    "bad.txt: 'layer'": ["--neurons", "{tmp}/bad.txt"],
    "other.safetensors: tensor layers.1.fwd.up": ["--mask", "{folder}/other.safetensors"],
    "mask.safetensors: has 10 neurons": ["--mask", "{folder}/mask.safetensors", "--pick", "11"],
    "a.json: ": ["--neuron", UP, "--json", "{tmp}/absent/a.json"],
    "clouds: cannot be made": ["--neuron", UP, "--figures", "{tmp}/bad.txt/clouds"],
    "--question: ": ["--neuron", UP, "--question", "problem"],
    "template 'calc :'": ["--neuron", UP, "--template", "calc :"],
    "--template: ": ["--neuron", UP, "--template", ""],
    "--images: is empty": ["--neuron", UP, "--images", ""],
    "--images: ": ["--neuron", UP, "--images", "picture"],
    "--max-new-tokens": ["--neuron", UP, "--max-new-tokens", "99999"],
    "--factor: ": ["--neuron", UP, "--factor", "inf"],
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_are_one_sentence(folder: Path, tmp_path: Path, message: str) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.txt").write_text("layer\n")
    out = run(folder, *(part.format(tmp=tmp_path, folder=folder) for part in ERRORS[message]))
    assert out.exit_code == 1
    assert out.output.startswith("Error: ")
    assert message in out.output
    assert out.output.count("\n") == 1


def test_a_model_without_a_chat_template_asks_for_the_option(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "probes.jsonl").write_text((folder / "probes.jsonl").read_text())
    out = run(tmp_path, "--neuron", UP)
    assert out.exit_code == 1
    assert "--template" in out.output
    assert "profile.yml" not in out.output
    assert run(tmp_path, "--neuron", UP, "--template", "{question}", "--max-new-tokens", "2").exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["--neuron", UP, "--pick", "2"]])
def test_misuse_is_told_before_anything_is_read(folder: Path, arguments: list[str]) -> None:
    out = run(folder, *arguments)
    assert out.exit_code == 2
    assert "--mask" in out.output
