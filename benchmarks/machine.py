"""What a benchmark says of the machine it ran on, and how it runs a command and measures it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


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

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


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


def drop_file_caches() -> bool:
    """Empty the page cache where the user may; return whether that worked."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
