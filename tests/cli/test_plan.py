"""`snrf plan`: its figures against counts from the files' own headers, its problems, and that it reads no weight."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_source, make_target
from click.testing import CliRunner, Result
from pair import MODULES, Pair, files, make_pair, merge, run, source_name, target_name, write_recipe

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site

Header = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


def plan(recipe: dict[str, Any] | Path, folder: Path, *options: str) -> Result:
    path = recipe if isinstance(recipe, Path) else write_recipe(folder / "snrf.yml", recipe)
    return CliRunner().invoke(snrf, ["plan", str(path), *options])


def planned(recipe: dict[str, Any] | Path, folder: Path, *options: str) -> dict[str, Any]:
    result = plan(recipe, folder, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def header(file: Path) -> Header:
    """A safetensors header, read without safetensors."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        content = json.loads(opened.read(length))
    content.pop("__metadata__", None)
    return content


def size(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return end - start


def peak_memory() -> int:
    """In bytes; Linux counts kilobytes, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_json_against_the_headers(pair: Pair, tmp_path: Path) -> None:
    target, source = header(pair.target / "model.safetensors"), header(pair.source / "model.safetensors")
    content = planned(pair.recipe(), tmp_path)
    counts = {site: int(member.sum()) for site, member in pair.neurons.items()}
    other_side = {site: target[target_name(site)]["shape"][1 - MODULES[site.projection][1]] for site in counts}
    parameters = sum(count * other_side[site] for site, count in counts.items())
    assert content["parameters_touched"] == parameters
    assert content["bytes_touched"] == 2 * parameters
    assert content["source_bytes_read"] == sum(size(source[source_name(site)]) for site in counts)
    known = {"name": str(pair.target), "model_type": "llava", "family": "llama"}
    whole = sum(size(entry) for entry in target.values())
    assert content["target"] == {**known, "bytes": whole, "decoder": "language_model.model.layers."}
    assert content["source"]["bytes"] == sum(size(entry) for entry in source.values())
    assert content["mask"] == str(pair.mask)
    assert (content["problems"], content["warnings"]) == ([], [])
    tensors = content["tensors"]
    edited = {entry["target"]: entry for entry in tensors["edited"]}
    fusion = {"beta": 0.5, "rank": 4, "order": "svd-then-mask", "update": "low-rank", "drop_rate": 0.5}
    every_edit = {**fusion, "seed": 0, "rescale": True, "keep": 3.0, "dtype": "BF16", "source_base": None}
    assert edited == {
        target_name(site): {
            **every_edit,
            "target": target_name(site),
            "source": source_name(site),
            "shape": target[target_name(site)]["shape"],
            "axis": ("rows", "columns")[MODULES[site.projection][1]],
            "neurons": count,
        }
        for site, count in counts.items()
    }
    every = {target_name(Site(layer, name)) for layer in range(3) for name in MODULES}
    assert sorted(tensors["unmatched"]) == sorted(every - edited.keys())
    assert tensors["copied"] == len(target) - len(edited)


def test_text_says_the_same(pair: Pair, tmp_path: Path) -> None:
    result = plan(pair.recipe(), tmp_path)
    content = planned(pair.recipe(), tmp_path)
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if "%" in line}
    for name, (_, _, neurons) in MODULES.items():
        counts = [int(member.sum()) for site, member in pair.neurons.items() if site.projection == name]
        share = f"{100 * sum(counts) / (3 * neurons):.2f}"
        assert rows[name] == [str(len(counts)), str(sum(counts)), str(3 * neurons), share, "%"]
    assert rows["all"][:3] == ["12", str(pair.neurons.count()), "960"]
    assert "12 edited, 78 copied; of the decoder's projections 3 have nothing to change" in result.stdout
    parameters = sum(torch.Size(entry["shape"]).numel() for entry in header(pair.target / "model.safetensors").values())
    touched = content["parameters_touched"]
    assert f"touched   {touched} parameters ({100 * touched / parameters:.2f} %), 20.4 kB" in result.stdout
    assert "read      98.3 kB of the source's 271 kB" in result.stdout
    assert "beta 0.5, rank 4, svd-then-mask" in result.stdout


def test_gradients_and_filters_are_shown_as_ranges(pair: Pair, tmp_path: Path) -> None:
    source = {"beta": [0.0, 0.25, 0.5], "rank": [{"filter": "mlp", "value": 0}]}
    recipe = pair.recipe(source=source, parameters={"order": "mask-then-svd"})
    assert "beta 0.25 to 0.5, rank 0 to 4 (0: full rank), mask-then-svd" in plan(recipe, tmp_path).stdout


def test_layouts_do_not_change_the_plan(pair: Pair, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", "llava", "hub", max_shard_size=30_000)
    source = make_source(tmp_path / "source", "llama", safe=False, max_shard_size=30_000)
    models = [{"model": str(source), "parameters": {"beta": 0.5, "rank": 4}}]
    other = planned(pair.recipe(base_model=str(target), models=models), tmp_path)
    expected = planned(pair.recipe(), tmp_path)
    other["target"]["name"], other["source"]["name"] = expected["target"]["name"], expected["source"]["name"]
    assert other == expected


def test_sparse_files_of_7b_parameters(tmp_path: Path) -> None:
    """Shapes of Qwen2.5-7B in files of zeros that occupy no disk; reading them would fill 15 GB of memory."""
    layers, width, intermediate, keys, vocabulary = 28, 3584, 18944, 512, 152064
    config: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 28}
    config |= {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config |= {"num_key_value_heads": 4, "vocab_size": vocabulary}
    shapes = {"model.embed_tokens.weight": [vocabulary, width], "lm_head.weight": [vocabulary, width]}
    for layer in range(layers):
        rows = {"q": width, "k": keys, "v": keys, "o": width}
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": [rows[name], width] for name in rows}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": [intermediate, width] for name in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = [width, intermediate]
    entries, end = {}, 0
    for name, (rows_of, columns) in shapes.items():
        start, end = end, end + 2 * rows_of * columns
        entries[name] = {"dtype": "BF16", "shape": [rows_of, columns], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    for name in ("target", "source"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(weights, 8 + len(text) + end)
        assert weights.stat().st_blocks * 512 < 1e6 < 15e9 < weights.stat().st_size
    mask = {Site(layer, "attn.k"): torch.arange(keys) < 10 for layer in range(layers)}
    mask |= {Site(layer, "fwd.down"): torch.arange(intermediate) < 7 for layer in range(layers)}
    write_mask(tmp_path / "mask.safetensors", NeuronSet(mask))
    recipe: dict[str, Any] = {"merge_method": "snrf", "base_model": "target", "models": [{"model": "source"}]}
    recipe["parameters"] = {"masks": "mask.safetensors"}
    before = peak_memory()
    content = planned(recipe, tmp_path)
    assert peak_memory() - before < 200e6
    assert content["parameters_touched"] == layers * (10 + 7) * width
    assert content["bytes_touched"] == 2 * layers * (10 + 7) * width
    assert content["source_bytes_read"] == 2 * layers * width * (keys + intermediate)
    assert content["target"]["bytes"] == end
    result = plan(recipe, tmp_path)
    assert "read      3.9 GB of the source's 15.2 GB" in result.stdout


def test_problems_are_those_of_the_merge(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(source={"beta": 2, "rank": 2.5}, parameters={"betta": 1}, tokenizer_source="base", dtype="x")
    result = plan(recipe, tmp_path)
    assert result.exit_code == 1
    listed = result.stdout[result.stdout.index("This merge cannot run:\n") :].splitlines()[1:]
    merged = run(recipe, tmp_path / "out").output
    assert listed == [line for line in merged.splitlines() if re.match(r"  \d\. ", line)]
    assert len(listed) == 5
    as_json = plan(recipe, tmp_path, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problems"] == [line[5:] for line in listed]


def test_one_problem_without_models(pair: Pair, tmp_path: Path) -> None:
    result = plan(pair.recipe(base_model=None), tmp_path)
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first == "This merge cannot run:"
    assert second.startswith("  1. base_model: is missing; ")
    assert json.loads(plan(pair.recipe(base_model=None), tmp_path, "--json").stdout)["target"] is None
    assert "1. merge_method: must be snrf" in plan(pair.recipe(merge_method="linear"), tmp_path).stdout


def test_output_folder_is_checked_on_request(pair: Pair, tmp_path: Path) -> None:
    merge(pair.recipe(), tmp_path / "out", "--out-shard-size", "20000")
    assert plan(pair.recipe(), tmp_path).exit_code == 0
    before = files(tmp_path / "out")
    result = plan(pair.recipe(), tmp_path, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "the output folder holds other weights" in result.stdout
    assert files(tmp_path / "out") == before
    assert plan(pair.recipe(), tmp_path, "--out", str(tmp_path / "new")).exit_code == 0
    assert not (tmp_path / "new").exists()
    empty = plan(pair.recipe(), tmp_path, "--out", "")
    assert empty.exit_code == 1
    assert "1. the output path is empty; give a folder" in empty.stdout


def test_adapter_is_planned_from_the_model_below(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe()
    recipe["models"][0]["model"] += f"+{tmp_path / 'adapter'}"
    without = plan(recipe, tmp_path)
    assert without.exit_code == 1
    assert "pass --lora-merge-cache DIR" in without.stdout
    content = planned(recipe, tmp_path, "--lora-merge-cache", str(tmp_path / "cache"))
    assert content["tensors"] == planned(pair.recipe(), tmp_path)["tensors"]
    assert len(content["warnings"]) == 1
    assert "planned from the model below the adapter" in content["warnings"][0]
    assert not (tmp_path / "cache").exists()
