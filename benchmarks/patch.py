"""Time and peak memory of ``snrf patch``, beside ``cp`` of the base and the same merge through ``mergekit-yaml``.

    python benchmarks/patch.py --size 0.5B --json patch.json

The checkpoints and the mask are those of ``benchmarks/merge.py``: bf16, random, 10 % of the neurons of every layer and
projection. The tensors of ``snrf patch`` and ``mergekit-yaml`` are compared bit by bit; a difference is exit code 1.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import click
import torch
from machine import Measured, describe, drop_file_caches, run
from merge import SHAPES, _median, make_checkpoint, write_recipes
from safetensors import safe_open

from mergekit_snrf.checkpoint import open_checkpoint

CP, LINEAR, MERGEKIT, PATCH = "cp", "linear", "snrf", "snrf patch"
SNRF = [sys.executable, "-c", "from mergekit_snrf.cli.snrf import main; main()"]


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
    """Print wall time, CPU time and peak memory, and the ratios that the project promises."""
    folder = Path(tempfile.mkdtemp(prefix="snrf-patch-")) if work is None else work
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {name: folder / f"out-{name.replace(' ', '-')}" for name in (CP, LINEAR, MERGEKIT, PATCH)}
    try:
        if not (folder / "source" / "model.safetensors").exists():
            make_checkpoint(folder / "base", SHAPES[size], 0)
            make_checkpoint(folder / "source", SHAPES[size], 1, drift=folder / "base")
        recipes = write_recipes(folder, rank)
        mergekit = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
        options = ["--quiet", "--no-copy-tokenizer", "--out-shard-size", out_shard_size]
        commands = {
            CP: ["cp", "-r", str(folder / "base"), str(outputs[CP])],
            LINEAR: [*mergekit, str(recipes["linear"]), str(outputs[LINEAR]), *options],
            MERGEKIT: [*mergekit, str(recipes["snrf"]), str(outputs[MERGEKIT]), *options],
            PATCH: [*SNRF, "patch", str(recipes["snrf"]), str(outputs[PATCH]), "--quiet", "--workers", str(threads)],
        }
        cold = drop_file_caches()
        # Rounds of all methods rather than all rounds of one: a slow phase of the machine then hits every method.
        runs: dict[str, list[Measured]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                shutil.rmtree(outputs[name], ignore_errors=True)
                runs[name].append(run(command, threads=threads, drop_caches=cold))
        results = {name: _median(measured) for name, measured in runs.items()}
        different = different_tensors(outputs[PATCH], outputs[MERGEKIT])
        size_mb = open_checkpoint(str(folder / "base")).bytes / 1e6
    finally:
        for path in outputs.values():
            shutil.rmtree(path, ignore_errors=True)
        if work is None:
            shutil.rmtree(folder)
    patch = results[PATCH]
    ratios = {
        "snrf patch / linear, wall (bar: <= 0.65)": patch.wall_s / results[LINEAR].wall_s,
        "snrf patch / snrf through mergekit-yaml, wall": patch.wall_s / results[MERGEKIT].wall_s,
        "snrf patch / cp, wall": patch.wall_s / results[CP].wall_s,
        "snrf patch / linear, CPU": patch.cpu_s / results[LINEAR].cpu_s,
        "snrf patch, peak memory in GB (bar: <= 2 at 7B shapes)": patch.peak_mb / 1000,
    }
    machine = describe(threads)
    click.echo(f"{machine['cpu']}, {machine['cores']} cores, {threads} threads; {'cold' if cold else 'warm'} cache")
    click.echo(f"two bf16 checkpoints of {size_mb:.0f} MB ({size}), rank {rank}, medians of {repeats}")
    for name, measured in results.items():
        click.echo(
            f"{name:<18} {measured.wall_s:7.1f} s wall {measured.cpu_s:7.1f} s CPU {measured.peak_mb:7.0f} MB peak"
        )
    for name, ratio in ratios.items():
        click.echo(f"{name:<56} {ratio:.2f}")
    click.echo(
        f"{len(different)} tensors differ from mergekit-yaml's, such as {different[0]}"
        if different
        else "all tensors are bit-identical to mergekit-yaml's"
    )
    if json_path:
        content = {
            "benchmark": "patch",
            "machine": machine,
            "size": size,
            "rank": rank,
            "checkpoint_mb": size_mb,
            "cold_cache": cold,
            "results": {name: measured.as_dict() for name, measured in results.items()},
            "ratios": ratios,
            "different_tensors": different,
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
