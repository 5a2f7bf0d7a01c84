"""Lists of neurons as LAPE and MMNeuron save them: made here as their code makes them, and files that are none."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files import reading
from mergekit_snrf.neurons.lists import read_neurons
from mergekit_snrf.neurons.shape import DecoderShape

SHAPE = DecoderShape(layers=3, hidden_size=8, heads=2, kv_heads=1, head_dim=4, intermediate_size=10)
SETS = [[[1, 9], [], [0]], [[], [], []], [[5], [5, 6], [5, 6, 7]]]


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def as_tensors(sets: Any) -> Any:
    return [[torch.tensor(layer).long() for layer in one] for one in sets]


def names(path: Path, **options: Any) -> set[str]:
    return {str(neuron) for neuron in read_neurons(path, SHAPE, **options).neurons()}


def expected(layers: list[list[int]]) -> set[str]:
    return {f"fwd.{side}.L{n}.N{i}" for n, layer in enumerate(layers) for i in layer for side in ("up", "down")}


def test_every_set_of_a_file_of_torch_and_of_json(tmp_path: Path) -> None:
    # LAPE's files have no suffix, others have.
    files = [saved(tmp_path / name, as_tensors(SETS)) for name in ("llama-7b", "x.pth")]
    files += [tmp_path / "x.json", tmp_path / "named.json"]
    files[2].write_text(json.dumps(SETS))
    files[3].write_text(json.dumps({str(number): one for number, one in enumerate(SETS)}))
    for file in files:
        for number, layers in enumerate(SETS):
            assert names(file, chosen=str(number)) == expected(layers), file
        with pytest.raises(SnrfError, match=r"has 3 sets of neurons \(0, 1, 2\); choose one") as caught:
            read_neurons(file, SHAPE)
        assert caught.value.field == "set"
        with pytest.raises(SnrfError, match="has no set '3'"):
            read_neurons(file, SHAPE, chosen="3")
    assert names(saved(tmp_path / "one.pth", as_tensors(SETS[2:]))) == expected(SETS[2])
    assert names(saved(tmp_path / "flat.pth", as_tensors(SETS)[2])) == expected(SETS[2])


def test_names_of_neurons(tmp_path: Path) -> None:
    given = ["fwd.up.L2.N9", "attn.k.L0.N3", "fwd.up.L2.N0"]
    (tmp_path / "a.txt").write_text("\n".join(given) + "\n")
    (tmp_path / "b.txt").write_text(", ".join(given))
    (tmp_path / "c.json").write_text(json.dumps(given))
    for name in ("a.txt", "b.txt", "c.json"):
        assert names(tmp_path / name) == set(given)
    (tmp_path / "a.txt").write_text("fwd.up.L2.N10\n")
    with pytest.raises(SnrfError, match=r"a\.txt: fwd\.up\.L2\.N10 is not in the model, whose last one is"):
        read_neurons(tmp_path / "a.txt", SHAPE)
    (tmp_path / "a.txt").write_text("vision.mlp.L2.N1\n")
    with pytest.raises(SnrfError, match="has neurons outside of the text decoder"):
        read_neurons(tmp_path / "a.txt", SHAPE)
    (tmp_path / "a.txt").write_text("fwd.up\n")
    with pytest.raises(SnrfError, match=r"a\.txt: 'fwd\.up' does not name a neuron"):
        read_neurons(tmp_path / "a.txt", SHAPE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_tensors([SETS[0][:2]]), "has 2 layers in a set, the model has 3 layers"),
        ([[torch.tensor([10]), torch.tensor([]), torch.tensor([])]], r"layer 0: index -?\d+ is not in \[0, 10\)"),
        ([[torch.tensor([-1]), torch.tensor([]), torch.tensor([])]], r"layer 0: index -?\d+ is not in \[0, 10\)"),
        ([[torch.tensor([]), torch.tensor([1.5]), torch.tensor([])]], "layer 1: must be a list of whole numbers"),
        ([[torch.ones(10).bool(), torch.tensor([]), torch.tensor([])]], "layer 0: must be a list of whole numbers"),
        # No more than a few bytes in the file, but a terabyte when it is written out.
        (
            [[torch.zeros(1).long().expand(10**12), torch.tensor([]), torch.tensor([])]],
            "layer 0: must be a list of at most 10",
        ),
        ([[torch.zeros(2, 2).long(), torch.tensor([]), torch.tensor([])]], "layer 0: must be a list of at most 10"),
        ({"a": 3}, "has int in a set"),
        (torch.zeros(3), "holds no sets of neurons"),
        ([], "has 0 layers in a set"),
    ],
)
def test_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match=message):
        read_neurons(saved(tmp_path / "x.pth", content), SHAPE)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never"),))


def test_nothing_is_executed_and_nothing_large_is_unpacked(tmp_path: Path, monkeypatch: Any) -> None:
    bad = [saved(tmp_path / "evil.pth", [Evil()]), tmp_path / "plain.pth", tmp_path / "text.pth"]
    bad[1].write_bytes(pickle.dumps(SETS))
    bad[2].write_text("fwd.up.L0.N1")
    for file in bad:
        with pytest.raises(SnrfError, match="is not a list of tensors that"):
            read_neurons(file, SHAPE)
    assert not Path("/tmp/never").exists()
    monkeypatch.setattr("mergekit_snrf.neurons.lists.DATA_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2 * 10**6))
    assert (tmp_path / "bomb.pth").stat().st_size < 10**4
    with pytest.raises(SnrfError, match="unpacks to 2000000 bytes, more than the limit of 1000000"):
        read_neurons(tmp_path / "bomb.pth", SHAPE)
    with pytest.raises(SnrfError, match="cannot be read"):
        read_neurons(tmp_path / "none.pth", SHAPE)
    assert reading.DATA_BYTES > 10**6


@pytest.mark.parametrize(
    "content", ["[[[1], [true], []]]", "[[[1], [2.0], []]]", f"[[[{10**30}], [], []]]", "[3, 4, 5]"]
)
def test_json_of_other_numbers_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SnrfError, match=r"layer \d: "):
        read_neurons(tmp_path / "x.json", SHAPE)
