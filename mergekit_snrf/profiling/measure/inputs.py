"""The inputs of a live decoder's projections, as hooks see them while batches run through the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergekit_snrf.models.live import LiveDecoder
from mergekit_snrf.models.moments import InputSite, input_sizes


@contextmanager
def watched_inputs(
    decoder: LiveDecoder,
    counted: Bool[Tensor, "batch tokens"],
    visit: Callable[[InputSite, Float[Tensor, "counted d"]], None],
) -> Iterator[None]:
    """Visit the input of every projection at the counted tokens, once, while a batch runs through the model.

    Later passes of the same batch, as ``weight: gradient`` makes them, are not visited again. ``visit`` takes float32,
    or float64 of a float64 model. ``SnrfError``: an input was not seen, or has another size.
    """
    sizes, seen = input_sizes(decoder.shape), set[InputSite]()
    # Found once: a boolean index would wait for the device at every input.
    places = None if bool(counted.all()) else counted.flatten().nonzero().flatten()

    def hook(site: InputSite) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            if site in seen:
                return
            seen.add(site)
            tensor: Tensor = args[0].detach()
            if tensor.shape[:2] != counted.shape or tensor.shape[2] != sizes[site]:
                what = f"reads {list(tensor.shape)}, expected [{', '.join(map(str, counted.shape))}, {sizes[site]}]"
                raise decoder.unsupported(what, site.layer, site.module)
            rows = tensor.flatten(0, 1)
            rows = rows if places is None else rows[places.to(tensor.device)]
            rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
            visit(site, rows)

        return watch

    with ExitStack() as stack:
        for site in sizes:
            module = decoder.layers[site.layer].get_submodule(site.module)
            stack.enter_context(module.register_forward_pre_hook(hook(site)))
        yield
    missing = sorted(sizes.keys() - seen)
    if missing:
        raise decoder.unsupported("did not run as a module of the layer", missing[0].layer, missing[0].module)


def run_once(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch in eval mode, without cache and with the last logits only; return what it returns."""
    accepted = inspect.signature(type(model).forward).parameters
    # The logits of long probes over a large vocabulary would need more memory than all else.
    extra = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in accepted}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return model(**{**inputs, **extra})
    finally:
        for module, training in modes.items():
            module.training = training
