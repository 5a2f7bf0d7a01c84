"""A tiny vision-language model with the parameter names of the original InternVLChat checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_internvl_chat import InternVisionConfig, InternVLChatConfig


class Embeddings(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        images, tokens, width = hidden.shape
        query, key, value = self.qkv(hidden).view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(images, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class Layer(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.num_attention_heads)
        self.ls1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.intermediate_size)
        self.ls2 = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ls1 * self.attn(self.norm1(hidden))
        return hidden + self.ls2 * self.mlp(self.norm2(hidden))


class Encoder(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class VisionModel(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.embeddings(pixel_values))


class InternVLChatModel(PreTrainedModel):
    """Images are projected into the token embeddings, at the positions of the image context token."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        joined = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        width = config.llm_config.hidden_size
        self.vision_model = VisionModel(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        self.mlp1 = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width))
        self.img_context_token_id = config.img_context_token_id
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Features of images [tiles, 3, height, width] as [tiles, tokens, width of the language model]."""
        features = self.vision_model(pixel_values)[:, 1:]
        tiles, patches, width = features.shape
        side, step = round(patches**0.5), round(1 / self.config.downsample_ratio)
        grid = features.view(tiles, side // step, step, side // step, step, width)
        return self.mlp1(grid.transpose(2, 3).reshape(tiles, (side // step) ** 2, step * step * width))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embeddings [batch, tokens, width] of a prompt and of the images in it."""
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        features = self.extract_feature(pixel_values.to(self.dtype)).flatten(0, 1)
        where = input_ids == self.img_context_token_id
        if where.sum() != len(features):
            raise ValueError(f"the prompt has {where.sum()} image context tokens, the images make {len(features)}")
        return embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        embeddings = self.embed(input_ids, pixel_values)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """New tokens only, as the language model returns them for a prompt of embeddings."""
        embeddings = self.embed(input_ids, pixel_values)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
