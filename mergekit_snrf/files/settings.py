"""The base of the package's small types, which YAML validates and Python constructs with keywords."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen set of named values; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
