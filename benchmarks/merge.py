"""Time and peak memory of a merge through ``mergekit-yaml``, beside mergekit's own methods in one run.

    python benchmarks/merge.py --size 0.5B --json merge.json

Two bf16 checkpoints of random weights are made with the shapes of Qwen2.5; their difference is a tenth as large as the
weights, with singular values that fall off about as i^-0.5. The mask holds 10 % of the neurons of
every layer and projection; ``one layer`` holds the same of layer 0 alone. ``regmean`` has no mask: it moves all neurons
of the five projections, with moments of random inputs (dense up to 4096 inputs, or ``--sketch``). ``--workers`` adds
the same merge with other numbers of tensors that are fused at once.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
from machine import bar, drop_file_caches, figures_of, median, report, run_rounds, title
from pairs import MERGEKIT, SHAPES, make_pair, work_folder, write_recipes

from mergekit_snrf.models.checkpoint import open_checkpoint

# Bars of the time relative to linear, by rank, on 0.5B and on 7B shape.
LINEAR_BARS = {"0.5B": {16: 0.9, 64: 1.0}, "7B-4layers": {16: 0.8, 64: 1.0}}
# Of regmean: with dense moments of an input wider than this the bar is the second.
REGMEAN_WIDE, REGMEAN_BARS = 2048, {False: 1.3, True: 2.0}


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), default="0.5B", show_default=True)
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(0), default=(16,), show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out-shard-size", default="5B", show_default=True)
@click.option("--sketch", type=click.IntRange(1), help="Eigenvectors of all moments; default: dense up to 4096 inputs.")
@click.option("--workers", multiple=True, type=click.IntRange(1), help="Also merge with so many workers.")
@click.option("--only", multiple=True, help="Measure these rows alone, besides linear and passthrough.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the checkpoints; a temporary one by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    size: str,
    ranks: tuple[int, ...],
    repeats: int,
    threads: int,
    out_shard_size: str,
    sketch: int | None,
    workers: tuple[int, ...],
    only: tuple[str, ...],
    work: Path | None,
    json_path: Path | None,
) -> None:
    """Print wall time, CPU time and peak memory, and the ratios that the project promises."""
    with work_folder(work) as folder:
        out = folder / "out"
        make_pair(folder, size)
        recipes = {}
        for rank in ranks:
            for name, recipe in write_recipes(folder, rank, sketch).items():
                recipes[f"{name}, rank {rank}" if name.startswith("snrf") else name] = recipe
        if only:
            recipes = {name: path for name, path in recipes.items() if name in (*only, "linear", "passthrough")}
        cold = drop_file_caches()
        options = ["--quiet", "--no-copy-tokenizer", "--out-shard-size", out_shard_size]
        commands: dict[str, tuple[list[str], Path | None]] = {
            "imports": ([sys.executable, "-c", "import mergekit.scripts.run_yaml"], None)
        }
        commands |= {name: ([*MERGEKIT, str(recipe), str(out), *options], out) for name, recipe in recipes.items()}
        for n in workers:
            words = [str(recipes[f"snrf, rank {ranks[0]}"]), str(out), *options, "--num-threads", str(n)]
            commands[f"snrf, rank {ranks[0]}, {n} workers"] = ([*MERGEKIT, *words], out)
        runs = run_rounds(commands, repeats, threads=threads, drop_caches=cold)
        size_mb = open_checkpoint(str(folder / "base")).bytes / 1e6
        shutil.rmtree(out, ignore_errors=True)
    results = {name: median(measured) for name, measured in runs.items()}
    bars = []
    if "regmean" in results:
        dense = sketch is None and SHAPES[size]["hidden_size"] > REGMEAN_WIDE
        limit = REGMEAN_BARS[dense]
        bars.append(bar("regmean / linear, wall", results["regmean"].wall_s / results["linear"].wall_s, limit))
        bars.append(bar("regmean / linear, peak", results["regmean"].peak_mb / results["linear"].peak_mb, 1))
    for rank in ranks if not only else ():
        whole, single = results[f"snrf, rank {rank}"], results[f"snrf in one layer, rank {rank}"]
        limit = LINEAR_BARS.get(size, {}).get(rank, 1.0)
        bars.append(bar(f"snrf / linear, peak, rank {rank}", whole.peak_mb / results["linear"].peak_mb, 1))
        bars.append(bar(f"snrf / linear, wall, rank {rank}", whole.wall_s / results["linear"].wall_s, limit))
        ratio = single.wall_s / results["passthrough"].wall_s
        bars.append(bar(f"snrf in one layer / passthrough, wall, rank {rank}", ratio, 1.0))
    title(threads, f"{'cold' if cold else 'warm'} cache")
    click.echo(f"two bf16 checkpoints of {size_mb:.0f} MB ({size}), medians of {repeats}")
    for name, measured in results.items():
        click.echo(
            f"{name:<28} {measured.wall_s:7.1f} s wall {measured.cpu_s:7.1f} s CPU {measured.peak_mb:7.0f} MB peak"
        )
    details = {"size": size, "checkpoint_mb": size_mb, "cold_cache": cold, "sketch": sketch}
    report(json_path, "merge", threads, figures_of(runs), bars, **details)


if __name__ == "__main__":
    main()
