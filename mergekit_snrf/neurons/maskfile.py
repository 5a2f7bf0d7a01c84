"""Mask files: a set of neurons with its provenance.

Format ``snrf-mask``, version 1: safetensors with one ``torch.bool`` tensor of shape [neurons] for every layer and
projection, named ``layers.{l}.{projection}``; an absent key is an empty set. The lengths are the real number of
rows (columns for fwd.down), so that a mask checks itself against any checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_snrf.errors import SnrfError, invalid, naming, printable, unexpected
from mergekit_snrf.files import container
from mergekit_snrf.files.container import Framework
from mergekit_snrf.files.references import check_sha256, local_path
from mergekit_snrf.files.references import sha256 as sha256_of
from mergekit_snrf.files.shown import Plotted
from mergekit_snrf.neurons.sets import NeuronSet, described, is_member
from mergekit_snrf.neurons.shape import check_decoder_only
from mergekit_snrf.neurons.sites import Site

MASK_FORMAT, MASK_VERSION = "snrf-mask", 1


class ModelProvenance(BaseModel):
    """A model that a mask was made from; every field is optional and unknown fields are kept."""

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


@dataclass(frozen=True, repr=False)
class Mask(Plotted):
    """A set of neurons, where it comes from, and the file it was read from."""

    neurons: NeuronSet
    provenance: Provenance = field(default_factory=Provenance)
    path: str = "mask"

    def __repr__(self) -> str:
        name = printable(Path(self.path).name)
        return f"<Mask {name}: {self.neurons.count()} neurons at {len(self.neurons.nonempty())} sites>"


AnyNeurons = NeuronSet | Mask | str | os.PathLike[str]
"""Neurons, or where the mask file of some is."""


def read_mask(path: str | os.PathLike[str], *, towers: bool = False, framework: Framework = "pt") -> Mask:
    """Read and validate a mask file.

    Args:
        towers: whether neurons of ``TOWERS`` are allowed.
        framework: ``np`` reads arrays of numpy, to be counted, and does not import torch.

    Raises:
        SnrfError: the file is missing, damaged, of another format, or has neurons outside of the text decoder.
    """
    tensors, content = container.read(path, file_format=MASK_FORMAT, version=MASK_VERSION, framework=framework)
    members = {}
    for key, tensor in tensors.items():
        with naming({}, where=f"{path}: tensor {key!r}"):
            site = Site.from_key(key)
        if not is_member(tensor):
            what = f"tensor {key!r} must be torch.bool of shape [neurons], got {described(tensor)}"
            raise SnrfError(path, what, "make the mask again")
        members[site] = tensor
    if not towers:
        check_decoder_only(NeuronSet(members), path)
    try:
        provenance = Provenance.model_validate(content)
    except ValidationError as error:
        raise invalid(path, error.errors(), remedy="make the mask again") from None
    return Mask(NeuronSet(members), provenance, str(path))


def load_mask(
    reference: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    folders: tuple[str | os.PathLike[str], ...] = (),
    towers: bool = False,
) -> Mask:
    """Read a mask from a path, or from ``hf://owner/repo@revision/path``.

    Args:
        sha256: raise ``SnrfError`` where the file is another one.
        folders: where to look for a relative path after the working folder.
        towers: whether neurons outside of the text decoder are allowed, for ``deactivate``.
    """
    path = local_path(reference, folders)
    if sha256 is not None:
        check_sha256(path, sha256)
    return read_mask(path, towers=towers)


def mask_of(neurons: AnyNeurons, *, towers: bool = False) -> Mask:
    """Return a mask as it is, a set of neurons as one without a file, or the mask that ``load_mask`` finds."""
    if isinstance(neurons, Mask):
        return neurons
    if isinstance(neurons, NeuronSet):
        return Mask(neurons)
    if isinstance(neurons, str | os.PathLike):
        return load_mask(neurons, towers=towers)
    raise unexpected("neurons", neurons, "a Mask, a NeuronSet or the path of a mask")


def write_mask(path: str | os.PathLike[str], neurons: NeuronSet | Mask, provenance: Provenance | None = None) -> None:
    """Write a mask file; equal arguments give equal bytes, and an existing mask is replaced at once or not at all.

    Without ``provenance``, a mask keeps its own.
    """
    mask = mask_of(neurons)
    check_replaceable(path)
    content = (provenance or mask.provenance).model_dump(mode="json", exclude_none=True)
    tensors = {site.key: member for site, member in mask.neurons.items()}
    container.write(path, tensors, file_format=MASK_FORMAT, version=MASK_VERSION, content=content)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise ``SnrfError`` where a mask would replace another kind of file, such as a model's weights."""
    if not os.path.isfile(path):
        return
    try:
        container.read(path, file_format=MASK_FORMAT, version=MASK_VERSION)
    except SnrfError:
        raise SnrfError(path, "already exists and is not a mask", "choose another path, or delete it") from None


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
        inputs=[{"file": Path(mask.path).name, "sha256": sha256_of(mask.path)} for mask in inputs],
        **details,
    )
