"""Configuration of a tiny vision-language model, laid out on disk as the original InternVLChat checkpoints are."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """Sizes of the vision tower; images are squares of `image_size` pixels."""

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 16,
        intermediate_size: int = 24,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        image_size: int = 16,
        patch_size: int = 4,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        super().__init__(**kwargs)


class InternVLChatConfig(PretrainedConfig):
    """A vision tower under `vision_config` and any causal language model of transformers under `llm_config`."""

    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        downsample_ratio: float = 0.5,
        img_context_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = AutoConfig.for_model(**{"model_type": "qwen2", **(llm_config or {})})
        self.downsample_ratio = downsample_ratio
        self.img_context_token_id = img_context_token_id
        super().__init__(**kwargs)
