"""Moments files: what is written is read again, and what does not belong there is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_moments import matrix_of, random_moment, sizes_of, write_random_moments
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.regmean import DenseMoment
from mergekit_snrf.models.moments import InputSite, MomentsProvenance, read_moments, write_moments

SIZES = sizes_of(2, 7, 11)
SITE = InputSite(1, "down")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_moments(tmp_path_factory.mktemp("moments") / "m.safetensors", SIZES, sketches={"down": 4})


def test_what_is_written_is_read(path):
    found = read_moments(path)
    assert (found.sizes, found.sketches) == (SIZES, {site: 4 for site in SIZES if site.input == "down"})
    assert found.layers == 2
    assert [kind["name"] for kind in found.provenance.keep or []] == ["read", "find"]
    stored = load_file(path)
    for site in SIZES:
        for number, which in enumerate(("gain", "keep")):
            assert float(stored[f"{site.key}.{which}.clip"]) == 1.0 + number
            moment = found.moment(site, which)
            if isinstance(moment, DenseMoment):
                torch.testing.assert_close(moment.matrix(), torch.from_numpy(matrix_of(stored, f"{site.key}.{which}")))
            else:
                assert torch.equal(moment.factor, stored[f"{site.key}.{which}.factor"])
    assert torch.equal(found.moment(SITE, "keep").factor, random_moment(11, 11, tokens=400, sketch=4).factor)  # type: ignore[union-attr]


def test_equal_moments_give_equal_bytes_and_replace_only_moments(path, tmp_path):
    again = write_random_moments(tmp_path / "m.safetensors", SIZES, sketches={"down": 4})
    assert again.read_bytes() == path.read_bytes()
    write_random_moments(again, SIZES)
    assert not read_moments(again).sketches
    weights = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.ones(2)}, weights)
    before = weights.read_bytes()
    with pytest.raises(SnrfError, match="not a snrf-moments file"):
        write_moments(weights, load_file(path), MomentsProvenance())
    assert weights.read_bytes() == before


Change = Callable[[dict[str, Tensor]], Any]
NAN = float("nan")
DENSE, SKETCH = "layers.0.up.gain", "layers.1.down.keep"


def put(key: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(f"{DENSE}.correlation"), f"{DENSE}.correlation"),
        (lambda tensors: tensors.pop(f"{SKETCH}.clip"), f"{SKETCH}.clip"),
        (lambda tensors: [tensors.pop(key) for key in [*tensors] if key.startswith("layers.0.attn.")], "layers.0.attn"),
        (lambda tensors: [tensors.pop(key) for key in [*tensors] if key.startswith("layers.0.")], "layers.0.attn"),
        (lambda tensors: [tensors.pop(key) for key in [*tensors] if ".keep." in key], ".keep."),
        (lambda tensors: tensors.clear(), "layers.0.attn"),
        (put(f"{DENSE}.correlation", torch.ones(27, dtype=torch.float16)), "[28]"),
        (put(f"{DENSE}.correlation", torch.ones(28)), "F16"),
        (put(f"{DENSE}.scale", torch.ones(6)), "layers.0.up"),
        (put(f"{DENSE}.scale", torch.ones(7, 1)), f"{DENSE}.scale"),
        (put(f"{SKETCH}.factor", torch.ones(11, 4)), "F16"),
        (put(f"{SKETCH}.rest", torch.ones(2)), f"{SKETCH}.rest"),
        (put(f"{SKETCH}.scale", torch.ones(11)), SKETCH),
        (put("layers.00.up.gain.scale", torch.ones(7)), "layers.00.up.gain.scale"),
        (put("model.embed_tokens.weight", torch.ones(7)), "model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_files_of_another_structure_are_refused(change, named, path, tmp_path):
    bad = changed(path, tmp_path / "bad.safetensors", change)
    with pytest.raises(SnrfError, match=re.escape(named)) as caught:
        read_moments(bad)
    assert caught.value.where == str(bad)


def changed(path: Path, bad: Path, change: Change) -> Path:
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        save_file(tensors, bad, file.metadata())
    return bad


@pytest.mark.parametrize(
    ("change", "site", "which"),
    [
        (lambda tensors: tensors[f"{DENSE}.scale"].fill_(NAN), InputSite(0, "up"), "gain"),
        (lambda tensors: tensors[f"{DENSE}.scale"].neg_(), InputSite(0, "up"), "gain"),
        (lambda tensors: tensors[f"{DENSE}.correlation"].fill_(1.5), InputSite(0, "up"), "gain"),
        (lambda tensors: tensors[f"{DENSE}.correlation"][3:].fill_(NAN), InputSite(0, "up"), "gain"),
        (lambda tensors: tensors[f"{SKETCH}.factor"][0].fill_(float("inf")), SITE, "keep"),
        (lambda tensors: tensors[f"{SKETCH}.rest"].fill_(-1), SITE, "keep"),
        (lambda tensors: tensors[f"{SKETCH}.rest"].fill_(NAN), SITE, "keep"),
    ],
)
def test_values_that_no_moment_has_are_refused(change, site, which, path, tmp_path):
    found = read_moments(changed(path, tmp_path / "bad.safetensors", change))
    with pytest.raises(SnrfError, match=re.escape(f"{site.key}.{which}")):
        found.moment(site, which)
    found.moment(InputSite(1, "up"), "gain")


def test_a_provenance_of_other_types_is_refused(path, tmp_path):
    bad, metadata = tmp_path / "bad.safetensors", {"format": "snrf-moments", "version": "1", "snrf": '{"keep": 3}'}
    save_file(load_file(path), bad, metadata)
    with pytest.raises(SnrfError, match="key 'keep': must be a list, got 3; take the moments again"):
        read_moments(bad)
