"""Masks, profiles, merged tensors and adapters against those of version 0.1 (golden/world.py made the files)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from golden import world
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from mergekit_snrf.cli.profile import main as snrf_profile
from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.merge import install

GOLDEN = Path(__file__).parent / "golden"
PINNED = json.loads((GOLDEN / "golden.json").read_text())
EXPECTED = world.tensors(GOLDEN / "golden.safetensors")
COMMANDS = {"snrf-profile": snrf_profile, "snrf": snrf, "mergekit-yaml": mergekit_yaml}
SAME_MACHINE = world.machine() == PINNED["machine"]


@pytest.fixture
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tensor]]:
    """What the commands write now."""
    folder = tmp_path_factory.mktemp("golden")

    def run(command: str, *arguments: str) -> None:
        LoaderCache.loaders.clear()
        result = CliRunner().invoke(COMMANDS[command], arguments, prog_name=command)
        assert result.exit_code == 0, (command, arguments, result.output, result.exception)

    install()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert world.make_inputs(folder) == PINNED["inputs"], "tests/checkpoints.py makes other checkpoints"
        yield world.outputs(folder, run)


@pytest.mark.skipif(sys.platform != "linux", reason="random weights and arithmetic of another platform")
def test_output_is_that_of_version_0_1(found: dict[str, Tensor]) -> None:
    assert set(found) == set(EXPECTED)
    assert [name for name, tensor in found.items() if not same(name, tensor, EXPECTED[name])] == []


def same(name: str, actual: Tensor, expected: Tensor) -> bool:
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    if name.endswith("_impact"):
        return torch.allclose(actual, expected, rtol=1e-5, atol=0)
    if SAME_MACHINE or not actual.is_floating_point():
        return world.as_bytes(actual) == world.as_bytes(expected)
    return bool(((actual - expected).abs() <= 2 * ulp(expected)).all())


def ulp(tensor: Tensor) -> float:
    """The distance between neighbouring numbers of the size of the tensor's largest entry."""
    return float(tensor.abs().max()) * torch.finfo(tensor.dtype).eps
