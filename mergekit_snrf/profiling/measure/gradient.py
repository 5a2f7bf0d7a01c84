"""How much the final states of a model feel a change at each position of each layer (``weight: gradient``).

A change d_i of what o_proj or down_proj gives at position i changes the final states F by ``J_i d_i`` to first order.
For a random cotangent E the gradient of ``<E, F>`` is ``g_i = J_i^T E``, and the mean of ``||g_i||^2`` is the squared
Frobenius norm of J_i. So ``||g_i||^2 / hidden_size`` estimates by how much the squared norm of a change grows on its
way to the final states, for all positions of all layers at once: one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.live import LiveDecoder
from mergekit_snrf.neurons.sites import PROJECTIONS

ATTENTION, FFN = "self_attn.o_proj", PROJECTIONS["fwd.down"].module


@dataclass(frozen=True)
class LayerGradient:
    """Mean over the hidden size of the squared gradient at each position of the outputs of o_proj and down_proj.

    Float32, float64 for a float64 model.
    """

    attention: Float[Tensor, "batch tokens"]
    ffn: Float[Tensor, "batch tokens"]


def layer_gradients(
    model: nn.Module, decoder: LiveDecoder, forward: Callable[[], object], counted: Bool[Tensor, "batch tokens"]
) -> list[LayerGradient]:
    """Run a model once; return for every layer the squared gradient of its final states at the ``counted`` positions.

    The cotangent is drawn from a fixed seed for each probe, and does not depend on padding or on the other probes.
    Parameters and what is below the first decoder layer get no gradient; the activations of all layers are kept until
    the backward pass. ``SnrfError``: the decoder's final states do not follow from its layers.
    """
    found: dict[tuple[int, str], Tensor] = {}
    states: list[Tensor] = []
    stack_module = model.get_submodule(decoder.path.rpartition(".")[0])

    def keep_states(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as stack:
        stack.enter_context(_without_parameters(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(stack_module.register_forward_hook(keep_states))
        stack.enter_context(decoder.layers[0].register_forward_pre_hook(_differentiable, with_kwargs=True))
        for index, layer in enumerate(decoder.layers):
            for name in (ATTENTION, FFN):
                module = layer.get_submodule(name)
                stack.enter_context(module.register_forward_hook(_squared_gradient(found, index, name)))
        forward()
        final = states[-1] if states else None
        if final is None or final.shape[:2] != counted.shape or not final.requires_grad:
            what = f"{decoder.path} has no final states to differentiate"
            raise SnrfError(decoder.model, what, "weight by 'residual'", field="weight")
        final.backward(_cotangent(final, counted))
    if len(found) != 2 * len(decoder.layers):
        what = f"the final states do not depend on every layer of {decoder.path}"
        raise SnrfError(decoder.model, what, "weight by 'residual'", field="weight")
    return [LayerGradient(found[index, ATTENTION], found[index, FFN]) for index in range(len(decoder.layers))]


def _cotangent(
    states: Float[Tensor, "batch tokens hidden"], counted: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens hidden"]:
    cotangent = torch.zeros_like(states)
    for probe, positions in zip(cotangent, counted.to(states.device), strict=True):
        drawn = torch.randn(int(positions.sum()), states.shape[2], generator=torch.Generator().manual_seed(0))
        probe[positions] = drawn.to(states)
    return cotangent


def _squared_gradient(
    found: dict[tuple[int, str], Tensor], index: int, name: str
) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(keep)

    def keep(gradient: Tensor) -> None:
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        found[index, name] = gradient.detach().to(dtype).square().mean(-1)

    return hook


def _differentiable(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the graph begin at the first decoder layer, so that neither embeddings nor a vision tower are kept."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


@contextmanager
def _without_parameters(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of any parameter."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
