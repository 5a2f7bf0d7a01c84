"""Model cards of merges, adapters and masks; everything in them is read from the files and the plan."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_snrf import __version__
from mergekit_snrf.files import markdown, references
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance, Provenance

if TYPE_CHECKING:
    from mergekit.common import ModelReference

    from mergekit_snrf.merge.plan import MergePlan

PAPER = "https://arxiv.org/abs/2602.19058"
_VISION = ("vision_config", "vision_model", "image_token_id", "image_token_index", "vision_tower")
# Provenance fields that may be paths.
_PATHS = ("path", "file", "dataset")
# A name that YAML reads as the same text without quotes.
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z][\w.+@-]*", re.ASCII | re.IGNORECASE)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def merge_card(plan: MergePlan, name: str, recipe: str, *, cast: str | None = None, changed: int | None = None) -> str:
    """Return the README of a merged folder.

    Args:
        plan: of the merge.
        name: of the merged model.
        recipe: its text, as written.
        cast: the dtype that every tensor was cast to, if the recipe sets one.
        changed: how many of the covered weights differ from the target's, where that is known.
    """
    differ = "" if changed is None else f", {changed} of which differ from the target's after rounding"
    return _of_plan(
        plan,
        name,
        f"{_model(plan.references[0])} with an update from {_model(plan.references[1])} on chosen neurons, merged by "
        f"[Shared Neuron Low-Rank Fusion]({PAPER}) with [mergekit](https://github.com/arcee-ai/mergekit) and "
        f"mergekit-snrf. The update covers {plan.parameters_touched} weights of the text decoder{differ}; all others "
        f"are the target's{f', cast to {cast}' if cast else ''}.",
        recipe=recipe,
        command="mergekit-yaml snrf.yml merged/",
        relation="merge",
        library="transformers",
        tags=("merge", "snrf"),
    )


def adapter_card(
    plan: MergePlan, name: str, recipe: str, modules: int, rank: int, base_model: str | None = None
) -> str:
    """Return the README of an adapter's folder.

    Args:
        plan: of the merge.
        name: of the adapter.
        recipe: its text, as written.
        modules: that it adapts.
        rank: of every module.
        base_model: the target's hub id, where it is not that of the plan.
    """
    return _of_plan(
        plan,
        name,
        f"A LoRA adapter for {_model(plan.references[0])}: the update beta * M_S(Delta_r) that [Shared Neuron Low-Rank "
        f"Fusion]({PAPER}) adds to it from {_model(plan.references[1])}, in {modules} modules of the text decoder, "
        f"rank {rank}. Made with mergekit-snrf.",
        '```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(target, "this folder")\n```',
        recipe=recipe,
        command="snrf lora snrf.yml adapter/",
        relation="adapter",
        library="peft",
        tags=("snrf", "lora"),
        base_model=base_model,
    )


def mask_card(mask: Mask, *, sha256: str) -> str:
    """Return a README for a mask file."""
    mask = _without_folders(mask)
    target, source = (
        markdown.line((side and side.path) or "") for side in (mask.provenance.target, mask.provenance.source)
    )
    name, usual = Path(mask.path).name, Fusion()
    recipe = {
        "merge_method": "snrf",
        "base_model": target or "TARGET",
        "models": [{"model": source or "SOURCE", "parameters": {"beta": usual.beta, "rank": usual.rank}}],
        "parameters": {"masks": name, "masks_sha256": sha256},
    }
    return _document(
        name,
        f"A mask of {mask.neurons.count()} neurons for [Shared Neuron Low-Rank Fusion]({PAPER}), a safetensors file of "
        f"booleans for mergekit-snrf.",
        markdown.table(
            ("projection", "layers", "neurons", "of", "share"),
            [(name, *counts, _share(*counts[1:])) for name, counts in mask.neurons.by_projection().items()],
        ),
        markdown.table(("", ""), [("sha256", f"`{sha256}`"), *provenance_rows(mask)]),
        "## Use",
        f"    pip install mergekit-snrf=={__version__}\n    mergekit-yaml snrf.yml merged/",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).rstrip()}\n```",
        models=[path for path in (target, source) if _HUB_ID.fullmatch(path) and not os.path.exists(path)],
        library="mergekit-snrf",
        tags=("snrf", "neuron-mask"),
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


def _of_plan(
    plan: MergePlan,
    name: str,
    *intro: str,
    recipe: str,
    command: str,
    relation: str,
    library: str,
    tags: tuple[str, ...],
    base_model: str | None = None,
) -> str:
    """Return the README of what a plan was made into: the introduction, what was changed, and how to make it again."""
    assert plan.target is not None
    packages = dict.fromkeys(("mergekit", "torch", "transformers", library))
    return _document(
        name,
        *intro,
        *_changes(plan),
        *_mask_of(plan),
        *_reproduction(plan, recipe, command, tuple(packages)),
        models=list(dict.fromkeys([*([base_model] if base_model else []), *_hub_ids(plan)])),
        relation=relation,
        library=library,
        task=pipeline_tag(plan.target),
        tags=tags,
    )


def _changes(plan: MergePlan) -> list[str]:
    rows = [(name, tensors, changed, of, _share(changed, of)) for name, (tensors, changed, of) in plan.counts().items()]
    return [
        "## What was changed",
        markdown.table(("projection", "tensors", "neurons", "of", "share"), rows),
        f"Update: {plan.update}.",
    ]


def _mask_of(plan: MergePlan) -> list[str]:
    if plan.mask is None or plan.mask_path is None:
        return []
    digest = references.sha256(plan.mask_path)
    rows = [("file", f"`{plan.mask_path.name}`"), ("sha256", f"`{digest}`"), ("neurons", plan.mask.neurons.count())]
    return ["## Neurons", markdown.table(("", ""), [*rows, *provenance_rows(_without_folders(plan.mask))])]


def _reproduction(plan: MergePlan, recipe: str, command: str, packages: tuple[str, ...]) -> list[str]:
    # A local version, such as 2.13.0+cpu, is on no index.
    pins = " ".join(f"{name}=={version(name).partition('+')[0]}" for name in packages)
    models = [
        (_spoken(reference), reference.model.revision or "as of the merge", f"`{checkpoint.config_sha256}`")
        for reference, checkpoint in zip(plan.references, plan.checkpoints, strict=True)
    ]
    shared = portable(recipe)
    named = "" if shared == recipe else ", its absolute paths cut to their last part"
    return [
        "## To make it again",
        f"    pip install mergekit-snrf=={__version__} {pins}\n    {command}",
        f"with this as `snrf.yml`{named}, and the mask of the sha256 above where it says:",
        f"```yaml\n{shared.rstrip()}\n```",
        markdown.table(("model", "revision", "sha256 of config.json"), models),
    ]


def portable(recipe: str) -> str:
    """Return a recipe's text with the absolute paths of what is on this machine cut to their last part.

    Of paths that end alike as many parts are kept as tell them apart.
    """
    scalars = [token for token in yaml.scan(recipe, yaml.SafeLoader) if isinstance(token, yaml.ScalarToken)]
    names = _names({path for token in scalars for path, _ in _parts(token.value) if _is_here(path)})
    pieces, end = [], 0
    for token in scalars:
        short = "".join(names.get(path, path) + rest for path, rest in _parts(token.value))
        if short == token.value:
            continue
        written = recipe[token.start_mark.index : token.end_mark.index]
        # A block scalar ends after its line break.
        after = written[len(written.rstrip()) :]
        quoted = short if _PLAIN.fullmatch(short) else json.dumps(short, ensure_ascii=False)
        pieces += [recipe[end : token.start_mark.index], quoted + after]
        end = token.end_mark.index
    return "".join([*pieces, recipe[end:]])


def _parts(reference: str) -> list[tuple[str, str]]:
    """Split a reference to a mask or a model into paths and what follows each; joined again they are the reference."""
    if _is_here(reference):
        return [(reference, "")]
    # A model may be model@revision+adapter@revision.
    parts = [part.partition("@") for part in reference.split("+")]
    return [
        (path, at + revision + ("+" if number < len(parts) else ""))
        for number, (path, at, revision) in enumerate(parts, 1)
    ]


def _names(paths: Collection[str]) -> dict[str, str]:
    """Return the shortest ends of paths that tell them apart."""
    parts = {path: PurePath(path).parts for path in paths}
    distinct = set(parts.values())

    def name(of: tuple[str, ...]) -> str:
        ends = (of[-count:] for count in range(1, len(of) + 1))
        return str(PurePath(*next(end for end in ends if sum(other[-len(end) :] == end for other in distinct) == 1)))

    return {path: name(of) for path, of in parts.items()}


def _is_here(path: str) -> bool:
    return os.path.isabs(path) and os.path.exists(path)


def _without_folders(mask: Mask) -> Mask:
    """Return a mask in whose provenance absolute paths are cut to their last part."""

    def cut(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: cut(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner, key) for inner in value]
        return _last_part(value) if isinstance(value, str) and key in _PATHS else value

    return replace(mask, provenance=Provenance.model_validate(cut(mask.provenance.model_dump(exclude_none=True))))


def _last_part(path: str) -> str:
    """Return the name of what lies at an absolute path, the rest of which is nobody's business; others as they are."""
    absolute = next((kind(path) for kind in (PurePosixPath, PureWindowsPath) if kind(path).is_absolute()), None)
    return path if absolute is None else absolute.name


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


def _document(
    name: str,
    *parts: str,
    models: list[str],
    library: str,
    tags: tuple[str, ...],
    relation: str | None = None,
    task: str | None = None,
) -> str:
    """Return a page with the front matter that hubs read; what is empty is left out of it."""
    front = {
        "base_model": models,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["mergekit", *tags],
    }
    return markdown.document(name, parts, front)
