"""A recipe opened for an analysis: what it does, as a merge that a loaded target can be edited to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.controls import Merge, planned
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.recipefile import MergeConfiguration, MergeOptions, dtype_from_name, load_recipe
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import find_decoder, pairing_problems
from mergekit_snrf.models.weights import Weights, bias_name, stored_weights


@dataclass(frozen=True)
class OpenedRecipe:
    """A recipe whose models are on this machine; ``dtype`` is what to load the target in, ``settings`` the study's."""

    merge: Merge
    target: Checkpoint
    source: Checkpoint
    target_folder: Path
    dtype: str
    mask: str | None
    any_family: bool
    warnings: Sequence[str]
    settings: Mapping[str, Any]


def open_recipe(config: MergeConfiguration, options: MergeOptions, recipe_folder: str | None) -> OpenedRecipe:
    """Check a recipe as a merge would, and open its models, all safetensors, without loading one.

    Relative paths are looked for in the working folder, then in ``recipe_folder``.
    """
    plan = draft_merge(config, options, recipe_folder=recipe_folder).finish()
    target, source = plan.target.checkpoint, plan.source.checkpoint
    name = plan.recipe.working_dtype(plan.edits[0].dtype if plan.edits else "F32")
    dtype: torch.dtype | None = dtype_from_name(name)
    warnings = list(plan.warnings)
    if config.out_dtype is not None and config.out_dtype != name:
        made_in = f"the comparison is made in {name or 'the dtype of the checkpoint'}"
        warnings.append(f"out_dtype {config.out_dtype} rounds the merged folder once more; {made_in}")
    base = None if plan.source_base is None else plan.source_base.checkpoint
    cache = options.transformers_cache
    of_base = None if base is None else stored_weights(base, base.local(cache), dtype)
    merge = planned(plan, stored_weights(source, source.local(cache), dtype), of_base)
    settings = {"source": source.name, "source_config_sha256": source.config_sha256, "update": plan.update}
    if base is not None:
        settings["source_base"] = base.name
    return OpenedRecipe(
        merge=merge,
        target=target,
        source=source,
        target_folder=target.local(options.transformers_cache),
        dtype=name or "auto",
        mask=None if plan.mask_path is None else str(plan.mask_path),
        any_family=bool(plan.recipe.value("allow_family_mismatch")),
        warnings=warnings,
        settings={**settings, "config_sha256": target.config_sha256},
    )


def open_rivals(paths: Sequence[str], opened: OpenedRecipe, options: MergeOptions) -> dict[str, Merge]:
    """Open other recipes of the same target, by the names of their files.

    Raises:
        SnrfError: as ``open_recipe``; or a recipe is of another target, or two have the same name.
    """
    merges: dict[str, Merge] = {}
    for path in paths:
        other = open_recipe(load_recipe(path), options, os.path.dirname(os.path.realpath(path)))
        if other.target_folder != opened.target_folder:
            what = f"merges into {other.target.name}, not into {opened.target.name}"
            raise SnrfError(path, what, "give a recipe of the same target", field="rival")
        name = f"recipe {Path(path).stem}"
        if name in merges:
            raise SnrfError(path, f"there are two {name}", "rename one of the files", field="rival")
        merges[name] = other.merge
    return merges


def open_base(name: str, opened: OpenedRecipe, options: MergeOptions) -> Weights:
    """Open the model that target and source were both trained from; ``SnrfError``: it does not fit, or lacks a bias."""
    base = open_checkpoint(name, cache_dir=options.transformers_cache, trust_remote_code=options.trust_remote_code)
    problems = pairing_problems(opened.target, base, any_family=opened.any_family)
    if problems:
        what = f"does not fit in place of the source: {problems[0]}"
        raise SnrfError(name, what, "give the model that both were trained from", field="base")
    decoder = find_decoder(base)
    for site in opened.merge.bias_fusions:
        if bias_name(decoder.weight_name(site)) not in base.tensors:
            what = f"has no tensor {bias_name(decoder.weight_name(site))}, but the recipe moves biases"
            raise SnrfError(name, what, "leave out this row, or biases in the recipe", field="base")
    return stored_weights(
        base, base.local(options.transformers_cache), dtype_from_name(opened.dtype.removeprefix("auto") or None)
    )
