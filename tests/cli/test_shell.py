"""What all commands share: help that teaches, examples that work, JSON, standard input, Ctrl-C, misspelled names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_snrf.cli import plan as planning
from mergekit_snrf.cli.profile import main as snrf_profile
from mergekit_snrf.cli.snrf import main as snrf

BOARD = Path(__file__).parents[2] / "examples" / "board"


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def test_every_command_ends_with_two_examples_that_parse() -> None:
    for name, command in commands(snrf):
        examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  snrf ")]
        assert len(examples) == 2, name
        for line in examples:
            words = shlex.split(line)
            assert words[: 1 + len(name.split())] == ["snrf", *name.split()], line
            arguments = words[1 + len(name.split()) :]
            if name != "merge" and ">" not in arguments:
                command.make_context(name, arguments, resilient_parsing=False)


def test_root_help_has_every_command_in_the_order_of_work() -> None:
    text = CliRunner().invoke(snrf, ["--help"]).output
    places = [text.index(f"\n  {name} ") for name in ("init", "profile", "moments", "plan", "merge")]
    assert places == sorted(places)
    assert all(f"\n  {name} " in text for name in snrf.commands)
    assert "mergekit-yaml" in text
    assert "snrf-profile" in text
    assert "did you mean 'plan'?" in CliRunner().invoke(snrf, ["pln"]).output


def test_json_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BOARD)
    text = Path("snrf.yml").read_text()
    printed = CliRunner().invoke(snrf, ["plan", "-", "--json"], input=text)
    assert printed.exit_code == 0, printed.output
    written = CliRunner().invoke(snrf, ["plan", "snrf.yml", "--json", str(tmp_path / "plan.json")])
    assert "20 edited, 60 copied" in written.output
    assert json.loads(printed.stdout) == json.loads((tmp_path / "plan.json").read_text())
    refused = CliRunner().invoke(snrf, ["plan", "-"], input="merge_method: [")
    assert refused.exit_code == 1
    assert "not valid YAML" in refused.output
    tuned = CliRunner().invoke(snrf, ["moments", "tune", "-"], input=text)
    assert "standard input, where no number can be written" in tuned.output


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "check_outputs", interrupted)
    result = CliRunner().invoke(snrf, ["plan", str(BOARD / "snrf.yml")])
    assert (result.exit_code, result.stderr) == (130, "\nInterrupted.\n")
    monkeypatch.setattr("mergekit_snrf.profiling.domains.load_config", interrupted)
    result = CliRunner().invoke(snrf, ["profile", str(BOARD / "profile.yml"), str(tmp_path / "mask.safetensors")])
    assert (result.exit_code, result.stderr) == (130, "\nInterrupted; continue with --resume.\n")


def test_finished_mask_is_not_replaced(tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    mask.write_bytes(b"finished")
    result = CliRunner().invoke(snrf_profile, [str(BOARD / "profile.yml"), str(mask)])
    assert result.exit_code == 1
    assert f"{mask}: is finished; give --overwrite" in result.output
    assert mask.read_bytes() == b"finished"


def test_misspelled_method(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    for method, said in (("snfr", "did you mean 'snrf'?"), ("linear", None)):
        recipe.write_text(f"merge_method: {method}\nmodels: []\n")
        result = CliRunner().invoke(mergekit_yaml, [str(recipe), str(tmp_path / "out")])
        assert ("did you mean" in result.output) == (said is not None)


def test_merge_is_mergekits_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(BOARD)
    out = tmp_path / "my out"
    result = CliRunner().invoke(snrf, ["merge", "snrf.yml", str(out), "--no-write-model-card"])
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith(f"Merged into '{out}'. Before you share it: snrf card '{out}'\n")
    assert (out / "model.safetensors").exists()
    piped = CliRunner().invoke(
        snrf, ["merge", "-", str(tmp_path / "piped"), "--quiet"], input=Path("snrf.yml").read_text()
    )
    assert piped.exit_code == 0, piped.output
    assert "Merged into" not in piped.output
    assert (tmp_path / "piped/README.md").exists()
    assert not (out / "README.md").exists()
