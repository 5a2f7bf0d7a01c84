"""Which model to load, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mergekit_snrf.files.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class ModelName(Settings):
    """A model in a folder or on the hub."""

    model: str = Field(min_length=1, description="A folder or a hub id.")
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit of the hub id.")
    gguf_file: str | None = Field(
        default=None, min_length=1, description="The file in the model to load if it is GGUF."
    )


class Loading(Settings):
    """Where and in which dtype models are loaded."""

    dtype: Dtype = Field(default="auto", description="Dtype of the weights; auto: that of the checkpoint.")
    device: str | None = Field(
        default=None, min_length=1, description="Such as cuda, cuda:1 or cpu; default: cuda if there is one."
    )
    device_map: Literal["auto"] | None = Field(default=None, description="auto: spread the layers over all devices.")
    trust_remote_code: bool = Field(
        default=False, strict=True, description="Run code that the checkpoint brings along."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.device is not None and self.device_map is not None:
            raise ValueError("device and device_map exclude each other; device_map: auto uses all devices")
        return self


class ModelRef(ModelName, Loading):
    """A model, and how it is loaded.

    >>> ModelRef(model="Qwen/Qwen2.5-Math-7B", device="cuda:1").dtype
    'auto'
    """

    @property
    def origin(self) -> dict[str, Any]:
        """What transformers needs to find the files: ``from_pretrained(ref.model, **ref.origin)``."""
        files = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {
            "trust_remote_code": self.trust_remote_code,
            **{key: value for key, value in files.items() if value is not None},
        }
