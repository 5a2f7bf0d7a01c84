"""What a merge will do, from configurations and headers alone: the edits, their cost, and every problem at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.files.references import check_sha256, local_path
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge.checks import (
    check_chat_template,
    check_distinct,
    check_dtypes,
    check_output,
    check_remote_code,
    check_roles,
    compare_provenance,
)
from mergekit_snrf.merge.recipe import Recipe, default, read_recipe
from mergekit_snrf.models.checkpoint import FLOAT_DTYPES, ITEM_BYTES, Checkpoint, open_checkpoint
from mergekit_snrf.models.decoder import Decoder, find_decoder, pairing_problems
from mergekit_snrf.models.weights import bias_name
from mergekit_snrf.neurons.maskfile import Mask, read_mask
from mergekit_snrf.neurons.sets import PROJECTIONS, Site
from mergekit_snrf.neurons.shape import check_fit


@dataclass(frozen=True)
class PlannedEdit:
    """One tensor that a merge changes: a weight, or the bias beside it.

    Attributes:
        target_name: its name in the target and in the output.
        source_name: its name in the source.
        neurons: how many of its rows (or columns) change.
        source_bytes: what is read of the source and of its base.
        source_base_name: its name in the source's base, where the recipe has one.
    """

    site: Site
    target_name: str
    source_name: str
    shape: tuple[int, ...]
    dtype: str
    neurons: int
    source_bytes: int
    fusion: Fusion
    source_base_name: str | None = None

    @property
    def is_bias(self) -> bool:
        """Whether the tensor is the bias of row neurons."""
        return len(self.shape) == 1

    @property
    def parameters(self) -> int:
        """Number of weights that the edit changes."""
        return self.neurons if self.is_bias else self.neurons * self.shape[1 - self.site.axis]


@dataclass
class MergePlan:
    """A validated merge, or the reasons why it cannot run.

    Attributes:
        problems: one sentence each; a merge runs only if there is none.
        warnings: one sentence each.
        copied: names of the target's tensors that are taken over unchanged.
        references: the models as the recipe names them, local folders by their absolute path: target, source, and the
            source's base if there is one.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    target: Checkpoint | None = None
    source: Checkpoint | None = None
    source_base: Checkpoint | None = None
    target_decoder: Decoder | None = None
    source_decoder: Decoder | None = None
    source_base_decoder: Decoder | None = None
    mask: Mask | None = None
    mask_path: Path | None = None
    edits: list[PlannedEdit] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    references: list[ModelReference] = field(default_factory=list)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The models of the recipe that were found: target, source and the source's base."""
        return [c for c in (self.target, self.source, self.source_base) if c is not None]

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
        """Bytes of the source, and of its base, that the merge reads."""
        return sum(edit.source_bytes for edit in self.edits)

    @property
    def parameters_touched(self) -> int:
        """Weights inside the masked rows and columns."""
        return sum(edit.parameters for edit in self.edits)

    @property
    def bytes_touched(self) -> int:
        """Bytes of the masked rows and columns in the target's dtype."""
        return sum(edit.parameters * ITEM_BYTES[edit.dtype] for edit in self.edits)

    @property
    def update(self) -> str:
        """The update in words: beta and what has a part in the variant."""
        if not self.edits:
            return "nothing"
        how = self.edits[0].fusion
        said = [f"beta {_span([edit.fusion.beta for edit in self.edits])}"]
        fusions = [edit.fusion for edit in self.edits if not edit.is_bias] or [how]
        if how.update == "dare":
            rescaled = "" if how.rescale else ", not rescaled"
            rates = _span([fusion.drop_rate for fusion in fusions])
            said.append(f"dare: drop_rate {rates}, seed {how.seed}{rescaled}")
        else:
            ranks = [fusion.rank for fusion in fusions]
            said.append(f"rank {_span(ranks)}{' (0: full rank)' if 0 in ranks else ''}, {how.order}")
        if self.source_base is not None:
            said.append("Delta = source - source_base")
        if any(edit.is_bias for edit in self.edits):
            said.append("biases")
        return ", ".join(said)

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Return (weights, neurons changed, neurons in all) by projection."""
        if self.target_decoder is None:
            return {}
        shape = self.target_decoder.shape
        weights = [edit for edit in self.edits if not edit.is_bias]
        tensors = Counter(edit.site.projection for edit in weights)
        changed: Counter[str] = Counter()
        for edit in weights:
            changed[edit.site.projection] += edit.neurons
        return {name: (tensors[name], changed[name], shape.layers * shape.neurons(name)) for name in PROJECTIONS}


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


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
    named = [recipe.target, recipe.source, recipe.source_base]
    plan.references = [absolute(model, recipe_folder) for model in named if model is not None]
    with plan._collect():
        plan.target = _open(recipe.target, options, recipe_folder)
        plan.target_decoder = find_decoder(plan.target)
    with plan._collect():
        plan.source = _open_donor(plan, recipe.source, options, recipe_folder, merge_adapter)
        plan.source_decoder = find_decoder(plan.source)
    if recipe.source_base is not None:
        with plan._collect():
            plan.source_base = _open_donor(plan, recipe.source_base, options, recipe_folder, merge_adapter)
            plan.source_base_decoder = find_decoder(plan.source_base)
    if recipe.target.lora is not None:
        plan.problems.append(
            f"base_model {recipe.target} has a LoRA adapter, which would lose the processor's files; "
            f"merge the adapter into a folder of its own first and name that folder"
        )
    if isinstance(recipe.parameters.get("masks"), str):
        with plan._collect():
            plan.mask_path = local_path(str(recipe.value("masks")), (recipe_folder,) if recipe_folder else ())
            expected = str(_tolerant(recipe, "masks_sha256"))
            if expected:
                with naming({"sha256": "masks_sha256"}):
                    check_sha256(plan.mask_path, expected)
            plan.mask = read_mask(plan.mask_path)
    check_output(plan, config, options, out_path)
    check_dtypes(plan, config)
    check_chat_template(plan, config)
    check_remote_code(plan, options)
    if plan.target is None or plan.target_decoder is None:
        return plan
    if plan.mask is not None:
        with plan._collect():
            shape, model = plan.target_decoder.shape, plan.target.name
            check_fit(plan.mask.neurons, shape, where=plan.mask.path, model=model)
        compare_provenance(plan, plan.mask)
    if plan.source is None or plan.source_decoder is None:
        return plan
    any_family = bool(_tolerant(recipe, "allow_family_mismatch"))
    check_distinct(plan, recipe)
    check_roles(plan)
    plan.problems += map(str, pairing_problems(plan.target, plan.source, any_family=any_family))
    if plan.source_base is not None and plan.source_base_decoder is not None:
        unfit = pairing_problems(plan.target, plan.source_base, any_family=any_family)
        plan.problems += [f"source_base {plan.source_base.name} as the source: {problem}" for problem in unfit]
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


def _open_donor(
    plan: MergePlan, reference: ModelReference, options: MergeOptions, recipe_folder: str | None, merge_adapter: bool
) -> Checkpoint:
    below = _open(reference, options, recipe_folder)
    if reference.lora is None:
        return below
    return _with_adapter(plan, absolute(reference, recipe_folder), below, options, merge_adapter)


def _with_adapter(
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


def _plan_edits(plan: MergePlan, recipe: Recipe, mask: Mask, target: Checkpoint, source: Checkpoint) -> None:
    mine = plan.target_decoder
    assert mine is not None
    last = mine.shape.layers - 1
    failures: Counter[str] = Counter()
    biases = bool(recipe.value("biases"))
    for site, member in mask.neurons.nonempty().items():
        t = site.layer / last if last else 1.0
        weight = mine.weight_name(site)
        for name in (weight, bias_name(weight)) if biases and site.axis == 0 else (weight,):
            if name not in target.tensors:
                continue
            try:
                edit = _planned_edit(plan, recipe, site, name, int(member.sum()), t)
            except SnrfError as error:
                # The same mistake in every layer is one problem.
                failures[str(error) if not failures else ""] += 1
                continue
            if edit.fusion.beta > 0:
                plan.edits.append(edit)
    if failures:
        message = next(iter(failures))
        more = sum(failures.values()) - 1
        plan.problems.append(message + (f" ({more} further tensors likewise)" if more else ""))
    edited = {edit.target_name for edit in plan.edits}
    plan.copied = [name for name in target.tensors if name not in edited]
    _check_names(plan)
    unused = [text for text in recipe.filters() if text != "*" and not any(text in e.target_name for e in plan.edits)]
    for text in unused:
        plan.warnings.append(f"filter {text!r} matches no tensor with masked neurons, so its value is never used")
    if not plan.edits and not failures and not recipe.value("allow_noop"):
        empty = mask.neurons.count() == 0
        reason = f"{mask.path}: the mask has no neurons" if empty else "parameter 'beta' is 0 for every masked tensor"
        remedy = "give a mask with neurons" if empty else "give a beta above 0"
        plan.problems.append(f"{reason}, so the merge would change nothing; {remedy}, or set allow_noop: true")
    elif biases and not failures and not any(edit.is_bias for edit in plan.edits):
        plan.problems.append(
            f"parameter 'biases' is true, but no masked neuron of {target.name} that changes has a bias (this decoder "
            f"has none, or none in the masked projections); remove it"
        )


def _planned_edit(plan: MergePlan, recipe: Recipe, site: Site, name: str, neurons: int, t: float) -> PlannedEdit:
    """Return the edit of a weight or bias of the target; raise ``SnrfError`` where it cannot be fused."""
    assert plan.target is not None
    header = plan.target.tensors[name]
    is_bias = len(header.shape) == 1
    names, size = [], 0
    donors = [(plan.source, plan.source_decoder, "source"), (plan.source_base, plan.source_base_decoder, "source_base")]
    for checkpoint, decoder, role in donors:
        if checkpoint is None or decoder is None:
            continue
        weight = decoder.weight_name(site)
        theirs = bias_name(weight) if is_bias else weight
        other = checkpoint.tensors.get(theirs)
        if other is None or other.shape != header.shape or other.dtype not in FLOAT_DTYPES:
            found = "is missing" if other is None else f"is {other.dtype} of shape {list(other.shape)}"
            raise SnrfError(
                f"{checkpoint.name}: tensor {theirs} of the {role} {found}, but {name} of {plan.target.name} has shape "
                f"{list(header.shape)}; its bias cannot move, remove biases from the recipe"
            )
        names.append(theirs)
        size += other.bytes
    fusion = recipe.fusion(name, t)
    if not is_bias:
        fusion.check_rank(name, header.shape)
    return PlannedEdit(
        site=site,
        target_name=name,
        source_name=names[0],
        shape=header.shape,
        dtype=header.dtype,
        neurons=neurons,
        source_bytes=size,
        fusion=fusion,
        source_base_name=names[1] if len(names) > 1 else None,
    )


def _check_names(plan: MergePlan) -> None:
    """Refuse a model with two tensors that mergekit, which takes the first of several names, would mix up."""
    for edit in plan.edits:
        names = [name for name in (edit.target_name, edit.source_name, edit.source_base_name) if name is not None]
        for checkpoint, own in zip((plan.source, plan.source_base), names[1:], strict=False):
            assert checkpoint is not None
            wrong = next((name for name in names[: names.index(own)] if name in checkpoint.tensors), None)
            if wrong is not None:
                plan.problems.append(
                    f"{checkpoint.name}: has a tensor {wrong} besides its decoder's {own}; mergekit "
                    f"would take the wrong one, use a model with a text decoder alone"
                )
                return
