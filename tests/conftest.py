from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "plugin"))

from family_table import BEGIN, END, markdown, passed

# Nothing in the tests may reach a hub; a test that serves its own sets these for its subprocess.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-families", action="store_true", help="write the README's table of families")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[passed] = {}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    results = session.config.stash[passed]
    if not session.config.getoption("--update-families") or exitstatus or not results:
        return
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(f"{text[:start]}\n{markdown(results)}\n{text[end:]}")
