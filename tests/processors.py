"""Tokenizers, chat templates, processor files and prompts with an image for the tiny checkpoints."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available
from transformers.utils.import_utils import is_num2words_available

TILE = 16
PATCH = 4
QUESTION = "What is the area of the triangle in the image?"

# Two corpora, so that a target's and a source's tokenizer disagree on the tokens and on their number.
TARGET_CORPUS = (
    QUESTION,
    "The area of a triangle is one half of the base times the height.",
    "user assistant system The angle ABC is a right angle. What is the length of AB?",
)
SOURCE_CORPUS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell?",
    "user assistant 48 / 2 = 24, so she sold 48 + 24 = 72 clips. The answer is 72.",
)


@dataclass(frozen=True)
class Chat:
    """How a family writes a conversation: Jinja around one message, and what stands for an image."""

    turn: str = "<|im_start|>{{ message['role'] }}\n"
    end: str = "<|im_end|>\n"
    prompt: str = "<|im_start|>assistant\n"
    image: str = ""
    begin: str = ""
    bos: str | None = None
    eos: str = "<|im_end|>"
    pad: str = "<|endoftext|>"
    named: dict[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()

    def template(self) -> str:
        """The Jinja chat template; a message's content may be a string or a list of text and image parts."""
        return (
            f"{self.begin}{{% for message in messages %}}{self.turn}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            f"{{% if part['type'] == 'image' %}}{self.image}"
            "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
            f"{self.end}{{% endfor %}}{{% if add_generation_prompt %}}{self.prompt}{{% endif %}}"
        )


_QWEN_VL = Chat(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    special=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_HEADERS = {
    "turn": "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n",
    "end": "<|eot_id|>",
    "prompt": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "begin": "<|begin_of_text|>",
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
}
_HEADER_TOKENS = ("<|start_header_id|>", "<|end_header_id|>")
_IDEFICS = Chat(
    turn="{{ message['role'] | capitalize }}:",
    end="<end_of_utterance>\n",
    prompt="Assistant:",
    image="<image>",
    begin="<|begin_of_text|>",
    bos="<|begin_of_text|>",
    eos="<end_of_utterance>",
    special=(
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ),
)
_GEMMA = {
    "turn": "<start_of_turn>{{ message['role'] }}\n",
    "end": "<end_of_turn>\n",
    "prompt": "<start_of_turn>model\n",
    "begin": "<bos>",
    "bos": "<bos>",
    "eos": "<end_of_turn>",
    "pad": "<pad>",
    "special": ("<start_of_turn>",),
}
_MISTRAL = {
    "turn": "{% if message['role'] == 'user' %}[INST]{% endif %}",
    "end": "{% if message['role'] == 'user' %}[/INST]{% else %}</s>{% endif %}",
    "prompt": "",
    "begin": "<s>",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
}

TARGET_CHATS: dict[str, Chat] = {
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "llava": Chat(image="<image>\n", special=("<|im_start|>", "<image>")),
    "llava_next": Chat(image="<image>\n", special=(*_HEADER_TOKENS, "<image>"), **_HEADERS),
    "internvl": Chat(
        image="<IMG_CONTEXT>\n",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        special=("<|im_start|>",),
    ),
    "internvl_chat": Chat(image="<image>\n", special=("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")),
    "minicpmv": Chat(
        image="(<image>./</image>)\n", special=(*_HEADER_TOKENS, "<image>", "</image>", "<unk>"), **_HEADERS
    ),
    "gemma3": Chat(
        image="<start_of_image>",
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        **_GEMMA,
    ),
    "mistral3": Chat(image="[IMG]", special=("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"), **_MISTRAL),
    "qwen2": Chat(special=("<|im_start|>",)),
    "qwen3": Chat(special=("<|im_start|>",)),
    "llama": Chat(special=_HEADER_TOKENS, **_HEADERS),
    "mistral": Chat(special=("[INST]", "[/INST]"), **_MISTRAL),
}
VLMS: tuple[str, ...] = tuple(family for family, chat in TARGET_CHATS.items() if chat.image)
SOURCE_CHATS: dict[str, Chat] = {
    "qwen2": TARGET_CHATS["qwen2"],
    "qwen3": TARGET_CHATS["qwen3"],
    "llama": TARGET_CHATS["llama"],
    "mistral": TARGET_CHATS["mistral"],
    "gemma": Chat(**_GEMMA),
    "gemma2": Chat(**_GEMMA),
    "gemma3": Chat(**_GEMMA),
}
# A base model without a chat template, as many on the hub are.
WITHOUT_TEMPLATE = ("mistral",)


@functools.cache
def _trained(corpus: tuple[str, ...], size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def make_tokenizer(chat: Chat, corpus: tuple[str, ...], *, size: int, template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` ordinary tokens, followed by the family's special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(corpus, size)),
        bos_token=chat.bos,
        eos_token=chat.eos,
        pad_token=chat.pad,
        extra_special_tokens={**chat.named},
        model_max_length=2048,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(chat.special)}, replace_extra_special_tokens=False)
    if template:
        tokenizer.chat_template = chat.template()
    return tokenizer


_NORMALIZE = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}


@dataclass(frozen=True)
class ProcessorFiles:
    """A processor as its files say it: class names, the image processor's settings and the processor's own."""

    processor: str
    image_processor: str
    image: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)
    video_processor: str | None = None

    def save(self, folder: Path, *, nested: bool) -> None:
        """Write the files of a transformers 5 checkpoint (`nested`: all in one) or of an older one."""
        image = {"image_processor_type": self.image_processor, **_NORMALIZE, **self.image}
        whole = {"processor_class": self.processor, **self.own}
        if nested:
            video = {"video_processor": {"video_processor_type": self.video_processor, **_NORMALIZE, **self.image}}
            files = {"processor_config": {**whole, "image_processor": image, **(video if self.video_processor else {})}}
        else:
            files = {"preprocessor_config": {"processor_class": self.processor, **image}}
            if self.own:
                files["processor_config"] = whole
            # Where the file is absent, transformers infers the video processor's class from the image processor's.
            if self.video_processor not in (None, self.image_processor.replace("Image", "Video")):
                files["video_preprocessor_config"] = {"video_processor_type": self.video_processor, **_NORMALIZE}
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")

    def missing(self) -> tuple[str, ...]:
        """Packages without which transformers refuses to load this processor in this environment."""
        # transformers has video processors for torchvision only, and asks for it by name in PixtralProcessor.
        torchvision = self.video_processor is not None or self.processor == "PixtralProcessor"
        lacking = {
            "torchvision": torchvision and not is_torchvision_available(),
            "num2words": self.processor == "SmolVLMProcessor" and not is_num2words_available(),
        }
        return tuple(package for package, lacks in lacking.items() if lacks)


def _qwen_vl(processor: str, video_processor: str) -> ProcessorFiles:
    image = {
        "size": {"shortest_edge": 64, "longest_edge": 1024},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return ProcessorFiles(processor, "Qwen2VLImageProcessor", image, video_processor=video_processor)


def _idefics(name: str, video_processor: str | None = None) -> ProcessorFiles:
    image = {
        "size": {"longest_edge": 2 * TILE},
        "max_image_size": {"longest_edge": TILE},
        "do_image_splitting": True,
        "do_pad": True,
    }
    return ProcessorFiles(f"{name}Processor", f"{name}ImageProcessor", image, {"image_seq_len": 4}, video_processor)


def _llava(name: str, patch: int, side: int, **image: Any) -> ProcessorFiles:
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "do_center_crop": True}
    own = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return ProcessorFiles(f"{name}Processor", f"{name}ImageProcessor", {**crop, **image}, own)


# 17 x 17 patches and a class token make position ids over 256, which bfloat16 cannot hold.
LLAVA_PATCH, LLAVA_SIDE = 2, 34
LLAVA_NEXT_GRIDS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
_SQUARE = {"height": TILE, "width": TILE}

PROCESSORS: dict[str, ProcessorFiles] = {
    "qwen2_5_vl": _qwen_vl("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_vl": _qwen_vl("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": _qwen_vl("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM", "SmolVLMVideoProcessor"),
    "llava": _llava("Llava", LLAVA_PATCH, LLAVA_SIDE),
    "llava_next": _llava("LlavaNext", PATCH, TILE, image_grid_pinpoints=LLAVA_NEXT_GRIDS),
    "internvl": ProcessorFiles(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 2},
        {"image_seq_length": 4},
        "InternVLVideoProcessor",
    ),
    "gemma3": ProcessorFiles("Gemma3Processor", "Gemma3ImageProcessor", {"size": _SQUARE}, {"image_seq_length": 4}),
    "mistral3": ProcessorFiles(
        "PixtralProcessor",
        "PixtralImageProcessor",
        {"size": {"longest_edge": TILE}, "patch_size": PATCH},
        {"patch_size": PATCH, "spatial_merge_size": 2},
    ),
}


def example_image() -> Image.Image:
    """A fixed RGB image, 24 pixels wide and 16 high, without symmetries."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor_missing(family: str) -> tuple[str, ...]:
    """Packages that `AutoProcessor` lacks here for a family that has a native processor; () if it loads."""
    return PROCESSORS[family].missing()


def text_inputs(folder: Path, text: str) -> dict[str, Tensor]:
    """Token ids [1, tokens] and mask of a question, through the chat template where the tokenizer has one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if tokenizer.chat_template is not None:
        text = _render(tokenizer, [{"role": "user", "content": [{"type": "text", "text": text}]}])
    return {**tokenizer(text, add_special_tokens=False, return_tensors="pt")}


def image_inputs(
    folder: Path, family: str, text: str, image: Image.Image, *, by_hand: bool | None = None
) -> dict[str, Tensor]:
    """What the model's forward wants for an image and a question, with the image's tokens in the prompt.

    Where `AutoProcessor` cannot load for want of a package, or `by_hand` asks for it, the image processor and the
    tokenizer do its work: the tensors are the same.
    """
    if by_hand is None:
        by_hand = family not in PROCESSORS or bool(processor_missing(family))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}]
    if not by_hand:
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return {**inputs}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tensors, placeholder, expanded = BY_HAND[family](folder, image)
    prompt = _render(tokenizer, messages)
    if prompt.count(placeholder) != 1:
        raise ValueError(f"{folder}: the chat template renders {placeholder!r} {prompt.count(placeholder)} times")
    tokens = tokenizer(prompt.replace(placeholder, expanded), add_special_tokens=False, return_tensors="pt")
    if "image_grid_thw" in tensors:
        pad = tokenizer.convert_tokens_to_ids(placeholder)
        tensors["mm_token_type_ids"] = (tokens["input_ids"] == pad).long()
    return {**tokens, **tensors}


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


Expansion = tuple[dict[str, Tensor], str, str]


def _qwen_by_hand(folder: Path, image: Image.Image) -> Expansion:
    tensors = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
    tokens = int(tensors["image_grid_thw"].prod()) // 4
    return {**tensors}, "<|image_pad|>", "<|image_pad|>" * tokens


def _idefics_by_hand(folder: Path, image: Image.Image) -> Expansion:
    processor = AutoImageProcessor.from_pretrained(folder)
    tensors = {**processor(images=[image], return_row_col_info=True, return_tensors="pt")}
    rows, columns = int(tensors.pop("rows")[0][0]), int(tensors.pop("cols")[0][0])
    tile, whole = "<fake_token_around_image>{}" + "<image>" * 4, "<fake_token_around_image>"
    lines = ["".join(tile.format(f"<row_{r + 1}_col_{c + 1}>") for c in range(columns)) for r in range(rows)]
    expanded = "".join(f"{line}\n" for line in lines) + ("\n" if rows else "") + tile.format("<global-img>") + whole
    return tensors, "<image>", expanded


def _internvl_by_hand(folder: Path, image: Image.Image) -> Expansion:
    tensors = {**AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")}
    tiles = int(tensors.pop("num_patches").sum())
    return tensors, "<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>"


def _pixtral_by_hand(folder: Path, image: Image.Image) -> Expansion:
    step = 2 * PATCH
    tensors = AutoImageProcessor.from_pretrained(folder)(images=[image], patch_size=step, return_tensors="pt")
    height, width = (int(side) // step for side in tensors["image_sizes"][0])
    rows = ["[IMG]" * width] * height
    return {**tensors}, "[IMG]", "[IMG_BREAK]".join(rows) + "[IMG_END]"


def _pixels(image: Image.Image) -> Tensor:
    """[1, 3, TILE, TILE], in [-1, 1]."""
    values = np.asarray(image.convert("RGB").resize((TILE, TILE)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def _internvl_chat_by_hand(folder: Path, image: Image.Image) -> Expansion:
    return {"pixel_values": _pixels(image)}, "<image>", f"<img>{'<IMG_CONTEXT>' * 4}</img>"


def _minicpmv_by_hand(folder: Path, image: Image.Image) -> Expansion:
    return {"pixel_values": _pixels(image)}, "(<image>./</image>)", f"<image>{'<unk>' * 4}</image>"


BY_HAND: dict[str, Callable[[Path, Image.Image], Expansion]] = {
    "qwen2_5_vl": _qwen_by_hand,
    "qwen2_vl": _qwen_by_hand,
    "qwen3_vl": _qwen_by_hand,
    "idefics3": _idefics_by_hand,
    "smolvlm": _idefics_by_hand,
    "internvl": _internvl_by_hand,
    "mistral3": _pixtral_by_hand,
    "internvl_chat": _internvl_chat_by_hand,
    "minicpmv": _minicpmv_by_hand,
}
