"""What the README says, held against the code."""

from __future__ import annotations

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
from mergekit_snrf.merge.method import SPEC
from mergekit_snrf.merge.recipe import read_recipe
from mergekit_snrf.profiling.settings import ProfileConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_families_is_that_of_the_tests() -> None:
    rows = README[README.index(BEGIN) : README.index(END)].splitlines()
    found = [tuple(cell.strip() for cell in row.split("|")[1:4]) for row in rows if row.startswith("| ")][1:]
    expected = [(family, f"`{prefix}.N`", SOURCE_OF[family]) for (family, _), prefix in sorted(TARGETS.items())]
    assert found == expected, "run `make families`"


def test_table_of_parameters_is_complete() -> None:
    named = re.findall(r"^\| `(\w+)` \| (?:top level|source)", README, re.MULTILINE)
    assert sorted(named) == sorted(parameter.name for parameter in SPEC.parameters)


def test_examples_in_yaml_are_valid() -> None:
    recipe, profile = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
    problems: list[str] = []
    assert read_recipe(MergeConfiguration.model_validate(recipe), problems)
    assert not problems
    ProfileConfig.model_validate(profile)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"\bsnrf (?:mask )?[a-z]+\b[^`\n#]*", README))))
def test_commands_exist(line: str) -> None:
    command: click.Command = snrf
    for word in line.split()[1:]:
        if not isinstance(command, click.Group):
            break
        assert word in command.commands, line
        command = command.commands[word]
    options = {name for parameter in command.params for name in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", line)) <= options


def test_options_of_the_profiler_exist() -> None:
    options = {name for parameter in snrf_profile.params for name in parameter.opts}
    assert {"--dry-run", "--resume"} <= options


def test_files_that_are_linked_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
