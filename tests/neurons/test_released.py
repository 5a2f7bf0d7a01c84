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
from mergekit_snrf.neurons.lists import kv_row, read_neurons, released_json
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import DecoderShape
from mergekit_snrf.neurons.sites import Site

examples = settings(max_examples=60)

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
    return read_neurons(path, shape, **options)


@examples
@given(shapes())
def test_kv_row_undoes_repeat_kv_of_transformers(shape: DecoderShape) -> None:
    rows = torch.arange(shape.kv_heads * shape.head_dim).reshape(1, shape.kv_heads, 1, shape.head_dim)
    repeated = repeat_kv(rows, shape.repeats).flatten()
    assert [kv_row(index, shape) for index in range(shape.heads * shape.head_dim)] == repeated.tolist()


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


@pytest.mark.parametrize(
    ("key", "index", "limit"),
    [
        *(("attn_q", 12, 12), ("attn_k", 12, 12), ("attn_v", -1, 12), ("fwd_up", 10, 10)),
        *(("fwd_down", -3, 10), ("fwd_down", 10**30, 10)),
    ],
)
def test_indices_out_of_range(tmp_path: Path, key: str, index: int, limit: int) -> None:
    with pytest.raises(SnrfError, match=re.escape(f"index {index} is not in [0, {limit})")) as caught:
        imported(tmp_path, {key: {"2": [0, index, 1]}}, TINY)
    assert caught.value.field == f"{key}, layer '2'"


def test_rows_have_the_range_of_the_weight(tmp_path: Path) -> None:
    assert imported(tmp_path, {"attn_k": {"0": [5]}}, TINY, kv_indices="rows").count() == 1
    with pytest.raises(SnrfError, match=r"index 6 is not in \[0, 6\)"):
        imported(tmp_path, {"attn_k": {"0": [6]}}, TINY, kv_indices="rows")


@pytest.mark.parametrize(
    "layer", ["3", "-1", "", "00", "01", "0000001", "1.0", "+1", " 1", "1\n", "\u0661", "\u00b2", "x", "9" * 5000]
)
def test_layers_that_the_model_has_not(tmp_path: Path, layer: str) -> None:
    with pytest.raises(SnrfError, match=r"neurons\.json: attn_q, layer .*: the model has layers 0 to 2"):
        imported(tmp_path, {"attn_q": {layer: [0]}}, TINY)


@pytest.mark.parametrize("indices", [None, {}, 3, "12", [1.0], ["1"], [True], [None], [[1]], [1, 2.5]])
def test_indices_that_are_no_whole_numbers(tmp_path: Path, indices: Any) -> None:
    with pytest.raises(SnrfError, match=r"neurons\.json: fwd_up, layer '0': "):
        imported(tmp_path, {"fwd_up": {"0": indices}}, TINY)


MALFORMED = (
    *({"attn_x": {"0": [1]}}, {"attn.k": {"0": [1]}}, {"attn_k": [[1, 2]]}, {"attn_k": None}, [], "null", "3", ""),
    *('{"attn_k": {"0": [1, 2', "[" * 100_000, '{"attn_k": {"0": [' + "9" * 5000 + "]}}", b'{"\xff\xfe": 1}', None),
)


@pytest.mark.parametrize("content", MALFORMED, ids=lambda value: str(value)[:30])
def test_malformed_files(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "neurons.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else b"")
    with pytest.raises(SnrfError) as caught:
        read_neurons(path, TINY) if isinstance(content, bytes | None) else imported(tmp_path, content, TINY)
    assert caught.value.where == str(path)
