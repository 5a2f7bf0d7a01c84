"""Lists of neurons that other programs write, as masks of a text decoder, and the released code's JSON from a mask.

- The JSON of the paper's released code: ``{"attn_k": {"0": [..]}}``, layer numbers as text, indices as numbers. Its
  ``attn_k`` and ``attn_v`` count the heads after they were repeated for grouped-query attention, so that an index runs
  up to ``heads * head_dim``. The weight has ``kv_heads * head_dim`` rows; the row that index i means is
  ``(i // head_dim // n_rep) * head_dim + i % head_dim``. Its detection also writes ``attn_o``, which no merge edits: it
  is passed over.
- LAPE (RUCAIBox/Language-Specific-Neurons) and MMNeuron save ``[set][layer]`` tensors of indices of activations with
  ``torch.save``, a set for each language or domain. Such a neuron is a row of fwd.up and a column of fwd.down.
- The same nested lists as JSON, or an object of sets by name.
- Names of neurons, ``fwd.up.L14.N12953``: a JSON list of them, or one a line of text.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.reading import DATA_BYTES, open_regular, parse_json, read_text
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import DecoderShape, check_fit
from mergekit_snrf.neurons.sites import GROUPED, PROJECTIONS, Neuron, Site

_TORCH = (".pth", ".pt", ".bin")
_KEYS = {name.replace(".", "_"): name for name in PROJECTIONS}
_NEVER_EDITED = {"attn_o"}
_LAYER = re.compile("0|[1-9][0-9]{0,4}")
KvIndices = Literal["repeated", "rows"]
_SPACES = re.compile(r"[\s,]+")
_MODEL = "give the model that the file was made from"


def read_neurons(
    path: str | os.PathLike[str], shape: DecoderShape, *, chosen: str | None = None, kv_indices: KvIndices = "repeated"
) -> NeuronSet:
    """Read the neurons of a file as a set of neurons of a decoder of this shape.

    Files of ``torch.save`` are read with ``weights_only``, so nothing in them is executed.

    Args:
        chosen: number or name of a set, where the file has several.
        kv_indices: of the released code's JSON, ``repeated`` as it writes them, or ``rows`` for real weight rows.

    Raises:
        SnrfError: the file cannot be read, is too large or of another kind, has several sets and none is ``chosen``,
            or a neuron is not in a decoder of this shape.
    """
    where = Path(path)
    if where.suffix in _TORCH or _is_zip(where):
        return _of_layers(where, _chosen(where, _load_torch(where), chosen), shape)
    text = read_text(where, DATA_BYTES)
    if text.lstrip()[:1] not in ("[", "{"):
        return _of_names(where, [name for name in _SPACES.split(text) if name], shape)
    content = parse_json(text, where)
    if isinstance(content, dict) and not any(isinstance(one, list) for one in content.values()):
        return _of_released(where, content, shape, kv_indices)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return _of_names(where, content, shape)
    return _of_layers(where, _chosen(where, content, chosen), shape)


def _is_zip(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(4) == b"PK\x03\x04"


def _load_torch(path: Path) -> Any:
    """Return what ``torch.save`` wrote, where it unpacks to at most 256 MB and holds tensors only."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > DATA_BYTES:
                what = f"unpacks to {size} bytes, more than the limit of {DATA_BYTES} for such a file"
                raise SnrfError(path, what, "it is not a list of neurons")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except SnrfError:
        raise
    except Exception as error:  # The unpickler raises whatever the bytes make it raise.
        what = f"is not a list of tensors that torch.save wrote ({first_line(error)})"
        raise SnrfError(path, what, "save it again, as lists of tensors of indices only") from None


def _chosen(path: Path, content: Any, chosen: str | None) -> Any:
    """Return one of several sets, by number or name; content of one depth less is one set alone."""
    if isinstance(content, Sequence) and not any(_is_layer_list(one) for one in content) and chosen is None:
        return content
    sets = dict(content) if isinstance(content, Mapping) else {}
    if isinstance(content, Sequence):
        sets = {str(number): one for number, one in enumerate(content)}
    if not sets:
        raise SnrfError(path, "holds no sets of neurons", "use a list of layers for each set")
    if chosen is None and len(sets) > 1:
        names = ", ".join(str(name) for name in list(sets)[:10])
        raise SnrfError(path, f"has {len(sets)} sets of neurons ({names})", "choose one", field="set")
    name = next(iter(sets)) if chosen is None else chosen
    if name not in sets:
        raise SnrfError(path, f"has no set {name!r:.40}", f"choose 0 to {len(sets) - 1} or a name", field="set")
    return sets[name]


def _is_layer_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(one, torch.Tensor | list | tuple) for one in value)


def _of_layers(path: Path, layers: Any, shape: DecoderShape) -> NeuronSet:
    """Return indices by layer as rows of fwd.up and columns of fwd.down."""
    if not isinstance(layers, list | tuple) or len(layers) != shape.layers:
        found = f"{len(layers)} layers" if isinstance(layers, list | tuple) else type(layers).__name__
        raise SnrfError(path, f"has {found} in a set, the model has {shape.layers} layers", _MODEL)
    neurons: dict[Site, list[int]] = {}
    for layer, given in enumerate(layers):
        indices = _indices(path, f"layer {layer}", given, shape.intermediate_size, "in this model")
        neurons |= {Site(layer, name): indices for name in ("fwd.up", "fwd.down")}
    return _set_of(neurons, shape)


def _indices(path: Path, field: str, given: Any, limit: int, of: str) -> list[int]:
    """Return indices below ``limit``, the range ``of`` what they count."""
    if isinstance(given, torch.Tensor):
        # An expanded tensor takes a few bytes in a file, and any number of them as a list.
        if given.ndim != 1 or given.numel() > limit:
            raise SnrfError(path, f"must be a list of at most {limit} indices", _MODEL, field=field)
        given = given.tolist()
    if not isinstance(given, list | tuple) or not all(type(index) is int for index in given):
        raise SnrfError(path, "must be a list of whole numbers", "save the indices of neurons", field=field)
    worst = min([0, *given]) or max(given, default=0)
    if not 0 <= worst < limit:
        raise SnrfError(path, f"index {worst} is not in [0, {limit}), the range {of}", _MODEL, field=field)
    return list(given)


def _of_names(path: Path, names: Sequence[str], shape: DecoderShape) -> NeuronSet:
    if not names:
        raise SnrfError(path, "names no neuron", "write one a line, such as fwd.up.L14.N12953")
    try:
        neurons = [Neuron.parse(name) for name in names]
    except SnrfError as error:
        raise error.at(path) from None
    check_fit(neurons, shape, where=path, model="the model")
    found: defaultdict[Site, list[int]] = defaultdict(list)
    for neuron in neurons:
        found[neuron.site].append(neuron.index)
    return _set_of(found, shape)


def kv_row(index: int, shape: DecoderShape) -> int:
    """Return the weight row that an index over repeated heads means."""
    return (index // shape.head_dim // shape.repeats) * shape.head_dim + index % shape.head_dim


def _of_released(path: Path, content: Mapping[str, Any], shape: DecoderShape, kv_indices: KvIndices) -> NeuronSet:
    found: dict[Site, list[int]] = {}
    for key, by_layer in content.items():
        if key in _NEVER_EDITED:
            continue
        name = _KEYS.get(key)
        if name is None:
            raise SnrfError(path, f"unknown projection {key!r}", f"the released code writes {', '.join(_KEYS)}")
        if not isinstance(by_layer, dict):
            raise SnrfError(path, "must map layer numbers to lists of indices", "correct the file", field=key)
        repeated = name in GROUPED and kv_indices == "repeated"
        limit = shape.heads * shape.head_dim if repeated else shape.neurons(name)
        for layer, indices in by_layer.items():
            field = f"{key}, layer {layer!r:.20}"
            if _LAYER.fullmatch(layer) is None or int(layer) >= shape.layers:
                raise SnrfError(path, f"the model has layers 0 to {shape.layers - 1}", _MODEL, field=field)
            heads = " over repeated heads" if repeated else ""
            given = _indices(path, field, indices, limit, f"of {name} in this model{heads}")
            if given:
                found[Site(int(layer), name)] = [kv_row(index, shape) for index in given] if repeated else given
    return _set_of(found, shape)


def _set_of(found: Mapping[Site, list[int]], shape: DecoderShape) -> NeuronSet:
    members = {}
    for site, indices in found.items():
        empty = torch.zeros(shape.neurons(site.projection), dtype=torch.bool)
        members[site] = empty.index_fill(0, torch.tensor(indices, dtype=torch.int64), True)
    return NeuronSet(members)


def released_json(neurons: NeuronSet, shape: DecoderShape) -> dict[str, dict[str, list[int]]]:
    """Return the released code's JSON of a set of neurons; a k or v row stands for its repetition in every head."""
    check_fit(neurons, shape, where=None, model="the model")
    result: dict[str, dict[str, list[int]]] = {key: {} for key in _KEYS}
    for site, member in neurons.nonempty().items():
        indices = member.nonzero().flatten().tolist()
        if site.projection in GROUPED:
            width, repeats = shape.head_dim, shape.repeats
            indices = sorted(
                ((row // width) * repeats + copy) * width + row % width for row in indices for copy in range(repeats)
            )
        result[site.projection.replace(".", "_")][str(site.layer)] = indices
    return result
