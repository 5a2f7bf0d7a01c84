"""The JSON of the paper's released code: ``{"attn_k": {"0": [..]}}``, layer numbers as text, indices as numbers.

Its ``attn_k`` and ``attn_v`` count the heads after they were repeated for grouped-query attention, so that an index
runs up to ``heads * head_dim``. The weight has ``kv_heads * head_dim`` rows; the row that index i means is
``(i // head_dim // n_rep) * head_dim + i % head_dim``. Its detection also writes ``attn_o``, which no merge edits: it
is passed over.
"""

from __future__ import annotations

import os
import re
from typing import Literal

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.reading import load_json
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import DecoderShape, check_fit
from mergekit_snrf.neurons.sites import GROUPED, PROJECTIONS, Site

_KEYS = {name.replace(".", "_"): name for name in PROJECTIONS}
_NEVER_EDITED = {"attn_o"}
_LAYER = re.compile("0|[1-9][0-9]{0,4}")
KvIndices = Literal["repeated", "rows"]
_MODEL = "give the model that the file was made from"


def kv_row(index: int, shape: DecoderShape) -> int:
    """Return the weight row that an index over repeated heads means."""
    return (index // shape.head_dim // shape.repeats) * shape.head_dim + index % shape.head_dim


def read_released(path: str | os.PathLike[str], shape: DecoderShape, kv_indices: KvIndices = "repeated") -> NeuronSet:
    """Read the released code's JSON as a set of neurons of a decoder of this shape.

    ``kv_indices`` is ``repeated`` as the released code writes them, or ``rows`` for indices of real weight rows.
    """
    members: dict[Site, torch.Tensor] = {}
    content = load_json(path)
    if not isinstance(content, dict):
        raise SnrfError(path, "must be an object", "write it as {'attn_k': {'0': [1, 2]}}")
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
            if not isinstance(indices, list) or not all(type(index) is int for index in indices):
                raise SnrfError(path, "must be a list of whole numbers", "correct the file", field=field)
            if not indices:
                continue
            worst = max(indices) if min(indices) >= 0 else min(indices)
            if not 0 <= worst < limit:
                heads = " over repeated heads" if repeated else ""
                what = f"index {worst} is not in [0, {limit}), the range of {name} in this model{heads}"
                raise SnrfError(path, what, _MODEL, field=field)
            rows = [kv_row(index, shape) for index in indices] if repeated else indices
            member = torch.zeros(shape.neurons(name), dtype=torch.bool)
            member[torch.tensor(rows)] = True
            members[Site(int(layer), name)] = member
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
