"""A tiny vision-language model with the parameter names of MiniCPM-Llama3-V checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_minicpm import MiniCPMVConfig


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


class MiniCPMV(PreTrainedModel):
    """Images are resampled into the token embeddings, at the positions of the image token."""

    config_class = MiniCPMVConfig
    _supports_sdpa = True

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self.llm = LlamaForCausalLM(config)
        self.vpm = SiglipVisionModel(config.vision_config)
        self.resampler = Resampler(
            config.query_num, config.hidden_size, config.vision_config.hidden_size, config.num_attention_heads
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embeddings [batch, tokens, width] of a prompt and of the images [images, 3, height, width] in it."""
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        patches = self.vpm(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        features = self.resampler(patches).flatten(0, 1)
        where = input_ids == self.config.img_token_id
        if where.sum() != len(features):
            raise ValueError(f"the prompt has {where.sum()} image tokens, the images make {len(features)}")
        return embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        embeddings = self.embed(input_ids, pixel_values)
        return self.llm(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)

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
        return self.llm.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
