"""What the benchmarks share: the machine they ran on, running and measuring commands, and their JSON files."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click


def describe(threads: int) -> dict[str, Any]:
    """Return CPU model, cores, memory in GiB, threads and package versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "threads": threads,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "mergekit", "safetensors", "numpy")},
    }


@dataclass(frozen=True)
class Measured:
    """Wall seconds, CPU seconds and peak resident memory in MB of one command."""

    wall_s: float
    cpu_s: float
    peak_mb: float


# A process inherits the peak memory of the one that started it, so a small one starts the command.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
wall = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}))
sys.exit(code)
"""


def run(command: Sequence[str], *, threads: int, drop_caches: bool = False) -> Measured:
    """Run a command to its end and measure it.

    Raises:
        SystemExit: the command fails; its error output is shown.
    """
    if drop_caches:
        drop_file_caches()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, *command], env=environment, capture_output=True, start_new_session=True
    )
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.decode()[-2000:]}")
    return Measured(**json.loads(process.stdout))


def run_rounds(
    commands: Mapping[str, tuple[Sequence[str], Path | None]], repeats: int, *, threads: int, drop_caches: bool
) -> dict[str, list[Measured]]:
    """Run every command ``repeats`` times, its output folder removed before each.

    The rounds are of all commands rather than all rounds of one: a slow phase of the machine then hits every command.

    Args:
        commands: by name, the words and the output folder.
    """
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, (command, out) in commands.items():
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
            runs[name].append(run(command, threads=threads, drop_caches=drop_caches))
    return runs


def median(measured: Sequence[Measured]) -> Measured:
    """Return the medians of each figure."""
    return Measured(
        *(statistics.median(getattr(m, field) for m in measured) for field in Measured.__dataclass_fields__)
    )


def peak_mb() -> float:
    """Return the most memory that this process has used, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def drop_file_caches() -> bool:
    """Empty the page cache where the user may; return whether that worked."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def figures_of(runs: Mapping[str, Sequence[Measured]]) -> dict[str, list[float]]:
    """Return the figures of measured commands under names that say their unit, for ``write_json``."""
    return {
        f"{name}, {label}": [getattr(m, field) for m in measured]
        for name, measured in runs.items()
        for field, label in (("wall_s", "wall s"), ("cpu_s", "CPU s"), ("peak_mb", "peak MB"))
    }


def title(threads: int, *more: str) -> None:
    """Print what a benchmark runs on."""
    machine = describe(threads)
    packages = (f"{name} {machine['packages'][name]}" for name in ("torch", "transformers"))
    click.echo(", ".join([machine["cpu"], f"{machine['cores']} cores", f"{threads} threads", *packages, *more]))


def show(figures: Mapping[str, Sequence[float]]) -> None:
    """Print the median of every figure, and its range."""
    for name, values in figures.items():
        click.echo(f"{name:<36} {statistics.median(values):9.3f} ({min(values):.3f} to {max(values):.3f})")


def bar(name: str, value: float, limit: float, *, least: bool = False) -> dict[str, Any]:
    """Return one promise, what was measured, and whether it is kept."""
    met = value >= limit if least else value <= limit
    return {"bar": f"{name} {'>=' if least else '<='} {limit:g}", "value": value, "met": met}


def bars_text(bars: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a promise."""
    return "\n".join(f"{'met   ' if b['met'] else 'MISSED'} {b['bar']}: {b['value']:.3g}" for b in bars)


def report(
    path: Path | None,
    benchmark: str,
    threads: int,
    figures: Mapping[str, Sequence[float]],
    bars: Sequence[Mapping[str, Any]] = (),
    **details: Any,
) -> None:
    """Print the promises, and write a benchmark's file, which ``compare.py`` reads.

    Args:
        path: of the file; None: none is written.
        benchmark: its name.
        figures: by name, what every round measured; less is better.
        bars: of ``bar``.
        details: whatever else is worth keeping.
    """
    if bars:
        click.echo(f"\n{bars_text(bars)}")
    if path is None:
        return
    content = {
        "benchmark": benchmark,
        "machine": describe(threads),
        "figures": {name: list(runs) for name, runs in figures.items()},
        "bars": list(bars),
        **details,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
