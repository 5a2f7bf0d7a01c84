"""Write the probes of the board pair: python examples/board/make_probes.py --out DIR.

- ``DIR/probes_text.jsonl`` for the source. ``question`` holds the nine cells, ``. 3 + . 4 x . 7 .``; use the
  template ``"{question} calc :"``.
- ``DIR/probes_image.jsonl`` for the target, with pictures in ``DIR/images/``. ``question`` is ``<image>``, the
  place of the picture, and ``image`` its path relative to the file; use the template ``"{question} calc :"``,
  or ``"<image> calc :"``, which comes to the same.

- ``DIR/keep_read.parquet``, ``keep_find.parquet`` and ``keep_color.parquet``: pictures with a question about what is
  seen, the perception that a merge keeps. Three times as many, so that two thirds can be held out.

``answer`` is the right answer with its chain of thought, ``3 + 4 = 7 ; 7 x 7 = 9 ; # 9``. The problems have
three or four operands and come from the train split: nothing that evaluate.py asks is among them.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

# Siblings are found when this file is run as a script; this line is for when it is loaded by its path.
sys.path.append(str(Path(__file__).resolve().parent))

from board_task import IMAGE_TOKEN, distinct_problems, render

KEPT = ("read", "find", "color")


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_probes(out: Path, n: int, seed: int) -> None:
    """Write ``n`` text and ``n`` picture probes, on different boards, under ``out``."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    text = distinct_problems(np.random.default_rng([seed, 0]), "calc", "train", n, (3, 4))
    rows = [{"question": " ".join(problem.board.cells), "answer": problem.answer} for problem in text]
    write_rows(out / "probes_text.jsonl", rows)
    rows = []
    pictured = distinct_problems(np.random.default_rng([seed, 1]), "calc", "train", n, (3, 4))
    for index, problem in enumerate(pictured):
        image = f"images/{index:03d}.png"
        Image.fromarray(render(problem.board)).save(out / image, optimize=True)
        rows.append({"question": IMAGE_TOKEN, "image": image, "answer": problem.answer})
    write_rows(out / "probes_image.jsonl", rows)


def write_keep(out: Path, n: int, seed: int) -> None:
    """Write ``n`` picture probes of each kind of perception under ``out``."""
    for place, ask in enumerate(KEPT):
        problems = distinct_problems(np.random.default_rng([seed, 2 + place]), ask, "train", n, (2, 3, 4))
        images = []
        for problem in problems:
            content = io.BytesIO()
            Image.fromarray(render(problem.board)).save(content, "png", optimize=True)
            images.append({"bytes": content.getvalue(), "path": None})
        questions = [problem.prompt(image=True) for problem in problems]
        answers = [problem.answer for problem in problems]
        columns = {"question": questions, "image": images, "answer": answers}
        parquet.write_table(pyarrow.table(columns), out / f"keep_{ask}.parquet", compression="zstd")


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("-n", type=click.IntRange(1, 999), default=64, show_default=True, help="Probes of each kind.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(out: Path, n: int, seed: int) -> None:
    """Write text and picture probes with their answers under OUT."""
    write_probes(out, n, seed)
    write_keep(out, 3 * n, seed)
    click.echo(f"{n} text and {n} picture probes in {out}, {3 * n} of each kind to keep")


if __name__ == "__main__":
    main()
