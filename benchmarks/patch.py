"""Time, peak memory and size of ``snrf patch`` and ``snrf lora``, beside ``cp`` and merges through ``mergekit-yaml``.

    python benchmarks/patch.py --size 0.5B --json patch.json

The checkpoints and the mask are those of ``benchmarks/merge.py``: bf16, random, 10 % of the neurons of every layer and
projection. The tensors of ``snrf patch`` and ``mergekit-yaml`` are compared bit by bit; a difference is exit code 1.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
import torch
from machine import bar, drop_file_caches, figures_of, median, report, run_rounds, title
from pairs import MERGEKIT, SHAPES, SNRF, make_pair, work_folder, write_recipes
from safetensors import safe_open

from mergekit_snrf.models.checkpoint import open_checkpoint

CP, LINEAR, MERGED, PATCH, LORA = "cp", "linear", "snrf", "snrf patch", "snrf lora"
REGMEAN = "snrf patch, regmean"


def different_tensors(a: Path, b: Path) -> list[str]:
    """Return the names of the tensors of two checkpoints that are not equal to the bit, or that one of them lacks."""
    mine, theirs = open_checkpoint(str(a)).tensors, open_checkpoint(str(b)).tensors
    different = sorted(set(mine) ^ set(theirs))
    for name in sorted(set(mine) & set(theirs)):
        with safe_open(a / mine[name].file, "pt") as left, safe_open(b / theirs[name].file, "pt") as right:
            x, y = left.get_tensor(name), right.get_tensor(name)
        if (x.dtype, x.shape) != (y.dtype, y.shape) or not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            different.append(name)
    return different


def folder_mb(folder: Path) -> float:
    """Return the size of a folder's files in MB."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), default="0.5B", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Threads of mergekit, and workers of the patch.")
@click.option("--out-shard-size", default="5B", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the checkpoints; a temporary one by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    size: str, rank: int, repeats: int, threads: int, out_shard_size: str, work: Path | None, json_path: Path | None
) -> None:
    """Print wall time, CPU time, peak memory and size, and the ratios that the project promises."""
    with work_folder(work) as folder:
        outs = {name: folder / f"out-{name.replace(' ', '-')}" for name in (CP, LINEAR, MERGED, PATCH, LORA, REGMEAN)}
        make_pair(folder, size)
        recipes = write_recipes(folder, rank)
        snrf = str(recipes["snrf"])
        options = ["--quiet", "--no-copy-tokenizer", "--out-shard-size", out_shard_size]
        patching = ["--quiet", "--workers", str(threads)]
        words = {
            CP: ["cp", "-r", str(folder / "base"), str(outs[CP])],
            LINEAR: [*MERGEKIT, str(recipes["linear"]), str(outs[LINEAR]), *options],
            MERGED: [*MERGEKIT, snrf, str(outs[MERGED]), *options],
            PATCH: [*SNRF, "patch", snrf, str(outs[PATCH]), *patching],
            REGMEAN: [*SNRF, "patch", str(recipes["regmean"]), str(outs[REGMEAN]), *patching],
            LORA: [*SNRF, "lora", snrf, str(outs[LORA]), "--dtype", "bfloat16", "--quiet"],
        }
        cold = drop_file_caches()
        commands = {name: (command, outs[name]) for name, command in words.items()}
        runs = run_rounds(commands, repeats, threads=threads, drop_caches=cold)
        different = different_tensors(outs[PATCH], outs[MERGED])
        sizes = {name: folder_mb(out) for name, out in outs.items()}
        for path in outs.values():
            shutil.rmtree(path)
    results = {name: median(measured) for name, measured in runs.items()}
    linear, patch, lora = results[LINEAR], results[PATCH], results[LORA]
    bars = [
        bar("snrf patch / linear, wall", patch.wall_s / linear.wall_s, 0.5),
        bar("snrf patch of regmean / linear, wall", results[REGMEAN].wall_s / linear.wall_s, 1),
        bar("snrf patch of regmean / linear, peak", results[REGMEAN].peak_mb / linear.peak_mb, 1),
        bar("snrf lora / linear, wall", lora.wall_s / linear.wall_s, 0.4),
        bar("snrf patch, peak GB", patch.peak_mb / 1000, 1),
        bar("tensors in which snrf patch differs from mergekit-yaml", len(different), 0),
    ]
    title(threads, f"{'cold' if cold else 'warm'} cache")
    click.echo(f"two bf16 checkpoints of {sizes[CP]:.0f} MB ({size}), rank {rank}, medians of {repeats}")
    for name, measured in results.items():
        click.echo(
            f"{name:<20} {measured.wall_s:7.1f} s wall {measured.cpu_s:7.1f} s CPU {measured.peak_mb:7.0f} MB peak "
            f"{sizes[name]:8.1f} MB output"
        )
    details = {"size": size, "rank": rank, "cold_cache": cold, "output_mb": sizes, "different_tensors": different}
    report(json_path, "patch", threads, figures_of(runs), bars, **details)
    if different:
        click.echo(f"tensors that differ: {', '.join(different[:5])}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
