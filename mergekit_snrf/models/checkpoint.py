"""Checkpoints on disk or on the hub: names, shapes and dtypes of the tensors, and the configuration.

Reads headers and JSON only, never a weight.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.reading import DATA_BYTES, open_regular, read_bytes
from mergekit_snrf.files.shown import Shown
from mergekit_snrf.models import hub
from mergekit_snrf.models.shards import TensorHeader, parse_object, read_headers, weight_map

_MEDIA = re.compile(
    r".*\.(png|jpe?g|gif|webp|svg|pdf|mp[34]|mov|avi|wav|zip|tar|gz|npz|npy|pkl|parquet|arrow)", re.IGNORECASE
)
_SMALL = 100_000_000
"""Bytes of the largest file that is copied with a model beside its weights; tokenizers have about 30 million."""
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack)(\.index\.json)?$", re.IGNORECASE)
_OWN_FILES = {"mergekit_config.yml", "README.md"}
_NESTED_TEXT = ("text_config", "llm_config", "language_config")
_IMAGES = ("vision_config", "vision_tower", "mm_vision_tower")
_VISION = (*_IMAGES, "vision_model", "image_token_id", "image_token_index")
_TOKENIZERS = re.compile(r"tokenizer\.(json|model)|vocab\.(json|txt)|spiece\.model|.*\.(tiktoken|bpe\.model)")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_DEEPEST = 3
_AGAIN = "get the file again"


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """The headers and the configuration of one model.

    Attributes:
        name: a folder or a hub id, as the user wrote it.
        folder: None while the weights are only on the hub.
        config: the content of ``config.json``.
        files: paths of all files, with ``/``.
        commit: of the revision; None for a folder, and without a connection to the hub.
        missing: files that the model needs beside its weights and that a cache without connection lacks.
    """

    name: str
    folder: Path | None
    tensors: Mapping[str, TensorHeader]
    config: Mapping[str, Any]
    config_bytes: bytes
    files: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    commit: str | None = None
    missing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name}: {self.model_type}, {len(self.tensors)} tensors, {self.bytes} bytes>"

    @property
    def config_sha256(self) -> str:
        """The sha256 of ``config.json``."""
        return hashlib.sha256(self.config_bytes).hexdigest()

    @property
    def model_type(self) -> str:
        """The ``model_type`` of the configuration, or an empty string."""
        return str(self.config.get("model_type", ""))

    @property
    def pipeline_tag(self) -> str:
        """The hub's name of what the model does: ``image-text-to-text``, or ``text-generation``."""
        return "image-text-to-text" if any(key in self.config for key in _VISION) else "text-generation"

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def written_text_config(self) -> Mapping[str, Any]:
        """The part of ``config.json`` that describes the text decoder, as it is written."""
        nested = (self.config.get(key) for key in _NESTED_TEXT)
        return next((config for config in nested if isinstance(config, Mapping)), self.config)

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the text decoder, with transformers' defaults if it has a class for the type."""
        written = self.written_text_config
        completed = self._completed(self.config) or self._completed(written)
        if completed is None:
            return written
        # An older layout may have the same model_type: then the class reads other keys, and answers with defaults.
        sizes = ("num_hidden_layers", "hidden_size")
        return (
            completed if all(completed.get(key) == written.get(key, completed.get(key)) for key in sizes) else written
        )

    def _completed(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        from transformers import CONFIG_MAPPING

        model_type = str(config.get("model_type", ""))
        if model_type not in CONFIG_MAPPING:
            return None
        raw = {key: value for key, value in config.items() if key != "model_type"}
        try:
            return CONFIG_MAPPING[model_type](**raw).get_text_config(decoder=True).to_dict()
        except Exception as error:
            what = f"transformers refuses this {model_type} configuration ({' '.join(str(error).split())})"
            raise SnrfError(f"{self.name}/config.json", what, f"correct it, or {_AGAIN}") from None

    @property
    def needs_remote_code(self) -> bool:
        """Whether transformers must run code from the checkpoint to read the configuration, or cannot read it."""
        from transformers import CONFIG_MAPPING

        return self.model_type not in CONFIG_MAPPING and ("auto_map" in self.config or not self.model_type)

    def register_type(self) -> None:
        """Let transformers read a type that has neither a class nor code in the checkpoint, such as LLaVA's first."""
        from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

        if self.model_type and self.model_type not in CONFIG_MAPPING and "auto_map" not in self.config:
            written = type("WrittenConfig", (PretrainedConfig,), {"model_type": self.model_type})
            AutoConfig.register(self.model_type, written)

    def side_files(self) -> tuple[str, ...]:
        """Return the small files that belong to the model: configuration, tokenizer, processor, templates, code.

        A folder with weights of its own is another model. ``SnrfError``: the cache lacks some, or one is unreadable.
        """
        if self.missing:
            what = f"the cache lacks {', '.join(self.missing)}, and the hub cannot be reached"
            raise SnrfError(self.name, what, f"download the model first (hf download {self.name})")
        files = _side_files(self.files)
        return files if self.folder is None else tuple(name for name in files if _size(self.folder / name) <= _SMALL)

    def local(self, cache_dir: str | None = None) -> Path:
        """Return the folder of the shards and side files, downloaded if they are only on the hub."""
        if self.folder is not None:
            return self.folder
        shards = sorted({tensor.file for tensor in self.tensors.values()})
        files = [*shards, *self.side_files(), "*.index.json"]
        return hub.download(self.name, self.revision, files, cache_dir)


def _side_files(files: Sequence[str]) -> tuple[str, ...]:
    models = {folder for folder in map(posixpath.dirname, filter(_WEIGHTS.match, files)) if folder}

    def belongs(path: str) -> bool:
        folder, name = posixpath.split(path)
        above = {folder, *map(str, PurePosixPath(folder).parents)}
        return (
            path not in _OWN_FILES
            and not _WEIGHTS.match(name)
            and not any(part.startswith(".") for part in path.split("/"))
            and not models & above
            and "__pycache__" not in path.split("/")
            and not _MEDIA.fullmatch(name)
        )

    return tuple(sorted(filter(belongs, files)))


def _size(path: Path) -> int:
    with open_regular(path, remedy=_AGAIN) as file:
        return os.fstat(file.fileno()).st_size


def weight_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of ``names`` that are weights, or an index of weights."""
    return tuple(sorted(name for name in names if _WEIGHTS.match(name)))


def open_checkpoint(
    name: str, revision: str | None = None, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Read the headers of a local folder or of a model on the hub; no weights are read, no code is executed.

    Args:
        revision: of the hub id.
        cache_dir: where mergekit keeps downloaded models.

    Raises:
        SnrfError: there is no such model, or a file of it is missing or damaged.
    """
    if os.path.isdir(name):
        return _from_folder(name, Path(name), trust_remote_code=trust_remote_code)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or os.path.isdir(os.path.dirname(name)):
        remedy = "give the folder of a checkpoint, or a hub id such as owner/model"
        if "+" in name:
            remedy = "only a recipe takes base+adapter; merge the adapter into its base first"
        raise SnrfError(name, "no such folder", remedy)
    return _from_hub(name, revision, cache_dir, trust_remote_code)


def _from_folder(name: str, folder: Path, **more: Any) -> Checkpoint:
    config_path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not config_path.exists():
        raise SnrfError(name, "is an adapter without its model", "write BASE+ADAPTER in a recipe, or merge it first")
    config_bytes = read_bytes(config_path, DATA_BYTES, remedy=f"{name} is not the folder of a checkpoint")
    return Checkpoint(
        name=name,
        folder=folder,
        tensors=read_headers(folder),
        config=parse_object(config_bytes, config_path),
        config_bytes=config_bytes,
        **{"files": _files(folder), **more},
    )


def _files(folder: Path) -> tuple[str, ...]:
    found: list[str] = []
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        folders[:] = [n for n in folders if n[0] not in "._" and len(inside.parts) < _DEEPEST]
        found += [(inside / name).as_posix() for name in names]
    return tuple(sorted(found))


def _from_hub(name: str, revision: str | None, cache_dir: str | None, trust_remote_code: bool) -> Checkpoint:
    found = hub.find_repository(name, revision)
    known: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(found, SnrfError):
        cached = hub.cached_snapshot(name, revision, cache_dir)
        if cached is None or not _has_weights(cached):
            raise found
        checkpoint = _from_folder(name, cached, **known)
        return replace(checkpoint, missing=_missing(checkpoint))
    commit, files = found
    known |= {"commit": commit, "files": files}
    cached = hub.cached_snapshot(name, commit, cache_dir)
    if cached is not None and _has_weights(cached):
        if hub.lacking(cached, _side_files(files)):
            hub.download(name, revision, _side_files(files), cache_dir)
        return _from_folder(name, cached, **known)
    config_path = hub.download(name, revision, ["config.json"], cache_dir) / "config.json"
    config_bytes = read_bytes(config_path, DATA_BYTES, remedy=_AGAIN)
    return Checkpoint(
        name=name,
        folder=None,
        tensors=hub.remote_headers(name, commit),
        config=parse_object(config_bytes, config_path),
        config_bytes=config_bytes,
        **known,
    )


def _has_weights(folder: Path) -> bool:
    """Tell whether a snapshot has the configuration and every shard that its index names."""
    if not (folder / "config.json").is_file():
        return False
    places = weight_map(folder)
    return places is not None and (isinstance(places, str) or not hub.lacking(folder, set(places.values())))


def _missing(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the files that the configuration of a cached model calls for and the cache lacks."""
    files, config = checkpoint.files, checkpoint.config
    code = config.get("auto_map")
    references = code.values() if isinstance(code, Mapping) else ()
    # A reference is module.Class; owner/model--module.Class is code of another repository.
    modules = {f"{one.partition('.')[0]}.py" for one in references if isinstance(one, str) and "--" not in one}
    needed = ["tokenizer_config.json", *modules]
    missing = [name for name in needed if name not in files]
    if not any(map(_TOKENIZERS.fullmatch, files)):
        missing.append("tokenizer.json")
    if any(key in config for key in _IMAGES) and not any(name in files for name in _PROCESSORS):
        missing.append(_PROCESSORS[0])
    return tuple(sorted(missing))
