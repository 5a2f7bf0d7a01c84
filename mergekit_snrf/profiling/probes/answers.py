"""The answer that follows a prompt: generated greedily by the model, and appended as token ids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.loading import tokenizer_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Where configurations keep the tokens that stand for an image, a video or a sound, or announce one.
_PLACEHOLDERS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index",
    "audio_token_id", "audio_token_index", "vision_start_token_id",
)  # fmt: skip
_IMAGES = ("image_token_id", "image_token_index", "img_context_token_id", "img_token_id")
_NOT_PER_TOKEN = ("image_", "pixel_", "video_", "second_per_")


@dataclass(frozen=True)
class Answer:
    """The tokens of one answer, a generated end included, and whether it came before max_new_tokens."""

    ids: tuple[int, ...]
    ended: bool = True


def placeholder_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the tokens that stand for images, videos or sounds, which no answer may contain."""
    return _tokens(config, _PLACEHOLDERS)


def image_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the tokens in whose places the model puts what it sees."""
    return _tokens(config, _IMAGES)


def _tokens(config: PretrainedConfig, names: tuple[str, ...]) -> tuple[int, ...]:
    found = (getattr(config, name, None) for name in names)
    return tuple(sorted({token for token in found if isinstance(token, int) and token >= 0}))


def end_ids(model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of the generation config and of the tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return tuple(sorted({*several, tokenizer_of(processor).eos_token_id} - {None}))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, processor: Any, inputs: Mapping[str, Tensor], max_new_tokens: int
) -> list[Answer]:
    """Generate the model's own answers to a batch of left-padded prompts; ``SnrfError``: it cannot generate.

    Greedy: the most probable token at every step, whatever sampling, penalties or beams the checkpoint's generation
    config sets. Tokens that stand for an image are never generated, because no image follows them.
    """
    from transformers import GenerationConfig

    generate: Any = getattr(model, "generate", None)
    if not callable(generate):
        what = f"{type(model).__name__} cannot generate answers"
        remedy = "read the answers from a column of the data set"
        raise SnrfError(str(model.config.name_or_path) or None, what, remedy, field="by")
    ends, tokenizer = end_ids(model, processor), tokenizer_of(processor)
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=list(placeholder_ids(model.config)) or None,
    )
    own = model.generation_config
    # generate() fills what is not set from the model's own generation config.
    model.generation_config = greedy
    try:
        sequences = generate(**inputs, generation_config=greedy)
    finally:
        model.generation_config = own
    prompt = inputs["input_ids"].shape[1]
    return [_cut(ids, ends) for ids in sequences[:, prompt:].tolist()]


def _cut(ids: list[int], ends: Sequence[int]) -> Answer:
    for index, token in enumerate(ids):
        if token in ends:
            return Answer(tuple(ids[: index + 1]))
    return Answer(tuple(ids), ended=False)


def append_answers(
    inputs: Mapping[str, Tensor], answers: Sequence[Answer], pad: int
) -> tuple[dict[str, Tensor], Bool[Tensor, "batch tokens"]]:
    """Append answers to left-padded prompts, move all padding to the right, and say where the answers' tokens are.

    No row is wider than the longest prompt with its answer. Inputs of images, which do not hold one integer a token,
    stay as they are.
    """
    ids, prompts = inputs["input_ids"], inputs["attention_mask"] != 0
    own = [torch.tensor(answer.ids, dtype=ids.dtype, device=ids.device) for answer in answers]
    tails = {"input_ids": own, "attention_mask": [torch.ones_like(tail) for tail in own]}

    def packed(tensor: Tensor, name: str) -> Tensor:
        parts = zip(tensor, prompts, tails.get(name, [torch.zeros_like(tail) for tail in own]), strict=True)
        rows = [torch.cat([row[real], tail.to(row.dtype)]) for row, real, tail in parts]
        return pad_sequence(rows, batch_first=True, padding_value=pad if name == "input_ids" else 0)

    extended = {
        name: packed(tensor, name) if is_per_token(name, tensor, ids) else tensor for name, tensor in inputs.items()
    }
    return extended, packed(torch.zeros_like(prompts), "attention_mask")


def is_per_token(name: str, tensor: Tensor, ids: Tensor) -> bool:
    """Whether an input holds one integer a token."""
    return tensor.shape == ids.shape and not tensor.is_floating_point() and not name.startswith(_NOT_PER_TOKEN)


def accepted(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the per-token inputs that the model's forward does not name, such as a tokenizer's token types."""
    named = inspect.signature(model.forward).parameters
    ids = inputs["input_ids"]
    return {name: tensor for name, tensor in inputs.items() if name in named or not is_per_token(name, tensor, ids)}


def with_positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add ``position_ids`` [batch, tokens] that start at 0 with the first real token.

    Not for models that derive positions of several axes from images (Qwen-VL's M-RoPE): with an image in the batch
    they count the real tokens by themselves.
    """
    named = inspect.signature(model.forward).parameters
    own = any(hasattr(module, "get_rope_index") for module in (model, getattr(model, "model", None)))
    if "position_ids" not in named or (own and any(name.startswith("pixel_") for name in inputs)):
        return dict(inputs)
    mask = inputs["attention_mask"]
    return {**inputs, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
