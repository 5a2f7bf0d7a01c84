"""The first page of the documentation, command by command, on tiny stand-ins of Qwen2.5-VL and Qwen2.

`python tests/test_start.py` writes the outputs into the page again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import make_source, make_target, read
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_snrf.cli.profile import main as snrf_profile
from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.merge import install

PAGE = Path(__file__).parent.parent / "docs" / "start.md"
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
COMMANDS = {"snrf": snrf, "snrf-profile": snrf_profile, "mergekit-yaml": mergekit_yaml}


def make_world(folder: Path) -> None:
    """Two models with random weights, problems to profile and others to evaluate, and the page's evaluation."""
    make_target(folder / "vlm", "qwen2_5_vl", "nested")
    make_source(folder / "llm", "qwen2")
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        # Without torchvision the processor does not load; the problems are text.
        (folder / "vlm" / name).unlink(missing_ok=True)
    for name in ("vlm", "llm"):
        (folder / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    numbers = random.Random(0)
    for name, count in (("problems", 16), ("held-out", 40)):
        pairs = [(numbers.randrange(10, 50), numbers.randrange(2, 10)) for _ in range(count)]
        rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "evaluation.py").write_text(code)


def run(line: str) -> str:
    """Run a line of the page in the working folder, and return what it prints."""
    name, *words = shlex.split(line)
    if name == "cd":
        os.chdir(words[0])
        return ""
    if name not in COMMANDS:
        return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout
    result = CliRunner().invoke(COMMANDS[name], words, prog_name=name)
    assert result.exit_code in (0, 1), result.output
    assert result.exit_code == 0 or line == "snrf card merged/", (line, result.output)
    # A merge says where it is beside mergekit's progress bars.
    said = [one for one in result.stderr.splitlines() if one.startswith("Merged into")]
    return "".join(f"{one}\n" for one in [*result.stdout.splitlines(), *said]).rstrip("\n") + "\n"


def rendered(folder: Path, page: str) -> str:
    """Return the page with the outputs that its commands have in a folder."""

    def block(match: re.Match[str]) -> str:
        lines = [line for line in match[0].splitlines() if line.startswith("$ ")]
        outputs = {line: run(line[2:]).replace(f"{os.path.realpath(folder)}/", "") for line in lines}
        return "\n".join(f"{line}\n{output}" for line, output in outputs.items())

    os.environ["COLUMNS"] = "100"
    install()
    with contextlib.chdir(folder):
        return BLOCK.sub(block, page)


def words(page: str) -> str:
    """The page without figures and verdicts, since other machines may round otherwise."""
    page = re.sub(r"(?<=seed 0\.\n).*?(?=\nsnrf.best.yml|\n\n\$)", "", page, flags=re.DOTALL)
    return re.sub(r"[ -]+", " ", re.sub(r"[-+]?\d[\d.,]*(e-\d+)?", "N", page))


def test_first_page_is_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    make_world(tmp_path)
    page = PAGE.read_text()
    assert words(rendered(tmp_path, page)) == words(page), "run python tests/test_start.py"
    before, after = read(tmp_path / "vlm"), read(tmp_path / "merge/merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers." in name and "visual" not in name for name in changed)


def test_getting_started_names_the_files_that_init_writes() -> None:
    index = (PAGE.parent / "index.md").read_text()
    (target, source) = re.findall(r"^    snrf init \w+/(\S+) \w+/(\S+) merge/$", index, re.MULTILINE)[0]
    assert f"    snrf-profile profile.yml {target.lower()}--{source.lower()}.safetensors\n" in index


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make_world(Path(scratch))
        PAGE.write_text(rendered(Path(scratch), PAGE.read_text()))
    sys.exit()
