"""What can be wrong with a merge besides its parameters: output folder, dtypes, template, code, mask, provenance."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.merge.cards import pipeline_tag
from mergekit_snrf.merge.folders import path_problem
from mergekit_snrf.models.checkpoint import FLOAT_DTYPES, ITEM_BYTES, Checkpoint, weight_files
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance

if TYPE_CHECKING:
    from mergekit_snrf.merge.plan import MergePlan
    from mergekit_snrf.merge.recipe import Recipe

_TEMPORARY_SHARD = re.compile(r"(model|pytorch_model)-\d+\.(safetensors|bin)")


def check_output(plan: MergePlan, config: MergeConfiguration, options: MergeOptions, out_path: str | None) -> None:
    """Refuse an output folder that cannot be written, is a model of the recipe, or holds other weights."""
    if out_path is None:
        return
    problem = path_problem(out_path)
    if problem is not None:
        plan.problems.append(str(problem))
    if problem is not None or not os.path.exists(out_path):
        return
    for checkpoint in plan.checkpoints:
        if checkpoint.folder and os.path.samefile(checkpoint.folder, out_path):
            plan.problems.append(f"{out_path}: the output folder is a model of the recipe; choose another folder")
            return
    # One unsharded file is what a repeated merge replaces; anything else would stay beside the new shards.
    unsharded = "model.safetensors" if options.safe_serialization else "pytorch_model.bin"
    if unsharded in os.listdir(out_path) and not os.path.exists(os.path.join(out_path, "mergekit_config.yml")):
        plan.problems.append(
            f"{os.path.join(out_path, unsharded)}: would be replaced, but the folder has no mergekit_config.yml of an "
            f"earlier merge; remove the file or choose another folder"
        )
        return
    fits = plan.target is None or output_bytes(plan.target, config) <= options.out_shard_size
    others = [file for file in weight_files(os.listdir(out_path)) if not (fits and file == unsharded)]
    if others:
        plan.problems.append(
            f"{os.path.join(out_path, others[0])}: the output folder holds other weights ({len(others)} "
            f"{'file' if len(others) == 1 else 'files'}), which would be mixed up with the new shards; remove them or "
            f"choose another folder"
        )


def output_bytes(target: Checkpoint, config: MergeConfiguration) -> int:
    """Return the size of the output's tensors in bytes."""
    name = config.out_dtype or config.dtype
    width = {torch_name: ITEM_BYTES[dtype] for dtype, torch_name in FLOAT_DTYPES.items()}.get(name or "")
    if width is None:
        return target.bytes
    return sum(t.parameters * width if t.dtype in FLOAT_DTYPES else t.bytes for t in target.tensors.values())


def temporary_shards(out_path: str) -> list[str]:
    """Return the shards that mergekit has begun in ``out_path`` and not yet given their final names."""
    if not os.path.isdir(out_path):
        return []
    return [os.path.join(out_path, n) for n in os.listdir(out_path) if _TEMPORARY_SHARD.fullmatch(n)]


def check_dtypes(plan: MergePlan, config: MergeConfiguration) -> None:
    """Refuse dtypes that mergekit does not know, or that would convert what is no floating-point tensor."""
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name is None:
            continue
        try:
            valid = dtype_from_name(name) in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        except RuntimeError:
            valid = False
        if not valid:
            plan.problems.append(f"{key}: {name!r} is not one of {', '.join(FLOAT_DTYPES.values())}")
            continue
        for tensor, header in (plan.target.tensors if plan.target else {}).items():
            if header.dtype not in FLOAT_DTYPES and header.dtype != "I64":
                assert plan.target is not None
                plan.problems.append(
                    f"{plan.target.name}: tensor {tensor} of shape {list(header.shape)} is {header.dtype}, which "
                    f"mergekit would convert to {name}; remove {key} from the recipe to keep every dtype as it is"
                )
                break


def check_chat_template(plan: MergePlan, config: MergeConfiguration) -> None:
    """Refuse a chat template that mergekit cannot find."""
    if not config.chat_template or config.chat_template == "auto":
        return
    # mergekit notices a bad template after the weights are written, and then leaves the tokenizer out.
    from mergekit.merge import _set_chat_template

    try:
        _set_chat_template(SimpleNamespace(), config)
    except RuntimeError:
        plan.problems.append(
            f"chat_template: {config.chat_template!r} is neither Jinja text nor the name of one of mergekit's "
            f"templates (chatml, llama3, ...); correct or remove it"
        )


def check_distinct(plan: MergePlan, recipe: Recipe) -> None:
    """Refuse models that are one and the same, as far as no adapter makes them different."""
    target, source, base = plan.target, plan.source, plan.source_base
    if target is None or source is None:
        return
    if recipe.source.lora is None and _same(target, source):
        plan.problems.append(
            f"{source.name}: the source is the base_model {target.name} itself, so the merge would change nothing; "
            f"name the text-only model under 'models'"
        )
    if base is None or recipe.source_base is None:
        return
    if recipe.source_base.lora is None and _same(target, base):
        plan.problems.append(
            f"{base.name}: source_base is the base_model itself, which Delta is taken from without it; remove it, or "
            f"name the model that the source was trained from"
        )
    if recipe.source_base.lora == recipe.source.lora and _same(source, base):
        plan.problems.append(
            f"{base.name}: source_base is the source itself, so the merge would change nothing; name the model that "
            f"the source was trained from"
        )


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    if one.folder and other.folder:
        return os.path.samefile(one.folder, other.folder)
    return (one.name, one.revision) == (other.name, other.revision)


def check_roles(plan: MergePlan) -> None:
    """Warn where target and source look exchanged."""
    if plan.target is None or plan.source is None:
        return
    if pipeline_tag(plan.source) != pipeline_tag(plan.target) == "text-generation":
        plan.warnings.append(
            f"{plan.target.name}: the base_model, which gains and gives the output its shape, is a text-only model, "
            f"and the source {plan.source.name} is the one that reads images; exchange them unless that is meant"
        )


def check_remote_code(plan: MergePlan, options: MergeOptions) -> None:
    """Refuse checkpoints whose code must run, unless the user allows it."""
    for checkpoint in plan.checkpoints:
        if options.trust_remote_code or not checkpoint.needs_remote_code:
            continue
        if not checkpoint.model_type and "auto_map" not in checkpoint.config:
            plan.problems.append(
                f"{checkpoint.name}: its config.json has no model_type; get the file again, or give the folder of a "
                f"transformers model"
            )
        else:
            plan.problems.append(
                f"{checkpoint.name}: model_type {checkpoint.model_type!r} is defined by code in the checkpoint, which "
                f"mergekit must run to read the configuration; look at the code, then pass --trust-remote-code"
            )


def compare_provenance(plan: MergePlan, mask: Mask) -> None:
    """Warn where the mask says that it was made for other models."""
    for role, checkpoint in (("target", plan.target), ("source", plan.source)):
        recorded: ModelProvenance | None = getattr(mask.provenance, role)
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
        elif recorded.path and Path(recorded.path).name != Path(checkpoint.name).name:
            contradictions.append(f"{recorded.path!r} against {checkpoint.name!r}")
        if contradictions:
            plan.warnings.append(f"{mask.path}: was made for another {role}: {'; '.join(contradictions)}")
