"""Deterministic, validated safetensors files: what masks, profiles, moments, counts and journals have in common.

The safetensors library reads; the header is written here, because the library writes ``__metadata__`` in hash
order, and equal inputs must give equal bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import safetensors
from pydantic import BaseModel, ValidationError

from mergekit_snrf.errors import SnrfError, first_line, invalid
from mergekit_snrf.files.writing import replacing

if TYPE_CHECKING:
    from torch import Tensor

Framework = Literal["pt", "np"]
_Content = TypeVar("_Content", bound=BaseModel)
_Path = str | os.PathLike[str]

_MAX_DEPTH = 100  # Pydantic cannot write what is nested deeper than 255 levels.
_DAMAGED = "the file is damaged, get it again"
# AttributeError: of a dtype that this torch lacks.
_READING = (safetensors.SafetensorError, OSError, AttributeError, TypeError, KeyError, RuntimeError, MemoryError)
_DTYPES = {
    **{"torch.bool": "BOOL", "torch.int32": "I32", "torch.int64": "I64"},
    **{"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float64": "F64"},
}


@dataclass(frozen=True)
class Format:
    """One kind of file, by its ``name`` and ``version`` in the metadata.

    Attributes:
        made: how to make one, for messages.
        again: what to do with a damaged one.
        instead: by the name of another format, what to do with such a file where this one is needed.
    """

    name: str
    version: int
    made: str
    again: str
    instead: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: _Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Write ``tensors`` and the JSON object ``content`` so that equal arguments give equal bytes."""
        from torch import uint8

        snrf = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        metadata = {"format": self.name, "version": str(self.version), "snrf": snrf}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        # Wide dtypes first keeps every tensor aligned to its element size.
        order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))
        for key in order:
            tensor = tensors[key]
            start, end = end, end + tensor.numel() * tensor.element_size()
            dtype = _DTYPES[str(tensor.dtype)]
            header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        # A file name that is not Unicode has surrogates, which no other reader of the header would accept.
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        text += b" " * (-len(text) % 8)
        with replacing(path) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for key in order:
                flat = tensors[key].detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(uint8).numpy().data)

    @contextmanager
    def opened(self, path: _Path, framework: Framework = "pt") -> Iterator[tuple[Any, dict[str, Any]]]:
        """Open a file: safetensors' reader, whose tensors are not read yet, and the JSON object.

        ``SnrfError``: it is missing, damaged, or of another format or version.
        """
        path = Path(path)
        if not os.path.isfile(path):
            reason = "is not a file" if os.path.exists(path) else "does not exist"
            raise SnrfError(path, reason, f"give the path of a {self.name} file")
        try:
            with safetensors.safe_open(path, framework=framework) as file:
                metadata = file.metadata() or {}
                self._check(path, metadata)
                yield file, _content(path, metadata)
        except _READING as error:
            what = f"not a readable safetensors file ({first_line(error)})"
            raise SnrfError(path, what, "it is damaged or truncated, get it again") from None

    def read(self, path: _Path, framework: Framework = "pt") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of a file and its JSON object; ``SnrfError`` as ``opened``.

        With ``framework="np"`` the tensors are arrays of numpy, and torch is not imported. Nothing in the file is
        executed or unpickled; boolean bytes other than 0 and 1 are refused.
        """
        with self.opened(path, framework) as (file, content):
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, tensor in tensors.items():
            boolean = str(tensor.dtype).removeprefix("torch.") == "bool"
            if boolean and len(flat := np.asarray(tensor).reshape(-1)) and int(flat.view(np.uint8).max()) > 1:
                raise SnrfError(path, f"tensor {key!r} holds bytes that are not booleans", _DAMAGED)
        return tensors, content

    def parsed(self, path: _Path, content: Mapping[str, Any], of: type[_Content]) -> _Content:
        """Return the JSON object of a file as a pydantic model; ``SnrfError`` names the key at fault."""
        try:
            return of.model_validate(content)
        except ValidationError as error:
            raise invalid(path, error.errors(), remedy=self.again) from None

    def check_replaceable(self, path: _Path) -> None:
        """Raise ``SnrfError`` where a file would replace one of another kind, such as a model's weights."""
        if not os.path.isfile(path):
            return
        try:
            with self.opened(path, "np"):
                pass
        except SnrfError:
            what = f"already exists and is not a {self.name} file"
            raise SnrfError(path, what, "choose another path, or delete it") from None

    def _check(self, path: Path, metadata: Mapping[str, str]) -> None:
        if (found := metadata.get("format")) != self.name:
            what = f"a {self.name} file is needed, but its metadata says format={found!r}"
            raise SnrfError(path, what, self.instead.get(str(found), self.made))
        if metadata.get("version") != str(self.version):
            what = f"{self.name} version {metadata.get('version')!r} is not supported, only {self.version}"
            raise SnrfError(path, what, "update mergekit-snrf")


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
