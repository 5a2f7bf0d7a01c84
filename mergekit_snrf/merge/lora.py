"""The update of a merge as a PEFT adapter: tens of megabytes in place of a whole model.

beta * M_S(Delta_r) has rank r at most: for attn.q, attn.k, attn.v and fwd.up the masked rows are zero rows of B,
for fwd.down the masked columns are zero columns of A. So the adapter is the update itself, not an approximation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from jaxtyping import Float
from mergekit.options import MergeOptions
from safetensors.torch import save
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import masked_update
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.fusion.updates import Update
from mergekit_snrf.merge.cards import adapter_card
from mergekit_snrf.merge.folders import built_aside, output_problem
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
from mergekit_snrf.merge.tensors import Tensors, threads
from mergekit_snrf.models.checkpoint import Checkpoint, TensorHeader
from mergekit_snrf.models.decoder import find_decoder

LOG = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Adapter:
    """What was exported: modules and rank of each, and the size of the file in bytes."""

    ranks: Mapping[str, int]
    bytes: int


def factors(
    update: Update, neurons: int, axis: int, beta: float
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
    """Return (A, B) with B @ A = beta * M_S(Delta_r) as a whole matrix.

    Args:
        update: the selected neurons as ``left @ right``.
        neurons: how many neurons the projection has.
        axis: the axis of the weight that counts neurons.
    """
    left, right = update.left, update.right
    if left is None or left.shape[0] < left.shape[1]:
        # Fewer neurons than ranks: their rows themselves are the smaller factor.
        rows = update.rows()
        count, length = rows.shape
        identity = torch.eye(min(count, length), dtype=rows.dtype)
        left, right = (identity, rows) if count <= length else (rows, identity)
    spread = torch.zeros(neurons, left.shape[1], dtype=left.dtype)
    spread[update.selected] = left * beta
    return (right, spread) if axis == 0 else (spread.mT.contiguous(), right.mT.contiguous())


def live_prefix(checkpoint: Checkpoint) -> str:
    """Return the decoder's prefix in the model that transformers builds, ``model.language_model.layers.``.

    transformers renames tensors while it loads; an adapter is attached to the modules of the live model. The model is
    built without weights.

    Raises:
        SnrfError: transformers cannot build it, or its decoder is not found.
    """
    from mergekit.common import get_auto_cls
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(checkpoint.folder or checkpoint.name),
            revision=checkpoint.revision,
            trust_remote_code=checkpoint.trust_remote_code,
        )
        if not config.architectures:
            raise ValueError("its config.json names no class under 'architectures'")
        with torch.device("meta"):
            model = get_auto_cls(config.architectures[0]).from_config(
                config, trust_remote_code=checkpoint.trust_remote_code
            )
    except Exception as error:
        raise SnrfError(
            f"{checkpoint.name}: transformers cannot build it ({' '.join(str(error).split())[:300]}); an adapter "
            f"needs the names of its modules"
        ) from None
    headers = {
        name: TensorHeader("BF16", tuple(parameter.shape), "live") for name, parameter in model.named_parameters()
    }
    live = Checkpoint(
        checkpoint.name, checkpoint.folder, headers, checkpoint.config, checkpoint.config_bytes, checkpoint.files
    )
    return find_decoder(live).prefix


def export_adapter(
    plan: MergePlan,
    options: MergeOptions,
    out_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    recipe: str,
    recipe_folder: str | None = None,
    quiet: bool = False,
    workers: int = 2,
    overwrite: bool = False,
) -> Adapter:
    """Write the adapter of a planned merge; the folder appears at once or not at all.

    Args:
        plan: of the merge.
        out_path: must not exist, or be empty.
        dtype: of A and B; float32 is exact.
        recipe: the recipe's text, kept in the model card.
        recipe_folder: where relative paths of the recipe are looked for after the working folder.
        workers: tensors that are computed at once, each on one thread and with one float32 copy of its tensor.
        overwrite: the folder may also hold an earlier adapter, which is replaced when the new one is complete.

    Raises:
        SnrfError: the merge cannot run, the folder is not empty, a bias moves, or a weight is not finite.
    """
    plan.raise_problems()
    problem = output_problem(plan, out_path, "adapter", overwrite=overwrite)
    if problem is not None:
        raise problem
    if any(edit.is_bias for edit in plan.edits):
        raise SnrfError(
            "parameter 'biases' is true, but a LoRA adapter is a product of two matrices added to a weight and cannot "
            "move the target's biases; remove it, or merge with mergekit-yaml or 'snrf patch'"
        )
    assert plan.target is not None
    assert plan.target_decoder is not None
    for warning in plan.warnings:
        LOG.warning(warning)
    if not plan.edits:
        raise SnrfError(f"{plan.mask_path}: the merge changes nothing, so there is no adapter to write")
    prefix = live_prefix(plan.target)
    read = Tensors(plan, options)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    shape = plan.target_decoder.shape

    def matrices(edit: PlannedEdit) -> tuple[Tensor, Tensor]:
        update, neurons = _update_of(plan, edit, read), shape.neurons(edit.site.projection)
        a, b = factors(update, neurons, edit.site.axis, edit.fusion.beta)
        return a.to(dtype).contiguous(), b.to(dtype).contiguous()

    # The folder first: one that cannot be made is better known before the work than after it.
    with built_aside(out_path, "adapter", overwrite=overwrite) as building:
        progress = tqdm.tqdm(total=len(plan.edits), desc="Exporting", unit="tensor", disable=quiet)
        with one_thread(), progress, threads(workers) as pool:
            for edit, (a, b) in zip(plan.edits, pool.map(matrices, plan.edits), strict=True):
                module = f"{prefix}{edit.site.layer}.{edit.site.module}"
                ranks[module] = a.shape[0]
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
                progress.update()
        # safetensors' save_file would make the file readable for its owner alone.
        (building / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        card = adapter_card(plan, Path(out_path).absolute().name, recipe, ranks)
        (building / "README.md").write_text(card, encoding="utf-8")
        size = (building / "adapter_model.safetensors").stat().st_size
        _config(plan, ranks).save_pretrained(building)
    return Adapter(ranks, size)


def _update_of(plan: MergePlan, edit: PlannedEdit, tensors: Tensors) -> Update:
    assert plan.mask is not None
    target, source, source_base = tensors.read(edit)
    return masked_update(
        target,
        source,
        plan.mask.neurons[edit.site],
        edit.site.axis,
        edit.fusion,
        name=edit.target_name,
        source_base=source_base,
        site=edit.site,
    )


def _config(plan: MergePlan, ranks: Mapping[str, int]) -> Any:
    from peft import LoraConfig

    assert plan.target is not None
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # alpha = rank everywhere makes PEFT's factor alpha / r one: beta is inside B.
    others = {rf"{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        base_model_name_or_path=plan.target.name,
        revision=plan.target.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        lora_dropout=0.0,
        bias="none",
        # Whole names: vision towers have a q_proj, too.
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
    )
    # PEFT keeps a set, whose order changes from run to run.
    config.target_modules = sorted(ranks)
    return config
