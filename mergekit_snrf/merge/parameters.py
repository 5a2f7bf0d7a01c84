"""The parameters of a recipe: those of ``Fusion``, and those that only a recipe has. Imports no mergekit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from mergekit_snrf.fusion.fuse import Fusion, settings

REQUIRED = object()
ALL_NEURONS = "all"
"""In place of a mask file."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a recipe.

    Attributes:
        by_tensor: gradients, filters and a place under the source are allowed; otherwise one value at the top level.
    """

    name: str
    kind: type
    default: Any
    meaning: str
    range: str = ""
    by_tensor: bool = False


_OF_RECIPE = (
    Parameter(
        "masks",
        str,
        REQUIRED,
        "mask file: a path, or hf://owner/repo@revision/path; all: every neuron, the default of regmean",
    ),
    Parameter("masks_sha256", str, "", "the mask file must have this sha256"),
    Parameter("moments", str, "", "moments file of the target for regmean: a path, or hf://owner/repo@revision/path"),
    Parameter("source_base", str, "", "the model that the source was trained from: Delta = W_source - W_source_base"),
    Parameter("biases", bool, False, "the biases of masked neurons move, too (attn.q, attn.k, attn.v of Qwen2)"),
    Parameter("allow_noop", bool, False, "accept a merge that changes nothing"),
    Parameter(
        "allow_family_mismatch",
        bool,
        False,
        "accept a source of another model family with equal shapes; neurons then pair by index only",
    ),
)
OF_FUSION = tuple(entry.name for entry in fields(Fusion))
PARAMETERS = (
    *_OF_RECIPE,
    *(
        Parameter(name, type(known.default), known.default, known.meaning, known.range, known.by_tensor)
        for name, known in settings().items()
    ),
)


class Row(NamedTuple):
    """One line of the documentation's table of parameters."""

    name: str
    where: str
    default: str
    range: str
    meaning: str


def documentation() -> list[Row]:
    """Return the rows of the recipe reference."""
    return [
        Row(
            one.name,
            "source or top level" if one.by_tensor else "top level",
            "required" if one.default is REQUIRED else _written(one.name, one.default),
            one.range,
            one.meaning,
        )
        for one in PARAMETERS
    ]


def _written(name: str, default: Any) -> str:
    text = str(default).lower() if isinstance(default, bool) else str(default) or "none"
    of_regmean = settings()[name].of_regmean if name in OF_FUSION else None
    return text if of_regmean is None else f"{text} (regmean: {of_regmean:g})"
