"""What both remote models share: the features of images stand in the prompt in place of a token's embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class EmbeddedImages(PreTrainedModel):
    """Needs the language model, the id of the image token, and features [images, tokens, width] of pixels."""

    _supports_sdpa = True

    def text_model(self) -> PreTrainedModel:
        raise NotImplementedError

    def image_token_id(self) -> int:
        raise NotImplementedError

    def features(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model().get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.text_model().get_output_embeddings()

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        features = self.features(pixel_values.to(self.dtype)).flatten(0, 1)
        where = input_ids == self.image_token_id()
        if where.sum() != len(features):
            raise ValueError(f"the prompt has {where.sum()} image tokens, the images make {len(features)}")
        return embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        embeddings = self.embed(input_ids, pixel_values)
        return self.text_model()(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """New tokens only, as the language model returns them for a prompt of embeddings."""
        embeddings = self.embed(input_ids, pixel_values)
        return self.text_model().generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
