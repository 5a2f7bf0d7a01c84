"""The colors of the board as domains: which neurons are specific to one, and what the target loses without them.

    python examples/board/domains.py

writes 64 pictures of each color with the question for it, and runs what a user types, in out/colors:

    snrf-profile colors.yml colors.safetensors
    snrf domains show colors.safetensors --top 0.1 --tokens prompt --figures .
    snrf domains select colors.safetensors masks --top 0.1 --tokens prompt
    snrf domains ablate target colors.safetensors --top 0.1 --tokens prompt --eval "domains.py:colors?n=200" --json ...
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow
import yaml
from PIL import Image
from pyarrow import parquet
from transformers import PreTrainedModel

# This file is also loaded by its path, where siblings are not found by themselves.
sys.path.append(str(Path(__file__).resolve().parent))

from board_scores import answers
from board_task import COLORS, Problem, distinct_problems, render

from mergekit_snrf.evidence.items import Items

HERE = Path(__file__).resolve().parent
PROBES = 64
CHOICE = ("--top", "0.1", "--tokens", "prompt")


def problems_of(color: str, n: int, seed: int, split: str) -> list[Problem]:
    """Return ``n`` problems that ask for the color of boards of one color."""
    rng = np.random.default_rng([seed, list(COLORS).index(color)])
    drawn = distinct_problems(rng, "color", split, 8 * n)
    return [problem for problem in drawn if problem.board.color == color][:n]


def colors(model: PreTrainedModel, processor: Any, *, n: int = 200, seed: int = 0) -> dict[str, Items]:
    """Return the accuracy of a VLM on held-out boards of each color, ``n`` a color."""
    found = {}
    for color in COLORS:
        asked = problems_of(color, n, seed, "test")
        texts = answers(model, processor, asked)
        scores = tuple(float(problem.accepts(text)) for problem, text in zip(asked, texts, strict=True))
        found[color] = Items(scores, ids=tuple(f"{color}/{seed}/{number}" for number in range(n)))
    return found


def write_probes(folder: Path) -> None:
    """Write pictures of every color, of the train split, and colors.yml, which names them."""
    domains = {}
    for color in COLORS:
        rows = []
        for problem in problems_of(color, PROBES, 0, "train"):
            content = io.BytesIO()
            Image.fromarray(render(problem.board)).save(content, "png", optimize=True)
            rows.append({"question": problem.prompt(image=True), "image": {"bytes": content.getvalue(), "path": None}})
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{color}.parquet")
        domains[color] = {"dataset": f"{color}.parquet", "question": "question", "images": "image"}
    config = {"model": str(HERE / "target"), "domains": domains, "template": "{question}", "answer": "none"}
    (folder / "colors.yml").write_text(yaml.safe_dump(config, sort_keys=False))


def measured(run: Callable[..., None], folder: Path, items: int, draws: int) -> dict[str, Any]:
    """Run all commands in a folder with ``run(folder, *words)``; return the result of the ablation."""
    folder.mkdir(parents=True, exist_ok=True)
    write_probes(folder)
    evaluation = f"{HERE / 'domains.py'}:colors?n={items}"
    run(folder, "snrf-profile", "colors.yml", "colors.safetensors", "--quiet")
    run(folder, "snrf", "domains", "show", "colors.safetensors", *CHOICE, "--figures", ".")
    run(folder, "snrf", "domains", "select", "colors.safetensors", "masks", *CHOICE)
    words = ("snrf", "domains", "ablate", HERE / "target", "colors.safetensors", *CHOICE, "--eval", evaluation)
    run(folder, *words, "--draws", str(draws), "--json", "domains.json", "--figures", ".", "--quiet")
    return json.loads((folder / "domains.json").read_text())


@click.command()
@click.option("-n", "items", default=200, show_default=True, help="Held-out problems of each color.")
@click.option("--draws", default=10, show_default=True, help="Sets of random neurons.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/colors"), show_default=True)
def main(items: int, draws: int, out: Path) -> None:
    """Count, choose and deactivate the neurons of the colors."""
    from story import run

    result = measured(run, out.resolve(), items, draws)
    click.echo("\n".join(result["verdict"]))


if __name__ == "__main__":
    main()
