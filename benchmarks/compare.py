"""Name what got slower: python benchmarks/compare.py BEFORE.json AFTER.json.

Both files come from one benchmark's ``--json``. A figure (seconds or MB of every round) counts as slower if its median
grew by more than the noise: the larger of ``--tolerance`` and the spread of either file's rounds, which is the distance
of their most extreme round from the median. With one round a file there is no spread to see, and only the tolerance
counts. Promises that were kept before and are not any more are named too. Exit code 1 if anything got worse.
"""

from __future__ import annotations

import json
import statistics
import sys
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


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--tolerance", default=0.1, show_default=True, type=click.FloatRange(0), help="Share that is never news.")
def main(before: Path, after: Path, tolerance: float) -> None:
    """Print what is slower or needs more memory in AFTER than in BEFORE."""
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
        sys.exit(1)
    click.echo(f"nothing got worse by more than noise: {len(old['figures'])} figures, {len(new['bars'])} promises")


if __name__ == "__main__":
    main()
