"""What rounding leaves of an update: said for every merge, a warning where most of it is lost, and how to keep it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoints import read, write
from pair import Pair, merge, target_name

from mergekit_snrf.fusion.fuse import Fusion, fuse


@pytest.fixture
def close(pair: Pair, tmp_path: Path) -> Pair:
    """The pair with a source so close to the target that bfloat16 loses most of the update."""
    folder = tmp_path / "close"
    folder.mkdir()
    for file in pair.source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    target, source = read(pair.target), read(pair.source)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in source.items():
        near = target.get(f"language_{name}".replace("language_model.layers", "language_model.model.layers"))
        if near is not None and tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            source[name] = near.float() * (1 + 1e-3 * noise)
    write(folder, source)
    return Pair(pair.folder, pair.target, folder, pair.mask, pair.neurons)


def test_rounding_is_what_float64_says() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 32, generator=generator).bfloat16()
    source = target.float() + 0.01 * torch.randn(24, 32, generator=generator)
    member = torch.arange(24) % 3 == 0
    result, certificate, rounding = fuse(target, source, member, 0, Fusion(beta=0.5, rank=0))
    step = 0.5 * (source.double() - target.double())[member]
    lost = result.double()[member] - target.double()[member] - step
    assert certificate is None
    assert rounding.update == pytest.approx(float(step.norm()), rel=1e-5)
    assert rounding.lost == pytest.approx(float(lost.norm()), rel=1e-5)
    assert (rounding.weights, rounding.changed) == (256, int((result != target).sum()))


def test_lost_update_warns(close: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        merge(close.recipe(), tmp_path / "out")
    (warning,) = [record.message for record in caplog.records if "rounding" in record.message]
    assert "dtype: float32" in warning
    assert "snrf lora" in warning


def test_kept_update_does_not_warn(pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        merge(pair.recipe(), tmp_path / "out")
    (said,) = [record for record in caplog.records if record.message.startswith("rounding")]
    assert said.levelno == logging.INFO


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_wider_output_keeps_the_update(key: str, close: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        after = merge(close.recipe(**{key: "float32"}), tmp_path / "out")
    assert not [record for record in caplog.records if "rounding" in record.message]
    target, source = read(close.target), read(close.source)
    for site, member in close.neurons.nonempty().items():
        name = target_name(site)
        donor = source[name.removeprefix("language_model.")]
        expected = fuse(target[name].float(), donor, member, site.axis, Fusion(beta=0.5, rank=4)).tensor
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], expected)
