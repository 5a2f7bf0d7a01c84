"""Work out a merge from configurations and headers alone, and find every problem at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

from jaxtyping import Bool
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_snrf.errors import SnrfError, first_line, naming
from mergekit_snrf.files.references import check_sha256, local_path
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge.checks import (
    check_chat_template,
    check_distinct,
    check_dtypes,
    check_edits,
    check_names,
    check_output,
    check_pairing,
    check_remote_code,
    check_roles,
    compare_provenance,
)
from mergekit_snrf.merge.folders import Kind, output_problem
from mergekit_snrf.merge.method import ALL_NEURONS
from mergekit_snrf.merge.plan import MergePlan, OpenedModel, PlanDraft, PlannedEdit
from mergekit_snrf.merge.recipe import Recipe, read_recipe
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.moments import check_moments, compare_moments, read_moments
from mergekit_snrf.models.shards import FLOAT_DTYPES
from mergekit_snrf.models.weights import bias_name
from mergekit_snrf.neurons.maskfile import Mask, read_mask
from mergekit_snrf.neurons.shape import check_fit, every_neuron
from mergekit_snrf.neurons.sites import Site

LOG = logging.getLogger(__name__)


def draft_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    out_path: str | None = None,
    recipe_folder: str | None = None,
    merge_adapter: bool = True,
) -> PlanDraft:
    """Read configurations and headers of the models and the mask, and work out the merge without reading a weight.

    Args:
        out_path: the output folder, checked if given.
        recipe_folder: where relative paths are looked for after the working folder.
        merge_adapter: let mergekit apply a LoRA source (``model+adapter``) to its cache folder first, which
            reads weights; otherwise the plan shows the names of the model below the adapter.
    """
    draft = PlanDraft()
    draft.recipe = recipe = read_recipe(config, draft.problems)
    if recipe is None:
        return draft
    for role in ("target", "source", "source_base"):
        reference: ModelReference | None = getattr(recipe, role)
        if reference is not None:
            draft.references.append(_absolute(reference, recipe_folder))
            with draft.collect():
                _open(draft, role, draft.references[-1], options, merge_adapter)
    _read_mask(draft, recipe, recipe_folder)
    _read_moments(draft, recipe, recipe_folder)
    check_output(draft, config, options, out_path)
    check_dtypes(draft, config)
    check_chat_template(draft, config, options)
    check_remote_code(draft, options)
    target = draft.models.get("target")
    if target is None:
        return draft
    if draft.mask is not None:
        with draft.collect():
            model = target.checkpoint.name
            check_fit(draft.mask.neurons, target.decoder.shape, where=draft.mask.path, model=model)
        compare_provenance(draft, draft.mask)
    if "source" in draft.models:
        check_distinct(draft, recipe)
        any_family = bool(recipe.value("allow_family_mismatch"))
        check_roles(draft, allowed=any_family)
        check_pairing(draft, any_family=any_family)
        if draft.mask is not None and not draft.problems:
            _plan_edits(draft, recipe, draft.mask, target)
    return draft


def plan_output(
    config: MergeConfiguration,
    options: MergeOptions,
    out_path: str,
    kind: Kind,
    *,
    recipe_folder: str | None,
    overwrite: bool,
    problems: Callable[[PlanDraft], Iterable[SnrfError]],
) -> MergePlan:
    """Return the plan of a merge that ``built_aside`` can write to ``out_path``, and log its warnings.

    Arguments as ``draft_merge`` and ``built_aside``; ``problems`` makes a plan unfit for this kind of output.
    ``SnrfError`` has every problem.
    """
    draft = draft_merge(config, options, recipe_folder=recipe_folder)
    target = draft.checkpoints.get("target")
    of_folder = output_problem(out_path, kind, overwrite=overwrite, inputs=draft.inputs, target=target)
    draft.problems += [problem for problem in (*problems(draft), of_folder) if problem is not None]
    plan = draft.finish()
    for warning in plan.warnings:
        LOG.warning(warning)
    return plan


def _absolute(reference: ModelReference, recipe_folder: str | None) -> ModelReference:
    """Return the same model and adapter with absolute folders, found from the working folder or beside the recipe."""

    def located(part: ModelPath) -> ModelPath:
        places = (os.path.join(folder, part.path) for folder in ("", recipe_folder or ""))
        found = next((os.path.abspath(place) for place in places if os.path.isdir(place)), part.path)
        return ModelPath(path=found, revision=part.revision)

    return ModelReference(
        model=located(reference.model),
        lora=None if reference.lora is None else located(reference.lora),
        override_architecture=reference.override_architecture,
    )


def _with_adapter(reference: ModelReference, options: MergeOptions) -> Checkpoint:
    """Let mergekit merge an adapter into its cache folder, which reads weights, and open the result."""
    try:
        merged = reference.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
    except Exception as error:
        what = f"mergekit cannot merge the adapter into the source ({first_line(error)})"
        remedy = f"check the adapter, and empty {options.lora_merge_cache} before the next run"
        raise SnrfError(reference, what, remedy) from error
    return open_checkpoint(merged.model.path, trust_remote_code=options.trust_remote_code)


def _open(draft: PlanDraft, role: str, reference: ModelReference, options: MergeOptions, merge_adapter: bool) -> None:
    if reference.lora is not None and not os.path.isdir(reference.model.path) and os.path.isdir(str(reference)):
        what = "has a '+' in its name, which in a recipe stands between a model and its adapter"
        raise SnrfError(reference, what, "rename the folder, or name a link to it")
    place, trust = reference.model, options.trust_remote_code
    checkpoint = open_checkpoint(
        place.path, place.revision, cache_dir=options.transformers_cache, trust_remote_code=trust
    )
    draft.checkpoints[role] = checkpoint
    if reference.lora is not None and role == "target":
        what = "a base_model with a LoRA adapter would lose the processor's files"
        remedy = "merge the adapter into a folder of its own first and name that folder"
        draft.problems.append(SnrfError(reference, what, remedy))
    elif reference.lora is not None and not options.lora_merge_cache:
        what = "the source has a LoRA adapter, which mergekit merges into a folder first"
        raise SnrfError(reference, what, "pass --lora-merge-cache DIR")
    elif reference.lora is not None and not merge_adapter:
        what = "planned from the model below the adapter, which is applied when the merge runs"
        draft.warnings.append(f"{reference}: {what}")
    elif reference.lora is not None:
        checkpoint = draft.checkpoints[role] = _with_adapter(reference, options)
    draft.models[role] = OpenedModel(reference, checkpoint, find_decoder(checkpoint))


def _folders(recipe_folder: str | None) -> tuple[str, ...]:
    return (recipe_folder,) if recipe_folder else ()


def _read_mask(draft: PlanDraft, recipe: Recipe, recipe_folder: str | None) -> None:
    """Read the mask; ``masks: all``, and ``update: regmean`` without a mask, are about all neurons."""
    written, target = recipe.parameters.get("masks"), draft.models.get("target")
    if written == ALL_NEURONS or (written is None and recipe.value("update") == "regmean"):
        if target is not None:
            draft.mask = Mask(every_neuron(target.decoder.shape), path="all neurons")
        return
    if not isinstance(written, str):
        return
    with draft.collect(), naming({"sha256": "masks_sha256"}):
        draft.mask_path = local_path(str(recipe.value("masks")), _folders(recipe_folder))
        if recipe.value("masks_sha256"):
            check_sha256(draft.mask_path, str(recipe.value("masks_sha256")))
        draft.mask = read_mask(draft.mask_path)


def _read_moments(draft: PlanDraft, recipe: Recipe, recipe_folder: str | None) -> None:
    target = draft.models.get("target")
    if recipe.value("update") != "regmean" or not recipe.value("moments"):
        return
    with draft.collect():
        draft.moments = read_moments(local_path(str(recipe.value("moments")), _folders(recipe_folder)))
        if target is not None:
            check_moments(draft.moments, target.decoder.shape, target.checkpoint.name)
            draft.warnings += compare_moments(draft.moments, target.checkpoint)


def _plan_edits(draft: PlanDraft, recipe: Recipe, mask: Mask, target: OpenedModel) -> None:
    decoder = target.decoder
    last = decoder.shape.layers - 1
    failures: list[SnrfError] = []
    for site, member in mask.neurons.nonempty().items():
        t = site.layer / last if last else 1.0
        weight = decoder.weight_name(site)
        for name in (weight, bias_name(weight)) if recipe.value("biases") and site.axis == 0 else (weight,):
            if name not in target.checkpoint.tensors:
                continue
            try:
                edit = _planned_edit(draft, recipe.fusion(name, t), site, name, member)
            except SnrfError as error:
                failures.append(error)
                continue
            if edit.fusion.beta > 0:
                draft.edits.append(edit)
    if failures:
        # The same mistake in every layer is one problem.
        first, more = failures[0], len(failures) - 1
        also = f" ({more} further tensors likewise)" if more else ""
        draft.problems.append(SnrfError(first.where, f"{first.what}{also}", first.remedy, field=first.field))
    check_names(draft)
    check_edits(draft, recipe, mask, failed=bool(failures))


def _planned_edit(
    draft: PlanDraft, fusion: Fusion, site: Site, name: str, member: Bool[Tensor, " neurons"]
) -> PlannedEdit:
    """Return the edit of a weight or bias of the target; raise ``SnrfError`` where it cannot be fused."""
    header = draft.checkpoints["target"].tensors[name]
    is_bias = len(header.shape) == 1
    names, size = {}, 0
    for role, model in draft.models.items():
        if role == "target":
            continue
        weight = model.decoder.weight_name(site)
        names[role] = theirs = bias_name(weight) if is_bias else weight
        other = model.checkpoint.tensors.get(theirs)
        if other is None or other.shape != header.shape or other.dtype not in FLOAT_DTYPES:
            found = "is missing" if other is None else f"is {other.dtype} of shape {list(other.shape)}"
            ours = f"{name} of {draft.checkpoints['target'].name} has shape {list(header.shape)}"
            what = f"tensor {theirs} of the {role} {found}, but {ours}"
            raise SnrfError(model.checkpoint.name, what, "its bias cannot move, remove biases from the recipe")
        size += other.bytes
    if is_bias:
        fusion = fusion.of_bias()
    else:
        fusion.check_rank(name, header.shape)
    return PlannedEdit(
        site=site,
        names={"target": name, **names},
        shape=header.shape,
        dtype=header.dtype,
        neurons=int(member.sum()),
        source_bytes=size,
        fusion=fusion,
        member=member,
    )
