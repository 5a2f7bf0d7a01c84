"""Name what got slower, between two files of a benchmark or between two commits.

    python benchmarks/compare.py before.json after.json
    python benchmarks/compare.py main HEAD --benchmark "merge.py --size 0.5B" --rounds 7

Two files come from one benchmark's ``--json``. A figure (seconds or MB of every round) counts as slower if its median
grew by more than the noise: the larger of ``--tolerance`` and the spread of either file's rounds, which is the distance
of their most extreme round from the median. With one round a file there is no spread to see, and only the tolerance
counts. Promises that were kept before and are not any more are named too.

Two commits are checked out and measured in pairs: every round runs the benchmark of this folder with the package of
both, the second one first in every other round. A figure counts as slower if the 95 % bootstrap interval of the median
of the rounds' ratios lies above 1 + ``--tolerance``. A busy phase of the machine hits both halves of a pair.

Exit code 1 if anything got worse.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def spread(runs: Sequence[float]) -> float:
    """Return how far the most extreme round lies from the median, as a share of it."""
    middle = statistics.median(runs)
    return max(abs(run - middle) for run in runs) / middle if middle else 0.0


def slower(
    before: dict[str, list[float]], after: dict[str, list[float]], tolerance: float
) -> list[tuple[str, float, float, float]]:
    """Return name, median before, median after and noise of every figure that grew by more than the noise."""
    found = []
    for name in before:
        if name in after:
            old, new = statistics.median(before[name]), statistics.median(after[name])
            noise = max(tolerance, spread(before[name]), spread(after[name]))
            if new > old * (1 + noise):
                found.append((name, old, new, noise))
    return found


def read(path: Path) -> dict[str, Any]:
    """Read a benchmark's file.

    Raises:
        click.ClickException: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        figures = content["figures"]
        if not all(runs and all(float(run) >= 0 for run in runs) for runs in figures.values()):
            raise ValueError("a figure has no rounds, or a negative one")
        return {"benchmark": content["benchmark"], "machine": content["machine"], "figures": figures} | {
            "bars": {entry["bar"]: entry for entry in content.get("bars", [])}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(f"{path}: not a file of a benchmark's --json ({error})") from None


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the ratios of paired rounds, and its 95 % bootstrap interval."""
    ratios = [b / a for a, b in zip(before, after, strict=True) if a > 0]
    if not ratios:
        return 1.0, 1.0, 1.0
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[-51]


def measured_in_pairs(
    commits: tuple[str, str], benchmark: Sequence[str], rounds: int, repository: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run a benchmark with the package of two commits, round by round; return the figures of both.

    Raises:
        click.ClickException: a commit is unknown, or the benchmark fails.
    """
    figures: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    with tempfile.TemporaryDirectory(prefix="snrf-compare-") as temporary:
        folder = Path(temporary)
        (folder / "work").mkdir()
        for number, commit in enumerate(commits):
            (folder / str(number)).mkdir()
            archive = _done(["git", "-C", str(repository), "archive", commit])
            _done(["tar", "-x", "-C", str(folder / str(number))], stdin=archive)
        script, *options = benchmark
        words = [sys.executable, str(Path(__file__).parent / script), *options]
        words += ["--repeats", "1", "--work", str(folder / "work"), "--json", str(folder / "figures.json")]
        for turn in range(rounds):
            for number in (0, 1) if turn % 2 == 0 else (1, 0):
                _done(words, {**os.environ, "PYTHONPATH": str(folder / str(number))})
                for name, (value,) in read(folder / "figures.json")["figures"].items():
                    figures[number].setdefault(name, []).append(value)
    return figures


def _done(words: Sequence[str], environment: dict[str, str] | None = None, stdin: bytes | None = None) -> bytes:
    result = subprocess.run(words, env=environment, input=stdin, capture_output=True, check=False)
    if result.returncode:
        raise click.ClickException(f"{' '.join(words)} failed:\n{result.stderr.decode()[-2000:]}")
    return result.stdout


def compare_commits(
    commits: tuple[str, str], benchmark: Sequence[str], rounds: int, tolerance: float, repository: Path
) -> bool:
    """Print every figure's ratio with its interval; return whether one got worse."""
    before, after = measured_in_pairs(commits, benchmark, rounds, repository)
    worse = False
    for name in (name for name in before if name in after):
        ratio, low, high = ratio_interval(before[name], after[name])
        slow = low > 1 + tolerance
        said = "SLOWER" if slow else "faster" if high < 1 - tolerance else "same  "
        medians = f"{statistics.median(before[name]):.4g} -> {statistics.median(after[name]):.4g}"
        click.echo(f"{said} {name}: {medians}, ratio {ratio:.3f} [{low:.3f}, {high:.3f}] of {rounds} pairs")
        worse = worse or slow
    return worse


@click.command()
@click.argument("before")
@click.argument("after")
@click.option("--tolerance", default=0.1, show_default=True, type=click.FloatRange(0), help="Share that is never news.")
@click.option("--benchmark", help="Script of this folder with its options: BEFORE and AFTER are commits.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(2), help="Pairs of runs of two commits.")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    default=Path(__file__).resolve().parents[1],
    help="Of the commits; this one by default.",
)
def main(before: str, after: str, tolerance: float, benchmark: str | None, rounds: int, repository: Path) -> None:
    """Print what is slower or needs more memory in AFTER than in BEFORE."""
    if benchmark is None:
        worse = compare_files(Path(before), Path(after), tolerance)
    else:
        worse = compare_commits((before, after), shlex.split(benchmark), rounds, tolerance, repository)
    sys.exit(int(worse))


def compare_files(before: Path, after: Path, tolerance: float) -> bool:
    """Print what differs between two files; return whether anything got worse."""
    old, new = read(before), read(after)
    if old["benchmark"] != new["benchmark"]:
        raise click.ClickException(
            f"{before} is of the benchmark {old['benchmark']}, {after} of {new['benchmark']}; compare files of one"
        )
    for key in old["machine"].keys() | new["machine"].keys():
        mine, theirs = old["machine"].get(key), new["machine"].get(key)
        if mine != theirs:
            click.echo(f"note: {key} differs, {mine} and {theirs}; times compare on one machine only")
    worse = slower(old["figures"], new["figures"], tolerance)
    for name, a, b, noise in worse:
        click.echo(f"SLOWER {name}: {a:.4g} -> {b:.4g} ({b / a - 1 if a else 1:+.0%}, noise {noise:.0%})")
    for name, a, b, noise in slower(new["figures"], old["figures"], tolerance):
        click.echo(f"faster {name}: {b:.4g} -> {a:.4g} ({a / b - 1 if b else -1:+.0%}, noise {noise:.0%})")
    broken = [name for name, entry in new["bars"].items() if not entry["met"] and old["bars"].get(name, entry)["met"]]
    for name in broken:
        click.echo(f"BROKEN {name}: {old['bars'][name]['value']:.3g} -> {new['bars'][name]['value']:.3g}")
    gone = sorted(old["figures"].keys() - new["figures"].keys())
    if gone:
        click.echo(f"note: not measured any more: {', '.join(gone)}")
    if worse or broken:
        return True
    click.echo(f"nothing got worse by more than noise: {len(old['figures'])} figures, {len(new['bars'])} promises")
    return False


if __name__ == "__main__":
    main()
