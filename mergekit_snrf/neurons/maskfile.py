"""Mask files: a set of neurons with its provenance, and references to files on a hub.

Format ``snrf-mask``, version 1: safetensors with one ``torch.bool`` tensor of shape [neurons] for every layer and
projection, named ``layers.{l}.{projection}``; an absent key is an empty set. The lengths are the real number of
rows (columns for fwd.down), so that a mask checks itself against any checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_snrf.errors import SnrfError, problem
from mergekit_snrf.files import container
from mergekit_snrf.neurons.sets import NeuronSet, Site

MASK_FORMAT, MASK_VERSION = "snrf-mask", 1


class ModelProvenance(BaseModel):
    """What is known of a model that a mask was made from; every field is optional."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    path: str | None = None
    revision: str | None = None
    model_type: str | None = None
    config_sha256: str | None = None
    probes: dict[str, Any] | None = None


class Provenance(BaseModel):
    """Where a mask comes from; every field is optional and unknown fields are kept."""

    model_config = ConfigDict(extra="allow")

    target: ModelProvenance | None = None
    source: ModelProvenance | None = None
    selection: dict[str, Any] | None = None
    operation: str | None = None
    inputs: list[dict[str, Any]] | None = None
    seed: int | None = None
    dtype: str | None = None
    versions: dict[str, str] | None = None


@dataclass(frozen=True)
class Mask:
    """A set of neurons and where it comes from.

    Attributes:
        path: the file it was read from, for messages.
    """

    neurons: NeuronSet
    provenance: Provenance = field(default_factory=Provenance)
    path: str = "mask"


def read_mask(path: str | os.PathLike[str]) -> Mask:
    """Read and validate a mask file.

    Raises:
        SnrfError: the file is missing, damaged, of another format, or holds a tensor that is not a mask.
    """
    tensors, content = container.read(path, file_format=MASK_FORMAT, version=MASK_VERSION)
    members = {}
    for key, tensor in tensors.items():
        try:
            site = Site.from_key(key)
        except SnrfError as error:
            raise SnrfError(f"{path}: tensor {key!r}: {error}") from None
        if tensor.dtype != torch.bool or tensor.ndim != 1 or tensor.numel() == 0:
            raise SnrfError(
                f"{path}: tensor {key!r} must be torch.bool of shape [neurons], got {tensor.dtype} of "
                f"shape {list(tensor.shape)}; make the mask again"
            )
        members[site] = tensor
    try:
        provenance = Provenance.model_validate(content)
    except ValidationError as error:
        raise SnrfError(f"{path}: provenance {problem(error.errors()[0])}; make the mask again") from None
    return Mask(NeuronSet(members), provenance, str(path))


def write_mask(path: str | os.PathLike[str], neurons: NeuronSet, provenance: Provenance | None = None) -> None:
    """Write a mask file; equal arguments give equal bytes, and an existing mask is replaced at once or not at all.

    Raises:
        SnrfError: the file cannot be written, or a file that is no mask lies there.
    """
    check_replaceable(path)
    container.write(
        path,
        {site.key: member for site, member in neurons.items()},
        file_format=MASK_FORMAT,
        version=MASK_VERSION,
        content=(provenance or Provenance()).model_dump(mode="json", exclude_none=True),
    )


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Check that a mask may be written to a path: what lies there is a mask, or nothing.

    Raises:
        SnrfError: another file lies there, such as a model's weights.
    """
    if not os.path.isfile(path):
        return
    try:
        container.read(path, file_format=MASK_FORMAT, version=MASK_VERSION)
    except SnrfError:
        raise SnrfError(
            f"{path}: is there already and no readable mask, so it is not replaced; choose another name, or delete it"
        ) from None


# As in huggingface_hub's file system: a slash in a revision is %2F, but for its own refs/pr/N and refs/convert/NAME.
_HUB = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?/(?P<file>[^@]+\.[\w]+)",
    re.ASCII,
)


def local_path(reference: str, folders: tuple[str | os.PathLike[str], ...] = ()) -> Path:
    """Return the local file that ``reference`` names, downloading it from the hub when it is ``hf://...``.

    Args:
        reference: a path, or ``hf://owner/repo@revision/path/in/repo`` (the revision is optional).
        folders: where to look for a relative path after the working folder, such as the recipe's folder.

    Raises:
        SnrfError: the reference is empty or malformed, or the file does not exist or cannot be downloaded.
    """
    if not reference:
        raise SnrfError("the path of a file is empty; give a path, or hf://owner/repo@revision/path")
    if not reference.startswith("hf://"):
        candidates = [Path(os.path.expanduser(reference))]
        if not candidates[0].is_absolute():
            candidates += [Path(folder) / reference for folder in folders]
        candidates = list(dict.fromkeys(candidate.absolute() for candidate in candidates))
        for candidate in candidates:
            if os.path.isfile(candidate):
                return candidate.resolve()
        folder = next((candidate for candidate in candidates if os.path.isdir(candidate)), None)
        if folder is not None:
            raise SnrfError(f"{reference}: is a folder ({folder}), a file is needed; give the path of the file")
        places = " and ".join(map(str, candidates))
        raise SnrfError(f"{reference}: no such file, looked for {places}; correct the path")
    match = _HUB.fullmatch(reference)
    if match is None:
        raise SnrfError(f"{reference}: not a hub reference; the form is hf://owner/repo@revision/path")
    from huggingface_hub import hf_hub_download

    try:
        revision = match["revision"] and unquote(match["revision"])
        downloaded = hf_hub_download(match["repo"], match["file"], revision=revision)
    except Exception as error:
        # What huggingface_hub, httpx and the file system raise has no common base; the type tells what was not found.
        reason = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
        raise SnrfError(
            f"{reference}: cannot be downloaded ({reason}); check owner, repo, revision and path, or download "
            f"the file and give its path"
        ) from None
    return Path(downloaded)


def check_sha256(path: Path, expected: str) -> None:
    """Raise ``SnrfError`` where a file is not the expected one."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
        raise SnrfError(f"masks_sha256 must be 64 hexadecimal digits, got {expected!r}; 'snrf mask show' prints them")
    found = container.sha256(path)
    if found != expected.lower():
        raise SnrfError(
            f"{path}: sha256 is {found}, but masks_sha256 is {expected}; "
            f"get the mask that was meant, or update masks_sha256"
        )


def provenance_of_operation(operation: str, inputs: Sequence[Mask], **details: Any) -> Provenance:
    """Describe a mask made from other masks: the operation, and file name and sha256 of every input in order.

    Target and source are carried over where all inputs agree on them.
    """

    def common(name: str) -> ModelProvenance | None:
        values = [getattr(mask.provenance, name) for mask in inputs]
        return values[0] if values and all(value == values[0] for value in values) else None

    return Provenance(
        target=common("target"),
        source=common("source"),
        operation=operation,
        inputs=[{"file": Path(mask.path).name, "sha256": container.sha256(mask.path)} for mask in inputs],
        **details,
    )
