"""A tiny vision-language model with the parameter names of MiniCPM-Llama3-V checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipVisionModel

from .configuration_minicpm import MiniCPMVConfig
from .embedded_images import EmbeddedImages


class Resampler(nn.Module):
    """A fixed number of learned queries that attend to an image's patches."""

    def __init__(self, queries: int, width: int, vision_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, patches: Tensor) -> Tensor:
        memory = self.ln_kv(self.kv_proj(patches))
        query = self.ln_q(self.query).expand(len(patches), -1, -1)
        mixed, _ = self.attn(query, memory, memory, need_weights=False)
        return self.ln_post(mixed) @ self.proj


class MiniCPMV(EmbeddedImages):
    """Images are resampled into the token embeddings, at the positions of the image token."""

    config_class = MiniCPMVConfig

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self.llm = LlamaForCausalLM(config)
        self.vpm = SiglipVisionModel(config.vision_config)
        self.resampler = Resampler(
            config.query_num, config.hidden_size, config.vision_config.hidden_size, config.num_attention_heads
        )
        self.post_init()

    def text_model(self) -> PreTrainedModel:
        return self.llm

    def image_token_id(self) -> int:
        return self.config.img_token_id

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.resampler(self.vpm(pixel_values=pixel_values).last_hidden_state)
