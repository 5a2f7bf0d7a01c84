"""The base of the package's small types of settings."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings that YAML validates and Python constructs with keywords; immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
