"""The weights of text decoders, of a loaded model, a state dict or a checkpoint, and how far they have moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import complete_stacks, find_decoder, main_stacks
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.shards import ByteRange, byte_ranges, read_tensor
from mergekit_snrf.neurons.sites import Site

# Elements that are converted to float64 at a time.
_PANEL = 2**20
# Tables of older checkpoints that are no parameters.
_BUFFERS = (".inv_freq",)


def bias_name(weight_name: str) -> str:
    """Return the name of the bias beside a weight."""
    return f"{weight_name.removesuffix('weight')}bias"


def stored_ranges(checkpoint: Checkpoint, folder: Path, names: Iterable[str]) -> dict[str, ByteRange]:
    """Return the byte ranges of the floating-point tensors in the shards, all safetensors, that hold the named ones."""
    shards = sorted({checkpoint.tensors[name].file for name in names})
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise SnrfError(checkpoint.name, f"is stored as {shard}", "convert it to safetensors first")
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
class NamedWeights:
    """Weights that are ``read`` by their names, one by one; None: there is none of that name.

    ``where`` is the model, for messages; ``prefix`` what precedes the layer number, ``model.layers.``.
    """

    where: str
    prefix: str
    read: Callable[[str], Tensor | None] = field(repr=False)

    def name(self, site: Site) -> str:
        """Return the tensor's name."""
        return f"{self.prefix}{site.layer}.{site.module}.weight"

    def weight(self, site: Site) -> Float[Tensor, "rows columns"]:
        """Read a projection's weight; raise ``SnrfError`` if the decoder has no such layer."""
        found = self.read(self.name(site))
        if found is None:
            raise SnrfError(self.where, f"has no tensor {self.name(site)}", "use a mask of this model")
        return found

    def bias(self, site: Site) -> Float[Tensor, " rows"] | None:
        """Read a projection's bias; None if it has none."""
        return self.read(bias_name(self.name(site)))


def state_weights(tensors: Mapping[str, Tensor]) -> NamedWeights:
    """Return the weights of a state dict; ``SnrfError``: it has no decoder with all five projections, or several."""
    prefixes = main_stacks(tensors, sorted(complete_stacks(tensors)))
    if len(prefixes) != 1:
        found = f"several text decoders ({', '.join(prefixes)})" if prefixes else "no text decoder"
        remedy = "use one with one stack of layers with separate q, k, v, up and down weights"
        raise SnrfError("state dict", f"has {found}", remedy)
    return NamedWeights("state dict", prefixes[0], tensors.get)


def stored_weights(
    checkpoint: Checkpoint, folder: Path | None = None, dtype: torch.dtype | None = None
) -> NamedWeights:
    """Return the weights of a checkpoint on disk, stored as safetensors; none is kept.

    Args:
        folder: of its shards, where they were downloaded to; None is the checkpoint's own.
        dtype: to round them to, as mergekit does where the recipe sets it; None: as stored.
    """
    found = folder or checkpoint.folder
    if found is None:
        raise SnrfError(checkpoint.name, "its weights are only on the hub", "download it first")
    prefix, ranges = find_decoder(checkpoint).prefix, stored_ranges(checkpoint, found, checkpoint.tensors)

    def read(name: str) -> Tensor | None:
        return read_tensor(ranges[name]).to(dtype) if name in ranges else None

    return NamedWeights(checkpoint.name, prefix, read)


def weights_of(model: nn.Module | Mapping[str, Tensor] | Checkpoint | Weights) -> Weights:
    """Return the decoder weights of a loaded model, a state dict or a checkpoint."""
    if isinstance(model, nn.Module):
        return find_live_decoder(model)
    if isinstance(model, Checkpoint):
        return stored_weights(model)
    if isinstance(model, str | Path):
        raise SnrfError(model, "is a path", "give open_checkpoint(path), a loaded model or a state dict")
    if isinstance(model, Mapping):
        return state_weights(model)
    if not hasattr(model, "weight"):
        raise unexpected("source", model, "a loaded model, a state dict or open_checkpoint(path)")
    return model


def squared_changes(
    base: Checkpoint, models: Sequence[Checkpoint], cache_dir: str | None = None
) -> Iterator[tuple[float, ...]]:
    """Yield ``||theta - theta_0||^2`` of every model for each decoder layer, over all its parameters, in float64.

    One tensor of each checkpoint is in memory at a time. ``SnrfError``: a model has other tensors than the base in a
    layer, or its weights are not safetensors or not finite.

    Args:
        base: theta_0.
        cache_dir: where models of the hub are kept.
    """
    opened = [(one, stored_weights(one, one.local(cache_dir))) for one in (base, *models)]
    for layer in range(find_decoder(base).shape.layers):
        names = [_parameters(one, weights, layer) for one, weights in opened]
        for (one, _), found in zip(opened, names, strict=True):
            if odd := sorted(found ^ names[0]):
                what = f"the parameters of layer {layer} are not those of {base.name}, such as {odd[0]}"
                raise SnrfError(one.name, what, "use models of one architecture")
        totals = [0.0] * len(models)
        for name in sorted(names[0]):
            first, *others = (_read(one, weights, f"{layer}.{name}") for one, weights in opened)
            for index, other in enumerate(others):
                totals[index] += _square(first, other, f"{models[index].name}: {name} of layer {layer}")
        yield tuple(totals)


def _parameters(one: Checkpoint, weights: NamedWeights, layer: int) -> set[str]:
    start = f"{weights.prefix}{layer}."
    return {name[len(start) :] for name in one.tensors if name.startswith(start) and not name.endswith(_BUFFERS)}


def _read(one: Checkpoint, weights: NamedWeights, name: str) -> Tensor:
    found = weights.read(weights.prefix + name)
    if found is None:
        raise SnrfError(one.name, f"{name} is not stored in floating point", "use the unquantised checkpoint")
    return found


def _square(base: Float[Tensor, " *shape"], other: Float[Tensor, " *shape"], where: str) -> float:
    if base.shape != other.shape:
        what = f"has shape {list(other.shape)}, in the base {list(base.shape)}"
        raise SnrfError(where, what, "use models of one architecture")
    panels = zip(base.flatten().split(_PANEL), other.flatten().split(_PANEL), strict=True)
    total = sum(float((theirs.double() - ours.double()).square().sum()) for ours, theirs in panels)
    if not torch.isfinite(torch.tensor(total)):
        raise SnrfError(where, "has NaN or infinite weights, or the base has", "get the checkpoint again")
    return total
