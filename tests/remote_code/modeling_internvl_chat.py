"""A tiny vision-language model with the parameter names of the original InternVLChat checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_internvl_chat import InternVisionConfig, InternVLChatConfig
from .embedded_images import EmbeddedImages


class Layer(nn.Module):
    """A layer of the vision tower, whose attention is fused as no text decoder's may be."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        inner = config.intermediate_size
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        fused = self.attn["qkv"](self.norm1(hidden)).unflatten(-1, (3, self.heads, -1))
        mixed = F.scaled_dot_product_attention(*fused.permute(2, 0, 3, 1, 4))
        hidden = hidden + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden))))


class VisionModel(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, patches, width))
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*(Layer(config) for _ in range(2)))})

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.embeddings.patch_embedding(pixel_values).flatten(2).mT
        return self.encoder["layers"](patches + self.embeddings.position_embedding)


class InternVLChatModel(EmbeddedImages):
    """Images are projected into the token embeddings, at the positions of the image context token."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        joined = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        width = config.llm_config.hidden_size
        self.vision_model = VisionModel(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        self.mlp1 = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width))
        self.post_init()

    def text_model(self) -> PreTrainedModel:
        return self.language_model

    def image_token_id(self) -> int:
        return self.config.img_context_token_id

    def features(self, pixel_values: Tensor) -> Tensor:
        patches = self.vision_model(pixel_values)
        side, step = round(patches.shape[1] ** 0.5), round(1 / self.config.downsample_ratio)
        grid = patches.unflatten(1, (side // step, step, side // step, step))
        return self.mlp1(grid.transpose(2, 3).flatten(3).flatten(1, 2))
