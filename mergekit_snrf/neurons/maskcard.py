"""Model cards of mask files, and the provenance of masks as rows of a table."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from mergekit_snrf import __version__
from mergekit_snrf.files import markdown
from mergekit_snrf.files.references import cached_place
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance, Provenance
from mergekit_snrf.neurons.sets import count_rows

PAPER = "https://arxiv.org/abs/2602.19058"
# Fields of a provenance that may be paths.
_PATHS = ("path", "file", "dataset")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_DATA_FILE = re.compile(r".*\.(jsonl?|parquet|csv|tsv|arrow|safetensors)", re.ASCII | re.IGNORECASE)


def mask_card(mask: Mask, *, sha256: str, fusion: Mapping[str, float]) -> str:
    """Return a README for a mask file of this sha256, with a recipe whose source has the parameters ``fusion``."""
    mask = without_folders(mask)
    sides = (mask.provenance.target, mask.provenance.source)
    target, source = (markdown.line((side and side.path) or "") for side in sides)
    name = Path(mask.path).name
    recipe = {
        "merge_method": "snrf",
        "base_model": target or "TARGET",
        "models": [{"model": source or "SOURCE", "parameters": dict(fusion)}],
        "parameters": {"masks": name, "masks_sha256": sha256},
    }
    parts = [
        f"A mask of {mask.neurons.count()} neurons for [Shared Neuron Low-Rank Fusion]({PAPER}), a safetensors file of "
        f"booleans for mergekit-snrf.",
        markdown.table(
            ("projection", "layers", "neurons", "of", "share"), count_rows(mask.neurons.by_projection())[:-1]
        ),
        markdown.table(("", ""), [("sha256", f"`{sha256}`"), *provenance_rows(mask)]),
        "## Use",
        f"    pip install ./mergekit-snrf    # a clone, version {__version__}\n    mergekit-yaml snrf.yml merged/",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).rstrip()}\n```",
    ]
    models = [path for path in (target, source) if _HUB_ID.fullmatch(path) and not os.path.exists(path)]
    tags = ["mergekit", "snrf", "neuron-mask"]
    front = {"base_model": models, "library_name": "mergekit-snrf", "tags": tags}
    return markdown.document(markdown.cell(name), parts, front)


def provenance_rows(mask: Mask) -> list[tuple[str, str]]:
    """Return what the file says of where a mask comes from, as (what, text)."""
    found = mask.provenance
    rows = [*_side_rows("target", found.target), *_side_rows("source", found.source)]
    if found.selection:
        rows.append(("selection", _plain(found.selection)))
    if found.operation:
        inputs = ", ".join(str(entry.get("file") or entry.get("path") or "a mask") for entry in found.inputs or [])
        rows.append(("made by", f"{found.operation}{f' of {inputs}' if inputs else ''}"))
    rows += [(name, str(value)) for name in ("seed", "dtype") if (value := getattr(found, name)) is not None]
    if found.versions:
        rows.append(("versions", _plain(found.versions)))
    return rows


def _side_rows(role: str, side: ModelProvenance | None) -> list[tuple[str, str]]:
    if side is None:
        return []
    facts = [side.path or "unknown", side.revision and f"revision {side.revision}", side.model_type]
    if side.config_sha256:
        facts.append(f"config.json {side.config_sha256[:12]}…")
    rows = [(role, ", ".join(fact for fact in facts if fact))]
    if side.probes:
        kept: tuple[str, ...] = ("dataset", "config", "split", "count", "question", "images", "template")
        kept += ("system", "chat_template_kwargs", "answer", "sha256")
        rows.append((f"{role}'s probes", _plain({key: side.probes[key] for key in kept if key in side.probes})))
    return rows


def _plain(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(one) if isinstance(one, Mapping) else one}" for key, one in values.items())


def without_folders(mask: Mask) -> Mask:
    """Return a mask in whose provenance local paths are cut to their last part."""

    def cut(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: cut(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner, key) for inner in value]
        return _last_part(value) if isinstance(value, str) and key in _PATHS else value

    return replace(mask, provenance=Provenance.model_validate(cut(mask.provenance.model_dump(exclude_none=True))))


def _last_part(path: str) -> str:
    """Return the name of what lies at a local path, in the hub's cache its id; hub ids and ``hf://`` stay."""
    if place := cached_place(path):
        return "/".join(filter(None, (place[0], place[2])))
    of_hub = path.startswith("hf://") or (_HUB_ID.fullmatch(path) and not _DATA_FILE.fullmatch(path))
    # A drive or a backslash is of a path on Windows, and slashes separate there, too.
    return path if of_hub else PureWindowsPath(path).name or path
