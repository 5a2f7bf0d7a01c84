"""Time and peak memory of a merge through ``mergekit-yaml``, beside mergekit's own methods in one run.

    python benchmarks/merge.py --size 0.5B --json merge.json

Two bf16 checkpoints of random weights are made with the shapes of Qwen2.5; their difference is a tenth as large as the
weights, with singular values that fall off about as i^-0.5. The mask holds 10 % of the neurons of
every layer and projection; ``one layer`` holds the same of layer 0 alone.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from machine import Measured, describe, drop_file_caches, run
from safetensors.torch import save_file
from transformers import Qwen2Config

from mergekit_snrf.checkpoint import open_checkpoint
from mergekit_snrf.decoder import find_decoder
from mergekit_snrf.maskfile import write_mask
from mergekit_snrf.neurons import NeuronSet

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7B-4layers": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip


def make_checkpoint(folder: Path, shape: dict[str, Any], seed: int, drift: Path | None = None) -> None:
    """Write a random bf16 Qwen2 checkpoint in one file, ``drift`` plus a difference if given."""
    config = Qwen2Config(vocab_size=151936, architectures=["Qwen2ForCausalLM"], dtype="bfloat16", **shape)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        sizes["lm_head.weight"] = (151936, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            sizes[f"{prefix}self_attn.{name}.weight"] = (rows, hidden)
            sizes[f"{prefix}self_attn.{name}.bias"] = (rows,)
        sizes[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
        sizes[f"{prefix}mlp.gate_proj.weight"] = (wide, hidden)
        sizes[f"{prefix}mlp.up_proj.weight"] = (wide, hidden)
        sizes[f"{prefix}mlp.down_proj.weight"] = (hidden, wide)
        sizes[f"{prefix}input_layernorm.weight"] = (hidden,)
        sizes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    tensors = {name: _random(size, generator, drifting=drift is not None) for name, size in sizes.items()}
    if drift is not None:
        from safetensors import safe_open

        with safe_open(drift / "model.safetensors", "pt") as base:
            tensors = {name: base.get_tensor(name) + tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random(size: tuple[int, ...], generator: torch.Generator, *, drifting: bool) -> torch.Tensor:
    """Draw a weight, or a difference a tenth as large whose singular values fall off about as i^-0.5."""
    weight = torch.randn(size, generator=generator) * 0.02
    if drifting and len(size) == 2:
        axis = 0 if size[0] <= size[1] else 1
        decay = torch.arange(1, size[axis] + 1).pow(-0.5)
        decay *= 0.1 / decay.square().mean().sqrt()
        weight *= decay[:, None] if axis == 0 else decay[None, :]
    return weight.bfloat16()


def write_recipes(work: Path, rank: int) -> dict[str, Path]:
    """Write masks and recipes; return the recipes by name."""
    shape = find_decoder(open_checkpoint(str(work / "base"))).shape
    generator = torch.Generator().manual_seed(0)
    everywhere = NeuronSet(
        {site: torch.rand(shape.neurons(site.projection), generator=generator) < 0.1 for site in shape.sites()}
    )
    write_mask(work / "all.safetensors", everywhere)
    write_mask(work / "one.safetensors", NeuronSet({s: m for s, m in everywhere.items() if s.layer == 0}))
    snrf = (
        f"merge_method: snrf\nbase_model: {work}/base\nmodels:\n  - model: {work}/source\n"
        f"    parameters: {{rank: {rank}}}\nparameters:\n  masks: {work}/"
    )
    recipes = {
        "passthrough": f"merge_method: passthrough\nmodels:\n  - model: {work}/base\n",
        "linear": f"merge_method: linear\nmodels:\n  - model: {work}/base\n    parameters: {{weight: 0.5}}\n"
        f"  - model: {work}/source\n    parameters: {{weight: 0.5}}\n",
        "snrf": snrf + "all.safetensors\n",
        "snrf, one layer": snrf + "one.safetensors\n",
    }
    paths = {}
    for name, text in recipes.items():
        paths[name] = work / f"{name.replace(', ', '-').replace(' ', '-')}.yml"
        paths[name].write_text(text)
    return paths


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), default="0.5B", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out-shard-size", default="5B", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the checkpoints; a temporary one by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    size: str, rank: int, repeats: int, threads: int, out_shard_size: str, work: Path | None, json_path: Path | None
) -> None:
    """Print wall time, CPU time and peak memory, and the ratios that the project promises."""
    folder = Path(tempfile.mkdtemp(prefix="snrf-merge-")) if work is None else work
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "source" / "model.safetensors").exists():
            make_checkpoint(folder / "base", SHAPES[size], 0)
            make_checkpoint(folder / "source", SHAPES[size], 1, drift=folder / "base")
        recipes = write_recipes(folder, rank)
        cold = drop_file_caches()
        mergekit = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
        results: dict[str, Measured] = {
            "imports": _median(
                [
                    run([sys.executable, "-c", "import mergekit.scripts.run_yaml"], threads=threads, drop_caches=cold)
                    for _ in range(repeats)
                ]
            )
        }
        # Rounds of all methods rather than all rounds of one: a slow phase of the machine then hits every method.
        runs: dict[str, list[Measured]] = {name: [] for name in recipes}
        for _ in range(repeats):
            for name, recipe in recipes.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                command = [*mergekit, str(recipe), str(folder / "out"), "--quiet", "--out-shard-size", out_shard_size]
                runs[name].append(run([*command, "--no-copy-tokenizer"], threads=threads, drop_caches=cold))
        results |= {name: _median(measured) for name, measured in runs.items()}
        size_mb = open_checkpoint(str(folder / "base")).bytes / 1e6
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if work is None:
            shutil.rmtree(folder)
    ratios = {
        "snrf / linear, wall (bar: <= 1.3)": results["snrf"].wall_s / results["linear"].wall_s,
        "snrf in one layer / passthrough, wall (bar: <= 1.1)": results["snrf, one layer"].wall_s
        / results["passthrough"].wall_s,
        "snrf / linear, peak memory": results["snrf"].peak_mb / results["linear"].peak_mb,
    }
    machine = describe(threads)
    click.echo(f"{machine['cpu']}, {machine['cores']} cores, {threads} threads; {'cold' if cold else 'warm'} cache")
    click.echo(f"two bf16 checkpoints of {size_mb:.0f} MB ({size}), rank {rank}, medians of {repeats}")
    for name, measured in results.items():
        click.echo(
            f"{name:<18} {measured.wall_s:7.1f} s wall {measured.cpu_s:7.1f} s CPU {measured.peak_mb:7.0f} MB peak"
        )
    for name, ratio in ratios.items():
        click.echo(f"{name:<52} {ratio:.2f}")
    if json_path:
        content = {
            "benchmark": "merge",
            "machine": machine,
            "size": size,
            "rank": rank,
            "checkpoint_mb": size_mb,
            "cold_cache": cold,
            "results": {name: measured.as_dict() for name, measured in results.items()},
            "ratios": ratios,
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n")


def _median(measured: list[Measured]) -> Measured:
    return Measured(
        statistics.median(m.wall_s for m in measured),
        statistics.median(m.cpu_s for m in measured),
        statistics.median(m.peak_mb for m in measured),
    )


if __name__ == "__main__":
    main()
