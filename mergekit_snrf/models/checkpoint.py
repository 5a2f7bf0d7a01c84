"""A checkpoint as it lies on disk or on a hub: names, shapes and dtypes of its tensors, and its configuration.

Reads headers and JSON only, never a weight.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch

from mergekit_snrf.errors import SnrfError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors dtype."""

FLOAT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""safetensors names of the dtypes that weights are computed with, and torch's names for them."""

_TORCH_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.complex64: "C64",
}  # fmt: skip

_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".spm", ".bpe"}
_SIDE_PREFIXES = ("license", "notice", "use_policy")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack)(\.index\.json)?$", re.IGNORECASE)
_OWN_FILES = {"mergekit_config.yml", "README.md"}


@dataclass(frozen=True)
class TensorHeader:
    """What a checkpoint's header says of one tensor.

    Attributes:
        dtype: as safetensors writes it, such as ``BF16``.
        file: the shard's name inside the checkpoint.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return self.parameters * ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """The headers and the configuration of one model.

    Attributes:
        name: as the user wrote it: a folder or a hub id.
        folder: the local folder, or None while the weights are only on the hub.
        tensors: by name on disk.
        config: the parsed ``config.json``.
        config_bytes: ``config.json`` as it lies on disk.
        files: names of all files at the top level of the checkpoint.
    """

    name: str
    folder: Path | None
    tensors: Mapping[str, TensorHeader]
    config: Mapping[str, Any]
    config_bytes: bytes = field(repr=False)
    files: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def config_sha256(self) -> str:
        """The sha256 of ``config.json``."""
        return hashlib.sha256(self.config_bytes).hexdigest()

    @property
    def model_type(self) -> str:
        """The ``model_type`` of the configuration, or an empty string."""
        return str(self.config.get("model_type", ""))

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the text decoder, with transformers' defaults filled in where it knows the type.

        Raises:
            SnrfError: transformers knows the type but refuses the values.
        """
        from transformers import CONFIG_MAPPING

        def known(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
            model_type = str(config.get("model_type", ""))
            if model_type not in CONFIG_MAPPING:
                return None
            raw = {key: value for key, value in config.items() if key != "model_type"}
            try:
                return CONFIG_MAPPING[model_type](**raw).get_text_config(decoder=True).to_dict()
            except Exception as error:
                raise SnrfError(
                    f"{self.name}/config.json: transformers refuses this {model_type} configuration "
                    f"({' '.join(str(error).split())}); mend it, or get the file again"
                ) from None

        nested = (self.config.get(key) for key in ("text_config", "llm_config", "language_config"))
        inner = next((config for config in nested if isinstance(config, Mapping)), self.config)
        return known(self.config) or known(inner) or inner

    @property
    def needs_remote_code(self) -> bool:
        """Whether transformers can only read the configuration by running code from the checkpoint."""
        from transformers import CONFIG_MAPPING

        return self.model_type not in CONFIG_MAPPING

    def side_files(self) -> tuple[str, ...]:
        """Return the small files that belong to the model: configuration, tokenizer, processor, templates, code."""
        return tuple(
            sorted(
                name
                for name in self.files
                if name not in _OWN_FILES
                and not _WEIGHTS.match(name)
                and not name.startswith(".")
                and (Path(name).suffix in _SIDE_SUFFIXES or name.lower().startswith(_SIDE_PREFIXES))
            )
        )


def weight_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of ``names`` that are weights, or an index of weights."""
    return tuple(sorted(name for name in names if _WEIGHTS.match(name)))


def open_checkpoint(
    name: str,
    revision: str | None = None,
    *,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Read the headers of a local folder, of a model in the hub's cache, or of a model on the hub.

    Args:
        name: a folder, or a hub id.
        revision: of the hub id.
        cache_dir: where mergekit keeps downloaded models (``--transformers-cache``).
        trust_remote_code: kept for those who load the model later; nothing is executed here.

    Raises:
        SnrfError: there is no such model, or a file of it is missing or damaged.
    """
    if os.path.isdir(name):
        return _from_folder(name, Path(name), None, trust_remote_code)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise SnrfError(f"{name}: no such folder; give the folder of a checkpoint, or a hub id such as owner/model")
    return _from_hub(name, revision, cache_dir, trust_remote_code)


def _from_folder(name: str, folder: Path, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    config_bytes = _read_bytes(folder / "config.json", f"{name} is not a checkpoint folder")
    config = _parse_json(folder / "config.json", config_bytes)
    return Checkpoint(
        name=name,
        folder=folder,
        tensors=_read_headers(folder),
        config=config,
        config_bytes=config_bytes,
        files=tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_file())),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SnrfError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SnrfError(f"{path}: not valid JSON ({error}); the file is damaged, get it again") from None
    if not isinstance(parsed, dict):
        raise SnrfError(f"{path}: not a JSON object; the file is damaged, get it again")
    return parsed


def _read_headers(folder: Path) -> dict[str, TensorHeader]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = _parse_json(index, _read_bytes(index, "get it again")).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(v, str) and Path(v).name == v for v in weight_map.values()
            ):
                raise SnrfError(f"{index}: 'weight_map' does not map tensors to file names; get the index again")
            shards = {file: _read_shard(folder / file) for file in sorted(set(weight_map.values()))}
            missing = sorted(tensor for tensor, file in weight_map.items() if tensor not in shards[file])
            if missing:
                raise SnrfError(
                    f"{folder / weight_map[missing[0]]}: the index places tensor {missing[0]!r} in this file, which "
                    f"does not hold it ({len(missing)} such tensors); get the shard again"
                )
            return {tensor: shards[file][tensor] for tensor, file in weight_map.items()}
        if (folder / stem).is_file():
            return _read_shard(folder / stem)
    raise SnrfError(
        f"{folder}: holds neither model.safetensors nor pytorch_model.bin nor an index of shards; "
        f"give the folder of a complete checkpoint"
    )


def _read_shard(path: Path) -> dict[str, TensorHeader]:
    if not os.path.isfile(path):
        raise SnrfError(f"{path}: the index names this shard, but the file is missing; get it again")
    try:
        if path.suffix == ".safetensors":
            headers = {}
            with safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    headers[key] = TensorHeader(tensor.get_dtype(), tuple(tensor.get_shape()), path.name)
            return headers
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        state = state.get("state_dict", state) if isinstance(state, Mapping) else state
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise ValueError("it does not map names to tensors")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SnrfError(f"{path}: cannot be read ({reason}); get the file again or convert it to safetensors") from None
    return {
        key: TensorHeader(_TORCH_DTYPES.get(value.dtype, str(value.dtype)), tuple(value.shape), path.name)
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _from_hub(name: str, revision: str | None, cache_dir: str | None, trust_remote_code: bool) -> Checkpoint:
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    cached = _cached_snapshot(name, revision, cache_dir)
    if cached is not None:
        return _from_folder(name, cached, revision, trust_remote_code)
    try:
        api = huggingface_hub.HfApi()
        files = api.list_repo_files(name, revision=revision)
        config_path = Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision, cache_dir=cache_dir))
        metadata = api.get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        raise SnrfError(
            f"{name}: has no safetensors weights on the hub; download it first (hf download {name}) and give the folder"
        ) from None
    except Exception as error:
        # What huggingface_hub, httpx and the file system raise has no common base; the type tells what was not found.
        reason = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
        raise SnrfError(
            f"{name}: neither a local folder nor a model that the hub gives ({reason}); check the name, the network "
            f"and the login (hf auth login)"
        ) from None
    config_bytes = config_path.read_bytes()
    return Checkpoint(
        name=name,
        folder=None,
        tensors={
            key: TensorHeader(tensor.dtype, tuple(tensor.shape), file)
            for file, shard in metadata.files_metadata.items()
            for key, tensor in shard.tensors.items()
        },
        config=_parse_json(config_path, config_bytes),
        config_bytes=config_bytes,
        files=tuple(sorted(file for file in files if "/" not in file)),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _cached_snapshot(name: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """Return the cached snapshot if it is complete: configuration, and every shard its index names."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None
    if not (folder / "config.json").is_file():
        return None
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = _parse_json(index, _read_bytes(index, "get it again")).get("weight_map")
            files = weight_map.values() if isinstance(weight_map, dict) else ()
            return folder if all(os.path.isfile(folder / str(file)) for file in files) else None
        if (folder / stem).is_file():
            return folder
    return None
