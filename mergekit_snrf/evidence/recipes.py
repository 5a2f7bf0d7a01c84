"""A recipe opened for an analysis: what it does, as a merge that a loaded target can be edited to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_snrf.errors import SnrfError, keys_of_file, unexpected
from mergekit_snrf.evidence.controls import Merge, planned
from mergekit_snrf.evidence.options import Reading
from mergekit_snrf.files.reading import parse_yaml
from mergekit_snrf.files.settings import construct
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.recipefile import (
    MergeConfiguration,
    MergeOptions,
    checked_recipe,
    dtype_from_name,
    recipe_text,
)
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import find_decoder, pairing_problems
from mergekit_snrf.models.reference import ModelRef
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

    def ref(self, reading: Reading) -> ModelRef:
        """Return how the target is loaded, in the recipe's dtype unless another was chosen."""
        ref = reading.ref(self.target_folder)
        return construct(ModelRef, {**ref.model_dump(), "dtype": self.dtype}) if ref.dtype == "auto" else ref


Recipe = str | os.PathLike[str] | Mapping[str, Any]
"""A recipe file, ``-`` for standard input, or the content of one."""


def merge_options(reading: Reading, *, quiet: bool) -> MergeOptions:
    """Return mergekit's options."""
    caches = {"transformers_cache": reading.transformers_cache, "lora_merge_cache": reading.lora_merge_cache}
    return MergeOptions(**caches, trust_remote_code=reading.trust_remote_code, quiet=quiet)


def recipe_content(recipe: Recipe) -> tuple[dict[str, Any], str, str | None]:
    """Return the content of a recipe, its name in messages, and the folder that its relative paths may be in."""
    if isinstance(recipe, Mapping):
        return dict(recipe), "recipe", None
    if not isinstance(recipe, str | os.PathLike):
        raise unexpected("recipe", recipe, "the path of a recipe, or its content as a mapping")
    path = os.fspath(recipe)
    return parse_yaml(recipe_text(path), path), path, os.path.dirname(os.path.realpath(path))


def load_recipe_at(recipe: Recipe) -> tuple[MergeConfiguration, str | None]:
    """Return a recipe, and the folder that its relative paths may be in."""
    content, where, folder = recipe_content(recipe)
    return checked_recipe(content, where), folder


def open_recipe(config: MergeConfiguration, options: MergeOptions, recipe_folder: str | None) -> OpenedRecipe:
    """Check a recipe as a merge would, and open its models, all safetensors, without loading one.

    Relative paths are looked for in the working folder, then in ``recipe_folder``.
    """
    with keys_of_file():
        plan = draft_merge(config, options, recipe_folder=recipe_folder).finish()
    target, source = plan.target.checkpoint, plan.checkpoints["source"]
    name = plan.recipe.working_dtype(plan.edits[0].dtype if plan.edits else "F32")
    dtype: torch.dtype | None = dtype_from_name(name)
    warnings = list(plan.warnings)
    if config.out_dtype is not None and config.out_dtype != name:
        made_in = f"the comparison is made in {name or 'the dtype of the checkpoint'}"
        warnings.append(f"out_dtype {config.out_dtype} rounds the merged folder once more; {made_in}")
    base = plan.checkpoints.get("source_base")
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
        config, folder = load_recipe_at(path)
        other = open_recipe(config, options, folder)
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
