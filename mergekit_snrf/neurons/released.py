"""The JSON of the paper's released code: ``{"attn_k": {"0": [..]}}``, layer numbers as text, indices as numbers.

Its ``attn_k`` and ``attn_v`` count the heads after they were repeated for grouped-query attention, so that an index
runs up to ``heads * head_dim``. The weight has ``kv_heads * head_dim`` rows; the row that index i means is
``(i // head_dim // n_rep) * head_dim + i % head_dim``. Its detection also writes ``attn_o``, which no merge edits: it
is passed over.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site

_KEYS = {name.replace(".", "_"): name for name in PROJECTIONS}
_NEVER_EDITED = {"attn_o"}
_GROUPED = ("attn.k", "attn.v")
_LAYER = re.compile("0|[1-9][0-9]{0,4}")
KvIndices = Literal["repeated", "rows"]


def kv_row(index: int, shape: DecoderShape) -> int:
    """Return the weight row that an index over repeated heads means."""
    return (index // shape.head_dim // shape.repeats) * shape.head_dim + index % shape.head_dim


def read_released(path: str | os.PathLike[str], shape: DecoderShape, kv_indices: KvIndices = "repeated") -> NeuronSet:
    """Read the released code's JSON as a set of neurons of a decoder of this shape.

    Args:
        kv_indices: ``repeated`` as the released code writes them, or ``rows`` for indices of real weight rows.

    Raises:
        SnrfError: the file is missing, not of this form, or an index or layer is out of the decoder's range.
    """
    members: dict[Site, torch.Tensor] = {}
    for key, by_layer in _load(path).items():
        if key in _NEVER_EDITED:
            continue
        name = _KEYS.get(key)
        if name is None:
            raise SnrfError(f"{path}: unknown projection {key!r}; the released code writes {', '.join(_KEYS)}")
        if not isinstance(by_layer, dict):
            raise SnrfError(f"{path}: {key!r} must map layer numbers to lists of indices")
        repeated = name in _GROUPED and kv_indices == "repeated"
        limit = shape.heads * shape.head_dim if repeated else shape.neurons(name)
        for layer, indices in by_layer.items():
            where = f"{path}: {key}, layer {layer!r:.20}"
            if _LAYER.fullmatch(layer) is None or int(layer) >= shape.layers:
                raise SnrfError(
                    f"{where}: the model has layers 0 to {shape.layers - 1}; give the model it was made from"
                )
            if not isinstance(indices, list) or not all(type(index) is int for index in indices):
                raise SnrfError(f"{where}: expected a list of whole numbers")
            if not indices:
                continue
            if min(indices) < 0 or max(indices) >= limit:
                worst = max(indices) if max(indices) >= limit else min(indices)
                raise SnrfError(
                    f"{where}: index {worst} is not in [0, {limit}), the range of {name} in this model"
                    f"{' over repeated heads' if repeated else ''}; give the model it was made from"
                )
            rows = [kv_row(index, shape) for index in indices] if repeated else indices
            member = torch.zeros(shape.neurons(name), dtype=torch.bool)
            member[torch.tensor(rows)] = True
            members[Site(int(layer), name)] = member
    return NeuronSet(members)


def released_json(neurons: NeuronSet, shape: DecoderShape) -> dict[str, dict[str, list[int]]]:
    """Return the released code's JSON of a set of neurons; a k or v row stands for its repetition in every head.

    Raises:
        SnrfError: the set does not fit the shape.
    """
    result: dict[str, dict[str, list[int]]] = {key: {} for key in _KEYS}
    for site, member in neurons.nonempty().items():
        if site.layer >= shape.layers or len(member) != shape.neurons(site.projection):
            raise SnrfError(
                f"{site}: the mask has {len(member)} neurons there, the model's {shape.layers} layers have "
                f"{shape.neurons(site.projection)}; give the model that the mask was made for"
            )
        indices = member.nonzero().flatten().tolist()
        if site.projection in _GROUPED:
            width, repeats = shape.head_dim, shape.repeats
            indices = sorted(
                ((row // width) * repeats + copy) * width + row % width for row in indices for copy in range(repeats)
            )
        result[site.projection.replace(".", "_")][str(site.layer)] = indices
    return result


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SnrfError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    except (ValueError, RecursionError) as error:
        raise SnrfError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise SnrfError(f"{path}: expected an object such as {{'attn_k': {{'0': [1, 2]}}}}")
    return content
