"""What lmms-eval and lm-evaluation-harness really wrote, and tables as VLMEvalKit writes them, against their sums."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.compare_samples import compare_runs
from mergekit_snrf.evidence.readers import sheets
from mergekit_snrf.evidence.results import Study

FIXTURES = Path(__file__).parent / "fixtures"
LMMS = [FIXTURES / "lmms_eval" / name for name in ("target", "merged", "tiny")]
LM = [FIXTURES / "lm_eval" / name for name in ("target", "merged")]
VLM = [FIXTURES / "vlmevalkit" / name for name in ("base-vl", "merged-vl")]


def means(study: Study, metric: str) -> list[float]:
    return [condition.metrics[metric].mean.estimate for condition in study.conditions]


def sums(folder: Path) -> dict[str, float]:
    """What a tool itself summed up: by task, metric and filter."""
    (path,) = folder.rglob("*results*.json")
    results = json.loads(path.read_text())["results"]
    return {f"{task}/{name}": value for task, values in results.items() for name, value in values.items()}


def own_name(metric: str) -> str:
    return metric if "," in metric else f"{metric},none"


@pytest.mark.parametrize(
    ("folders", "tool", "metrics", "left_out"),
    [
        (
            LMMS,
            "lmms-eval: colors, local_mme, local_pope",
            {
                "colors/exact_match,strict-match",
                "colors/exact_match,flexible-extract",
                "local_mme/mme_perception_score",
                "local_mme/mme_cognition_score",
                "local_pope/pope_accuracy",
            },
            {
                f"local_pope/pope_{name}, which is not a mean"
                for name in ("f1_score", "precision", "recall", "yes_ratio")
            },
        ),
        (
            LM,
            "lm-evaluation-harness: choices, colors",
            {
                "colors/exact_match,strict-match",
                "colors/exact_match,flexible-extract",
                "choices/acc",
                "choices/acc_norm",
            },
            {"choices/brier_score, of which less is better"},
        ),
    ],
)
def test_means_are_the_tools_own(folders: list[Path], tool: str, metrics: set[str], left_out: set[str]) -> None:
    """Several filters, several metrics, objects, pictures: the mean of every metric is what the tool wrote of it."""
    study, notes = compare_runs(folders)
    assert study.evaluation == tool
    assert set(study.items) == metrics
    assert [condition.name for condition in study.conditions] == [folder.name for folder in folders]
    for metric in metrics:
        assert means(study, metric) == pytest.approx([sums(folder)[own_name(metric)] for folder in folders]), metric
    assert len(notes) == len(left_out)
    assert all(any(note.startswith(f"Left out: {reason}") for note in notes) for reason in left_out)
    assert len({tuple(means(study, metric)) for metric in metrics}) > 2


def test_a_filter_is_part_of_the_name_and_may_be_left_away() -> None:
    both = ["colors/exact_match,flexible-extract", "colors/exact_match,strict-match"]
    assert sorted(compare_runs(LM, metrics=["exact_match"])[0].items) == both
    assert list(compare_runs(LM, metrics=["exact_match,strict-match"])[0].items) == both[1:]
    roles = compare_runs(LM, keep=[both[0]])[0].roles
    assert {name for name, role in roles.items() if role == "keep"} == {both[0]}


def copies(folders: list[Path], place: Path) -> list[Path]:
    return [shutil.copytree(folder, place / folder.name) for folder in folders]


@pytest.mark.parametrize("folders", [LMMS[:2], LM])
def test_one_bad_task_is_a_note(folders: list[Path], tmp_path: Path) -> None:
    folders = copies(folders, tmp_path)
    (path,) = folders[1].rglob("*samples_colors*")
    path.write_bytes(path.read_bytes()[:-20])
    study, notes = compare_runs(folders)
    assert not any(metric.startswith("colors/") for metric in study.items)
    (note,) = [note for note in notes if "colors" in note]
    assert note.startswith(f"Left out: colors; {path}, line 12: not JSON")
    with pytest.raises(SnrfError, match="line 12: not JSON"):
        compare_runs(folders, tasks=["colors"])
    # A run that was cut short between two samples.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SnrfError, match="doc_id 5 occurs 1 times and doc_id 0 2 times; give a file of one run that"):
        compare_runs(folders, tasks=["colors"])


def test_without_its_results_file_a_run_of_lmms_eval_has_one_filter(tmp_path: Path) -> None:
    folders = copies(LMMS[:2], tmp_path)
    for folder in folders:
        for path in folder.rglob("*results.json"):
            path.unlink()
    study, notes = compare_runs(folders)
    assert "local_pope/pope_accuracy" in study.items
    assert any("doc_id 0 is also that of line 1; give a file of one run, with its results file" in one for one in notes)


@pytest.mark.parametrize(
    ("folder", "pattern", "text"),
    [
        (LMMS[0], "*samples*", "has results of lmms-eval and no samples; run the evaluation again with --log_samples"),
        (
            LM[0],
            "samples*",
            "has results of lm-evaluation-harness and no samples; run the evaluation again with --log_samples",
        ),
        (VLM[0], "*_*", "has results of VLMEvalKit and no samples; run VLMEvalKit with --mode all"),
    ],
)
def test_a_run_without_samples_is_told_how_to_write_them(folder: Path, pattern: str, text: str, tmp_path: Path) -> None:
    if folder in VLM:
        pytest.importorskip("openpyxl")
    place = shutil.copytree(folder, tmp_path / folder.name)
    for path in place.rglob(pattern):
        if "samples" in path.name or path.stem.endswith(("_auxmatch", "_result", "_results", "mini")):
            path.unlink()
    shown = CliRunner().invoke(main, ["compare", "--from", str(place), str(folder)])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert f"{place}: {text}" in shown.stderr


def test_folders_of_two_tools_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match="were written by lmms-eval and lm-evaluation-harness; compare folders of one"):
        compare_runs([LMMS[0], LM[1]])
    for folder in (LMMS[0], LM[0]):
        shutil.copytree(folder, tmp_path / "both" / folder.parent.name)
    with pytest.raises(SnrfError, match="holds samples of lmms-eval and lm-evaluation-harness; give the folder of one"):
        compare_runs([tmp_path / "both", LM[1]])


def table(folder: Path, name: str) -> pd.DataFrame:
    (path,) = folder.rglob(f"*_{name}")
    if path.suffix == ".xlsx":
        pytest.importorskip("openpyxl")
        return pd.read_excel(path)
    return pd.read_csv(path, sep="\t") if path.suffix == ".tsv" else pd.read_json(path)


def mme(data: pd.DataFrame, categories: list[str]) -> float:
    """MME's sum over categories: accuracy over questions plus accuracy over pictures with both right, in per cent."""
    total = 0.0
    for category in categories:
        part = data[data["category"] == category]
        total += 100 * part["score"].mean() + 100 * part.groupby("image_path")["score"].all().mean()
    return total


def test_tables_of_vlmevalkit() -> None:
    pytest.importorskip("openpyxl")
    study, notes = compare_runs(VLM, keep=["MME"], metrics=["MME/perception"])
    assert study.roles == {"MME/perception": "keep"}
    study, notes = compare_runs(VLM)
    assert notes == []
    assert study.evaluation == "VLMEvalKit: ChartQA_TEST, MME, MMMU_DEV_VAL, MathVision, MathVista_MINI, POPE"
    assert [condition.name for condition in study.conditions] == ["base-vl", "merged-vl"]

    def of(name: str, column: str, split: str) -> list[float]:
        tables = [table(folder, name) for folder in VLM]
        return [one[one["split"] == split][column].mean() for one in tables]

    pictures = [table(folder, "MME_auxmatch.xlsx") for folder in VLM]
    exploded = [table(folder, "POPE_auxmatch.tsv") for folder in VLM]
    exploded = [one.assign(category=one["category"].str.split(",")).explode("category") for one in exploded]
    expected = {
        "MME/perception": [mme(one, ["color", "OCR"]) for one in pictures],
        "MME/reasoning": [mme(one, ["code_reasoning"]) for one in pictures],
        "POPE/accuracy": [one["score"].mean() for one in exploded],
        "MMMU_DEV_VAL/accuracy,dev": of("MMMU_DEV_VAL_exact_matching_result.xlsx", "hit", split="dev"),
        "MMMU_DEV_VAL/accuracy,validation": of("MMMU_DEV_VAL_exact_matching_result.xlsx", "hit", split="validation"),
        "ChartQA_TEST/eval_score,dev": of("ChartQA_TEST_results.json", "eval_score", split="dev"),
        "ChartQA_TEST/eval_score,validation": of("ChartQA_TEST_results.json", "eval_score", split="validation"),
        "MathVision/verifier_score,dev": of("MathVision_detailed_results.xlsx", "verifier_score", split="dev"),
        "MathVision/verifier_score,validation": of(
            "MathVision_detailed_results.xlsx", "verifier_score", split="validation"
        ),
        # Of five answers: a letter, a choice, an integer, a float and a list; then a letter with its choice, and none.
        "MathVista_MINI/accuracy": [1.0, 0.2],
    }
    assert {metric: pytest.approx(means(study, metric)) for metric in study.items} == expected
    assert study.items["MME/perception"] == 5
    assert study.items["POPE/accuracy"] == 8


def test_tables_of_text_need_no_openpyxl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    study, notes = compare_runs(VLM)
    assert {metric.partition("/")[0] for metric in study.items} == {"POPE", "ChartQA_TEST"}
    assert any(
        "reading .xlsx needs the package openpyxl; pip install 'mergekit-snrf[analysis]'" in one for one in notes
    )


def of_kit(place: Path, name: str = "vl", run: str = "T20260101-000000") -> Path:
    """A run of POPE in the folder of a model."""
    folder = place / name / run
    folder.mkdir(parents=True, exist_ok=True)
    for path in VLM[0].rglob("*POPE*"):
        shutil.copy(path, folder / path.name.replace("base-vl", name))
    return folder


def test_the_newest_run_of_vlmevalkit_counts(tmp_path: Path) -> None:
    older, newer = of_kit(tmp_path), of_kit(tmp_path, run="T20260303-000000")
    path = newer / "vl_POPE_auxmatch.tsv"
    path.write_text(path.read_text().replace('"False"', '"True"'))
    os.symlink(path, tmp_path / "vl" / path.name)
    (newer / "vl_POPE_tmp.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    study, notes = compare_runs([tmp_path / "vl", VLM[0]], metrics=["accuracy"])
    assert means(study, "POPE/accuracy")[0] == pytest.approx(1.0)
    assert "vl has 2 runs of POPE; the newest by its name counts, T20260303-000000." in notes
    study, _ = compare_runs([older, newer], metrics=["accuracy"])
    assert means(study, "POPE/accuracy")[0] < means(study, "POPE/accuracy")[1]
    # A folder may have another name where its status says the model's.
    renamed = older.rename(tmp_path / "copy")
    (renamed / "status.json").write_text(json.dumps({"model_name": "vl"}))
    assert compare_runs([renamed, newer])[0].items == {"POPE/accuracy": 8}
    (renamed / "status.json").write_text("[")
    with pytest.raises(SnrfError, match="has results of VLMEvalKit and no samples"):
        compare_runs([renamed, newer])
    # Before runs had folders, tables were in the model's.
    of_kit(tmp_path / "old", run=".")
    assert compare_runs([tmp_path / "old" / "vl", newer])[0].items == {"POPE/accuracy": 8}


def test_several_models_or_judges_of_vlmevalkit(tmp_path: Path) -> None:
    of_kit(tmp_path / "out", "one")
    of_kit(tmp_path / "out", "two")
    with pytest.raises(SnrfError, match="a folder holds results of one and two; give one's folder"):
        compare_runs([tmp_path / "out", VLM[0]])
    folders = [of_kit(tmp_path / "a"), of_kit(tmp_path / "b")]
    for folder in folders:
        shutil.copy(folder / "vl_POPE_auxmatch.tsv", folder / "vl_POPE_gpt_auxmatch.tsv")
    assert set(compare_runs(folders)[0].items) == {"POPE/accuracy,auxmatch", "POPE/accuracy,gpt_auxmatch"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda text: text.replace('"0"', '"1"', 1), "has an index twice"),
        (lambda text: text.replace('"0"', '""', 1), "row 1 has no index"),
        (lambda text: text.replace("Is there a 3?", "Is there another?"), "1 have the same id but another document"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "of the 8 samples of POPE, 1 are in one only"),
        (lambda text: text.replace('"True"', '""', 1), "POPE/accuracy, whose value in .*row 1 is str, not a number"),
        (lambda text: text + '"', "not a table of tabs"),
        (lambda text: text.splitlines()[0], "has results of VLMEvalKit and no samples"),
    ],
)
def test_damaged_tables_are_named(change: Any, text: str, tmp_path: Path) -> None:
    first, other = of_kit(tmp_path / "a"), of_kit(tmp_path / "b")
    path = other / "vl_POPE_auxmatch.tsv"
    path.write_text(change(path.read_text()))
    (other / "vl_POPE.tsv").unlink()
    with pytest.raises(SnrfError, match=text) as error:
        compare_runs([first, other])
    assert len(str(error.value).splitlines()) == 1


def test_sheets_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / "vl_X.xlsx"
    book = openpyxl.Workbook()
    for row in (["index", "hit"], *([n, 1] for n in range(4))):
        book.active.append(row)
    book.active.cell(row=1_000_000, column=1, value="far")
    book.save(path)
    assert sheets.read_rows(path) == [{"index": n, "hit": 1} for n in range(4)]
    for limit, value, text in (
        ("MAX_SAMPLES", 3, "more than 3 samples"),
        ("MAX_METRICS", 1, "has 2 columns, more than the limit of 1"),
        ("_UNPACKED_BYTES", 1000, "unpacks to .* bytes, more than the limit of 1000"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sheets, limit, value)
            with pytest.raises(SnrfError, match=text):
                sheets.read_rows(path)
    bomb = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("xl/workbook.xml", b"0" * (sheets._UNPACKED_BYTES // 50))
    assert bomb.stat().st_size < 100_000
    monkeypatch.setattr(sheets, "_UNPACKED_BYTES", sheets._UNPACKED_BYTES // 100)
    with pytest.raises(SnrfError, match="unpacks to"):
        sheets.read_rows(bomb)


@settings(max_examples=20)
@given(st.sampled_from(sheets.SUFFIXES), st.binary(max_size=60), st.integers(0, 4000))
def test_any_bytes_are_refused_in_one_sentence(suffix: str, noise: bytes, place: int) -> None:
    """Noise alone, or somewhere in a table."""
    name = {".xlsx": "MathVision_detailed_results", ".tsv": "POPE_auxmatch", ".json": "ChartQA_TEST_results"}[suffix]
    (path,) = VLM[0].rglob(f"*_{name}{suffix}")
    content = path.read_bytes()
    for damaged in (noise, content[:place] + noise + content[place + len(noise) :]):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"x{suffix}")
            file.write_bytes(damaged)
            sentence = ""
            try:
                rows = sheets.read_rows(file)
            except SnrfError as error:
                rows, sentence = [], str(error)
            assert all(isinstance(row, dict) for row in rows)
            assert bool(rows) != bool(sentence)
            assert len(sentence.splitlines()) <= 1
