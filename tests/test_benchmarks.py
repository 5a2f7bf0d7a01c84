"""The script that compares two files of a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPARE = Path(__file__).resolve().parents[1] / "benchmarks" / "compare.py"


def write(path: Path, figures: dict[str, list[float]], *, met: bool = True, **other: Any) -> Path:
    bars = [{"bar": "a / b <= 2", "value": 1.5 if met else 2.5, "met": met}]
    content = {"benchmark": "merge", "machine": {"cpu": "x"}, "figures": figures, "bars": bars, **other}
    path.write_text(json.dumps(content))
    return path


def compare(*arguments: str | Path) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, COMPARE, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout + result.stderr


def test_only_what_grew_by_more_than_noise_is_named(tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", {"quiet s": [1.0, 1.0, 1.01], "noisy s": [1.0, 1.0, 1.6], "gone s": [1.0]})
    after = write(tmp_path / "b.json", {"quiet s": [1.3, 1.3, 1.31], "noisy s": [1.3, 1.4, 1.5], "new s": [9.0]})
    code, output = compare(before, after)
    assert code == 1
    assert "SLOWER quiet s: 1 -> 1.3 (+30%, noise 10%)" in output
    assert "noisy" not in output
    assert "not measured any more: gone s" in output
    assert compare(before, after, "--tolerance", "0.5")[0] == 0
    code, output = compare(after, before)
    assert code == 0
    assert "faster quiet s: 1.3 -> 1 (-23%, noise 10%)" in output


def test_a_promise_that_is_broken_is_named(tmp_path: Path) -> None:
    kept, broken = write(tmp_path / "a.json", {"t": [1.0]}), write(tmp_path / "b.json", {"t": [1.0]}, met=False)
    code, output = compare(kept, broken)
    assert code == 1
    assert "BROKEN a / b <= 2: 1.5 -> 2.5" in output
    assert compare(broken, broken)[0] == 0


def test_other_machines_and_benchmarks_are_said(tmp_path: Path) -> None:
    mine = write(tmp_path / "a.json", {"t": [1.0]})
    assert "cpu differs, x and y" in compare(mine, write(tmp_path / "b.json", {"t": [1.0]}, machine={"cpu": "y"}))[1]
    code, output = compare(mine, write(tmp_path / "c.json", {"t": [1.0]}, benchmark="patch"))
    assert code == 1
    assert "is of the benchmark merge" in output


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"benchmark": 1, "machine": {}, "figures": {"t": []}}', '{"figures": 3}']
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    code, output = compare(tmp_path / "x.json", write(tmp_path / "a.json", {"t": [1.0]}))
    assert code == 1
    assert "not a file of a benchmark's --json" in output
    assert "Traceback" not in output


MEASURE = """
import json, os, sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seconds = float(Path(os.environ["PYTHONPATH"], "seconds").read_text())
log = Path(options["--work"], "log")
noise = log.stat().st_size % 3 / 100 if log.exists() else 0
with log.open("a") as file:
    file.write(".")
figures = {"same s": [1 + noise], "changed s": [seconds * (1 + noise)]}
Path(options["--json"]).write_text(json.dumps({"benchmark": "x", "machine": {}, "figures": figures}))
"""


def test_two_commits_are_measured_in_pairs(tmp_path: Path) -> None:
    script, repository = tmp_path / "measure.py", tmp_path / "repository"
    script.write_text(MEASURE)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    for seconds in ("2", "3"):
        (repository / "seconds").write_text(seconds)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", seconds], check=True)
    options = ["--benchmark", str(script), "--rounds", "3", "--repository", str(repository)]
    code, output = compare("HEAD~", "HEAD", *options)
    assert code == 1, output
    assert "SLOWER changed s: 2" in output
    assert "ratio 1.5" in output
    assert "same   same s: 1" in output
    code, output = compare("HEAD", "HEAD~", *options)
    assert (code, "faster changed s: 3" in output) == (0, True)
    code, output = compare("HEAD", "nowhere", *options)
    assert code == 1
    assert "nowhere failed" in output
