"""Configuration of a tiny vision-language model that is laid out on disk as MiniCPM-Llama3-V checkpoints are."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, SiglipVisionConfig


class MiniCPMVConfig(LlamaConfig):
    """The language model's settings at the top level, the vision tower's under `vision_config`."""

    model_type = "minicpmv"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        query_num: int = 4,
        img_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vision_config = SiglipVisionConfig(**{**(vision_config or {}), "vision_use_head": False})
        self.query_num = query_num
        self.img_token_id = img_token_id
