"""The settings of a profiling run: checked before a model is loaded, and written down for resume and provenance."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.files.container import Format
from mergekit_snrf.files.references import sha256
from mergekit_snrf.files.writing import check_writable
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import DecoderShape, find_decoder, pairing_problems
from mergekit_snrf.models.loading import load_config
from mergekit_snrf.neurons.maskfile import MASK, ModelProvenance
from mergekit_snrf.profiling.journal import differences
from mergekit_snrf.profiling.probes.source import ProbeColumns, Prompting
from mergekit_snrf.profiling.result.profilefile import ProfileProvenance
from mergekit_snrf.profiling.settings import SIDES, Kind, ProfileConfig, SideName

_PACKAGES = ("mergekit-snrf", "torch", "transformers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """A model's headers and small files, read before its weights.

    ``config_sha256`` is of its config.json, ``content_sha256`` of the names and shapes of its tensors and of its small
    files, such as the tokenizer. Both are None for GGUF.
    """

    shape: DecoderShape
    model_type: str
    config_sha256: str | None = None
    content_sha256: str | None = None


def stem_of(mask: str | os.PathLike[str], part: str) -> Path:
    """Return the path that the files of a part of a run begin with, beside the mask: ``folder/mask.target``."""
    path = Path(mask)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.{part}")


def profile_path(mask: str | os.PathLike[str], side: SideName) -> Path:
    """Return the path of the profile of one side, ``folder/mask.target.profile.safetensors``."""
    return stem_of(mask, f"{side}.profile.safetensors")


def check_output(mask: str | os.PathLike[str], *, resume: bool, kind: Format = MASK) -> None:
    """Raise ``SnrfError`` where a file cannot be written, or an unfinished run would be lost without ``resume``."""
    check_writable(mask)
    path = Path(mask)
    # Profiles and journals lie beside a mask that is a link.
    check_writable(stem_of(path, "profile.safetensors"))
    if path.suffix != ".safetensors":
        raise SnrfError(path, "is not the name of a mask file", "use a name that ends in .safetensors")
    kind.check_replaceable(path)
    found = path.parent.glob("*.journal-*.safetensors")
    unfinished = sorted(file for file in found if file.name.startswith(stem_of(path, "").name))
    if unfinished and not resume:
        names = stem_of(path, "*.journal-*.safetensors").name
        remedy = f"resume the run, or delete its journals ({names})"
        raise SnrfError(unfinished[0], "is the journal of an unfinished run", remedy, field="resume")


def check_models(config: ProfileConfig) -> dict[SideName, ModelInfo]:
    """Return the headers of both models; an error if they have no usable text decoders of the same shape."""
    (target, of_target), (source, of_source) = (opened(config.kind(name)) for name in SIDES)
    if of_target is not None and of_source is not None:
        problems = pairing_problems(of_target, of_source, any_family=True)
        if problems:
            raise SnrfError(None, "; ".join(map(str, problems)))
        for problem in pairing_problems(of_target, of_source):
            logger.warning("%s", problem.what)
    elif target.shape != source.shape:
        what = f"the decoder has the shape {source.shape}, that of {config.target.model} has {target.shape}"
        raise SnrfError(config.kind("source").model.model, what, "use a source with the same decoder shape")
    return {"target": target, "source": source}


def opened(kind: Kind) -> tuple[ModelInfo, Checkpoint | None]:
    """Return the headers of a model, and its checkpoint unless it is GGUF.

    ``SnrfError``: it cannot be read, or has no usable text decoder.
    """
    ref = kind.model
    with naming(kind.model_keys):
        if ref.gguf_file is not None:
            config = load_config(ref)
            return ModelInfo(DecoderShape.of(config.to_dict()), config.model_type), None
        checkpoint = open_checkpoint(ref.model, ref.revision, trust_remote_code=ref.trust_remote_code)
        shape = find_decoder(checkpoint).shape
    info = ModelInfo(shape, checkpoint.model_type, checkpoint.config_sha256, _content_sha256(checkpoint))
    return info, checkpoint


def _content_sha256(checkpoint: Checkpoint) -> str:
    tensors = {name: [header.dtype, *header.shape] for name, header in checkpoint.tensors.items()}
    digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
    folder = checkpoint.folder
    if folder is not None:
        for name in checkpoint.side_files():
            digest.update(name.encode() + b"\0" + bytes.fromhex(sha256(folder / name)))
    return digest.hexdigest()


def fingerprint(request: Any) -> str:
    """Return the sha256 of a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def changes(was: ProfileProvenance, request: Mapping[str, Any]) -> list[str]:
    """Return the settings of a request that differ from those of a finished profile, as far as it records them."""
    model, probes = was.model or ModelProvenance(), (was.model and was.model.probes) or {}
    columns = [name for name in ProbeColumns.model_fields if name != "answer"]
    before = {
        "model": {"path": model.path, "config_sha256": model.config_sha256, "revision": model.revision},
        "probes": {name: probes.get(name) for name in columns},
        "answer": {key: value for key, value in probes.get("answer", {}).items() if key != "cut"},
        **{key: probes.get(key) for key in ("limit", *Prompting.model_fields)},
        **{key: getattr(was, key) for key in ("seed", "dtype", "measure", "versions")},
    }
    now: dict[str, Any] = {key: request.get(key) for key in before}
    for key in ("model", "probes"):
        now[key] = {name: request[key].get(name) for name in before[key]}
    if now["model"]["revision"] is None:  # Then the profile records the commit that was found.
        before["model"]["revision"] = None
    if now["dtype"] == "auto":  # Then it records the checkpoint's.
        before["dtype"] = "auto"
    return differences(before, now)


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    return {package: torch.__version__ if package == "torch" else version(package) for package in _PACKAGES}
