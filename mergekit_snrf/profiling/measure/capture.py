"""What every decoder layer of a live transformers model sees in one forward pass, one layer at a time.

Hooks collect a layer's tensors, hand them over as soon as the layer has run, and drop them: memory does not grow with
the depth. Nothing in the model is replaced, whatever kernel computes its attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mergekit_snrf.models.live import LiveDecoder, weight_of
from mergekit_snrf.neurons.sites import PROJECTIONS
from mergekit_snrf.profiling.impact.inputs import AttentionInputs

_OUTPUT = "self_attn.o_proj"
_SEEN = (*(PROJECTIONS[name].module for name in ("attn.q", "attn.k", "attn.v", "fwd.down")), _OUTPUT)


@dataclass(frozen=True)
class CapturedLayer:
    """What one decoder layer saw.

    Attributes:
        attention: inputs of the attention, before norm and RoPE.
        attended: input of o_proj.
        up: output of up_proj, where it was asked for.
        hidden: input of down_proj.
        stream: output of the layer, the residual stream that the next one reads.
    """

    index: int
    module: nn.Module
    attention: AttentionInputs
    attended: Float[Tensor, "batch tokens heads*head_dim"]
    up: Float[Tensor, "batch tokens intermediate"] | None
    hidden: Float[Tensor, "batch tokens intermediate"]
    stream: Float[Tensor, "batch tokens hidden"]


def run_layers(
    decoder: LiveDecoder,
    forward: Callable[[], object],
    attention_mask: Shaped[Tensor, "batch tokens"],
    visit: Callable[[CapturedLayer], None],
    *,
    up: bool = False,
) -> None:
    """Run one forward pass without gradients and visit every layer right after it has run.

    What ``visit`` does not keep is freed before the next layer runs. ``SnrfError``: a layer did not run, ran twice, or
    is called in an unknown way.

    Args:
        forward: runs the model once on a batch, without a cache.
        attention_mask: nonzero where a token of the batch is real.
        up: capture the output of up_proj as well.
    """
    visited: list[int] = []
    norms = [_norms(decoder, index) for index in range(len(decoder.layers))]

    def finished(index: int, seen: dict[str, Any], stream: Tensor) -> None:
        if index in visited:
            raise decoder.unsupported("ran twice in one forward pass", index)
        layer = decoder.layers[index]
        missing = sorted({"call", *_SEEN} - seen.keys())
        if missing:
            raise decoder.unsupported("did not run as a module of the layer", index, missing[0])
        visited.append(index)
        attention = _attention_inputs(decoder, index, seen, attention_mask, norms[index])
        up, hidden = seen.get(PROJECTIONS["fwd.up"].module), seen[PROJECTIONS["fwd.down"].module]
        visit(CapturedLayer(index, layer, attention, seen[_OUTPUT], up, hidden, stream))

    with ExitStack() as stack, torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            stack.enter_context(_hooked(layer, index, finished, up))
        forward()
    if sorted(visited) != list(range(len(decoder.layers))):
        missed = sorted(set(range(len(decoder.layers))) - set(visited))
        raise decoder.unsupported("did not run in the forward pass", missed[0])


@contextmanager
def _hooked(
    layer: nn.Module, index: int, finished: Callable[[int, dict[str, Any], Tensor], None], up: bool
) -> Iterator[None]:
    seen: dict[str, Any] = {}

    def before(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].detach()

    def after(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen[name] = output.detach()

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["call"] = inspect.signature(type(module).forward).bind(module, *args, **kwargs)

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        captured = dict(seen)
        seen.clear()
        finished(index, captured, (output[0] if isinstance(output, tuple | list) else output).detach())

    outputs = [PROJECTIONS[name].module for name in ("attn.q", "attn.k", "attn.v", *(["fwd.up"] if up else []))]
    with ExitStack() as stack:
        stack.callback(seen.clear)
        stack.enter_context(layer.register_forward_hook(left))
        attention = layer.get_submodule("self_attn")
        stack.enter_context(attention.register_forward_pre_hook(entered, with_kwargs=True))
        for name in outputs:
            stack.enter_context(layer.get_submodule(name).register_forward_hook(partial(after, name)))
        for name in (_OUTPUT, PROJECTIONS["fwd.down"].module):
            stack.enter_context(layer.get_submodule(name).register_forward_pre_hook(partial(before, name)))
        yield


def _norms(decoder: LiveDecoder, index: int) -> tuple[Tensor | None, Tensor | None, float]:
    """Return what q_norm and k_norm of a layer multiply with, and their epsilon."""
    attention = decoder.layers[index].get_submodule("self_attn")
    query, key = (_norm(decoder, index, name, getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
    epsilons = {epsilon for _, epsilon in (query, key) if epsilon is not None}
    if len(epsilons) > 1:
        what = f"q_norm and k_norm have different epsilons {sorted(epsilons)}"
        raise decoder.unsupported(what, index, "self_attn")
    return query[0], key[0], epsilons.pop() if epsilons else 1e-6


def _attention_inputs(
    decoder: LiveDecoder,
    index: int,
    seen: dict[str, Any],
    attention_mask: Tensor,
    norms: tuple[Tensor | None, Tensor | None, float],
) -> AttentionInputs:
    attention = decoder.layers[index].get_submodule("self_attn")
    call = _arguments(seen["call"])
    query, key, value = (seen[PROJECTIONS[name].module] for name in ("attn.q", "attn.k", "attn.v"))
    cos, sin = _rotary_tables(decoder, index, call)
    # The mask that the layer was given is the truth: images may see each other in both directions.
    mask = call.get("attention_mask")
    mask = _whole_mask(decoder, index, mask, query) if isinstance(mask, Tensor) and mask.ndim > 2 else None
    try:
        return AttentionInputs(
            query=query,
            key=key,
            value=value,
            head_dim=decoder.shape.head_dim,
            # Stock attention modules; an absent attribute has the default.
            scaling=float(getattr(attention, "scaling", decoder.shape.head_dim**-0.5)),
            cos=cos,
            sin=sin,
            query_norm=norms[0],
            key_norm=norms[1],
            norm_eps=norms[2],
            softcap=getattr(attention, "attn_logit_softcapping", None),
            causal=bool(getattr(attention, "is_causal", True) if (given := call.get("is_causal")) is None else given),
            window=None if mask is not None else _window(attention),
            key_mask=None if mask is not None else attention_mask,
            mask=mask,
        )
    except ValueError as error:
        what = f"the captured tensors do not fit together ({error})"
        raise decoder.unsupported(what, index, "self_attn") from None


def _arguments(call: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments of a call by name, those that went into ``**kwargs`` too."""
    arguments: dict[str, Any] = {}
    for name, value in call.arguments.items():
        variadic = call.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments |= value if variadic else {name: value}
    return arguments


def _rotary_tables(decoder: LiveDecoder, index: int, call: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    attention, place = decoder.layers[index].get_submodule("self_attn"), (index, "self_attn")
    if not getattr(attention, "use_rope", True):
        return None, None
    tables = call.get("position_embeddings")
    if not isinstance(tables, tuple | list) or [isinstance(table, Tensor) for table in tables] != [True, True]:
        what = "was not given (cos, sin) as position_embeddings, so its rotary layout is unknown"
        raise decoder.unsupported(what, *place)
    cos, sin = tables
    if cos.ndim == 4:
        config = getattr(attention, "rope_parameters", None) or getattr(attention, "rope_scaling", None) or {}
        sections = config.get("mrope_section")
        if not sections or 2 * sum(sections) != cos.shape[-1] or len(sections) != len(cos):
            raise decoder.unsupported(f"rotary tables of shape {list(cos.shape)} are unknown", *place)
        cos, sin = mixed_sections(cos, sections), mixed_sections(sin, sections)
    return cos, sin


def mixed_sections(
    table: Float[Tensor, "axes batch tokens rotary_dim"], sections: list[int]
) -> Float[Tensor, "batch tokens rotary_dim"]:
    """Return the one table that M-RoPE attention modules of older transformers make of one for each position axis.

    Section s of each half is taken from axis s: time, height, width.
    """
    parts = table.split(list(sections) * 2, dim=-1)
    return torch.cat([part[place % len(sections)] for place, part in enumerate(parts)], dim=-1)


def _norm(decoder: LiveDecoder, index: int, name: str, norm: Any) -> tuple[Tensor | None, float | None]:
    """Return what an RMS norm over heads multiplies with, found by trying it (Gemma: weight + 1), and its epsilon."""
    if norm is None or isinstance(norm, nn.Identity):
        return None, None
    weight, head_dim = weight_of(norm), decoder.shape.head_dim
    names = ("variance_epsilon", "eps")
    epsilon = next((float(getattr(norm, one)) for one in names if hasattr(norm, one)), None)
    if weight.shape == (head_dim,) and epsilon is not None and epsilon > 0:
        trial = torch.linspace(-1, 2, head_dim, dtype=weight.dtype, device=weight.device)
        result = norm(trial).float()
        normalised = trial.float() * (trial.float().square().mean() + epsilon).rsqrt()
        tolerance = 8 * torch.finfo(weight.dtype).eps
        for multiplier in (weight, 1.0 + weight.float()):
            if torch.allclose(result, normalised * multiplier.float(), rtol=tolerance, atol=tolerance):
                return multiplier, epsilon
    found = f"{type(norm).__name__} with a weight of shape {list(weight.shape)}"
    what = f"{found} is not an RMS norm over heads of size {head_dim}"
    raise decoder.unsupported(what, index, "self_attn", name)


def _whole_mask(decoder: LiveDecoder, index: int, mask: Tensor, query: Tensor) -> Tensor:
    batch, tokens, _ = query.shape
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2:] != (tokens, tokens):
        found = f"an attention mask of shape {list(mask.shape)} for {batch} probes of {tokens} tokens"
        raise decoder.unsupported(f"{found} is unknown", index, "self_attn")
    return mask


def _window(attention: Any) -> int | None:
    """Return the sliding window of a layer; modules without the attribute read their configuration's in every layer."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or None
    return getattr(getattr(attention, "config", None), "sliding_window", None) or None
