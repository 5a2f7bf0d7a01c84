"""Tiny checkpoints of every family, in every layout on disk that real checkpoints have.

    folder = make_target(tmp_path / "target", "qwen2_5_vl", "hub")
    source = make_source(tmp_path / "source", SOURCE_OF["qwen2_5_vl"])
    logits = load(folder)(**example_inputs(folder)).logits

The text decoder of a target and that of its source have equal shapes; their vocabularies differ. Every parameter is
random, norms and biases too, so that a tensor that is lost, shuffled or left alone shows in the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from processors import (
    LLAVA_NEXT_GRIDS,
    LLAVA_PATCH,
    LLAVA_SIDE,
    PATCH,
    PROCESSORS,
    QUESTION,
    SOURCE_CHATS,
    SOURCE_CORPUS,
    TARGET_CHATS,
    TARGET_CORPUS,
    TILE,
    VLMS,
    WITHOUT_TEMPLATE,
    example_image,
    image_inputs,
    make_tokenizer,
    text_inputs,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

LAYERS, HEADS, KV_HEADS, WIDTH, INTERMEDIATE = 3, 4, 2, 64, 96
TARGET_VOCAB, SOURCE_VOCAB = 400, 336

_DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 2048,
}
# What each decoder adds to _DECODER. In qwen3, mistral and the gemmas head_dim is not WIDTH / HEADS.
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}
SOURCES: tuple[str, ...] = tuple(_TEXT)

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}

Ids = Callable[[str], int]
Renames = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Where a layout keeps its decoder layers, and what makes it of a checkpoint that save_pretrained wrote.

    `flat`: config.json has the text decoder's settings at the top level and no text_config.
    """

    layers: str
    renames: Renames = field(default_factory=dict)
    flat: bool = False


@dataclass(frozen=True)
class Family:
    """A target: which source fits it, its configuration (keys of config.json) and its layouts."""

    source: str
    config: Callable[[Ids], dict[str, Any]]
    layouts: dict[str, Layout]
    tied: bool = False
    remote: tuple[str, ...] = ()


def _qwen_vl(vision: dict[str, Any], head_dim: int = 16, **rope: Any) -> Callable[[Ids], dict[str, Any]]:
    sections = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **rope}
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, **vision}

    def config(ids: Ids) -> dict[str, Any]:
        tokens = {"image": "image_pad", "video": "video_pad"}
        marks = ("vision_start", "vision_end")
        return {
            "text_config": {"rope_parameters": parameters},
            "vision_config": vision,
            **{f"{kind}_token_id": ids(f"<|{token}|>") for kind, token in tokens.items()},
            **{f"{mark}_token_id": ids(f"<|{mark}|>") for mark in marks},
        }

    return config


def _idefics(ids: Ids) -> dict[str, Any]:
    image, pad = ids("<image>"), ids("<|endoftext|>")
    return {"vision_config": _VISION, "scale_factor": 2, "image_token_id": image, "pad_token_id": pad}


def _llava(**own: Any) -> Callable[[Ids], dict[str, Any]]:
    side, patch = own.pop("side", TILE), own.pop("patch", PATCH)
    vision = {"model_type": "clip_vision_model", **_VISION, "image_size": side, "patch_size": patch}
    vision |= {"num_hidden_layers": 3, "projection_dim": 8}
    own |= {"vision_config": vision, "image_seq_length": (side // patch) ** 2}
    return lambda ids: {**own, "image_token_index": ids("<image>")}


def _internvl(ids: Ids) -> dict[str, Any]:
    return {"vision_config": _VISION, "image_token_id": ids("<IMG_CONTEXT>"), "image_seq_length": 4}


def _gemma3(ids: Ids) -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        "mm_tokens_per_image": 4,
        "image_token_index": ids("<image_soft_token>"),
        "boi_token_index": ids("<start_of_image>"),
        "eoi_token_index": ids("<end_of_image>"),
    }


def _mistral3(ids: Ids) -> dict[str, Any]:
    vision = {"model_type": "pixtral", **_VISION}
    return {"vision_config": vision, "image_token_index": ids("[IMG]"), "spatial_merge_size": 2}


def _internvl_chat(ids: Ids) -> dict[str, Any]:
    module = "modeling_internvl_chat.InternVLChatModel"
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
        },
        "vision_config": {"model_type": "intern_vit_6b", **_VISION},
        "downsample_ratio": 0.5,
        "img_context_token_id": ids("<IMG_CONTEXT>"),
    }


def _minicpmv(ids: Ids) -> dict[str, Any]:
    module = "modeling_minicpmv.MiniCPMV"
    return {
        "architectures": ["MiniCPMV"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "query_num": 4,
        "img_token_id": ids("<unk>"),
    }


_PLAIN = {"hub": Layout("model.layers")}
_QWEN_LAYOUTS = {
    "hub": Layout("model.layers", flat=True),
    "nested": Layout(
        "model.language_model.layers", {r"^model\.": "model.language_model.", r"^visual\.": "model.visual."}
    ),
}
_NESTED = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(vision_tower|multi_modal_projector|image_newline)": r"model.\1",
}
_VISION_MODEL = {r"^vision_tower\.": "vision_tower.vision_model."}
_SPLIT_LAYOUTS = {
    "hub": Layout("language_model.model.layers"),
    "nested": Layout("model.language_model.layers", _NESTED),
}
# CLIP and SigLIP towers lie one level deeper in the checkpoints on the hub than save_pretrained now writes them.
_SPLIT_CLIP_LAYOUTS = {
    "hub": Layout("language_model.model.layers", _VISION_MODEL),
    "nested": Layout("model.language_model.layers", {**_VISION_MODEL, **_NESTED}),
}

FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        "qwen2",
        _qwen_vl(
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": WIDTH,
                "window_size": TILE,
                "fullatt_block_indexes": [1],
            }
        ),
        _QWEN_LAYOUTS,
    ),
    "qwen2_vl": Family(
        "qwen2", _qwen_vl({"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}), _QWEN_LAYOUTS, tied=True
    ),
    "qwen3_vl": Family(
        "qwen3",
        _qwen_vl(
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            head_dim=32,
            mrope_interleaved=True,
        ),
        {"hub": Layout("model.language_model.layers")},
    ),
    "idefics3": Family("llama", _idefics, {"hub": Layout("model.text_model.layers")}),
    "smolvlm": Family("llama", _idefics, {"hub": Layout("model.text_model.layers")}, tied=True),
    "llava": Family("llama", _llava(side=LLAVA_SIDE, patch=LLAVA_PATCH), _SPLIT_CLIP_LAYOUTS),
    "llava_next": Family("llama", _llava(image_grid_pinpoints=LLAVA_NEXT_GRIDS), _SPLIT_CLIP_LAYOUTS),
    "internvl": Family("qwen2", _internvl, _SPLIT_LAYOUTS),
    "internvl_chat": Family(
        "qwen2",
        _internvl_chat,
        {"hub": Layout("language_model.model.layers")},
        remote=("configuration_internvl_chat.py", "modeling_internvl_chat.py", "embedded_images.py"),
    ),
    "minicpmv": Family(
        "llama",
        _minicpmv,
        {"hub": Layout("llm.model.layers")},
        remote=("configuration_minicpm.py", "modeling_minicpmv.py", "embedded_images.py"),
    ),
    "gemma3": Family("gemma3", _gemma3, _SPLIT_CLIP_LAYOUTS, tied=True),
    "mistral3": Family("mistral", _mistral3, _SPLIT_LAYOUTS),
    "qwen2": Family("qwen2", lambda ids: {}, _PLAIN),
    "qwen3": Family("qwen3", lambda ids: {}, _PLAIN),
    "llama": Family("llama", lambda ids: {}, _PLAIN, tied=True),
    "mistral": Family("mistral", lambda ids: {}, _PLAIN),
}
SOURCE_OF: dict[str, str] = {name: family.source for name, family in FAMILIES.items()}
# (family, layout) -> the name on disk of the list of decoder layers, "model.layers".
TARGETS: dict[tuple[str, str], str] = {
    (name, layout): where.layers for name, family in FAMILIES.items() for layout, where in family.layouts.items()
}
_TIED_SOURCES = ("qwen3", "gemma", "gemma2", "gemma3")


def _made_once(make: Callable[..., Path]) -> Callable[..., Path]:
    """Copy what an earlier call with the same arguments wrote to the folder that conftest.py names, if it does."""

    @functools.wraps(make)
    def copied(folder: Path | str, *arguments: Any, **options: Any) -> Path:
        cache = os.environ.get("SNRF_TEST_CHECKPOINTS")
        if cache is None:
            return make(Path(folder), *arguments, **options)
        call = f"{make.__name__} {arguments} {sorted(options.items())}"
        made = Path(cache) / hashlib.sha256(call.encode()).hexdigest()
        if not made.exists():
            draft = make(Path(tempfile.mkdtemp(dir=cache)), *arguments, **options)
            # Another worker may have been faster.
            with contextlib.suppress(OSError):
                draft.rename(made)
        folder = Path(folder)
        for file in [*_weight_files(folder), *folder.glob("*.index.json")]:
            file.unlink()
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return folder

    return copied


@_made_once
def make_target(
    folder: Path,
    family: str,
    layout: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool | None = None,
    max_shard_size: int | str | None = None,
    decoder: Mapping[str, int] | None = None,
) -> Path:
    """Write a target checkpoint with tokenizer and processor files; `tied=None` leaves embeddings as the family's are.

    `decoder` replaces settings of the text decoder, such as `num_attention_heads`.

    Raises KeyError if `(family, layout)` is not in TARGETS.
    """
    spec = FAMILIES[family]
    where = spec.layouts[layout]
    tokenizer = make_tokenizer(TARGET_CHATS[family], TARGET_CORPUS, size=320)
    text = {**_text_config(spec.source, TARGET_VOCAB, tokenizer), **(decoder or {})}
    own = {"model_type": family, **spec.config(tokenizer.convert_tokens_to_ids)}
    if "out_hidden_size" in own.get("vision_config", {}):
        own["vision_config"] = {**own["vision_config"], "out_hidden_size": text["hidden_size"]}
    tie = spec.tied if tied is None else tied
    if family not in VLMS or family == "minicpmv":
        config = {**text, **own}
    elif family == "internvl_chat":
        config = {**own, "llm_config": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": tie, **text}}
    else:
        native = {} if "text_config" in own else {"model_type": text["model_type"]}
        text.pop("model_type")
        config = {**own, "text_config": {**native, "tie_word_embeddings": tie, **text, **own.get("text_config", {})}}
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, {**config, "tie_word_embeddings": tie}, tokenizer, seed, dtype, remote=spec.remote)
    if where.flat:
        _flatten(folder)
    tensors = rename(read(folder), where.renames)
    if (family, layout) == ("llava", "hub"):
        positions = (LLAVA_SIDE // LLAVA_PATCH) ** 2 + 1
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
    write(folder, tensors, max_shard_size=max_shard_size)
    if family in PROCESSORS:
        PROCESSORS[family].save(folder, nested=layout == "nested")
    return folder


@_made_once
def make_source(
    folder: Path,
    family: str,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    vocab_size: int = SOURCE_VOCAB,
    tied: bool | None = None,
    safe: bool = True,
    max_shard_size: int | str | None = None,
    decoder: Mapping[str, int] | None = None,
) -> Path:
    """Write a text-only source checkpoint with its tokenizer; `safe=False` writes pytorch_model.bin.

    `decoder` replaces settings of the decoder, such as `num_attention_heads`.
    """
    tokenizer = make_tokenizer(SOURCE_CHATS[family], SOURCE_CORPUS, size=300, template=family not in WITHOUT_TEMPLATE)
    if vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size must be at least the tokenizer's {len(tokenizer)}, got {vocab_size}")
    tie = family in _TIED_SOURCES if tied is None else tied
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_text_config(family, vocab_size, tokenizer), **(decoder or {}), "tie_word_embeddings": tie}
    _save(folder, config, tokenizer, seed, dtype)
    write(folder, read(folder), safe=safe, max_shard_size=max_shard_size)
    return folder


def _text_config(source: str, vocab_size: int, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model_type = "gemma3_text" if source == "gemma3" else source
    return {"model_type": model_type, **_DECODER, **_TEXT[source], "vocab_size": vocab_size, **tokens}


def _flatten(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it for Qwen's vision-language models."""
    config = _config(folder)
    text = {key: value for key, value in config.pop("text_config").items() if key not in config}
    rope = text.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    flat = {**config, **text, **old, "torch_dtype": config["dtype"]}
    del flat["dtype"]
    (folder / "config.json").write_text(json.dumps(flat, indent=2) + "\n")


def _save(
    folder: Path,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    dtype: torch.dtype,
    remote: tuple[str, ...] = (),
) -> None:
    """Write the configuration, the tokenizer's files and a model of random weights, as save_pretrained does."""
    name = str(dtype).removeprefix("torch.")
    if remote:
        for file in remote:
            shutil.copy(Path(__file__).parent / "remote_code" / file, folder)
        (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": name}, indent=2) + "\n")
        model = _auto(config).from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
        )
    else:
        model = _auto(config).from_config(AutoConfig.for_model(**config))
    randomise(model, seed)
    model.to(dtype)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    generation = GenerationConfig(do_sample=False, **ids)
    if remote:
        tensors = model.state_dict()
        write(folder, {name: tensors[name] for name in tensors if name not in model.all_tied_weights_keys})
    else:
        model.generation_config = generation
        model.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices of unit gain, norms about 1, biases about 0; none is left constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            value = 0.2 * noise
        elif "embed" in name and parameter.ndim < 4:
            value = 0.5 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.copy_(value)


def rename(tensors: dict[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """The same tensors, each name passed through the regular expressions in order."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    if len(renamed) != len(tensors):
        raise ValueError(f"{renames} gives two of {sorted(tensors)} the same name")
    return renamed


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name on disk, from one file or shards, safetensors or .bin."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(Path(folder)):
        safe = file.suffix == ".safetensors"
        tensors |= load_file(file) if safe else torch.load(file, weights_only=True)
    if not tensors:
        raise FileNotFoundError(f"{folder} has no .safetensors and no .bin file")
    return tensors


def write(
    folder: Path, tensors: dict[str, Tensor], *, safe: bool = True, max_shard_size: int | str | None = None
) -> None:
    """Replace a checkpoint's weight files; an index is written only if there is more than one."""
    folder = Path(folder)
    for file in [*_weight_files(folder), *folder.glob("*.index.json")]:
        file.unlink()
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern=f"{stem}{{suffix}}.{suffix}",
        **({} if max_shard_size is None else {"max_shard_size": max_shard_size}),
    )
    for name, keys in split.filename_to_tensors.items():
        shard_tensors = {key: tensors[key] for key in keys}
        if safe:
            save_file(shard_tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard_tensors, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _weight_files(folder: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        yield from sorted(folder.glob(pattern))


def _is_safe(folder: Path) -> bool:
    return next(_weight_files(folder)).suffix == ".safetensors"


def add_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    """Add a tensor to an unsharded checkpoint's file, or replace it."""
    write(folder, {**read(folder), name: tensor}, safe=_is_safe(Path(folder)))


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def _auto(config: dict[str, Any]) -> Any:
    if "auto_map" in config:
        return AutoModel
    vlm = config["model_type"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if vlm else AutoModelForCausalLM


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """A checkpoint as transformers loads it, in eval mode; `options` go to from_pretrained (`dtype`, ...).

    Raises AssertionError if a key is missing, unexpected or of another shape.
    """
    config = _config(folder)
    model, info = _auto(config).from_pretrained(
        folder, output_loading_info=True, trust_remote_code="auto_map" in config, **options
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


def example_inputs(folder: Path) -> dict[str, Tensor]:
    """Inputs of `load(folder)`: a question with an image for vision-language models, else a question."""
    return probe_inputs(folder, QUESTION, example_image() if _config(folder)["model_type"] in VLMS else None)


def probe_inputs(folder: Path, text: str, image: Image.Image | None = None) -> dict[str, Tensor]:
    """Inputs of `load(folder)` for a question of your own, with an image or without; a batch of one, no padding."""
    if image is None:
        return text_inputs(folder, text)
    return image_inputs(folder, _config(folder)["model_type"], text, image)
