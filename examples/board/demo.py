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


def recipe_with(mask: Path) -> Path:
    """Write the pair's recipe with another mask, and paths from the project's folder, beside that mask."""
    text = (ROOT / BOARD / "snrf.yml").read_text()
    for before, after in (
        ("base_model: target", f"base_model: {BOARD / 'target'}"),
        ("model: source", f"model: {BOARD / 'source'}"),
        ("../../neuron_masks/board.safetensors", str(mask)),
    ):
        if before not in text:
            raise click.ClickException(f"{BOARD / 'snrf.yml'} no longer says {before!r}")
        text = text.replace(before, after)
    recipe = mask.with_suffix(".yml")
    (ROOT / recipe).write_text(text)
    return recipe


@click.command()
@click.option("-n", "items", default=200, show_default=True, help="Held-out items a task in the evaluation.")
def main(items: int) -> None:
    """Find the shared neurons of the board pair, merge, and compare with the target and with random neurons."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir(parents=True)
    shared, random = OUT / "shared.safetensors", OUT / "random.safetensors"
    run("snrf-profile", BOARD / "profile.yml", shared, "--quiet")
    run("snrf", "mask", "random", shared, random, "--seed", "0")
    run("snrf", "plan", recipe_with(shared))
    run("mergekit-yaml", recipe_with(shared), OUT / "merged", "--quiet")
    run("mergekit-yaml", recipe_with(random), OUT / "merged-random", "--quiet")
    models = (BOARD / "target", OUT / "merged", OUT / "merged-random")
    run("python", BOARD / "evaluate.py", *models, "-n", str(items), "--json", OUT / "scores.json")
    click.echo(f"\nThe merged model is in {ROOT / OUT / 'merged'}, its control on random neurons beside it.")


if __name__ == "__main__":
    main()
