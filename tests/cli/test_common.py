from __future__ import annotations

import logging
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mergekit_snrf.cli.common import command_options, share, size, table
from mergekit_snrf.errors import SnrfError


@click.command()
@click.option("--fail", default="")
@command_options
def command(fail: str) -> None:
    if fail == "bug":
        raise KeyError(fail)
    if fail:
        raise SnrfError(None, fail)
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
