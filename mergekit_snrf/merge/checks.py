"""What can be wrong with a merge besides its parameters: output folder, dtypes, template, code, mask, provenance."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.references import cached_place
from mergekit_snrf.merge.folders import is_merged_weights, left_by_killed_run, path_problem
from mergekit_snrf.merge.plan import PlanDraft
from mergekit_snrf.merge.recipe import Recipe
from mergekit_snrf.models.checkpoint import Checkpoint, weight_files
from mergekit_snrf.models.decoder import pairing_problems
from mergekit_snrf.models.shards import FLOAT_DTYPES, ITEM_BYTES
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance

_ANOTHER = "choose another folder"


def check_output(draft: PlanDraft, config: MergeConfiguration, options: MergeOptions, out_path: str | None) -> None:
    """Refuse an output folder that cannot be written, is a model of the recipe, or holds other weights."""
    if out_path is None:
        return
    with draft.collect():
        if problem := path_problem(out_path):
            raise problem
        if not os.path.exists(out_path):
            return
        for checkpoint in draft.checkpoints.values():
            if checkpoint.folder and os.path.samefile(checkpoint.folder, out_path):
                raise SnrfError(out_path, "the output folder is a model of the recipe", _ANOTHER)
        for path in map(Path, draft.inputs):
            if path.parent == Path(out_path).resolve() and is_merged_weights(path.name):
                raise SnrfError(path, "is read by the recipe, and would be replaced by the output", _ANOTHER)
        # One unsharded file is what a repeated merge replaces; anything else would stay beside the new shards.
        unsharded = "model.safetensors" if options.safe_serialization else "pytorch_model.bin"
        held = set(os.listdir(out_path)).difference(left_by_killed_run(Path(out_path)))
        if unsharded in held and not os.path.exists(os.path.join(out_path, "mergekit_config.yml")):
            what = "would be replaced, but the folder has no mergekit_config.yml of an earlier merge"
            raise SnrfError(os.path.join(out_path, unsharded), what, f"remove the file or {_ANOTHER}")
        target = draft.checkpoints.get("target")
        fits = target is None or output_bytes(target, config) <= options.out_shard_size
        others = [file for file in weight_files(sorted(held)) if not (fits and file == unsharded)]
        if others:
            count = f"{len(others)} {'file' if len(others) == 1 else 'files'}"
            what = f"the output folder holds other weights ({count}), which would be mixed up with the new shards"
            raise SnrfError(os.path.join(out_path, others[0]), what, f"remove them or {_ANOTHER}")


def output_bytes(target: Checkpoint, config: MergeConfiguration) -> int:
    """Return the size of the output's tensors in bytes."""
    name = config.out_dtype or config.dtype
    width = {torch_name: ITEM_BYTES[dtype] for dtype, torch_name in FLOAT_DTYPES.items()}.get(name or "")
    if width is None:
        return target.bytes
    return sum(t.parameters * width if t.dtype in FLOAT_DTYPES else t.bytes for t in target.tensors.values())


def check_dtypes(draft: PlanDraft, config: MergeConfiguration) -> None:
    """Refuse dtypes that mergekit does not have, or that would convert what is not a floating-point tensor."""
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name is None:
            continue
        try:
            valid = dtype_from_name(name) in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        except RuntimeError:
            valid = False
        if not valid:
            what = f"must be one of {', '.join(FLOAT_DTYPES.values())}, got {name!r}"
            draft.problems.append(SnrfError(None, what, field=key))
            continue
        target = draft.checkpoints.get("target")
        for tensor, header in target.tensors.items() if target else ():
            if header.dtype not in FLOAT_DTYPES and header.dtype != "I64":
                what = f"tensor {tensor} of shape {list(header.shape)} is {header.dtype}, which mergekit would convert"
                remedy = f"remove {key} from the recipe to keep every dtype as it is"
                draft.problems.append(SnrfError(target and target.name, f"{what} to {name}", remedy))
                break


def check_chat_template(draft: PlanDraft, config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse a chat template that mergekit cannot find, or a tokenizer that it cannot load to write the template.

    mergekit notices both after the weights are written, and then leaves the tokenizer out.
    """
    if not config.chat_template:
        return
    from mergekit.merge import _set_chat_template
    from transformers import AutoTokenizer

    try:
        if config.chat_template != "auto":
            _set_chat_template(SimpleNamespace(), config)
    except RuntimeError:
        what = f"{config.chat_template!r} is neither Jinja text nor the name of one of mergekit's templates"
        draft.problems.append(SnrfError(None, what, "correct or remove it", field="chat_template"))
    target = draft.checkpoints.get("target")
    if target is None or not options.copy_tokenizer:
        return
    try:
        AutoTokenizer.from_pretrained(
            str(target.folder or target.name), revision=target.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # Damaged files raise whatever their readers raise.
        what = f"the tokenizer, which gets the chat template, cannot be loaded ({first_line(error)})"
        draft.problems.append(SnrfError(target.name, what, "get its files again, or remove chat_template"))


def check_distinct(draft: PlanDraft, recipe: Recipe) -> None:
    """Refuse models that are one and the same, as far as no adapter makes them different."""
    target, source = draft.checkpoints["target"], draft.checkpoints["source"]
    base = draft.checkpoints.get("source_base")
    if recipe.source.lora is None and _same(target, source):
        what = f"the source is the base_model {target.name} itself, so the merge would change nothing"
        draft.problems.append(SnrfError(source.name, what, "name the text-only model under 'models'"))
    if base is None or recipe.source_base is None:
        return
    trained_from = "name the model that the source was trained from"
    if recipe.source_base.lora is None and _same(target, base):
        what = "source_base is the base_model itself, which Delta is taken from without it"
        draft.problems.append(SnrfError(base.name, what, f"remove it, or {trained_from}"))
    if recipe.source_base.lora == recipe.source.lora and _same(source, base):
        what = "source_base is the source itself, so the merge would change nothing"
        draft.problems.append(SnrfError(base.name, what, trained_from))


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    if one.folder and other.folder:
        return os.path.samefile(one.folder, other.folder)
    return (one.name, one.revision) == (other.name, other.revision)


def check_roles(draft: PlanDraft, *, allowed: bool) -> None:
    """Refuse target and source that look exchanged, or warn of it where that is allowed."""
    target, source = draft.checkpoints["target"], draft.checkpoints["source"]
    if source.pipeline_tag == target.pipeline_tag or target.pipeline_tag != "text-generation":
        return
    what = f"is a text-only model, and the source {source.name} reads images: target and source look exchanged"
    remedy = "exchange them: base_model is what the output is made from (or set allow_family_mismatch: true)"
    problem = SnrfError(target.name, what, None if allowed else remedy, field="base_model")
    if allowed:
        draft.warnings.append(str(problem))
    else:
        draft.problems.append(problem)


def check_pairing(draft: PlanDraft, *, any_family: bool) -> None:
    """Refuse donors whose neurons do not correspond to the target's."""
    target = draft.checkpoints["target"]
    for role in ("source", "source_base"):
        if role not in draft.models:
            continue
        donor = draft.checkpoints[role]
        for problem in pairing_problems(target, donor, any_family=any_family):
            where = None if role == "source" else f"source_base {donor.name} as the source"
            draft.problems.append(problem.at(where, field=problem.field and "allow_family_mismatch"))


def check_remote_code(draft: PlanDraft, options: MergeOptions) -> None:
    """Refuse checkpoints whose code must run, unless the user allows it."""
    for checkpoint in draft.checkpoints.values():
        if not checkpoint.model_type and "auto_map" not in checkpoint.config:
            remedy = "get the file again, or give the folder of a transformers model"
            draft.problems.append(SnrfError(checkpoint.name, "its config.json has no model_type", remedy))
        elif checkpoint.needs_remote_code and not options.trust_remote_code:
            what = (
                f"model_type {checkpoint.model_type!r} is defined by code in the checkpoint, which mergekit must run "
                f"to read the configuration"
            )
            draft.problems.append(SnrfError(checkpoint.name, what, "look at the code, then pass --trust-remote-code"))


def compare_provenance(draft: PlanDraft, mask: Mask) -> None:
    """Warn where the mask says that it was made for other models."""
    for role in ("target", "source"):
        recorded: ModelProvenance | None = getattr(mask.provenance, role)
        checkpoint = draft.checkpoints.get(role) if role in draft.models else None
        if recorded is None or checkpoint is None:
            continue
        contradictions = []
        if recorded.model_type and recorded.model_type != checkpoint.model_type:
            contradictions.append(f"model_type {recorded.model_type!r} against {checkpoint.model_type!r}")
        if recorded.config_sha256:
            if recorded.config_sha256 != checkpoint.config_sha256:
                contradictions.append(
                    f"config.json of sha256 {recorded.config_sha256[:12]}... against {checkpoint.config_sha256[:12]}..."
                )
        elif recorded.path and _last_part(recorded.path) != _last_part(checkpoint.name):
            contradictions.append(f"{recorded.path!r} against {checkpoint.name!r}")
        if contradictions:
            draft.warnings.append(f"{mask.path}: was made for another {role}: {'; '.join(contradictions)}")


def _last_part(path: str) -> str:
    place = cached_place(path)
    return Path(place[0] if place else path).name


def check_names(draft: PlanDraft) -> None:
    """Refuse a model with two tensors that mergekit, which takes the first of several names, would mix up."""
    for edit in draft.edits:
        names = list(edit.names.values())
        for role, own in edit.names.items():
            checkpoint = draft.checkpoints[role]
            wrong = next((name for name in names[: names.index(own)] if name in checkpoint.tensors), None)
            if wrong is not None:
                what = f"has a tensor {wrong} besides its decoder's {own}; mergekit would take the wrong one"
                draft.problems.append(SnrfError(checkpoint.name, what, "use a model with a text decoder alone"))
                return


def check_edits(draft: PlanDraft, recipe: Recipe, mask: Mask, *, failed: bool) -> None:
    """Warn of filters without effect; refuse a merge without edits, and biases where none moves."""
    for text in recipe.filters():
        if text != "*" and not any(text in edit.target_name for edit in draft.edits):
            what = f"filter {text!r} matches no tensor with masked neurons, so its value is never used"
            draft.warnings.append(what)
    if failed:
        return
    if not draft.edits and not recipe.value("allow_noop"):
        empty = mask.neurons.count() == 0
        where, field = (mask.path, None) if empty else ("parameters", "beta")
        what = f"{'the mask has no neurons' if empty else 'is 0 for every masked tensor'}, so the merge changes nothing"
        remedy = f"give {'a mask with neurons' if empty else 'a beta above 0'}, or set allow_noop: true"
        draft.problems.append(SnrfError(where, what, remedy, field=field))
    elif recipe.value("biases") and not any(edit.is_bias for edit in draft.edits):
        what = (
            f"is true, but no masked neuron of {draft.checkpoints['target'].name} that changes has a bias (this "
            f"decoder has none, or none in the masked projections)"
        )
        draft.problems.append(SnrfError("parameters", what, "remove it", field="biases"))
