"""What README and documentation say, held against the code."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import click
import pytest
import yaml
from checkpoints import SOURCE_OF, TARGETS
from family_table import BEGIN, END
from mergekit.config import MergeConfiguration

from mergekit_snrf.cli.profile import main as snrf_profile
from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.merge.recipe import read_recipe
from mergekit_snrf.profiling.settings import ProfileConfig

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/**/README.md")),
]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("mergekit_snrf/**/*.py")}
# A command in a code span or an indented line, up to its comment.
COMMANDS = re.compile(r"(?:`|^    )(snrf(?:-profile)? [^`\n#]*)", re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, text in SOURCES.items() if ">>> " in text])
def test_examples_of_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name.removesuffix(".py").replace("/", ".")))
    assert (found.attempted > 0, found.failed) == (True, 0)


def test_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 110


def test_table_of_families_is_that_of_the_tests() -> None:
    page = TEXTS["docs/models.md"]
    rows = page[page.index(BEGIN) : page.index(END)].splitlines()
    found = [tuple(cell.strip() for cell in row.split("|")[1:4]) for row in rows if row.startswith("| ")][1:]
    expected = [(family, f"`{prefix}.N`", SOURCE_OF[family]) for (family, _), prefix in sorted(TARGETS.items())]
    assert found == expected, "run `make families`"


@pytest.mark.parametrize("name", ["README.md", "docs/recipe.md"])
def test_first_yaml_is_a_valid_recipe(name: str) -> None:
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXTS[name], re.DOTALL)[0])
    problems: list[str] = []
    assert read_recipe(MergeConfiguration.model_validate(recipe), problems)
    assert not problems


def test_profile_yml_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXTS["docs/profiling.md"], re.DOTALL)
    ProfileConfig.model_validate(yaml.safe_load(text))


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name: str) -> None:
    for line in COMMANDS.findall(TEXTS[name]):
        command: click.Command = snrf_profile if line.startswith("snrf-profile") else snrf
        for word in line.split()[1:]:
            if not isinstance(command, click.Group) or word.startswith("-"):
                break
            if command.name == "moments" and word not in command.commands:
                word = "take"  # snrf moments PROFILE.yml OUT is short for snrf moments take.
            assert word in command.commands, line
            command = command.commands[word]
        options = {name for parameter in command.params for name in parameter.opts} | {"--help", "--version"}
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", line)) <= options, line


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_linked_exist(name: str) -> None:
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        page = (folder / file if file else ROOT / name).resolve()
        assert page.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                link
            )
