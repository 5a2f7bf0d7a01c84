"""``snrf patch`` and ``snrf lora`` run in this process, and what lies in their output folders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result
from pair import write_recipe

from mergekit_snrf.cli.snrf import main as snrf


def run(command: str, recipe: dict[str, Any] | Path, out: Path | str, *flags: str) -> Result:
    """Run `snrf COMMAND RECIPE OUT FLAGS`; a recipe that is no file yet lies in a folder of its own."""
    if isinstance(recipe, dict):
        recipe = write_recipe(Path(out).parent / "recipes" / f"{Path(out).name}.yml", recipe)
    return CliRunner().invoke(snrf, [command, str(recipe), str(out), "--quiet", *flags])


def done(command: str, recipe: dict[str, Any] | Path, out: Path, *flags: str) -> Path:
    """Run a command that succeeds and leaves nothing temporary."""
    result = run(command, recipe, out, *flags)
    assert result.exit_code == 0, result.output
    assert not list(out.parent.glob(".*"))
    return out


def assert_refused(result: Result, *texts: str) -> None:
    """Exit code 1 and one sentence that holds the texts, no traceback."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.output.strip().splitlines()
    assert line.startswith("Error: ")
    for text in texts:
        assert text in line, line


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tree(folder: Path) -> list[str]:
    """Everything below a folder but the recipes."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if "recipes" not in path.relative_to(folder).parts
    )


def front_of(card: str) -> dict[str, Any]:
    """The front matter of a model card."""
    return dict(yaml.safe_load(card.split("---\n", 2)[1]))


def rows_of(card: str) -> list[list[str]]:
    """The cells of all tables of a model card."""
    return [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
