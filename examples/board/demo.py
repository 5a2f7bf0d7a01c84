"""Profile, merge and evaluate the board pair with the commands that a user types: python examples/board/demo.py."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
BOARD = Path("examples/board")
OUT = Path("out/board")


def run(*command: str | Path) -> None:
    """Show a command, and run it with the scripts of this Python's environment."""
    words = [str(word) for word in command]
    click.secho(f"\n$ {shlex.join(words)}", bold=True)
    program = sys.executable if words[0] == "python" else str(Path(sys.executable).parent / words[0])
    # One thread is faster for models this small, and the mask's last bits depend on the number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if subprocess.run([program, *words[1:]], cwd=ROOT, env=environment, check=False).returncode:
        raise click.ClickException(f"{words[0]} failed")


def recipe_with(name: str, file: Path) -> Path:
    """Write a recipe of the pair with another mask or moments file, and paths from the project's folder, beside it."""
    text = (ROOT / BOARD / f"{name}.yml").read_text()
    shipped = "board.moments.safetensors" if name == "regmean" else "board.safetensors"
    for before, after in (
        ("base_model: target", f"base_model: {BOARD / 'target'}"),
        ("model: source", f"model: {BOARD / 'source'}"),
        (f"../../neuron_masks/{shipped}", str(file)),
    ):
        if before not in text:
            raise click.ClickException(f"{BOARD / name}.yml does not contain {before!r}")
        text = text.replace(before, after)
    recipe = file.with_suffix(".yml")
    (ROOT / recipe).write_text(text)
    return recipe


@click.command()
@click.option("-n", "items", default=200, show_default=True, help="Held-out items a task in the evaluation.")
def main(items: int) -> None:
    """Profile the board pair, merge it with RegMean and with SNRF, and compare both with the target and controls."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir(parents=True)
    shared, random = OUT / "shared.safetensors", OUT / "random.safetensors"
    run("snrf-profile", BOARD / "profile.yml", shared, "--quiet")
    run("snrf", "mask", "random", shared, random, "--seed", "0")
    regmean = recipe_with("regmean", OUT / "shared.moments.safetensors")
    run("snrf", "plan", regmean)
    run("mergekit-yaml", regmean, OUT / "merged", "--quiet")
    run("mergekit-yaml", recipe_with("snrf", shared), OUT / "merged-snrf", "--quiet")
    run("mergekit-yaml", recipe_with("snrf", random), OUT / "merged-random", "--quiet")
    models = (BOARD / "target", *(OUT / name for name in ("merged", "merged-snrf", "merged-random")))
    run("python", BOARD / "evaluate.py", *models, "-n", str(items), "--json", OUT / "scores.json")
    evaluation = f"{BOARD / 'evaluation.py'}:board?n={items}"
    run("snrf", "compare", regmean, "--rows", "linear", "--eval", evaluation, "--json", OUT / "regmean.json", "--quiet")
    click.echo(f"\nThe model merged with RegMean is in {ROOT / OUT / 'merged'}, the others are beside it.")


if __name__ == "__main__":
    main()
