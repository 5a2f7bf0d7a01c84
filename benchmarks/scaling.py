"""How time and memory grow: python benchmarks/scaling.py --json scaling.json.

One thing is varied at a time: tokens, probes, layers and hidden size for profiling, parameters for merging. Profiling
is measured in CPU seconds of one thread on Llama models of random weights with the head size of SmolLM2 (64), a third
as many key heads as query heads, and a vocabulary of 4096; memory is what a fresh process needs beyond a forward pass.
Merging is measured in wall seconds and peak memory of whole commands on the pairs of ``pairs.py``, rank 16, beside the
imports of mergekit, which every command begins with.

``python benchmarks/scaling_page.py scaling.json`` fits the exponents and writes the table and the figure of README.md.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from machine import drop_file_caches, report, run_rounds, title
from pairs import MERGEKIT, SHAPES, SNRF, make_pair, work_folder, write_recipes
from profiling import cpu_seconds, extra_memory, forward, probe

from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.profiling.measure.meter import Meter

HEAD, VOCABULARY = 64, 4096
BASE = {"tokens": 256, "probes": 1, "layers": 8, "hidden": 576}
VARIED = {
    "tokens": (128, 256, 512, 1024),
    "layers": (4, 8, 16, 32),
    "hidden": (192, 384, 768, 1536),
}
PROBES = {"tokens": 64, "layers": 4, "hidden": 192, "values": (8, 32, 128, 512)}
SIZES = ("0.1B", "0.5B", "1.5B")


def make_model(hidden: int, layers: int) -> Any:
    """Return a Llama of random weights: hidden / 64 heads, a third of them key heads, intermediate 8/3 hidden."""
    torch.manual_seed(0)
    heads = hidden // HEAD
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=HEAD,
        intermediate_size=8 * hidden // 3,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=1.5 / hidden**0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


def profile_seconds(hidden: int, layers: int, tokens: int, probes: int, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of a forward pass and of profiling, for all probes, by round."""
    model = make_model(hidden, layers)
    meter = Meter(model)
    batches = [probe(number, tokens, VOCABULARY) for number in range(probes)]
    meter.impacts(batches[0])
    found: dict[str, list[float]] = {"forward": [], "impacts": []}
    for _ in range(rounds):
        found["forward"].append(cpu_seconds(lambda: [forward(model, batch) for batch in batches]))
        found["impacts"].append(cpu_seconds(lambda: [meter.impacts(batch) for batch in batches]))
    del model, meter
    gc.collect()
    return found


def profile_memory(hidden: int, layers: int, tokens: int, probes: int) -> float | None:
    """Return MB that profiling needs beyond a forward pass, in a fresh process; None where the system cannot tell."""
    words = ["--memory-only", json.dumps([hidden, layers, tokens, probes])]
    process = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr[-2000:])
    return json.loads(process.stdout.splitlines()[-1])


def gemm_flops() -> float:
    """Return float32 operations a second of one thread in a product that fits the caches."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    return 2 * 512**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=20))


def profiling(rounds: int) -> list[dict[str, Any]]:
    """Return a series for every thing that is varied."""
    series = []
    for name, values in VARIED.items():
        points = []
        for value in values:
            setting = {**BASE, name: value}
            shape = setting["hidden"], setting["layers"], setting["tokens"], setting["probes"]
            points.append(
                {"x": value, **setting, **profile_seconds(*shape, rounds), "extra_mb": profile_memory(*shape)}
            )
            click.echo(f"profiling, {name} {value}: {points[-1]}")
        series.append({"varied": name, "points": points})
    points = []
    for count in PROBES["values"]:  # type: ignore[attr-defined]
        shape = PROBES["hidden"], PROBES["layers"], PROBES["tokens"], count
        points.append({"x": count, **profile_seconds(*shape, rounds), "extra_mb": profile_memory(*shape)})  # type: ignore[arg-type]
        click.echo(f"profiling, probes {count}: {points[-1]}")
    return [*series, {"varied": "probes", "points": points}]


def merging(sizes: tuple[str, ...], repeats: int, threads: int) -> list[dict[str, Any]]:
    """Return the points of merges of every size."""
    points = []
    for size in sizes:
        with work_folder(None) as work:
            make_pair(work, size)
            recipes, out = write_recipes(work, 16), work / "out"
            options = [str(out), "--quiet", "--no-copy-tokenizer", "--out-shard-size", "1B"]
            snrf = [str(recipes["snrf"]), str(out), "--quiet"]
            commands: dict[str, tuple[list[str], Path | None]] = {
                "imports": ([sys.executable, "-c", "import mergekit.scripts.run_yaml"], None),
                "linear": ([*MERGEKIT, str(recipes["linear"]), *options], out),
                "snrf": ([*MERGEKIT, str(recipes["snrf"]), *options], out),
                "snrf patch": ([*SNRF, "patch", *snrf], out),
                "snrf lora": ([*SNRF, "lora", *snrf, "--dtype", "bfloat16"], out),
            }
            runs = run_rounds(commands, repeats, threads=threads, drop_caches=drop_file_caches())
            tensors = open_checkpoint(str(work / "base")).tensors.values()
            parameters = sum(tensor.parameters for tensor in tensors)
        for name, measured in runs.items():
            figures = {"wall_s": [m.wall_s for m in measured], "peak_mb": [m.peak_mb for m in measured]}
            points.append({"method": name, "x": parameters, "size": size, **figures})
            click.echo(f"merging {size}, {name}: {figures['wall_s']} s, {figures['peak_mb']} MB")
    return points


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=2, show_default=True, help="Of the merges; profiling takes one.")
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SHAPES)), default=SIZES, show_default=True)
@click.option("--part", type=click.Choice(["profiling", "merging", "both"]), default="both", show_default=True)
@click.option("--memory-only", hidden=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="scaling.json", show_default=True)
def main(
    rounds: int, threads: int, sizes: tuple[str, ...], part: str, memory_only: str | None, json_path: Path
) -> None:
    """Measure, and write the points."""
    torch.set_num_threads(1)
    if memory_only:
        hidden, layers, tokens, probes = json.loads(memory_only)
        try:
            found = extra_memory(make_model(hidden, layers), tokens, probes)["extra_mb"]
        except OSError:
            found = None
        click.echo(json.dumps(found))
        return
    title(threads)
    kept = json.loads(json_path.read_text()) if json_path.exists() else {}
    details = {name: kept[name] for name in ("profiling", "merging", "gemm_flops") if name in kept}
    if part != "merging":
        details |= {"gemm_flops": gemm_flops(), "profiling": profiling(rounds)}
    if part != "profiling":
        details["merging"] = merging(sizes, rounds, threads)
    figures = {
        f"{s['varied']} {p['x']}, impacts, CPU s": p["impacts"]
        for s in details.get("profiling", [])
        for p in s["points"]
    }
    figures |= {f"{p['method']} {p['size']}, wall s": p["wall_s"] for p in details.get("merging", [])}
    report(json_path, "scaling", threads, figures, **details)


if __name__ == "__main__":
    main()
