"""The weights of a text decoder by layer and projection: of a loaded model, a state dict or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import complete_stacks, find_decoder, main_stacks
from mergekit_snrf.models.live import LiveDecoder, bias_of, find_live_decoder, weight_of
from mergekit_snrf.models.shards import ByteRange, byte_ranges, read_tensor
from mergekit_snrf.neurons.sites import Site

_MASK = "use a mask of this model"


def bias_name(weight_name: str) -> str:
    """Return the name of the bias beside a weight."""
    return f"{weight_name.removesuffix('weight')}bias"


def stored_ranges(checkpoint: Checkpoint, folder: Path, names: Iterable[str]) -> dict[str, ByteRange]:
    """Return the byte ranges of the floating-point tensors in the shards that hold the named ones.

    Args:
        folder: of the shards.

    Raises:
        SnrfError: a shard is stored as .bin, or its header is damaged.
    """
    shards = sorted({checkpoint.tensors[name].file for name in names})
    for shard in shards:
        if shard.endswith(".bin"):
            raise SnrfError(checkpoint.name, f"is stored as .bin ({shard})", "convert it to safetensors first")
    return {name: where for shard in shards for name, where in byte_ranges(folder / shard).items()}


class Weights(Protocol):
    """The projections of one text decoder."""

    def name(self, site: Site) -> str:
        """Return the name of a projection's weight, for messages."""

    def weight(self, site: Site) -> Float[Tensor, "rows columns"]:
        """Return a projection's weight."""

    def bias(self, site: Site) -> Float[Tensor, " rows"] | None:
        """Return a projection's bias; None if it has none."""


@dataclass(frozen=True)
class LiveWeights:
    """The weights of a loaded model."""

    decoder: LiveDecoder

    def module(self, site: Site) -> Any:
        """Return the ``nn.Linear`` of a projection.

        Raises:
            SnrfError: the decoder has no such layer.
        """
        if site.layer >= self.decoder.shape.layers:
            what = f"has no layer {site.layer}, {self.decoder.path} has {self.decoder.shape.layers}"
            raise SnrfError(self.decoder.model, what, _MASK)
        return self.decoder.layers[site.layer].get_submodule(site.module)

    def name(self, site: Site) -> str:
        """Return the name of the parameter."""
        return f"{self.decoder.path}.{site.layer}.{site.module}.weight"

    def weight(self, site: Site) -> Float[Tensor, "rows columns"]:
        """Return the parameter's data."""
        return weight_of(self.module(site))

    def bias(self, site: Site) -> Float[Tensor, " rows"] | None:
        """Return the bias's data."""
        return bias_of(self.module(site))


@dataclass(frozen=True)
class StateWeights:
    """The weights of a state dict with one text decoder.

    Attributes:
        tensors: by name.
        prefix: what precedes the layer number, ``model.layers.``.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    prefix: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> StateWeights:
        """Find the decoder among the names.

        Raises:
            SnrfError: there is none with all five projections in every layer, or several.
        """
        prefixes = main_stacks(tensors, sorted(complete_stacks(tensors)))
        if len(prefixes) != 1:
            found = f"several text decoders ({', '.join(prefixes)})" if prefixes else "no text decoder"
            remedy = "use one with one stack of layers with separate q, k, v, up and down weights"
            raise SnrfError(None, f"the state dict has {found}", remedy)
        return cls(tensors, prefixes[0])

    def name(self, site: Site) -> str:
        """Return the tensor's name."""
        return f"{self.prefix}{site.layer}.{site.module}.weight"

    def weight(self, site: Site) -> Float[Tensor, "rows columns"]:
        """Return a projection's weight.

        Raises:
            SnrfError: the decoder has no such layer.
        """
        name = self.name(site)
        if name not in self.tensors:
            raise SnrfError(None, f"the state dict has no tensor {name}", _MASK)
        return self.tensors[name]

    def bias(self, site: Site) -> Float[Tensor, " rows"] | None:
        """Return a projection's bias; None if it has none."""
        return self.tensors.get(bias_name(self.name(site)))


class StoredWeights:
    """The weights of a checkpoint on disk, read one by one, never kept.

    Args:
        checkpoint: its headers.
        folder: of its shards, where they were downloaded to; None is the checkpoint's own.

    Raises:
        SnrfError: it has no text decoder, or its weights are not on this machine.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path | None = None) -> None:
        found = folder or checkpoint.folder
        if found is None:
            raise SnrfError(checkpoint.name, "its weights are only on the hub", "download it first")
        self._checkpoint, self._folder = checkpoint, found
        self._decoder = find_decoder(checkpoint)

    @cached_property
    def _ranges(self) -> dict[str, ByteRange]:
        return stored_ranges(self._checkpoint, self._folder, self._checkpoint.tensors)

    def name(self, site: Site) -> str:
        """Return the tensor's name on disk."""
        return self._decoder.weight_name(site)

    def weight(self, site: Site) -> Float[Tensor, "rows columns"]:
        """Read a projection's weight.

        Raises:
            SnrfError: the decoder has no such layer, or the file cannot be read.
        """
        return self._read(self.name(site))

    def bias(self, site: Site) -> Float[Tensor, " rows"] | None:
        """Read a projection's bias; None if it has none."""
        name = bias_name(self.name(site))
        return self._read(name) if name in self._ranges else None

    def _read(self, name: str) -> Tensor:
        if name not in self._ranges:
            raise SnrfError(self._checkpoint.name, f"has no tensor {name}", _MASK)
        return read_tensor(self._ranges[name])


def weights_of(model: nn.Module | Mapping[str, Tensor] | Checkpoint | Weights) -> Weights:
    """Return the decoder weights of a loaded model, a state dict or a checkpoint.

    Raises:
        SnrfError: it has no text decoder, or several.
    """
    if isinstance(model, nn.Module):
        return LiveWeights(find_live_decoder(model))
    if isinstance(model, Checkpoint):
        return StoredWeights(model)
    if isinstance(model, str | Path):
        raise SnrfError(model, "is a path", "give open_checkpoint(path), a loaded model or a state dict")
    return StateWeights.of(model) if isinstance(model, Mapping) else model
