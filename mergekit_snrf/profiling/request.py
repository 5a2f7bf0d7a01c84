"""The settings of a profiling run: checked before a model is loaded, and written down for resume and provenance."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mergekit_snrf.errors import SnrfError, naming, os_reason
from mergekit_snrf.files.references import sha256
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import DecoderShape, find_decoder, pairing_problems
from mergekit_snrf.models.loading import load_config
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.maskfile import ModelProvenance, check_replaceable
from mergekit_snrf.profiling.journal import Tally, differences
from mergekit_snrf.profiling.probes.batches import Probes, probes_sha256
from mergekit_snrf.profiling.probes.rows import Rows
from mergekit_snrf.profiling.probes.source import AnswerRule, ProbeColumns, ProbeSource
from mergekit_snrf.profiling.result.profilefile import ProfileProvenance
from mergekit_snrf.profiling.settings import SIDES, ProfileConfig, SideConfig, SideName, model_keys

_PACKAGES = ("mergekit-snrf", "torch", "transformers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """A model's headers and small files, read before its weights.

    Attributes:
        shape: of its text decoder.
        config_sha256: of its config.json, None for GGUF.
        content_sha256: of the names and shapes of its tensors and of its small files, such as the tokenizer.
    """

    shape: DecoderShape
    model_type: str
    config_sha256: str | None = None
    content_sha256: str | None = None


def stem_of(mask: str | os.PathLike[str], side: SideName) -> Path:
    """Return the path that the files of one side begin with, beside the mask: ``folder/mask.target``."""
    path = Path(mask)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.{side}")


def profile_path(mask: str | os.PathLike[str], side: SideName) -> Path:
    """Return the path of the profile of one side, ``folder/mask.target.profile.safetensors``."""
    stem = stem_of(mask, side)
    return stem.with_name(f"{stem.name}.profile.safetensors")


def check_output(
    mask: str | os.PathLike[str], *, resume: bool, replaceable: Callable[[Path], None] = check_replaceable
) -> None:
    """Check that the mask can be written and no unfinished run would be lost.

    Args:
        replaceable: raises ``SnrfError`` where another kind of file lies.

    Raises:
        SnrfError: it cannot be written, or there are journals and ``resume`` is False.
    """
    if not os.fspath(mask):
        raise SnrfError(None, "the path of the mask to write is empty", "use one such as mask.safetensors")
    path = Path(mask)
    if path.is_dir():
        raise SnrfError(path, "is a folder", f"use the path of a mask file, such as {path / 'mask.safetensors'}")
    if path.suffix != ".safetensors":
        raise SnrfError(path, "is not the name of a mask file", "use a name that ends in .safetensors")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        what = f"cannot be written ({os_reason(error)})"
        raise SnrfError(path, what, "choose a folder that exists and is writable") from None
    replaceable(path)
    stem = path.name.removesuffix(".safetensors")
    found = path.parent.glob("*.journal-*.safetensors")
    unfinished = sorted(file for file in found if file.name.startswith(f"{stem}."))
    if unfinished and not resume:
        raise SnrfError(
            unfinished[0],
            "is the journal of an unfinished run",
            f"resume the run, or delete its journals ({stem_of(mask, 'target').stem}.*.journal-*.safetensors)",
            field="resume",
        )


def check_models(config: ProfileConfig) -> dict[SideName, ModelInfo]:
    """Return the headers of both models, whose decoders have the same shape.

    Raises:
        SnrfError: a model cannot be read, has no usable text decoder, or the two have different shapes.
    """
    checkpoints: dict[SideName, Checkpoint] = {}
    models: dict[SideName, ModelInfo] = {}
    for name in SIDES:
        models[name], checkpoint = _opened(config, name)
        if checkpoint is not None:
            checkpoints[name] = checkpoint
    if len(checkpoints) == 2:
        target, source = checkpoints["target"], checkpoints["source"]
        problems = pairing_problems(target, source, any_family=True)
        if problems:
            raise SnrfError(None, "; ".join(map(str, problems)))
        for problem in pairing_problems(target, source):
            logger.warning("%s", problem.what)
    elif models["target"].shape != models["source"].shape:
        raise SnrfError(
            config.side("source").model,
            f"the decoder has the shape {models['source'].shape}, that of {config.target.model} has "
            f"{models['target'].shape}",
            "use a source with the same decoder shape",
        )
    return models


def check_model(config: ProfileConfig, name: SideName) -> ModelInfo:
    """Return the headers of one model.

    Raises:
        SnrfError: it cannot be read, or has no usable text decoder.
    """
    return _opened(config, name)[0]


def _opened(config: ProfileConfig, name: SideName) -> tuple[ModelInfo, Checkpoint | None]:
    ref = config.model_of(name)
    with naming(model_keys(name)):
        if ref.gguf_file is not None:
            return _gguf_info(ref), None
        checkpoint = open_checkpoint(ref.model, ref.revision, trust_remote_code=ref.trust_remote_code)
        shape = find_decoder(checkpoint).shape
    info = ModelInfo(shape, checkpoint.model_type, checkpoint.config_sha256, _content_sha256(checkpoint))
    return info, checkpoint


def _gguf_info(ref: ModelRef) -> ModelInfo:
    config = load_config(ref)
    return ModelInfo(DecoderShape.of(config.to_dict()), config.model_type)


def _content_sha256(checkpoint: Checkpoint) -> str:
    tensors = {name: [header.dtype, *header.shape] for name, header in checkpoint.tensors.items()}
    digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
    for name in checkpoint.side_files() if checkpoint.folder is not None else ():
        assert checkpoint.folder is not None
        digest.update(name.encode() + b"\0" + bytes.fromhex(sha256(checkpoint.folder / name)))
    return digest.hexdigest()


def request_of(
    config: ProfileConfig, name: SideName, model: ModelInfo, rows: Rows, folder: Path | None, *, device: str, block: int
) -> dict[str, Any]:
    """Return everything that the bytes of a profile depend on, as JSON values.

    Paths are as the user wrote them: those found beside profile.yml are relative to it.
    """
    side = config.side(name)
    kernel: dict[str, Any] = {} if config.backend == "auto" else {"backend": config.backend}
    moments: dict[str, Any] = {}
    if name == "target" and config.keep:
        kinds = [kind.model_dump(exclude_none=True) for kind in config.keep]
        moments = {"keep": [{**kind, "dataset": _written(kind["dataset"], folder)} for kind in kinds]}
        moments["sketch"] = config.sketch
    return {
        **kernel,
        **moments,
        "model": {
            "path": _written(side.model, folder),
            "revision": side.revision,
            "gguf_file": side.gguf_file,
            "config_sha256": model.config_sha256,
            "content_sha256": model.content_sha256,
        },
        "probes": {**_probes(side, folder), "rows_sha256": _rows_sha256(rows)},
        "template": side.template,
        "answer": config.answer.model_dump(exclude_none=True),
        "limit": config.limit,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "token_limit": config.token_limit,
        "dtype": config.dtype,
        "device": device,
        "block_bytes": block,
        "measure": config.measure.provenance(),
        "versions": versions(),
    }


def moments_request(
    config: ProfileConfig, source: ProbeSource, rule: AnswerRule, model: ModelInfo, rows: Rows, folder: Path | None
) -> dict[str, Any]:
    """Return everything that the moments of one kind of probes depend on, as JSON values."""
    return {
        "model": {
            "path": model_path(config, "target", folder),
            "config_sha256": model.config_sha256,
            "content_sha256": model.content_sha256,
        },
        "probes": {**_source(source, folder), "rows_sha256": _rows_sha256(rows)},
        "answer": rule.model_dump(exclude_none=True),
        "sketch": config.sketch,
        **{key: getattr(config, key) for key in ("seed", "batch_size", "token_limit", "dtype", "device")},
        "versions": versions(),
    }


def _rows_sha256(rows: Rows) -> str:
    digest = hashlib.sha256()
    for row in rows.rows:
        content = [row.number, dict(row.fields), row.question, list(row.images), row.answer]
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def fingerprint(request: Mapping[str, Any]) -> str:
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
        **{key: probes.get(key) for key in ("limit", "template")},
        **{key: getattr(was, key) for key in ("seed", "dtype", "measure", "versions")},
    }
    now = {
        "model": {key: request["model"][key] for key in before["model"]},
        "probes": {name: request["probes"].get(name) for name in columns},
        **{key: request[key] for key in before if key not in ("model", "probes")},
    }
    if now["model"]["revision"] is None:  # Then the profile records the commit that was found.
        before["model"]["revision"] = None
    if now["dtype"] == "auto":  # Then it records the checkpoint's.
        before["dtype"] = "auto"
    return differences(before, now)


def probes_provenance(
    config: ProfileConfig, name: SideName, folder: Path | None, probes: Probes, tally: Tally
) -> dict[str, Any]:
    """Return where the probes of one side come from, and how many there are."""
    side = config.side(name)
    origin = {**_probes(side, folder), "limit": config.limit, "template": side.template}
    return _counted({key: value for key, value in origin.items() if value is not None}, config.answer, probes, tally)


def source_provenance(
    source: ProbeSource, rule: AnswerRule, folder: Path | None, probes: Probes, tally: Tally
) -> dict[str, Any]:
    """Return where the probes of one kind come from, and how many there are."""
    return _counted(_source(source, folder), rule, probes, tally)


def _counted(origin: Mapping[str, Any], rule: AnswerRule, probes: Probes, tally: Tally) -> dict[str, Any]:
    answer = rule.model_dump(exclude_none=True)
    return {
        **origin,
        "answer": {**answer, "cut": tally.cut} if answer["by"] == "model" else answer,
        "count": len(probes),
        "left_out": len(probes.bad),
        "tokens": tally.tokens,
        "answer_tokens": tally.answer_tokens,
        "sha256": probes_sha256(probes),
        "tokens_sha256_sum": f"{tally.digest:064x}",
    }


def model_path(config: ProfileConfig, name: SideName, folder: Path | None) -> str:
    """Return a model's path or hub id as the user wrote it."""
    return _written(config.side(name).model, folder)


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    return {package: torch.__version__ if package == "torch" else version(package) for package in _PACKAGES}


def _probes(side: SideConfig, folder: Path | None) -> dict[str, Any]:
    found = side.probes.model_dump(exclude_none=True)
    return {**found, "dataset": _written(side.probes.dataset, folder)}


def _source(source: ProbeSource, folder: Path | None) -> dict[str, Any]:
    found = source.model_dump(exclude_none=True)
    return {**found, "dataset": _written(source.dataset, folder)}


def _written(value: str, folder: Path | None) -> str:
    if folder is None or folder == Path():
        return value
    try:
        return Path(value).relative_to(folder).as_posix()
    except ValueError:
        return value
