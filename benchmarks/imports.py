"""What commands import, as a ratio to ``import mergekit.config``, which every user of mergekit pays.

    python benchmarks/imports.py --json imports.json

Each command runs on the board example in a process of its own, in interleaved rounds. ``CPU s`` is the whole process;
``imports s`` is the sum of what ``python -X importtime`` says of modules.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
from machine import bar, report, run, title

ROOT = Path(__file__).resolve().parents[1]
SNRF = "from mergekit_snrf.cli.snrf import main; main()"
MERGEKIT, PLAN = "import mergekit.config", "snrf plan"
COMMANDS = {
    MERGEKIT: ["-c", MERGEKIT],
    "import torch": ["-c", "import torch"],
    PLAN: ["-c", SNRF, "plan", str(ROOT / "examples" / "board" / "snrf.yml")],
    "snrf mask show": ["-c", SNRF, "mask", "show", str(ROOT / "neuron_masks" / "board.safetensors")],
    "snrf --help": ["-c", SNRF, "--help"],
}
# Bars of the CPU time relative to mergekit.config.
BARS = {PLAN: 0.7, "snrf mask show": 0.2, "snrf --help": 0.2}


def import_seconds(arguments: list[str]) -> float:
    """Return the seconds that a process spends on imports."""
    words = [sys.executable, "-X", "importtime", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    errors = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stderr
    return sum(int(own) for own in re.findall(r"^import time:\s+(\d+) \|", errors, re.MULTILINE)) / 1e6


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--work", hidden=True, help="Of the other benchmarks.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(repeats: int, work: str | None, json_path: Path | None) -> None:
    """Print the CPU seconds and import seconds of commands."""
    figures: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            figures.setdefault(f"{name}, CPU s", []).append(run([sys.executable, *arguments], threads=1).cpu_s)
            figures.setdefault(f"{name}, imports s", []).append(import_seconds(arguments))
    # The least of several rounds is nearest to what the work costs: noise only adds.
    least = {name: min(runs) for name, runs in figures.items()}
    bars = [
        bar(f"{name} / {MERGEKIT}, CPU", least[f"{name}, CPU s"] / least[f"{MERGEKIT}, CPU s"], limit)
        for name, limit in BARS.items()
    ]
    title(1, f"least of {repeats} rounds")
    for name in COMMANDS:
        cpu, imports = least[f"{name}, CPU s"], least[f"{name}, imports s"]
        click.echo(f"{name:<24} {cpu:6.2f} s CPU {imports:6.2f} s imports")
    report(json_path, "imports", 1, figures, bars)


if __name__ == "__main__":
    main()
