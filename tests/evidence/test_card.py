"""``snrf card``: the numbers of a comparison in the card of the merge that it measured, and in no other file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.evidence.results import Study, read_result, write_result

BOARD = Path(__file__).resolve().parents[2] / "examples" / "board"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The board's pair merged with RegMean and, as an adapter, with SNRF, and a comparison of each on few problems."""
    folder = tmp_path_factory.mktemp("card")
    evaluation = f"{BOARD / 'evaluation.py'}:board?n=2"
    rows = ["--rows", "linear", "--linear-betas", "0.5", "--quiet"]
    for command, name in (("patch", "regmean"), ("lora", "snrf")):
        recipe = BOARD / f"{name}.yml"
        for words in (
            (command, recipe, folder / name, "--quiet"),
            ("compare", recipe, "--eval", evaluation, *rows, "--json", folder / f"{name}.json"),
        ):
            result = run(*words)
            assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", ["regmean", "snrf"])
def test_card_shows_the_comparison(name: str, made: Path) -> None:
    card, result = made / name / "README.md", made / f"{name}.json"
    before = card.read_text()
    done = run("card", card.parent, "--result", result)
    assert done.exit_code == 0, done.output
    filled = card.read_text()
    assert str(BOARD.parent) not in filled
    start, end = filled.index("## Evaluation\n"), filled.index("## To make it again\n")
    section = filled[start:end]
    assert filled[:start] + filled[end:] == before
    study = json.loads(result.read_text())
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if line.startswith("| ")}
    swept = [one["name"] for one in study["conditions"] if one["role"] == "control" and one["curve"]]
    assert swept == ["linear, beta 0.5"]
    for one in study["conditions"]:
        if one["name"] in swept:
            continue
        row = rows[one["name"] + " (this model)" * (one["role"] == "claim")]
        for value in one["metrics"].values():
            for interval, sign in ((value["mean"], ""), (value["change"], "+")):
                if interval is not None:
                    assert format(100 * interval["estimate"], f"{sign}.1f") in row
    assert len(rows) == 2 + len(study["conditions"]) - len(swept)
    assert section.count("\n- ") == len(study["verdict"])
    # Filled again, it stays; with two results it has both.
    assert run("card", card.parent, "--result", result).exit_code == 0
    assert card.read_text() == filled
    assert run("card", card.parent, "--result", result, "--result", result).exit_code == 0
    assert card.read_text().count("(this model)") == 2


def test_other_folders_and_results_are_refused(made: Path, tmp_path: Path) -> None:
    card = made / "regmean" / "README.md"
    before = card.read_text()
    study = read_result(made / "regmean.json")
    assert isinstance(study, Study)
    for field, value, message in (
        ("update", "beta 1, regmean: keep 9, rank 0 (0: full rank)", "the update is not that of the comparison"),
        ("config_sha256", "ab" * 32, "the target's config.json is not that of"),
        ("moments_sha256", "ab" * 32, "the moments is not that of"),
    ):
        other = study.model_copy(update={"settings": {**study.settings, field: value}})
        write_result(tmp_path / "other.json", other)
        done = run("card", card.parent, "--result", tmp_path / "other.json")
        assert done.exit_code == 1
        assert message in done.output
    write_result(tmp_path / "ablation.json", study.model_copy(update={"kind": "ablation"}))
    assert "not a comparison" in run("card", card.parent, "--result", tmp_path / "ablation.json").output
    assert "is not that of" in run("card", card.parent, "--result", made / "snrf.json").output
    assert card.read_text() == before
    (tmp_path / "README.md").write_text("# Mine\n")
    done = run("card", tmp_path, "--result", made / "regmean.json")
    assert "is not a model card of mergekit-snrf" in done.output
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert "cannot be read" in run("card", made, "--result", made / "regmean.json").output
