"""The colors of the board as domains: which neurons are specific to one, and what the target loses without them.

    python examples/board/domains.py

writes 64 pictures of each color with the question for it, and runs what a user types, in out/colors:

    snrf-profile colors.yml colors.safetensors
    snrf domains show colors.safetensors --top 0.1 --tokens prompt --figures .
    snrf domains select colors.safetensors masks --top 0.1 --tokens prompt
    snrf domains ablate target colors.safetensors --top 0.1 --tokens prompt --eval "domains.py:colors?n=100" --draws 3

and prints a section for the page of the example, which story.py writes. What is in the folder is not made again.
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
from story_page import table

from mergekit_snrf.evidence.items import Items

HERE = Path(__file__).resolve().parent
PROBES, ITEMS, DRAWS = 64, 100, 3
CHOICE = ("--top", "0.1", "--tokens", "prompt")


def problems_of(color: str, n: int, seed: int, split: str) -> list[Problem]:
    """Return ``n`` problems that ask for the color of boards of one color."""
    rng = np.random.default_rng([seed, list(COLORS).index(color)])
    drawn = distinct_problems(rng, "color", split, 8 * n)
    return [problem for problem in drawn if problem.board.color == color][:n]


def colors(model: PreTrainedModel, processor: Any, *, n: int = 100, seed: int = 0) -> dict[str, Items]:
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


def measured(folder: Path, run: Callable[..., None]) -> dict[str, Any]:
    """Run all commands in a folder with ``run(folder, *words)``; return the result of the ablation."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "domains.json").exists():
        write_probes(folder)
        run(folder, "snrf-profile", "colors.yml", "colors.safetensors", "--quiet")
        run(folder, "snrf", "domains", "show", "colors.safetensors", *CHOICE, "--figures", ".")
        run(folder, "snrf", "domains", "select", "colors.safetensors", "masks", *CHOICE)
        evaluation = ("--eval", f"{HERE / 'domains.py'}:colors?n={ITEMS}", "--draws", str(DRAWS))
        words = ("snrf", "domains", "ablate", HERE / "target", "colors.safetensors", *CHOICE, *evaluation)
        run(folder, *words, "--json", "domains.json", "--figures", ".", "--quiet")
    return json.loads((folder / "domains.json").read_text())


def section(folder: Path, run: Callable[..., None]) -> list[str]:
    """Return the lines of the example's page: every number is from the result of the commands."""
    result = measured(folder, run)
    rows, shown, open_ = [], [], []
    for one in result["studies"]:
        _, claim, random = one["study"]["conditions"]
        name = f"{one['domain']}, {one['module']}"
        worst = max(abs(100 * random["metrics"][color]["change"]["estimate"]) for color in COLORS)
        cells = [spoken(claim["metrics"][color]["change"]) for color in COLORS]
        rows.append([name, str(claim["neurons"]), *cells, f"{worst:.1f}"])
        own = next(each["difference"] for each in one["study"]["contrasts"] if each["metric"] == one["domain"])
        (shown if own["high"] < 0 else open_).append(name)
    header = ["without the neurons of", "neurons", *COLORS, "random neurons, at most"]
    return [
        "### Do some neurons see one color only?",
        "",
        f"[Domain-specific neurons](../../docs/domains.md) of the target, with colors as domains ({PROBES} pictures a "
        f"color, prompt tokens, top 10 %), deactivated. Changes of the accuracy on {ITEMS} held-out boards of each "
        f"color; beside them the largest mean change after deactivating as many random neurons ({DRAWS} draws).",
        "",
        *table(header, rows),
        "",
        f"- Lower on the color itself than with random neurons off, zero excluded: {'; '.join(shown) or 'none'}.",
        f"- Not shown: {'; '.join(open_) or 'none'}.",
        "- The numbers of neurons differ, sets overlap, and the neurons of one color can carry another.",
    ]


def spoken(interval: dict[str, float]) -> str:
    """Return an interval in percentage points."""
    estimate, low, high = (f"{round(100 * interval[key], 1) + 0.0:+.1f}" for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/colors"), show_default=True)
def main(out: Path) -> None:
    """Count, choose and deactivate the neurons of the colors, and print the section of the page."""
    from story import run

    click.echo("\n".join(section(out.resolve(), run)))


if __name__ == "__main__":
    main()
