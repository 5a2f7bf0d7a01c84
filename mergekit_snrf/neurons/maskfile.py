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

from pydantic import BaseModel, ConfigDict

from mergekit_snrf.errors import SnrfError, naming, printable, unexpected
from mergekit_snrf.files.container import Format, Framework
from mergekit_snrf.files.references import check_sha256, local_path
from mergekit_snrf.files.references import sha256 as sha256_of
from mergekit_snrf.files.shown import Plotted
from mergekit_snrf.neurons.sets import NeuronSet, described, is_member
from mergekit_snrf.neurons.shape import check_decoder_only
from mergekit_snrf.neurons.sites import Site

MASK = Format(
    "snrf-mask",
    1,
    "make one with snrf-profile, 'snrf mask import', or from profiles with 'snrf mask select'",
    "make the mask again",
    {
        "snrf-profile": "select a mask from two such profiles: snrf mask select A B OUT",
        "snrf-moments": "give moments as moments: FILE, with update: regmean",
        "snrf-domains": "select masks from such a file: snrf domains select FILE DIR",
    },
)


class _Recorded(BaseModel):
    """What a file says; every field is optional and unknown fields are kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ModelProvenance(_Recorded):
    """A model that a mask was made from."""

    path: str | None = None
    revision: str | None = None
    model_type: str | None = None
    config_sha256: str | None = None
    probes: dict[str, Any] | None = None


class RunProvenance(_Recorded):
    """What a run through one model writes down."""

    model: ModelProvenance | None = None
    seed: int | None = None
    dtype: str | None = None
    versions: dict[str, str] | None = None
    fingerprint: str | None = None


class Provenance(_Recorded):
    """Where a mask comes from."""

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
    tensors, content = MASK.read(path, framework)
    members = {}
    for key, tensor in tensors.items():
        with naming({}, where=f"{path}: tensor {key!r}"):
            site = Site.from_key(key)
        if not is_member(tensor):
            what = f"tensor {key!r} must be torch.bool of shape [neurons], got {described(tensor)}"
            raise SnrfError(path, what, MASK.again)
        members[site] = tensor
    if not towers:
        check_decoder_only(NeuronSet(members), path)
    return Mask(NeuronSet(members), MASK.parsed(path, content, Provenance), str(path))


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
    MASK.check_replaceable(path)
    content = (provenance or mask.provenance).model_dump(mode="json", exclude_none=True)
    MASK.write(path, {site.key: member for site, member in mask.neurons.items()}, content)


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
