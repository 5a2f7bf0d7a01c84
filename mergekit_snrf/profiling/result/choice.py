"""The settings by which domain-specific neurons are chosen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mergekit_snrf.files.settings import Settings


class Choice(Settings):
    """How domain-specific neurons are chosen; the defaults are the paper's."""

    top: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.01, description="Share of the neurons of a module that is domain-specific."
    )
    percentile: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="Quantile of all shares of active tokens that a neuron must exceed on some domain."
    )
    tokens: Literal["all", "image", "prompt", "answer"] = Field(
        default="all", description="Tokens that count in the text decoder."
    )
    assign: Literal["bar", "argmax", "exclusive"] = Field(
        default="bar",
        description="A neuron belongs to every domain above the bar, to the most active one, or to the only one "
        "above the bar.",
    )
