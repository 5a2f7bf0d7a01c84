from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent / "merge"))

from family_table import BEGIN, END, markdown, passed

# Nothing in the tests may reach a hub; a test that serves its own sets these for its subprocess.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread makes results reproducible. torch and its libraries read this when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"
# Tiny checkpoints and data sets are made once for all tests; the workers of xdist inherit the folders.
if "SNRF_TEST_CHECKPOINTS" not in os.environ:
    _scratch = tempfile.mkdtemp(prefix="snrf-tests-")
    atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
    for _variable in ("SNRF_TEST_CHECKPOINTS", "HF_DATASETS_CACHE"):
        os.environ[_variable] = os.path.join(_scratch, _variable.lower())
        os.mkdir(os.environ[_variable])
# The same examples on every machine, however slow or busy it is.
settings.register_profile(
    "snrf", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("snrf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-messages", action="store_true", help="write tests/messages/messages.yml")
    parser.addoption("--update-families", action="store_true", help="write the table of families in docs/models.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[passed] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    # What was imported stays; every full collection, as a profiling run asks for, would look through all of it.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    results = session.config.stash[passed]
    if not session.config.getoption("--update-families") or exitstatus or not results:
        return
    page = Path(__file__).parent.parent / "docs" / "models.md"
    text = page.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:start]}\n{markdown(results)}\n{text[end:]}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the table of the brute-force oracle, also when the tests ran in several processes."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = [text for report in reports for name, text in report.user_properties if name == "impact error"]
    if rows:
        columns = "".join(f"{name:>10}" for name in ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"))
        terminalreporter.section("impact against zeroing each neuron of the real module, largest relative error")
        terminalreporter.write_line(f"{'family':36}{'site':8}{'dtype':9}{columns}")
        for row in sorted(rows):
            terminalreporter.write_line(row)
