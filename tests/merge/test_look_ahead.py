"""Merges that are fused ahead: the same bytes for any number of workers and any memory, and how they end early."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INTERMEDIATE, LAYERS, WIDTH, read
from forked import start_forked
from made_moments import sizes_of, write_random_moments
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from outputs import hashes, tree
from pair import Pair, assert_same, merge, target_name, write_recipe

from mergekit_snrf.fusion import threads, updates
from mergekit_snrf.merge import install
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.session import MergeSession
from mergekit_snrf.merge.tensors import Tensors


def merged(recipe: dict[str, Any], out: Path, workers: int) -> dict[str, str]:
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True, num_threads=workers))
    return {name: digest for name, digest in hashes(out).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("update", ["low-rank", "regmean"])
def test_workers_and_memory_do_not_change_the_bytes(
    update: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"source": {"rank": 4}}
    if update == "regmean":
        sizes = sizes_of(LAYERS, WIDTH, INTERMEDIATE)
        moments = write_random_moments(tmp_path / "moments.safetensors", sizes)
        changes = {"source": {"rank": None}, "parameters": {"update": update, "moments": str(moments), "masks": None}}
    recipe = pair.recipe(**changes)
    one, two, four = (merged(recipe, tmp_path / f"{count}", count) for count in (1, 2, 4))
    monkeypatch.setattr(threads, "memory_limit", lambda: 0)
    assert one == two == four == merged(recipe, tmp_path / "bounded", 4)
    # The loader's tensors on the executor's thread, as on a GPU, are the oracle.
    monkeypatch.setattr(MergeSession, "_can_look_ahead", lambda self, options: False)
    assert merged(recipe, tmp_path / "plain", 1) == one
    assert torch.get_num_threads() == 1


def test_bytes_in_flight_are_counted(pair: Pair) -> None:
    """What is estimated of a weight covers its tensor, Delta, and the changed neurons."""
    config, options = MergeConfiguration.model_validate(pair.recipe()), MergeOptions()
    plan = draft_merge(config, options).finish()
    tensors = Tensors(plan, options)
    for edit in plan.edits:
        size, neurons = torch.Size(edit.shape).numel(), edit.neurons * edit.shape[1 - edit.site.axis]
        assert tensors.memory(edit).kept == 2 * neurons
        assert tensors.memory(edit, whole=True).kept == 2 * size
        assert tensors.memory(edit).working >= 4 * size + (4 + 2) * neurons
        assert tensors.memory(edit, whole=True).working >= (2 + 4) * size + (4 + 2) * neurons


def test_an_interrupt_does_not_wait_for_workers(pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe, mark = write_recipe(tmp_path / "recipes" / "recipe.yml", pair.recipe()), tmp_path / "recipes" / "mark"

    def endless(*_: Any) -> None:
        mark.touch()
        while True:
            threads.check_not_stopped()
            time.sleep(0.01)

    def merge_without_end() -> None:
        # A test run in the background ignores the interrupt, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(100)
        torch.set_num_threads(2)
        updates.working_dtype = endless
        install()
        try:
            mergekit_yaml([str(recipe), str(tmp_path / "out"), "--quiet"], prog_name="mergekit-yaml")
        finally:
            threading._shutdown()  # type: ignore[attr-defined]

    child = start_forked(merge_without_end)
    while not mark.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "Traceback" not in capfd.readouterr().err
    assert tree(tmp_path) == []


def test_a_merge_of_one_layer_fuses_nothing_else(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(source={"beta": [{"filter": "layers.0.", "value": 0.5}, {"value": 0}]})
    out, before = merge(recipe, tmp_path / "out"), read(pair.target)
    edited = {target_name(site) for site in pair.neurons if site.layer == 0}
    assert_same(*({n: t for n, t in tensors.items() if n not in edited} for tensors in (out, before)))
