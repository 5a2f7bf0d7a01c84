from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mergekit_snrf.cli.common import command_options, load_recipe, share, size, table
from mergekit_snrf.errors import SnrfError

RECIPE = """
merge_method: snrf
base_model: owner/target
models:
  - model: owner/source
    parameters: {beta: [0.1, 0.5], rank: 4}
parameters: {masks: mask.safetensors}
dtype: bfloat16
"""

PARAMETER = "': must be a value, a list of values, or a mapping with value and filter"


@click.command()
@click.option("--fail", default="")
@command_options
def command(fail: str) -> None:
    if fail == "bug":
        raise KeyError(fail)
    if fail:
        raise SnrfError(fail)
    click.echo("done")


def test_commands_end_with_one_line_and_exit_code_1() -> None:
    result = CliRunner().invoke(command, ["--fail", "a.safetensors: is damaged; get it again"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: a.safetensors: is damaged; get it again\n"
    assert CliRunner().invoke(command, ["--fail", "x", "-v", "--quiet"]).stderr == "Error: x\n"
    assert CliRunner().invoke(command).stdout == "done\n"


def test_vv_shows_where_an_error_comes_from() -> None:
    result = CliRunner().invoke(command, ["--fail", "x", "-vv"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SnrfError)


def test_bugs_are_not_hidden() -> None:
    assert isinstance(CliRunner().invoke(command, ["--fail", "bug"]).exception, KeyError)


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ([], logging.WARNING),
        (["-v"], logging.INFO),
        (["-vv"], logging.DEBUG),
        (["-v", "-v", "-v"], logging.DEBUG),
        (["--quiet"], logging.ERROR),
        (["--quiet", "-v"], logging.ERROR),
    ],
)
def test_verbosity(monkeypatch: pytest.MonkeyPatch, options: list[str], level: int) -> None:
    given: list[Any] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: given.append(settings["level"]))
    assert CliRunner().invoke(command, options).exit_code == 0
    assert given == [level]


def test_help_names_the_options() -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert "-v" in result.stdout
    assert "--quiet" in result.stdout
    assert command.name == "command"


def test_table() -> None:
    assert table(("name", "n"), [("a", 1000), ("longer", 2), ("", "")]) == "\n".join(
        ["name       n", "a       1000", "longer     2", ""]
    )
    assert table(("name", "n"), []) == "name  n"


def test_share_and_size() -> None:
    assert [share(*parts) for parts in ((1, 3), (0, 5), (5, 5), (0, 0))] == ["33.33 %", "0.00 %", "100.00 %", "-"]
    assert [size(n) for n in (0, 999, 1000, 1_500_000, 2_000_000_000, 16_381_470_720, 10**15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 MB",
        "2 GB",
        "16.4 GB",
        "1e+03 TB",
    ]


def recipe(folder: Path, content: str | bytes) -> str:
    path = folder / "snrf.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_recipes_are_read_as_mergekit_reads_them(tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration

    config = load_recipe(recipe(tmp_path, RECIPE))
    assert isinstance(config, MergeConfiguration)
    assert config.merge_method == "snrf"
    assert str(config.base_model) == "owner/target"
    assert config.models[0].parameters == {"beta": [0.1, 0.5], "rank": 4}
    assert config.parameters == {"masks": "mask.safetensors"}


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = RECIPE.replace("{beta: [0.1, 0.5], rank: 4}", "&common {beta: 0.25}").replace(
        "parameters: {masks: mask.safetensors}", "parameters: {<<: *common, masks: m}"
    )
    assert load_recipe(recipe(tmp_path, text)).parameters == {"beta": 0.25, "masks": "m"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no recipe; a recipe begins with merge_method: snrf"),
        ("[]", "is no recipe; a recipe begins with merge_method: snrf"),
        ("models: []", "key 'merge_method' is missing; add it"),
        ("merge_method: snrf", "Exactly one of 'models', 'slices', or 'modules' must be present"),
        ("merge_method: snrf\nmodels: 3", "key 'models': must be a list, got 3"),
        ("merge_method: snrf\nmodels: [{model: a+b+c}]", "Can't parse a+b+c"),
        ("merge_method: snrf\ndtype: [1]\nmodels: [{model: a}]", "key 'dtype': must be text, got a list"),
        (
            "merge_method: snrf\nmodels: [a]",
            "key 'models.0': must be a mapping that begins with 'model: NAME', got 'a'",
        ),
        (
            "merge_method: snrf\nbase_model: 3\nmodels: [{model: a}]",
            "key 'base_model': must be the name of a model, a ",
        ),
        *(
            (
                f"merge_method: snrf\nmodels: [{{model: a}}]\nparameters: {{{written}}}",
                f"key 'parameters.{key}{PARAMETER}, got {given}",
            )
            for written, key, given in (
                ("rank: ", "rank", "nothing; write a value or remove the key"),
                ("strength: ", "strength", "nothing; write a value or remove the key"),
                ("beta: [1, null]", "beta.1", "nothing; write a value or remove the key"),
                ("beta: [{value: }]", "beta.0.value", "nothing; write a value or remove the key"),
            )
        ),
        (
            "merge_method: snrf\nmodels: [{model: a}]\nparameters: {rank: {x: 1}}",
            "key 'parameters.rank.value' is missing",
        ),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    path = recipe(tmp_path, content)
    with pytest.raises(SnrfError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "a: [1",
        "a: b: c",
        "\t- a",
        "--- a\n--- b",
        "%YAML 9.9\n---\na",
        "a: *missing",
        "? {a: b}\n: c",
        "a: 2020-13-45",
        "a: " + "9" * 5000,
        "a: !!int x",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!python/object/apply:os.system [ls]",
        "\0",
        b"\xff\xfe\x00\xd8",
        b"a: \xc3\x28",
    ],
    ids=lambda content: repr(content)[:30],
)
def test_what_is_no_yaml(tmp_path: Path, content: str | bytes) -> None:
    path = recipe(tmp_path, content)
    with pytest.raises(SnrfError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML (")
    assert str(caught.value).endswith("); correct the recipe")
    assert "\n" not in str(caught.value)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    "content",
    [BOMB, "&a [*a]", "&a {b: [*a]}", "&a {<<: *a}", "[" * 900_000, "{a: " * 200_000, "- " * 400_000, "[1," * 300_000],
    ids=lambda content: content[:12],
)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, content: str) -> None:
    path = recipe(tmp_path, content)
    with pytest.raises(SnrfError, match=r"snrf\.yml: is nested deeper than 100 levels, or has more than 100000 values"):
        load_recipe(path)


def test_a_checkpoint_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match=r"snrf\.yml: 1000001 bytes are too many for a recipe"):
        load_recipe(recipe(tmp_path, b"#" * 1_000_001))


@pytest.mark.parametrize("name", ["missing.yml", "", "x" * 300, "a\0b"])
def test_recipes_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(SnrfError, match=r"cannot be read \(.+\); correct the path"):
        load_recipe(f"{tmp_path}/{name}")
