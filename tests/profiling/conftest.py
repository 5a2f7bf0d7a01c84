"""Tiny checkpoints that the tests of this folder share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_source, make_target


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from ``target`` or ``source`` and a family to the folder of a checkpoint."""

    @functools.cache
    def make(kind: str, family: str) -> Path:
        folder = tmp_path_factory.mktemp("model") / f"{kind}-{family}"
        return make_target(folder, family, "hub") if kind == "target" else make_source(folder, family)

    return make
