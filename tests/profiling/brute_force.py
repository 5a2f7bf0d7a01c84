"""The oracle: zero the parameters of one neuron in a real transformers layer and run that layer again (Eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mergekit_snrf.profiling.impact.inputs import AttentionInputs

ATTENTION = ("q_proj", "k_proj", "v_proj")
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


class KeepFloat64(TorchFunctionMode):
    """Ignore the casts to float32 that transformers writes into softmax and RMS norms, on float64 tensors."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if function is Tensor.float or (function is Tensor.to and args[1:] == (torch.float32,)):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a tiny model, and what it saw in one forward pass."""

    attention: nn.Module
    mlp: nn.Module
    call: tuple[tuple, dict[str, Any]]
    mlp_call: Tensor
    inputs: AttentionInputs
    attended: Tensor
    """[batch, tokens, heads * head_dim]: the input of o_proj."""
    rotated: tuple[Tensor, Tensor]
    """[batch, heads, tokens, head_dim]: the queries and keys that the attention function received."""
    hidden: Tensor
    """[batch, tokens, intermediate]: the input of down_proj."""
    mask: Tensor
    """[batch, 1, tokens, tokens]: the additive mask of transformers."""
    counted: Tensor
    """[batch, tokens]: 1 where a token is real, float64."""

    def differences(self, projection: str, site: str) -> Tensor:
        """Return ``y - y'`` for every neuron of one projection: [neurons, batch, tokens, width].

        projection: a module name, ``q_proj`` ... ``down_proj``; site: ``pre_o`` or ``post_o`` (ignored for the FFN).
        """
        module = self.attention if projection in ATTENTION else self.mlp

        def run() -> Tensor:
            with KeepFloat64(), torch.no_grad():
                if module is self.mlp:
                    return module(self.mlp_call)
                with recorded(module.o_proj, "input") as seen:
                    output = module(*self.call[0], **self.call[1])[0]
                return seen[0] if site == "pre_o" else output

        linear = getattr(module, projection)
        whole = run()
        changes = []
        for neuron in range(linear.in_features if projection == "down_proj" else linear.out_features):
            with zeroed(linear, neuron, column=projection == "down_proj"):
                changes.append(whole - run())
        return torch.stack(changes)


def norms(differences: Tensor, weights: Tensor) -> Tensor:
    """Return the impacts ``sqrt(sum_i w_i ||y_i - y'_i||^2)`` [batch, neurons]."""
    squares = differences.square().sum(-1)
    return torch.where(weights > 0, squares * weights, 0.0).sum(-1).sqrt().mT


@contextmanager
def zeroed(linear: nn.Linear, neuron: int, column: bool) -> Iterator[None]:
    """Zero one row and its bias, or one column, for the time of the block."""
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    with torch.no_grad():
        if column:
            linear.weight[:, neuron] = 0
        else:
            linear.weight[neuron] = 0
            if linear.bias is not None:
                linear.bias[neuron] = 0
    try:
        yield
    finally:
        linear.load_state_dict(state)


@contextmanager
def recorded(module: nn.Module, what: str) -> Iterator[list[Any]]:
    """Collect the first positional input, the output, or the whole call of a module."""
    seen: list[Any] = []
    if what == "output":
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output.detach()))
    elif what == "input":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    else:
        handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def capture(decoder: nn.Module, index: int, forward: Callable[[], Any], counted: Tensor) -> Layer:
    """Run a model once and collect what layer ``index`` of its decoder saw."""
    layer = decoder.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    calls: list[tuple[Any, Tensor, Tensor]] = []
    lookup = function.get_interface

    def spying(name: str, default: Any) -> Any:
        real = lookup(name, default)

        def call(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((module, query.detach(), key.detach()))
            return real(module, query, key, *args, **kwargs)

        return call

    with (
        recorded(attention, "call") as call,
        recorded(attention.q_proj, "output") as query,
        recorded(attention.k_proj, "output") as key,
        recorded(attention.v_proj, "output") as value,
        recorded(attention.o_proj, "input") as attended,
        recorded(mlp, "input") as mlp_input,
        recorded(mlp.down_proj, "input") as hidden,
        KeepFloat64(),
        torch.no_grad(),
    ):
        function.get_interface = spying
        try:
            forward()
        finally:
            del function.get_interface
    args, kwargs = call[0]
    kwargs = {**kwargs, "past_key_values": None}
    names = ("hidden_states", "position_embeddings", "attention_mask")
    bound = dict(zip(names, args, strict=False)) | kwargs
    cos, sin = bound["position_embeddings"]
    if not getattr(attention, "use_rope", True):
        cos = sin = None

    def norm_weight(name: str) -> Tensor | None:
        norm = getattr(attention, name, None)
        if norm is None:
            return None
        return (norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight).detach()

    norm = getattr(attention, "q_norm", None)
    # Mistral's attention does not know its window: the model puts it into the mask.
    window = attention.config.sliding_window if type(attention).__name__ == "MistralAttention" else None
    inputs = AttentionInputs(
        query=query[0],
        key=key[0],
        value=value[0],
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        cos=cos,
        sin=sin,
        query_norm=norm_weight("q_norm"),
        key_norm=norm_weight("k_norm"),
        norm_eps=getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 1e-6),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=getattr(attention, "sliding_window", window),
        key_mask=counted,
    )
    rotated = next((query, key) for module, query, key in calls if module is attention)
    return Layer(
        attention,
        mlp,
        (args, kwargs),
        mlp_input[0],
        inputs,
        attended[0],
        rotated,
        hidden[0],
        bound["attention_mask"],
        counted.double(),
    )


def to_dtype(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """Cast every floating-point tensor of the inputs."""
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return replace(inputs, **{name: value.to(dtype) for name, value in tensors.items() if value.is_floating_point()})


def randomise(model: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Give a model weights that make attention sharp enough for no neuron to be negligible; float64, eval."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(scale * 1.5 * noise / parameter[0].numel() ** 0.5)
    return model


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def text_layer(name: str, index: int = 0, key_bias: float = 0.0, mask: Tensor = PADDED, **config: Any) -> Layer:
    """Return layer ``index`` of a tiny ``{name}Model`` after two left-padded probes.

    key_bias: added to every element of the bias of k_proj.
    mask: 1 where a token is real.
    """
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**(SIZES | config)))
    model = randomise(model, seed=len(name))
    if key_bias:
        with torch.no_grad():
            model.layers[index].self_attn.k_proj.bias.add_(key_bias)
    ids = torch.randint(3, 64, mask.shape, generator=torch.Generator().manual_seed(7)) * mask
    return capture(model, index, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False), counted=mask)


def image_layer(index: int = 0) -> Layer:
    """Return a decoder layer of a tiny Qwen2.5-VL after two left-padded probes of text around an image."""
    text = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, attn_implementation="eager", **special
    )
    model = randomise(transformers.Qwen2_5_VLModel(config), seed=3)
    ids = torch.tensor(
        [[0, 0, 0, 62, 60, 60, 60, 60, 60, 60, 63, 7, 9, 8], [5, 62, 60, 60, 60, 60, 60, 60, 63, 11, 12, 13, 14, 15]]
    )
    counted = (ids != 0).long()
    grid = torch.tensor([[1, 4, 6], [1, 4, 6]])
    pixels = torch.randn(48, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def forward() -> None:
        model(
            input_ids=ids,
            attention_mask=counted,
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == 60).int(),
            use_cache=False,
        )

    return capture(model.language_model, index, forward, counted)
