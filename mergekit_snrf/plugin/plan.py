"""What a merge will do, from configurations and headers alone: the edits, their cost, and every problem at once."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf import safefile
from mergekit_snrf.checkpoint import FLOAT_DTYPES, ITEM_BYTES, Checkpoint, open_checkpoint, weight_files
from mergekit_snrf.decoder import Decoder, find_decoder, pairing_problems
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion import Fusion
from mergekit_snrf.maskfile import Mask, ModelProvenance, local_path, read_mask
from mergekit_snrf.neurons import PROJECTIONS, Site
from mergekit_snrf.plugin.recipe import Recipe, default, read_recipe

_TEMPORARY_SHARD = re.compile(r"(model|pytorch_model)-\d+\.(safetensors|bin)")
_SHOWN = 3


@dataclass(frozen=True)
class Edit:
    """One tensor that a merge changes.

    Attributes:
        target_name: its name in the target and in the output.
        source_name: its name in the source.
        neurons: how many of its rows (or columns) change.
    """

    site: Site
    target_name: str
    source_name: str
    shape: tuple[int, ...]
    dtype: str
    neurons: int
    source_bytes: int
    fusion: Fusion

    @property
    def parameters(self) -> int:
        """Number of weights that the edit changes."""
        return self.neurons * self.shape[1 - self.site.axis]


@dataclass
class MergePlan:
    """A validated merge, or the reasons why it cannot run.

    Attributes:
        problems: one sentence each; a merge runs only if there is none.
        warnings: one sentence each.
        copied: names of the target's tensors that are taken over unchanged.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    target: Checkpoint | None = None
    source: Checkpoint | None = None
    target_decoder: Decoder | None = None
    source_decoder: Decoder | None = None
    mask: Mask | None = None
    mask_path: Path | None = None
    edits: list[Edit] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raise ``SnrfError`` with every problem, one a line; do nothing if there is none."""
        if len(self.problems) == 1:
            raise SnrfError(self.problems[0])
        if self.problems:
            lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
            raise SnrfError(f"the merge cannot run, there are {len(self.problems)} problems:{lines}")

    @contextmanager
    def _collect(self) -> Iterator[None]:
        try:
            yield
        except SnrfError as error:
            self.problems.append(str(error))

    @property
    def unmatched(self) -> list[str]:
        """Decoder projections of the target that have no masked neuron, or no strength, and stay as they are."""
        if self.target_decoder is None:
            return []
        edited = {edit.site for edit in self.edits}
        return [self.target_decoder.weight_name(s) for s in self.target_decoder.shape.sites() if s not in edited]

    @property
    def source_bytes(self) -> int:
        """Bytes of the source that the merge reads."""
        return sum(edit.source_bytes for edit in self.edits)

    @property
    def parameters_touched(self) -> int:
        """Weights inside the masked rows and columns."""
        return sum(edit.parameters for edit in self.edits)

    @property
    def bytes_touched(self) -> int:
        """Bytes of the masked rows and columns in the target's dtype."""
        return sum(edit.parameters * ITEM_BYTES[edit.dtype] for edit in self.edits)

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Return (tensors, neurons changed, neurons in all) by projection."""
        if self.target_decoder is None:
            return {}
        shape = self.target_decoder.shape
        tensors = Counter(edit.site.projection for edit in self.edits)
        changed: Counter[str] = Counter()
        for edit in self.edits:
            changed[edit.site.projection] += edit.neurons
        return {name: (tensors[name], changed[name], shape.layers * shape.neurons(name)) for name in PROJECTIONS}


def plan_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    out_path: str | None = None,
    recipe_folder: str | None = None,
    merge_adapter: bool = False,
) -> MergePlan:
    """Read configurations and headers of both models and the mask, and work out the merge without reading a weight.

    Args:
        config: the recipe as mergekit parsed it; not changed.
        out_path: the output folder, checked if given.
        recipe_folder: where relative paths are looked for after the working folder.
        merge_adapter: let mergekit apply a LoRA source (``model+adapter``) to its cache folder first, which
            reads weights; otherwise the plan shows the names of the model below the adapter.
    """
    plan = MergePlan()
    plan.recipe = read_recipe(config, plan.problems)
    if plan.recipe is None:
        return plan
    recipe = plan.recipe
    with plan._collect():
        plan.target = _open(recipe.target, options, recipe_folder)
        plan.target_decoder = find_decoder(plan.target)
    with plan._collect():
        plan.source = _open(recipe.source, options, recipe_folder)
        if recipe.source.lora is not None:
            source = absolute(recipe.source, recipe_folder)
            plan.source = _source_with_adapter(plan, source, plan.source, options, merge_adapter)
        plan.source_decoder = find_decoder(plan.source)
    if recipe.target.lora is not None:
        plan.problems.append(
            f"base_model {recipe.target} has a LoRA adapter, which would lose the processor's files; "
            f"merge the adapter into a folder of its own first and name that folder"
        )
    if isinstance(recipe.parameters.get("masks"), str):
        with plan._collect():
            plan.mask_path = local_path(str(recipe.value("masks")), (recipe_folder,) if recipe_folder else ())
            _check_sha256(plan.mask_path, str(_tolerant(recipe, "masks_sha256")))
            plan.mask = read_mask(plan.mask_path)
    _check_output(plan, config, options, out_path)
    _check_dtypes(plan, config)
    _check_chat_template(plan, config)
    _check_remote_code(plan, options)
    if plan.target is None or plan.target_decoder is None:
        return plan
    if plan.mask is not None:
        _check_mask(plan, plan.mask, plan.target, plan.target_decoder)
        _compare_provenance(plan, plan.mask)
    if plan.source is None or plan.source_decoder is None:
        return plan
    if recipe.source.lora is None:
        _check_distinct(plan, plan.target, plan.source)
    plan.problems += pairing_problems(
        plan.target, plan.source, any_family=bool(_tolerant(recipe, "allow_family_mismatch"))
    )
    if plan.mask is not None and not plan.problems:
        _plan_edits(plan, recipe, plan.mask, plan.target, plan.source)
    return plan


def _tolerant(recipe: Recipe, name: str) -> object:
    """Return a parameter's value, or its default where the recipe's value is invalid and already reported."""
    try:
        return recipe.value(name)
    except ValueError:
        return default(name)


def located(reference: ModelReference, recipe_folder: str | None) -> str:
    """Return a model's absolute folder, found from the working folder or beside the recipe, or else its hub id."""
    path = reference.model.path
    for folder in ("", recipe_folder or ""):
        candidate = os.path.join(folder, path)
        if os.path.isdir(candidate):
            return os.path.abspath(candidate)
    return path


def absolute(reference: ModelReference, recipe_folder: str | None) -> ModelReference:
    """Return the same model and adapter with absolute folders; hub ids stay as they are."""
    lora = reference.lora
    if lora is not None:
        lora = ModelPath(path=located(ModelReference(model=lora), recipe_folder), revision=lora.revision)
    return ModelReference(
        model=ModelPath(path=located(reference, recipe_folder), revision=reference.model.revision),
        lora=lora,
        override_architecture=reference.override_architecture,
    )


def _open(reference: ModelReference, options: MergeOptions, recipe_folder: str | None) -> Checkpoint:
    return open_checkpoint(
        located(reference, recipe_folder),
        reference.model.revision,
        cache_dir=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
    )


def _source_with_adapter(
    plan: MergePlan, reference: ModelReference, below: Checkpoint, options: MergeOptions, merge_adapter: bool
) -> Checkpoint:
    if not options.lora_merge_cache:
        raise SnrfError(
            f"{reference}: the source has a LoRA adapter, which mergekit merges into a folder first; "
            f"pass --lora-merge-cache DIR"
        )
    if not merge_adapter:
        plan.warnings.append(
            f"{reference}: planned from the model below the adapter, which is applied when the merge runs"
        )
        return below
    try:
        merged = reference.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SnrfError(
            f"{reference}: mergekit cannot merge the adapter into the source ({reason}); check the adapter, and empty "
            f"{options.lora_merge_cache} before the next run"
        ) from error
    return open_checkpoint(merged.model.path, trust_remote_code=options.trust_remote_code)


def _check_output(plan: MergePlan, config: MergeConfiguration, options: MergeOptions, out_path: str | None) -> None:
    if out_path is None:
        return
    if not os.path.exists(out_path):
        above = next(folder for folder in Path(out_path).absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            plan.problems.append(f"{out_path}: cannot be made, {above} is not a writable folder; choose another folder")
        return
    if not os.path.isdir(out_path):
        plan.problems.append(f"{out_path}: the output path is a file; give a folder")
        return
    for checkpoint in (plan.target, plan.source):
        if checkpoint is not None and checkpoint.folder and os.path.samefile(checkpoint.folder, out_path):
            plan.problems.append(f"{out_path}: the output folder is a model of the recipe; choose another folder")
            return
    # One unsharded file is what a repeated merge replaces; anything else would stay beside the new shards.
    unsharded = "model.safetensors" if options.safe_serialization else "pytorch_model.bin"
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


def _check_sha256(path: Path, expected: str) -> None:
    if not expected:
        return
    if not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
        raise SnrfError(f"masks_sha256 must be 64 hexadecimal digits, got {expected!r}; 'snrf mask show' prints them")
    found = safefile.sha256(path)
    if found != expected.lower():
        raise SnrfError(
            f"{path}: sha256 is {found}, but the recipe's masks_sha256 is {expected}; "
            f"get the mask that the recipe was written for, or update masks_sha256"
        )


def _check_dtypes(plan: MergePlan, config: MergeConfiguration) -> None:
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


def _check_chat_template(plan: MergePlan, config: MergeConfiguration) -> None:
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


def _check_distinct(plan: MergePlan, target: Checkpoint, source: Checkpoint) -> None:
    if target.folder and source.folder and os.path.samefile(target.folder, source.folder):
        plan.problems.append(
            f"{source.name}: the source is the base_model {target.name} itself, so the merge would change nothing; "
            f"name the text-only model under 'models'"
        )


def _check_remote_code(plan: MergePlan, options: MergeOptions) -> None:
    for checkpoint in (plan.target, plan.source):
        if checkpoint is not None and checkpoint.needs_remote_code and not options.trust_remote_code:
            plan.problems.append(
                f"{checkpoint.name}: model_type {checkpoint.model_type!r} is defined by code in the checkpoint, which "
                f"mergekit must run to read the configuration; look at the code, then pass --trust-remote-code"
            )


def _check_mask(plan: MergePlan, mask: Mask, target: Checkpoint, decoder: Decoder) -> None:
    shape = decoder.shape
    wrong = []
    for site, member in mask.neurons.items():
        if site.layer >= shape.layers:
            wrong.append(
                f"{mask.path}: tensor {site} lies outside the target {target.name}, which has layers 0 to "
                f"{shape.layers - 1}; use a mask made for this model"
            )
            continue
        expected = shape.neurons(site.projection)
        if len(member) != expected:
            weight = decoder.weight_name(site)
            remedy = "use a mask made for this model"
            if site.projection in ("attn.k", "attn.v") and len(member) == expected * shape.repeats:
                remedy = "its indices count heads repeated for GQA, make it again with 'snrf mask import'"
            wrong.append(
                f"{mask.path}: tensor {site} has shape [{len(member)}], but {weight} of {target.name} has shape "
                f"{list(target.tensors[weight].shape)} with {expected} {'columns' if site.axis else 'rows'}; {remedy}"
            )
    plan.problems += wrong[:_SHOWN]
    if len(wrong) > _SHOWN:
        plan.problems.append(f"{mask.path}: {len(wrong) - _SHOWN} further tensors do not fit the target either")


def _compare_provenance(plan: MergePlan, mask: Mask) -> None:
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


def _plan_edits(plan: MergePlan, recipe: Recipe, mask: Mask, target: Checkpoint, source: Checkpoint) -> None:
    mine, theirs = plan.target_decoder, plan.source_decoder
    assert mine is not None
    assert theirs is not None
    last = mine.shape.layers - 1
    failures: Counter[str] = Counter()
    for site, member in mask.neurons.nonempty().items():
        name = mine.weight_name(site)
        header, other = target.tensors[name], source.tensors[theirs.weight_name(site)]
        try:
            fusion = recipe.fusion(name, site.layer / last if last else 1.0)
            fusion.check_rank(name, header.shape)
        except SnrfError as error:
            # The same mistake in every layer is one problem.
            failures[str(error) if not failures else ""] += 1
            continue
        if fusion.beta == 0:
            continue
        plan.edits.append(
            Edit(
                site=site,
                target_name=name,
                source_name=theirs.weight_name(site),
                shape=header.shape,
                dtype=header.dtype,
                neurons=int(member.sum()),
                source_bytes=other.bytes,
                fusion=fusion,
            )
        )
    if failures:
        message = next(iter(failures))
        more = sum(failures.values()) - 1
        plan.problems.append(message + (f" ({more} further tensors likewise)" if more else ""))
    edited = {edit.target_name for edit in plan.edits}
    plan.copied = [name for name in target.tensors if name not in edited]
    for edit in plan.edits:
        if edit.source_name != edit.target_name and edit.target_name in source.tensors:
            plan.problems.append(
                f"{source.name}: has a tensor {edit.target_name} besides its decoder's {edit.source_name}; mergekit "
                f"would take the wrong one, use a source with a text decoder alone"
            )
            break
    unused = [text for text in recipe.filters() if text != "*" and not any(text in e.target_name for e in plan.edits)]
    for text in unused:
        plan.warnings.append(f"filter {text!r} matches no tensor with masked neurons, so its value is never used")
    if not plan.edits and not failures and not recipe.value("allow_noop"):
        empty = mask.neurons.count() == 0
        reason = f"{mask.path}: the mask has no neurons" if empty else "parameter 'beta' is 0 for every masked tensor"
        remedy = "give a mask with neurons" if empty else "give a beta above 0"
        plan.problems.append(f"{reason}, so the merge would change nothing; {remedy}, or set allow_noop: true")
