"""The board pair's tokenizer, processor and architectures, all stock transformers classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from board_task import ASKS, BLANK, CELL, CELLS, COLORS, GLYPHS, IMAGE_TOKEN, SIZE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)
VOCABULARY = (*SPECIAL, *GLYPHS, BLANK, "=", ";", "#", ":", *ASKS, *COLORS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: one token a word between spaces, ``<s>`` in front, padding on the left."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", VOCABULARY.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=64,
    )


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Return the processor that turns a 24x24 picture into nine image tokens and pixels in [-1, 1]."""
    # Only training builds a processor: loading and scoring also work where transformers lacks this class.
    from transformers import SiglipImageProcessorPil

    picture = SiglipImageProcessorPil(
        do_resize=False,
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=picture,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )


def llama_config() -> LlamaConfig:
    """Return the decoder that base, source and target share: four layers of width 128, 0.8 M parameters."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        # At the default of 0.02 arithmetic takes twice the steps to emerge at this width.
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_id=VOCABULARY.index("</s>"),
    )


def llava_config() -> LlavaConfig:
    """Return the target: a two-layer Siglip tower with one patch a cell in front of the shared decoder."""
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=CELL,
            vision_use_head=False,
        ),
        text_config=llama_config(),
        image_token_index=VOCABULARY.index(IMAGE_TOKEN),
        image_seq_length=CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def has_vision(processor: Any) -> bool:
    """Tell a processor, which takes pictures, from a tokenizer, which does not."""
    return hasattr(processor, "image_processor")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Return the model in ``folder``, computing in ``dtype``, with its processor (VLM) or tokenizer (LLM).

    Raises:
        FileNotFoundError: ``folder`` holds no ``config.json``; without the check transformers would take the
            path for the name of a model on the hub.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: name a folder with a saved model")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "vision_config"):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
