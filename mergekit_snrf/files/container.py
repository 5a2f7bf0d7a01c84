"""Deterministic, validated safetensors files: what mask, profile and journal files have in common.

The safetensors library reads; the header is written here, because the library writes ``__metadata__`` in hash
order, and equal inputs must give equal bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.writing import replacing

if TYPE_CHECKING:
    from torch import Tensor

Framework = Literal["pt", "np"]

_MAX_DEPTH = 100  # Pydantic cannot write what is nested deeper than 255 levels.
_DAMAGED = "the file is damaged, get it again"
_DTYPES = {
    **{"torch.bool": "BOOL", "torch.int32": "I32", "torch.int64": "I64"},
    **{"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float64": "F64"},
}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    file_format: str,
    version: int,
    content: Mapping[str, Any],
) -> None:
    """Write ``tensors`` and the JSON object ``content`` so that equal arguments give equal bytes."""
    from torch import uint8

    snrf = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": file_format, "version": str(version), "snrf": snrf}}
    end = 0
    # Wide dtypes first keeps every tensor aligned to its element size.
    order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))
    for key in order:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end]}
    # A file name that is not Unicode has surrogates, which no other reader of the header would accept.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            flat = tensors[key].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(uint8).numpy().data)


@contextmanager
def opened(
    path: str | os.PathLike[str], *, file_format: str, version: int, framework: Framework = "pt"
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file written by ``write``: safetensors' reader, whose tensors are not read yet, and the JSON object.

    ``SnrfError``: it is missing, damaged, or of another format or version.
    """
    path = Path(path)
    if not os.path.isfile(path):
        reason = "is not a file" if os.path.exists(path) else "does not exist"
        raise SnrfError(path, reason, f"give the path of a {file_format} file")
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata, file_format, version)
            yield file, _content(path, metadata)
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        what = f"not a readable safetensors file ({first_line(error)})"
        raise SnrfError(path, what, "it is damaged or truncated, get it again") from None


def read(
    path: str | os.PathLike[str], *, file_format: str, version: int, framework: Framework = "pt"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by ``write``: its tensors and its JSON object; ``SnrfError`` as ``opened``.

    With ``framework="np"`` the tensors are arrays of numpy, and torch is not imported. Nothing in the file is executed
    or unpickled; boolean bytes other than 0 and 1 are refused.
    """
    with opened(path, file_format=file_format, version=version, framework=framework) as (file, content):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in tensors.items():
        boolean = str(tensor.dtype).removeprefix("torch.") == "bool"
        if boolean and len(flat := np.asarray(tensor).reshape(-1)) and int(flat.view(np.uint8).max()) > 1:
            raise SnrfError(path, f"tensor {key!r} holds bytes that are not booleans", _DAMAGED)
    return tensors, content


def _content(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = json.loads(metadata.get("snrf", "{}"))
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or _depth(content) > _MAX_DEPTH:
        what = f"the metadata entry 'snrf' is not a JSON object of Unicode text at most {_MAX_DEPTH} levels deep"
        raise SnrfError(path, what, _DAMAGED)
    return content


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _check_format(path: Path, metadata: Mapping[str, str], file_format: str, version: int) -> None:
    if (found := metadata.get("format")) != file_format:
        what = f"a {file_format} file is needed, but its metadata says format={found!r}"
        instead = _INSTEAD.get((file_format, str(found))) or _MAKERS.get(file_format, "give another file")
        raise SnrfError(path, what, instead)
    if metadata.get("version") != str(version):
        what = f"{file_format} version {metadata.get('version')!r} is not supported, only {version}"
        raise SnrfError(path, what, "update mergekit-snrf")


_INSTEAD = {
    ("snrf-mask", "snrf-profile"): "select a mask from two such profiles: snrf mask select A B OUT",
    ("snrf-mask", "snrf-moments"): "give moments as moments: FILE, with update: regmean",
    ("snrf-mask", "snrf-domains"): "select masks from such a file: snrf domains select FILE DIR",
    ("snrf-profile", "snrf-mask"): "a mask is made from profiles, which snrf-profile writes beside it",
    ("snrf-moments", "snrf-mask"): "give a mask as masks: FILE, without update: regmean",
}
_MAKERS = {
    "snrf-mask": "make one with snrf-profile, 'snrf mask import', or from profiles with 'snrf mask select'",
    "snrf-profile": "make one with snrf-profile",
    "snrf-moments": "make one with snrf-profile and keep: in profile.yml, or with 'snrf moments'",
}
