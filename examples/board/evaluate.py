"""Score models of the board task: python examples/board/evaluate.py MODEL_DIR [MODEL_DIR ...].

Prints reasoning R and perception P with 95 % bootstrap intervals, every task's accuracy with its Wilson
interval, the share of malformed calc answers and, for several folders, the paired differences to the first.
Takes VLMs (boards as pictures) and LLMs (boards as nine tokens). The same folders, options and versions
give the same output. What can be imported from here: ``load``, ``evaluate``, ``difference`` and their types.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

# Siblings are found when this file is run as a script; this line is for when it is loaded by its path.
sys.path.append(str(Path(__file__).resolve().parent))

from board_models import load
from board_scores import LEVEL, PERCEPTION, REASONING, RESAMPLES, TASKS, Estimate, Result, difference, evaluate

__all__ = ["PERCEPTION", "REASONING", "TASKS", "Estimate", "Result", "difference", "evaluate", "load"]


def table(rows: list[list[str]]) -> str:
    """Return rows as lines of left-aligned columns, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def report(results: dict[str, Result]) -> str:
    """Return the tables for results by name, the first of them the reference of the differences."""
    rows = [["model", "R", "P", "malformed calc"]]
    for name, result in results.items():
        r, p = result.estimate(REASONING), result.estimate(PERCEPTION)
        rows.append([name, str(r), str(p), f"{result.malformed:.1f}"])
    parts = [table(rows)]
    tasks = [["model", *TASKS]]
    for name, result in results.items():
        tasks.append([name, *(str(result.accuracy(t)) if t in result.correct else "-" for t in TASKS)])
    parts.append(table(tasks))
    (first_name, first), *others = results.items()
    if others:
        rows = [[f"minus {first_name}", "R", "P"]]
        for name, other in others:
            found = [difference(first, other, group) for group in (REASONING, PERCEPTION)]
            rows.append([name, *(str(d) if d else "-" for d in found)])
        parts.append(table(rows))
    parts.append(
        f"Percent, n = {first.n} held-out problems a task, seed {first.seed}. {LEVEL:.0%} intervals: R, P and paired "
        f"differences by percentile bootstrap\nover the problems ({RESAMPLES} resamples, seed {first.seed}), "
        "single tasks by Wilson."
    )
    return "\n\n".join(parts)


def to_json(results: dict[str, Result]) -> dict[str, Any]:
    """Return what ``report`` prints as JSON values."""
    (first_name, first), *others = results.items()
    differences: dict[str, Any] = {}
    for name, other in others:
        found = {"reasoning": REASONING, "perception": PERCEPTION}
        pairs = {key: difference(first, other, tasks) for key, tasks in found.items()}
        differences[name] = {key: pair.to_json() if pair else None for key, pair in pairs.items()}
    return {
        "unit": "percent",
        "n": first.n,
        "seed": first.seed,
        "split": first.split,
        "interval": {
            "level": LEVEL,
            "reasoning, perception, differences": "percentile bootstrap over problems, each task on its own",
            "accuracy": "Wilson",
            "resamples": RESAMPLES,
            "seed": first.seed,
        },
        "models": {name: result.to_json() for name, result in results.items()},
        "minus": first_name,
        "differences": differences,
    }


@click.command()
@click.argument(
    "folders",
    metavar="MODEL_DIR...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("-n", type=click.IntRange(1, 5000), default=200, show_default=True, help="Problems a task.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of problems and bootstrap.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that torch uses.")
def main(folders: tuple[Path, ...], n: int, seed: int, json_file: Path | None, threads: int) -> None:
    """Print reasoning R and perception P of the models in MODEL_DIR..., compared with the first."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    results: dict[str, Result] = {}
    for folder in folders:
        try:
            model, processor = load(folder)
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{folder} does not load: {error}") from error
        results[str(folder)] = evaluate(model, processor, n, seed, progress=True)
    click.echo(report(results))
    if json_file:
        json_file.write_text(json.dumps(to_json(results), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
