"""Model cards of merges, adapters and masks; everything in them is read from the files and the plan."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_snrf import __version__, safefile
from mergekit_snrf.checkpoint import Checkpoint
from mergekit_snrf.maskfile import Mask, ModelProvenance

if TYPE_CHECKING:
    from mergekit.common import ModelReference

    from mergekit_snrf.plugin.plan import MergePlan

PAPER = "https://arxiv.org/abs/2602.19058"
_VISION = ("vision_config", "vision_model", "image_token_id", "image_token_index", "vision_tower")
_MAX_CELL = 300
# Backslash first: the others are written with it. Hubs make links of bare addresses.
_ESCAPED = {"\\": "\\\\", "|": "\\|", "<": "&lt;", "[": "\\[", "!": "\\!", "://": "&#58;//", "www.": "www&#46;"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def merge_card(plan: MergePlan, name: str, recipe: str, *, cast: str | None = None) -> str:
    """Return the README of a merged folder.

    Args:
        plan: of the merge.
        name: of the merged model.
        recipe: its text, as written.
        cast: the dtype that every tensor was cast to, if the recipe sets one.
    """
    assert plan.target is not None
    front = {
        "base_model": _hub_ids(plan),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag(plan.target),
        "tags": ["mergekit", "merge", "snrf"],
    }
    return _document(
        front,
        f"# {name}",
        f"{_model(plan.references[0])} with an update from {_model(plan.references[1])} on chosen neurons, merged by "
        f"[Shared Neuron Low-Rank Fusion]({PAPER}) with [mergekit](https://github.com/arcee-ai/mergekit) and "
        f"mergekit-snrf. The update covers {plan.parameters_touched} weights of the text decoder; all others are the "
        f"target's{f', cast to {cast}' if cast else ''}.",
        *_changes(plan),
        *_mask_of(plan),
        *_reproduction(plan, recipe, "mergekit-yaml snrf.yml merged/", ("mergekit", "torch", "transformers")),
    )


def adapter_card(plan: MergePlan, name: str, recipe: str, ranks: Mapping[str, int]) -> str:
    """Return the README of an adapter's folder.

    Args:
        plan: of the merge.
        name: of the adapter.
        recipe: its text, as written.
        ranks: rank of every adapted module.
    """
    assert plan.target is not None
    front = {
        "base_model": _hub_ids(plan),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": pipeline_tag(plan.target),
        "tags": ["mergekit", "snrf", "lora"],
    }
    low, high = min(ranks.values()), max(ranks.values())
    return _document(
        front,
        f"# {name}",
        f"A LoRA adapter for {_model(plan.references[0])}: the update beta * M_S(Delta_r) that [Shared Neuron Low-Rank "
        f"Fusion]({PAPER}) adds to it from {_model(plan.references[1])}, in {len(ranks)} modules of the text decoder, "
        f"rank {low if low == high else f'{low} to {high}'}. Made with mergekit-snrf.",
        '```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(target, "this folder")\n```',
        *_changes(plan),
        *_mask_of(plan),
        *_reproduction(plan, recipe, "snrf lora snrf.yml adapter/", ("mergekit", "torch", "transformers", "peft")),
    )


def mask_card(mask: Mask, *, sha256: str) -> str:
    """Return a README for a mask file."""
    target, source = (_line((side and side.path) or "") for side in (mask.provenance.target, mask.provenance.source))
    name = Path(mask.path).name
    front = {
        "base_model": [path for path in (target, source) if _HUB_ID.fullmatch(path) and not os.path.exists(path)],
        "library_name": "mergekit-snrf",
        "tags": ["mergekit", "snrf", "neuron-mask"],
    }
    recipe = {
        "merge_method": "snrf",
        "base_model": target or "TARGET",
        "models": [{"model": source or "SOURCE"}],
        "parameters": {"masks": name, "masks_sha256": sha256},
    }
    return _document(
        front,
        f"# {name}",
        f"A mask of {mask.neurons.count()} neurons for [Shared Neuron Low-Rank Fusion]({PAPER}), a safetensors file of "
        f"booleans for mergekit-snrf.",
        _table(
            ("projection", "layers", "neurons", "of", "share"),
            [(name, *counts, _share(*counts[1:])) for name, counts in mask.neurons.by_projection().items()],
        ),
        _table(("", ""), [("sha256", f"`{sha256}`"), *provenance_rows(mask)]),
        "## Use",
        f"    pip install mergekit-snrf=={__version__}\n    mergekit-yaml snrf.yml merged/",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).rstrip()}\n```",
    )


def pipeline_tag(checkpoint: Checkpoint) -> str:
    """Return the hub's name of what the model does: ``image-text-to-text``, or ``text-generation``."""
    return "image-text-to-text" if any(key in checkpoint.config for key in _VISION) else "text-generation"


def provenance_rows(mask: Mask) -> list[tuple[str, str]]:
    """Return what the file says of where a mask comes from, as (what, text)."""
    found = mask.provenance
    rows = [*_side_rows("target", found.target), *_side_rows("source", found.source)]
    if found.selection:
        rows.append(("selection", _plain(found.selection)))
    if found.operation:
        inputs = ", ".join(str(entry.get("file") or entry.get("path") or "a mask") for entry in found.inputs or [])
        rows.append(("made by", f"{found.operation}{f' of {inputs}' if inputs else ''}"))
    for name in ("seed", "dtype"):
        if getattr(found, name) is not None:
            rows.append((name, str(getattr(found, name))))
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
        kept = ("dataset", "config", "split", "count", "question", "images", "template", "answer", "sha256")
        rows.append((f"{role}'s probes", _plain({key: side.probes[key] for key in kept if key in side.probes})))
    return rows


def _changes(plan: MergePlan) -> list[str]:
    rows = [(name, tensors, changed, of, _share(changed, of)) for name, (tensors, changed, of) in plan.counts().items()]
    return [
        "## What was changed",
        _table(("projection", "tensors", "neurons", "of", "share"), rows),
        f"Update: {plan.update}.",
    ]


def _mask_of(plan: MergePlan) -> list[str]:
    if plan.mask is None or plan.mask_path is None:
        return []
    digest = safefile.sha256(plan.mask_path)
    rows = [("file", f"`{plan.mask_path.name}`"), ("sha256", f"`{digest}`"), ("neurons", plan.mask.neurons.count())]
    return ["## Neurons", _table(("", ""), [*rows, *provenance_rows(plan.mask)])]


def _reproduction(plan: MergePlan, recipe: str, command: str, packages: tuple[str, ...]) -> list[str]:
    # A local version, such as 2.13.0+cpu, is on no index.
    pins = " ".join(f"{name}=={version(name).partition('+')[0]}" for name in packages)
    models = [
        (_spoken(reference), reference.model.revision or "as of the merge", f"`{checkpoint.config_sha256}`")
        for reference, checkpoint in zip(plan.references, plan.checkpoints, strict=True)
    ]
    return [
        "## To make it again",
        f"    pip install mergekit-snrf=={__version__} {pins}\n    {command}",
        "with this as `snrf.yml`, and the mask of the sha256 above where it says:",
        f"```yaml\n{recipe.rstrip()}\n```",
        _table(
            ("model", "revision", "sha256 of config.json"),
            models,
        ),
    ]


def _hub_ids(plan: MergePlan) -> list[str]:
    paths = [path for model in plan.references for path in (model.model, model.lora) if path is not None]
    return [path.path for path in paths if not os.path.exists(path.path)]


def _model(reference: ModelReference) -> str:
    if os.path.exists(reference.model.path) or reference.lora is not None:
        return f"`{_spoken(reference)}`"
    return f"[{reference.model.path}](https://huggingface.co/{reference.model.path})"


def _spoken(reference: ModelReference) -> str:
    """Return hub ids, or the last parts of folders: the rest of their paths is nobody's business."""
    paths = [path.path for path in (reference.model, reference.lora) if path is not None]
    return " + ".join(Path(path).name if os.path.exists(path) else path for path in paths)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def _plain(values: Mapping[str, Any]) -> str:
    """Return a mapping of provenance in one line."""
    parts = [f"{key} {_plain(v) if isinstance(v, Mapping) else v}" for key, v in values.items()]
    return ", ".join(parts)


def _table(header: tuple[object, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    """Return text for a cell; what comes from a file cannot leave it, nor put HTML or links on the page."""
    text = _line(str(value))
    for mark, escaped in _ESCAPED.items():
        text = text.replace(mark, escaped)
    return text


def _line(text: str) -> str:
    """Return printable text on one line, and not too much of it."""
    text = "".join(mark for mark in " ".join(text.split()) if mark.isprintable())
    return text if len(text) <= _MAX_CELL else text[:_MAX_CELL] + "…"


def _document(front: Mapping[str, Any], *parts: str) -> str:
    kept = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False)}---\n" + "\n\n".join(parts) + "\n"
