"""The update of a merge as a PEFT adapter: tens of megabytes in place of a whole model.

beta * M_S(Delta_r) has rank r at most: for attn.q, attn.k, attn.v and fwd.up the masked rows are zero rows of B,
for fwd.down the masked columns are zero columns of A. So the adapter is the update itself, not an approximation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tqdm
from jaxtyping import Float
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import save
from torch import Tensor

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.references import cached_place
from mergekit_snrf.fusion.threads import Memory, look_ahead
from mergekit_snrf.fusion.updates import Update
from mergekit_snrf.merge.cards import adapter_card
from mergekit_snrf.merge.draft import plan_output
from mergekit_snrf.merge.folders import built_aside
from mergekit_snrf.merge.plan import MergePlan, PlanDraft, PlannedEdit
from mergekit_snrf.merge.tally import no_update, some_without_update
from mergekit_snrf.merge.tensors import Tensors, cast
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.shards import TensorHeader

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter is written: its dtype (float32 is exact), rank and the hub id of its base_model.

    By default the rank of all modules, padded with zeros, is the largest that the update has, and the base_model is
    that of the recipe.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rank: int | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class Adapter:
    """What was exported: the adapted modules, the rank of all of them, and the size of the file in bytes."""

    modules: int
    rank: int
    bytes: int


def factors(
    update: Update, neurons: int, axis: int, beta: float
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
    """Return (A, B) with B @ A = beta * M_S(Delta_r) as a whole matrix of so many neurons along an axis."""
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


def export_adapter(
    config: MergeConfiguration,
    recipe: str,
    options: MergeOptions,
    out_path: str,
    *,
    settings: AdapterSettings | None = None,
    recipe_folder: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Write the update of a merge as an adapter; the folder appears at once or not at all.

    Args:
        recipe: its text, kept in the model card.
        out_path: must not exist, or be empty.
        recipe_folder: where relative paths of the recipe are looked for after the working folder.
        workers: tensors that are computed at once, each on one thread and with one float32 copy of its tensor.
        overwrite: the folder may also hold an earlier adapter, which is replaced when the new one is complete.

    Raises:
        SnrfError: the merge cannot run, the folder is not empty, a bias moves, or a weight is not finite.
    """
    plan = plan_output(
        config, options, out_path, "adapter", recipe_folder=recipe_folder, overwrite=overwrite, problems=_problems
    )
    settings = settings or AdapterSettings()
    plan = replace(plan, edits=[_truncated(edit, settings.rank) for edit in plan.edits])
    rank = _rank(plan.edits, settings.rank)
    prefix = live_prefix(plan.target.checkpoint)
    modules = [f"{prefix}{edit.site.layer}.{edit.site.module}" for edit in plan.edits]
    # The folder first: one that cannot be made is better known before the work than after it.
    with built_aside(out_path, "adapter", overwrite=overwrite) as building:
        matrices = dict(zip(modules, _matrices(plan, options, settings, rank, workers), strict=True))
        tensors = {
            f"base_model.model.{module}.lora_{part}.weight": tensor
            for module, parts in matrices.items()
            for part, tensor in zip("AB", parts, strict=True)
        }
        # safetensors' save_file would make the file readable for its owner alone.
        (building / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        card = adapter_card(plan, recipe, len(modules), rank, settings.base_model)
        (building / "README.md").write_text(card, encoding="utf-8")
        size = (building / "adapter_model.safetensors").stat().st_size
        config = _config(plan.target.checkpoint, modules, rank, settings.base_model)
        (building / "adapter_config.json").write_text(config, encoding="utf-8")
    return Adapter(len(modules), rank, size)


def _problems(draft: PlanDraft) -> Iterator[SnrfError]:
    if any(edit.is_bias for edit in draft.edits):
        what = "a LoRA adapter, a product of two matrices added to a weight, cannot move biases"
        yield SnrfError(None, what, "remove it, or merge with mergekit-yaml or 'snrf patch'", field="biases")
    if not draft.edits and not draft.problems:
        yield SnrfError(draft.mask_path, "the merge changes nothing, so there is no adapter to write")


def _truncated(edit: PlannedEdit, rank: int | None) -> PlannedEdit:
    """Return an edit of regmean, whose update has full rank, with the rank of the adapter."""
    if edit.fusion.update != "regmean" or edit.fusion.rank:
        return edit
    if rank is None:
        what = "the update of regmean has full rank, too large for an adapter"
        raise SnrfError(None, what, "set it to 16, in the recipe or for the adapter", field="rank")
    return replace(edit, fusion=replace(edit.fusion, rank=min(rank, *edit.shape)))


def _rank(edits: Sequence[PlannedEdit], wanted: int | None) -> int:
    """Return the rank of all modules: the wanted one, or the largest that the update of a weight has."""
    full = [min(edit.neurons, edit.shape[1 - edit.site.axis]) for edit in edits]
    limits = [edit.fusion.rank if edit.fusion.update != "dare" else 0 for edit in edits]
    needed = max(min(size, limit or size) for size, limit in zip(full, limits, strict=True))
    if wanted is not None and wanted < needed:
        what = f"{wanted} is smaller than the rank {needed} of the update"
        raise SnrfError(None, what, f"give at least {needed}, or leave it out", field="adapter rank")
    return wanted or needed


def _matrices(
    plan: MergePlan, options: MergeOptions, settings: AdapterSettings, rank: int, workers: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A and B of every edit, in their order."""
    tensors, dtype = Tensors(plan, options), getattr(torch, settings.dtype)
    unmoved = 0

    def matrices(edit: PlannedEdit) -> tuple[Tensor, Tensor]:
        a, b = factors(tensors.update(edit), len(edit.member), edit.site.axis, edit.fusion.beta)
        a, b = (cast(matrix, dtype, edit.target_name) for matrix in (a, b))
        # Padded with zeros: runtimes size their buffers by one rank for all modules.
        return F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - b.shape[1]))

    def memory(edit: PlannedEdit) -> Memory:
        return Memory(tensors.memory(edit).working, rank * sum(edit.shape) * dtype.itemsize)

    progress = tqdm.tqdm(total=len(plan.edits), desc="Exporting", unit="tensor", disable=options.quiet)
    with progress, look_ahead(plan.edits, matrices, memory, workers=tensors.workers(workers)) as ahead:
        for _, pair in ahead:
            unmoved += not all(bool(matrix.any()) for matrix in pair)
            yield pair
            progress.update()
    if unmoved == len(plan.edits) and not plan.recipe.value("allow_noop"):
        raise no_update(unmoved)
    if unmoved:
        LOG.warning(some_without_update(unmoved, len(plan.edits)))


def live_prefix(checkpoint: Checkpoint) -> str:
    """Return the decoder's prefix in the model that transformers builds, ``model.language_model.layers.``.

    transformers renames tensors while it loads; an adapter is attached to the modules of the live model. The model is
    built without weights, unless it is a text model of transformers, whose modules have the names on disk.
    """
    on_disk = find_decoder(checkpoint).prefix
    if on_disk == "model.layers." and _is_plain_text(checkpoint):
        return on_disk
    from mergekit.common import get_auto_cls
    from transformers import AutoConfig

    try:
        place, trust = str(checkpoint.folder or checkpoint.name), checkpoint.trust_remote_code
        config = AutoConfig.from_pretrained(place, revision=checkpoint.revision, trust_remote_code=trust)
        if not config.architectures:
            raise ValueError("its config.json names no class under 'architectures'")
        with torch.device("meta"):
            model = get_auto_cls(config.architectures[0]).from_config(config, trust_remote_code=trust)
    except Exception as error:
        what = f"transformers cannot build it ({first_line(error)}), and an adapter needs the names of its modules"
        raise SnrfError(checkpoint.name, what, "check its config.json and files") from None
    headers = {name: TensorHeader("BF16", tuple(weight.shape), "live") for name, weight in model.named_parameters()}
    return find_decoder(replace(checkpoint, tensors=headers)).prefix


def _is_plain_text(checkpoint: Checkpoint) -> bool:
    """Return whether the model is a causal language model of transformers' own, found without importing its code."""
    config, kind, transformers = checkpoint.config, str(checkpoint.model_type), find_spec("transformers")
    nested = "auto_map" in config or any(isinstance(config[key], dict) for key in config if key.endswith("_config"))
    if nested or transformers is None or transformers.origin is None or not kind.isidentifier():
        return False
    code = Path(transformers.origin).parent / "models" / kind / f"modeling_{kind}.py"
    name = str((config.get("architectures") or [""])[0])
    if not name.endswith("ForCausalLM") or not code.is_file():
        return False
    text = code.read_text(encoding="utf-8")
    return f"\nclass {name}(" in text and 'base_model_prefix = "model"' in text


def _config(target: Checkpoint, modules: Sequence[str], rank: int, base_model: str | None) -> str:
    """Return the content of adapter_config.json, as PEFT reads it; importing PEFT imports all of transformers."""
    name, revision, _ = cached_place(target.name) or (target.name, target.revision, None)
    if base_model:
        name, revision = base_model, None
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        # alpha = rank makes PEFT's factor alpha / r one: beta is inside B.
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        # Whole names: vision towers have a q_proj, too.
        "target_modules": sorted(modules),
    }
    return json.dumps(content, indent=2) + "\n"
