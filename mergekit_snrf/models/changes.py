"""How far models have moved from the model that they were trained from, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.weights import NamedWeights, stored_weights

# Elements that are converted to float64 at a time.
_PANEL = 2**20
# Tables of older checkpoints that are no parameters.
_BUFFERS = (".inv_freq",)


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
        names = [_names(one, weights, layer) for one, weights in opened]
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


def _names(one: Checkpoint, weights: NamedWeights, layer: int) -> set[str]:
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
