from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import repeat_kv

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.neurons.released import kv_row, read_released, released_json
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site

examples = settings(max_examples=60)

QWEN = DecoderShape(layers=28, hidden_size=3584, heads=28, kv_heads=4, head_dim=128, intermediate_size=18944)
TINY = DecoderShape(layers=3, hidden_size=8, heads=4, kv_heads=2, head_dim=3, intermediate_size=10)


@st.composite
def shapes(draw: st.DrawFn) -> DecoderShape:
    kv_heads, repeats, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    heads = kv_heads * repeats
    return DecoderShape(draw(st.integers(1, 4)), 16, heads, kv_heads, head_dim, draw(st.integers(1, 12)))


@st.composite
def neurons_of(draw: st.DrawFn, shape: DecoderShape) -> NeuronSet:
    chosen = draw(st.sets(st.sampled_from(shape.sites()), max_size=6))
    sizes = {site: shape.neurons(site.projection) for site in chosen}
    return NeuronSet(
        {site: torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for site, n in sizes.items()}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("released")


def imported(folder: Path, content: Any, shape: DecoderShape, **options: Any) -> NeuronSet:
    path = folder / "neurons.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_released(path, shape, **options)


@examples
@given(shapes())
def test_kv_row_undoes_torchs_repetition(shape: DecoderShape) -> None:
    rows = torch.arange(shape.kv_heads * shape.head_dim).reshape(shape.kv_heads, shape.head_dim)
    repeated = rows.repeat_interleave(shape.repeats, dim=0).flatten()
    assert [kv_row(index, shape) for index in range(shape.heads * shape.head_dim)] == repeated.tolist()


@examples
@given(shapes())
def test_kv_row_undoes_repeat_kv_of_transformers(shape: DecoderShape) -> None:
    rows = torch.arange(shape.kv_heads * shape.head_dim).reshape(1, shape.kv_heads, 1, shape.head_dim)
    repeated = repeat_kv(rows, shape.repeats).flatten()
    assert [kv_row(index, shape) for index in range(shape.heads * shape.head_dim)] == repeated.tolist()


def test_kv_row_of_a_7b_model() -> None:
    assert [kv_row(i, QWEN) for i in (0, 127, 128, 895, 896, 3583)] == [0, 127, 0, 127, 128, 511]


@examples
@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), neurons_of(shape))))
def test_import_of_an_export_is_the_same_set(folder: Path, case: tuple[DecoderShape, NeuronSet]) -> None:
    shape, neurons = case
    assert imported(folder, released_json(neurons, shape), shape) == neurons


@examples
@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), neurons_of(shape))))
def test_export_lists_every_repetition_in_order(case: tuple[DecoderShape, NeuronSet]) -> None:
    shape, neurons = case
    content = released_json(neurons, shape)
    assert content.keys() == {"attn_q", "attn_k", "attn_v", "fwd_up", "fwd_down"}
    for key, by_layer in content.items():
        for layer, indices in by_layer.items():
            member = neurons[Site(int(layer), key.replace("_", "."))]
            if key in ("attn_k", "attn_v"):
                heads = member.reshape(shape.kv_heads, shape.head_dim)
                member = heads.repeat_interleave(shape.repeats, dim=0).flatten()
            assert indices == member.nonzero().flatten().tolist()
    assert sum(len(by_layer) for by_layer in content.values()) == len(neurons.nonempty())


@examples
@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), neurons_of(shape))))
def test_row_indices_are_taken_as_they_are(folder: Path, case: tuple[DecoderShape, NeuronSet]) -> None:
    shape, neurons = case
    content: dict[str, dict[str, list[int]]] = {}
    for neuron in neurons.neurons():
        by_layer = content.setdefault(neuron.site.projection.replace(".", "_"), {})
        by_layer.setdefault(str(neuron.site.layer), []).append(neuron.index)
    assert imported(folder, content, shape, kv_indices="rows") == neurons


def test_one_repetition_selects_the_row(tmp_path: Path) -> None:
    neurons = imported(tmp_path, {"attn_k": {"1": [10, 0, 0]}, "attn_v": {"0": []}, "fwd_up": {}}, TINY)
    assert [str(neuron) for neuron in neurons.neurons()] == ["attn.k.L1.N0", "attn.k.L1.N4"]


@pytest.mark.parametrize(
    ("key", "index", "limit"),
    [
        ("attn_q", 12, "12), the range of attn.q in this model;"),
        ("attn_k", 12, "12), the range of attn.k in this model over repeated heads;"),
        ("attn_v", -1, "12), the range of attn.v in this model over repeated heads;"),
        ("fwd_up", 10, "10), the range of fwd.up in this model;"),
        ("fwd_down", -3, "10), the range of fwd.down in this model;"),
        ("fwd_down", 10**30, "10), the range of fwd.down in this model;"),
    ],
)
def test_indices_out_of_range(tmp_path: Path, key: str, index: int, limit: str) -> None:
    message = f"neurons.json: {key}, layer '2': index {index} is not in [0, {limit} give the model it was made from"
    with pytest.raises(SnrfError, match=re.escape(message)):
        imported(tmp_path, {key: {"2": [0, index, 1]}}, TINY)


def test_rows_have_the_range_of_the_weight(tmp_path: Path) -> None:
    assert imported(tmp_path, {"attn_k": {"0": [5]}}, TINY, kv_indices="rows").count() == 1
    with pytest.raises(SnrfError, match=re.escape("index 6 is not in [0, 6), the range of attn.k in this model;")):
        imported(tmp_path, {"attn_k": {"0": [6]}}, TINY, kv_indices="rows")


@pytest.mark.parametrize(
    "layer", ["3", "-1", "", "00", "01", "0000001", "1.0", "+1", " 1", "1\n", "\u0661", "\u00b2", "x", "9" * 5000]
)
def test_layers_that_the_model_has_not(tmp_path: Path, layer: str) -> None:
    with pytest.raises(SnrfError, match=r"neurons\.json: attn_q, layer .*: the model has layers 0 to 2; give"):
        imported(tmp_path, {"attn_q": {layer: [0]}}, TINY)


@pytest.mark.parametrize("indices", [None, {}, 3, "12", [1.0], ["1"], [True], [None], [[1]], [1, 2.5]])
def test_indices_that_are_no_whole_numbers(tmp_path: Path, indices: Any) -> None:
    with pytest.raises(SnrfError, match=r"neurons\.json: fwd_up, layer '0': expected a list of whole numbers"):
        imported(tmp_path, {"fwd_up": {"0": indices}}, TINY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"attn_x": {"0": [1]}},
            "unknown projection 'attn_x'; the released code writes attn_q, attn_k, attn_v,",
        ),
        ({"attn.k": {"0": [1]}}, "unknown projection 'attn.k'"),
        ({"attn_k": [[1, 2]]}, "'attn_k' must map layer numbers to lists of indices"),
        ({"attn_k": None}, "'attn_k' must map layer numbers to lists of indices"),
        ([], "expected an object such as {'attn_k': {'0': [1, 2]}}"),
        ("null", "expected an object"),
        ("3", "expected an object"),
        ("", "not valid JSON"),
        ('{"attn_k": {"0": [1, 2', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"attn_k": {"0": [' + "9" * 5000 + "]}}", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_malformed_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SnrfError, match=rf"neurons\.json: .*{re.escape(message)}"):
        imported(tmp_path, content, TINY)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "neurons.json").write_bytes(b'{"\xff\xfe": 1}')
    with pytest.raises(SnrfError, match=r"neurons\.json: not valid JSON"):
        read_released(tmp_path / "neurons.json", TINY)


@pytest.mark.parametrize("name", ["missing.json", "", "x" * 300])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(SnrfError, match=r"cannot be read \(.+\); correct the path"):
        read_released(tmp_path / name, TINY)


@pytest.mark.parametrize(
    ("site", "length", "fitting"),
    [
        (Site(0, "attn.k"), 12, 6),
        (Site(0, "attn.q"), 6, 12),
        (Site(2, "fwd.up"), 11, 10),
        (Site(3, "fwd.down"), 10, 10),
    ],
)
def test_masks_of_another_model_are_not_exported(site: Site, length: int, fitting: int) -> None:
    neurons = NeuronSet({site: torch.ones(length, dtype=torch.bool)})
    message = f"{site}: the mask has {length} neurons there, the model's 3 layers have {fitting}; give the model"
    with pytest.raises(SnrfError, match=re.escape(message)):
        released_json(neurons, TINY)


def test_every_projection_has_its_key(tmp_path: Path) -> None:
    full = NeuronSet({site: torch.ones(TINY.neurons(site.projection), dtype=torch.bool) for site in TINY.sites()})
    content = released_json(full, TINY)
    assert {key: len(by_layer["0"]) for key, by_layer in content.items()} == {
        "attn_q": 12,
        "attn_k": 12,
        "attn_v": 12,
        "fwd_up": 10,
        "fwd_down": 10,
    }
    assert imported(tmp_path, content, TINY).keys() == {Site(layer, name) for layer in range(3) for name in PROJECTIONS}
