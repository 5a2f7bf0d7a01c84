"""What a profiling run is asked for, checked before anything is loaded, and written down for resume and provenance."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import DecoderShape, find_decoder, pairing_problems
from mergekit_snrf.neurons.maskfile import check_replaceable
from mergekit_snrf.profiling.journal import journals_of
from mergekit_snrf.profiling.measure.meter import Measure
from mergekit_snrf.profiling.probes.rows import Rows
from mergekit_snrf.profiling.settings import ProfileConfig, SideConfig

SideName = Literal["target", "source"]
SIDES: tuple[SideName, ...] = ("target", "source")

_PACKAGES = ("mergekit-snrf", "torch", "transformers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before it is loaded.

    Attributes:
        name: folder or hub id, for messages.
        shape: of its text decoder.
        config_sha256: of its config.json, None for GGUF.
        content_sha256: of the names and shapes of its tensors and of its small files, such as the tokenizer.
    """

    name: str
    shape: DecoderShape
    model_type: str
    config_sha256: str | None = None
    content_sha256: str | None = None


def side_of(config: ProfileConfig, name: SideName) -> SideConfig:
    """Return one of the two sides."""
    return config.target if name == "target" else config.source


def measure_of(config: ProfileConfig) -> Measure:
    """Return what the configuration asks to measure."""
    return Measure(config.scoring, config.weight, config.site, config.tokens)


def stem_of(mask: str | os.PathLike[str], side: SideName) -> Path:
    """Return the path that the files of one side begin with, beside the mask: ``folder/mask.target``."""
    path = Path(mask)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.{side}")


def profile_path(mask: str | os.PathLike[str], side: SideName) -> Path:
    """Return where the profile of one side lies, ``folder/mask.target.profile.safetensors``."""
    stem = stem_of(mask, side)
    return stem.with_name(f"{stem.name}.profile.safetensors")


def check_output(mask: str | os.PathLike[str], *, resume: bool) -> None:
    """Check that the mask can be written, and that no unfinished run would be lost.

    Raises:
        SnrfError: it cannot, or there are journals and ``resume`` is not asked for.
    """
    if not os.fspath(mask):
        raise SnrfError("the path of the mask to write is empty; give one such as mask.safetensors")
    path = Path(mask)
    if path.is_dir():
        raise SnrfError(
            f"{path}: is a folder; give the path of the mask file to write, such as {path / 'mask.safetensors'}"
        )
    if path.suffix != ".safetensors":
        raise SnrfError(f"{path}: the name of a mask file must end in .safetensors")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SnrfError(
            f"{path}: cannot be written ({error.strerror or error}); choose a folder that exists and is writable"
        ) from None
    check_replaceable(path)
    unfinished = [file for side in SIDES for file in journals_of(stem_of(mask, side))]
    if unfinished and not resume:
        raise SnrfError(
            f"{unfinished[0]}: an unfinished run lies here; add --resume to go on with it, or delete its journals "
            f"({stem_of(mask, 'target').stem}.*.journal-*.safetensors) to start anew"
        )


def check_models(config: ProfileConfig) -> dict[SideName, ModelInfo]:
    """Read the headers of both models and check that their neurons pair.

    Raises:
        SnrfError: a model cannot be read, has no usable text decoder, or the two have different shapes.
    """
    checkpoints: dict[SideName, Checkpoint] = {}
    models: dict[SideName, ModelInfo] = {}
    for name in SIDES:
        side = side_of(config, name)
        if side.gguf_file is not None:
            models[name] = _gguf_info(side)
            continue
        checkpoint = open_checkpoint(side.model, side.revision, trust_remote_code=config.trust_remote_code)
        checkpoints[name] = checkpoint
        shape = find_decoder(checkpoint).shape
        models[name] = ModelInfo(
            side.model, shape, checkpoint.model_type, checkpoint.config_sha256, _content_sha256(checkpoint)
        )
    if len(checkpoints) == 2:
        target, source = checkpoints["target"], checkpoints["source"]
        problems = pairing_problems(target, source, any_family=True)
        if problems:
            raise SnrfError("; ".join(problems))
        for problem in pairing_problems(target, source):
            logger.warning("%s", problem)
    elif models["target"].shape != models["source"].shape:
        raise SnrfError(
            f"the target {models['target'].name} has the decoder {models['target'].shape}, the source "
            f"{models['source'].name} has {models['source'].shape}; use a source with the same decoder shape"
        )
    return models


def _gguf_info(side: SideConfig) -> ModelInfo:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(side.model, gguf_file=side.gguf_file, revision=side.revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise SnrfError(f"{side.model}/{side.gguf_file}: cannot be read as GGUF ({reason}); check the path") from None
    heads = config.num_attention_heads
    shape = DecoderShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
    )
    return ModelInfo(side.model, shape, config.model_type)


def _content_sha256(checkpoint: Checkpoint) -> str:
    tensors = {name: [header.dtype, *header.shape] for name, header in checkpoint.tensors.items()}
    digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
    for name in checkpoint.side_files() if checkpoint.folder is not None else ():
        assert checkpoint.folder is not None
        digest.update(name.encode() + b"\0" + hashlib.sha256((checkpoint.folder / name).read_bytes()).digest())
    return digest.hexdigest()


def request_of(
    config: ProfileConfig, name: SideName, model: ModelInfo, rows: Rows, folder: Path | None, *, device: str, block: int
) -> dict[str, Any]:
    """Return everything that the bytes of a profile depend on, as JSON values.

    Paths are as the user wrote them: those found beside profile.yml are relative to it.
    """
    side = side_of(config, name)
    digest = hashlib.sha256()
    for row in rows.rows:
        content = [row.number, dict(row.fields), row.question, list(row.images), row.answer]
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    kernel: dict[str, Any] = {} if config.backend == "auto" else {"backend": config.backend}
    return {
        **kernel,
        "model": {
            "path": _written(side.model, folder),
            "revision": side.revision,
            "gguf_file": side.gguf_file,
            "config_sha256": model.config_sha256,
            "content_sha256": model.content_sha256,
        },
        "probes": {**_probes(side, folder), "rows_sha256": digest.hexdigest()},
        "template": side.template,
        "answer": config.answer.model_dump(exclude_none=True),
        "limit": config.limit,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "token_limit": config.token_limit,
        "dtype": config.dtype,
        "device": device,
        "block_bytes": block,
        "measure": measure_of(config).provenance(),
        "versions": versions(),
    }


def fingerprint(request: Mapping[str, Any]) -> str:
    """Return the sha256 of a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def probes_provenance(config: ProfileConfig, name: SideName, folder: Path | None) -> dict[str, Any]:
    """Return where the probes of one side come from."""
    side = side_of(config, name)
    found = {**_probes(side, folder), "limit": config.limit, "template": side.template}
    return {key: value for key, value in found.items() if value is not None}


def model_path(config: ProfileConfig, name: SideName, folder: Path | None) -> str:
    """Return a model's path or hub id as the user wrote it."""
    return _written(side_of(config, name).model, folder)


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers come from."""
    return {package: torch.__version__ if package == "torch" else version(package) for package in _PACKAGES}


def _probes(side: SideConfig, folder: Path | None) -> dict[str, Any]:
    found = side.probes.model_dump(exclude_none=True)
    return {**found, "dataset": _written(side.probes.dataset, folder)}


def _written(value: str, folder: Path | None) -> str:
    if folder is None or folder == Path():
        return value
    try:
        return Path(value).relative_to(folder).as_posix()
    except ValueError:
        return value
