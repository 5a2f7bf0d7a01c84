"""The base of the package's small types of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_snrf.errors import invalid

_T = TypeVar("_T", bound="Settings")


class Settings(BaseModel):
    """Settings that YAML validates and Python constructs with keywords; immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def construct(of: type[_T], given: Mapping[str, Any]) -> _T:
    """Return an instance of a type; ``SnrfError`` has the field of a value that is not allowed."""
    try:
        return of(**given)
    except ValidationError as error:
        raise invalid(None, error.errors(), fields=of.model_fields) from None


def own_first(of: type[Settings]) -> list[str]:
    """Return the fields of a type, its own before those of the types that it extends."""
    return sorted(of.model_fields, key=lambda field: field not in of.__annotations__)
