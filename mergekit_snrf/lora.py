"""The update of a merge as a PEFT adapter: tens of megabytes in place of a whole model.

beta * M_S(Delta_r) has rank r at most: for attn.q, attn.k, attn.v and fwd.up the masked rows are zero rows of B,
for fwd.down the masked columns are zero columns of A. So the adapter is the update itself, not an approximation.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from jaxtyping import Float
from mergekit.options import MergeOptions
from safetensors.torch import save
from torch import Tensor

from mergekit_snrf.checkpoint import Checkpoint, TensorHeader
from mergekit_snrf.decoder import find_decoder
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion import Update, masked_update
from mergekit_snrf.plugin.patch import local_folder
from mergekit_snrf.plugin.plan import Edit, MergePlan
from mergekit_snrf.shards import byte_ranges, read_tensor

_PARTIAL = ".partial"
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
        right = update.rows()
        left = torch.eye(len(right), dtype=right.dtype)
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
    recipe: str | None = None,
    quiet: bool = False,
) -> Adapter:
    """Write the adapter of a planned merge; the folder appears at once or not at all.

    Args:
        plan: of the merge.
        out_path: must not exist, or be empty.
        dtype: of A and B; float32 is exact.
        recipe: the recipe's text, kept in the model card.

    Raises:
        SnrfError: the merge cannot run, the folder is not empty, or a weight is not finite.
    """
    plan.raise_problems()
    if os.path.isdir(out_path) and os.listdir(out_path):
        raise SnrfError(f"{out_path}: the output folder is not empty; choose a new folder")
    assert plan.target is not None
    assert plan.target_decoder is not None
    assert plan.source is not None
    if not plan.edits:
        raise SnrfError(f"{plan.mask_path}: the merge changes nothing, so there is no adapter to write")
    prefix = live_prefix(plan.target)
    target_folder, source_folder = local_folder(plan.target, options), local_folder(plan.source, options)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for edit in tqdm.tqdm(plan.edits, desc="Exporting", unit="tensor", disable=quiet):
        update = _update_of(plan, edit, target_folder, source_folder)
        neurons = plan.target_decoder.shape.neurons(edit.site.projection)
        a, b = factors(update, neurons, edit.site.axis, edit.fusion.beta)
        module = f"{prefix}{edit.site.layer}.{edit.site.module}"
        ranks[module] = a.shape[0]
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype).contiguous()
    with _folder_at_once(Path(out_path).absolute()) as building:
        _config(plan, ranks).save_pretrained(building)
        # safetensors' save_file would make the file readable for its owner alone.
        (building / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        (building / "README.md").write_text(_card(plan, ranks, recipe), encoding="utf-8")
        size = (building / "adapter_model.safetensors").stat().st_size
    return Adapter(ranks, size)


def _update_of(plan: MergePlan, edit: Edit, target_folder: Path, source_folder: Path) -> Update:
    assert plan.target is not None
    assert plan.source is not None
    assert plan.mask is not None
    target = byte_ranges(target_folder / plan.target.tensors[edit.target_name].file)[edit.target_name]
    source = byte_ranges(source_folder / plan.source.tensors[edit.source_name].file)[edit.source_name]
    return masked_update(
        read_tensor(target),
        read_tensor(source),
        plan.mask.neurons[edit.site],
        edit.site.axis,
        edit.fusion.rank,
        edit.fusion.order,
        name=edit.target_name,
    )


def _config(plan: MergePlan, ranks: Mapping[str, int]) -> Any:
    from peft import LoraConfig

    assert plan.target is not None
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # alpha = rank everywhere makes PEFT's factor alpha / r one: beta is inside B.
    others = {rf"{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    return LoraConfig(
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


def _card(plan: MergePlan, ranks: Mapping[str, int], recipe: str | None) -> str:
    import yaml

    assert plan.target is not None
    assert plan.source is not None
    models = [c.name for c in (plan.target, plan.source) if not os.path.isabs(c.name)]
    front = {"base_model": models, "library_name": "peft", "tags": ["mergekit", "snrf", "lora"]}
    card = (
        f"---\n{yaml.safe_dump(front)}---\n# Shared neurons of {Path(plan.source.name).name} for "
        f"{Path(plan.target.name).name}\n\nThe update beta * M_S(Delta_r) of Shared Neuron Low-Rank Fusion "
        f"(https://arxiv.org/abs/2602.19058) as a LoRA adapter, made with mergekit-snrf: {len(ranks)} modules of the "
        f"text decoder, {sum(edit.neurons for edit in plan.edits)} neurons, rank "
        f"{min(ranks.values())} to {max(ranks.values())}.\n"
    )
    return card if recipe is None else f"{card}\n```yaml\n{recipe.rstrip()}\n```\n"


@contextmanager
def _folder_at_once(out: Path) -> Iterator[Path]:
    building = out.parent / f".{out.name}{_PARTIAL}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if out.exists():
            out.rmdir()
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
