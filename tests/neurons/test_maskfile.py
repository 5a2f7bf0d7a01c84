from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.maskfile import (
    ModelProvenance,
    Provenance,
    read_mask,
    write_mask,
)
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

examples = settings(max_examples=40)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
objects = st.dictionaries(texts, texts | st.integers() | st.lists(st.booleans(), max_size=2), max_size=2)
models = st.builds(
    ModelProvenance,
    path=st.none() | texts,
    revision=st.none() | texts,
    model_type=st.none() | texts,
    config_sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    probes=st.none() | objects,
    card=st.none() | texts,
)
provenances = st.builds(
    Provenance,
    target=st.none() | models,
    source=st.none() | models,
    selection=st.none() | objects,
    operation=st.none() | texts,
    inputs=st.none() | st.lists(objects, max_size=2),
    seed=st.none() | st.integers(0, 2**32 - 1),
    versions=st.none() | st.dictionaries(texts, texts, max_size=2),
    later_field=st.none() | objects,
)
members = st.lists(st.booleans(), min_size=1, max_size=40).map(torch.tensor)
neuron_sets = st.dictionaries(
    st.builds(Site, st.integers(0, 9999), st.sampled_from(list(PROJECTIONS))), members, max_size=6
).map(NeuronSet)

K0, DOWN = Site(0, "attn.k"), Site(14, "fwd.down")
MASK = NeuronSet({K0: torch.tensor([True, False, True, False]), DOWN: torch.arange(9) > 6})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("maskfile")


def crafted(key: str, tensor: dict[str, Any], data: bytes, snrf: str = "{}") -> bytes:
    header = {"__metadata__": {"format": "snrf-mask", "version": "1", "snrf": snrf}, key: tensor}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_an_empty_mask_is_a_valid_file(tmp_path: Path) -> None:
    write_mask(tmp_path / "empty.safetensors", NeuronSet({K0: torch.zeros(4, dtype=torch.bool)}))
    assert read_mask(tmp_path / "empty.safetensors").neurons == NeuronSet({})
    # The size of the layer stays in the file.
    assert load_file(tmp_path / "empty.safetensors")[K0.key].shape == (4,)
    with safe_open(tmp_path / "empty.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "snrf-mask", "version": "1", "snrf": "{}"}


@examples
@given(neurons=neuron_sets, provenance=provenances)
def test_round_trip(folder: Path, neurons: NeuronSet, provenance: Provenance) -> None:
    path = folder / "round.safetensors"
    write_mask(path, neurons, provenance)
    mask = read_mask(path)
    assert mask.neurons == neurons
    assert mask.provenance.model_dump(exclude_none=True) == provenance.model_dump(exclude_none=True)
    assert mask.path == str(path)
    before = path.read_bytes()
    write_mask(path, mask.neurons, mask.provenance)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layers.007.attn.k", "does not name a layer and projection"),
        ("layers.99999999999999999999.attn.k", "does not name a layer and projection"),
        ("layers.10000.attn.k", r"layer 10000 is not in \[0, 10000\)"),
        ("layers.0.attn.o", "unknown projection 'attn.o'"),
        ("layers.0.attn.k.weight", "does not name a layer and projection"),
        ("layers.\u0660.attn.k", "does not name a layer and projection"),
        ("model.layers.0.self_attn.k_proj.weight", "does not name a layer and projection"),
        ("", "does not name a layer and projection"),
    ],
)
def test_tensors_of_unknown_places(tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(crafted(key, {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}, b"\1\0\0\1"))
    with pytest.raises(SnrfError, match=rf"mask\.safetensors: tensor .*{message}"):
        read_mask(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "got"),
    [
        ("U8", [8], r"torch\.uint8 of shape \[8\]"),
        ("F32", [2], r"torch\.float32 of shape \[2\]"),
        ("I64", [1], r"torch\.int64 of shape \[1\]"),
        ("F8_E4M3", [8], r"torch\.float8_e4m3fn of shape \[8\]"),
        ("BOOL", [2, 4], r"torch\.bool of shape \[2, 4\]"),
        ("BOOL", [8, 1], r"torch\.bool of shape \[8, 1\]"),
    ],
)
def test_tensors_that_are_no_masks(tmp_path: Path, dtype: str, shape: list[int], got: str) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(crafted(K0.key, {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}, bytes(8)))
    with pytest.raises(SnrfError, match=rf"mask\.safetensors: tensor 'layers\.0\.attn\.k' must be .* got {got}"):
        read_mask(path)


@pytest.mark.parametrize(("shape", "data"), [([], b"\1"), ([0], b"")])
def test_scalars_and_empty_tensors_are_no_masks(tmp_path: Path, shape: list[int], data: bytes) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(crafted(K0.key, {"dtype": "BOOL", "shape": shape, "data_offsets": [0, len(data)]}, data))
    with pytest.raises(SnrfError, match=r"must be torch\.bool of shape \[neurons\]"):
        read_mask(path)


@pytest.mark.parametrize(
    ("snrf", "field"),
    [
        ('{"seed": "many"}', "seed"),
        ('{"seed": 1e400}', "seed"),
        ('{"target": "Qwen/Qwen2.5-VL-7B-Instruct"}', "target"),
        ('{"source": {"path": 5}}', "source.path"),
        ('{"target": {"probes": []}}', "target.probes"),
        ('{"inputs": {}}', "inputs"),
        ('{"inputs": [1]}', "inputs.0"),
        ('{"versions": {"torch": 2}}', "versions.torch"),
        ('{"dtype": null, "operation": []}', "operation"),
    ],
)
def test_provenance_of_the_wrong_kind_is_named(tmp_path: Path, snrf: str, field: str) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(crafted(K0.key, {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}, b"\1", snrf))
    with pytest.raises(SnrfError, match=rf"mask\.safetensors: key '{re.escape(field)}': ") as caught:
        read_mask(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model_dump", "copy", "model_fields", "__class__", "__dict__", "__pydantic_extra__"])
def test_unknown_provenance_does_no_harm(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mask.safetensors"
    snrf = json.dumps({name: 3, "target": {name: 3}, "seed": 5})
    path.write_bytes(crafted(K0.key, {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}, b"\1", snrf))
    mask = read_mask(path)
    assert mask.provenance.seed == 5
    write_mask(path, mask.neurons, mask.provenance)
    assert read_mask(path).provenance.model_dump(exclude_none=True) == json.loads(snrf)
