"""Turn a validated plan into what mergekit's planner, loader and writer understand.

mergekit's own tables of architectures know few vision-language models, and mixing two architectures shuffles or
drops tensors. So the output is described by the names that lie on disk, in two modules: ``copied``, every tensor
that stays as it is, from the base alone; and ``edited``, the decoder weights with masked neurons, whose names in the
source, and in the model that it was trained from, are aliases of the base's. Their tensors without masked neurons are
never planned, so never read.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import click
import yaml
from mergekit.architecture import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from mergekit.config import InputModelDefinition, MergeConfiguration, OutputModuleDefinition
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.checks import temporary_shards
from mergekit_snrf.merge.folders import CHAT_TEMPLATE_FILES, TOKENIZER_FILES
from mergekit_snrf.merge.method import as_click_error, remember_command, start_tally
from mergekit_snrf.merge.plan import MergePlan, absolute, plan_merge
from mergekit_snrf.merge.recipe import stray_keys
from mergekit_snrf.merge.tensors import wider_dtype
from mergekit_snrf.models import hub
from mergekit_snrf.models.checkpoint import Checkpoint

LOG = logging.getLogger(__name__)


class LiteralModule(ModuleArchitecture):
    """A module that consists of tensors named one by one.

    Attributes:
        pre: tensors outside the layers.
        layers: tensors of each layer, in the order of the stack, so that gradients over layers work.
    """

    def __init__(self, pre: Sequence[WeightInfo] = (), layers: Sequence[Sequence[WeightInfo]] = ()) -> None:
        self.pre = tuple(pre)
        self.layers = tuple(tuple(layer) for layer in layers)

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the tensors outside the layers."""
        return list(self.pre)

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Return no tensors; all are in ``pre`` or in the layers."""
        return []

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """Return the tensors of one layer."""
        return list(self.layers[index])

    def num_layers(self, config: PretrainedConfig) -> int:
        """Return the number of layers, whatever the configuration of a model says."""
        return len(self.layers)

    def num_layers_config_key(self) -> str:
        """Return no key: the output's configuration is the base's."""
        return ""


def architecture_of_merge(config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """Validate a merge and describe its output; rewrites ``config`` to modules and absolute paths.

    Stands in for mergekit's ``get_architecture_info``. Under a click command every problem becomes the command's
    error message; a caller of mergekit's Python API gets the ``SnrfError``.

    Raises:
        SnrfError: the merge cannot run; the message lists every problem.
    """
    context = click.get_current_context(silent=True)
    parameters = context.params if context is not None else {}
    out_path, recipe_path = parameters.get("out_path"), parameters.get("config_file")
    recipe_folder = os.path.dirname(os.path.abspath(recipe_path)) if recipe_path else None
    try:
        plan = plan_merge(config, options, out_path=out_path, recipe_folder=recipe_folder, merge_adapter=True)
        if recipe_path and os.path.isfile(recipe_path):
            # mergekit drops what it does not know before anyone else sees it.
            with open(recipe_path, encoding="utf-8") as file:
                plan.problems += stray_keys(yaml.safe_load(file))
        plan.raise_problems()
        _fetch_side_files(plan, options)
    except SnrfError as error:
        raise as_click_error(error) from None
    for warning in plan.warnings:
        LOG.warning(warning)
    if context is not None and out_path is not None:
        remember_command(context)
        _leave_no_shards_of_a_failed_run(context, out_path, options)
    written = config.to_yaml()
    rewrite(config, plan, recipe_folder)
    tally = start_tally(len(plan.edits))

    def card(name: str, recipe: str) -> str:
        # Without the recipe's text mergekit takes the configuration, which by then is the rewritten one; no recipe that
        # can run has modules of its own.
        rewritten = "modules" in (yaml.safe_load(recipe) or {})
        text, cast = written if rewritten else recipe, config.out_dtype or config.dtype
        # What mergekit rounds after the method has returned was not counted.
        return merge_card(plan, name, text, cast=cast, changed=None if config.out_dtype else tally.changed)

    _write_our_card(config, card)
    if options.multi_gpu:
        _wait_for_results_of_gpus()
    return describe(plan, config, options)


def _leave_no_shards_of_a_failed_run(context: click.Context, out_path: str, options: MergeOptions) -> None:
    existed = os.path.isdir(out_path)

    def remove() -> None:
        for shard in temporary_shards(out_path):
            os.remove(shard)
        if not existed and os.path.isdir(out_path) and not os.listdir(out_path):
            os.rmdir(out_path)

    context.call_on_close(remove)
    if options.async_write:
        # A writer thread may be in the middle of a shard; the interpreter waits for it before it calls this.
        atexit.register(remove)


_CARDS: dict[int, Callable[[str, str], str]] = {}


def _write_our_card(config: MergeConfiguration, card: Callable[[str, str], str]) -> None:
    """Let mergekit write this merge's card in place of its own, which knows neither mask nor neurons."""
    import mergekit.merge

    _CARDS[id(config)] = card
    weakref.finalize(config, _CARDS.pop, id(config), None)
    original = mergekit.merge.generate_card
    if getattr(original, "__snrf__", False):
        return

    @functools.wraps(original)
    def generate_card(config: MergeConfiguration, config_yaml: str, name: str | None = None) -> str:
        card = _CARDS.get(id(config))
        return original(config, config_yaml, name) if card is None else card(name or "merged", config_yaml)

    generate_card.__snrf__ = True  # type: ignore[attr-defined]
    mergekit.merge.generate_card = generate_card


class _Drained(threading.Event):
    """An event that counts as set only when a queue is empty, too."""

    def __init__(self, waiting: queue.Queue[Any]) -> None:
        super().__init__()
        self._waiting = waiting

    def is_set(self) -> bool:
        return super().is_set() and self._waiting.empty()


def _wait_for_results_of_gpus() -> None:
    """Let mergekit's executor for several GPUs collect every result before it writes.

    mergekit 0.1.5 stops listening as soon as the workers are done, whatever their queue still holds; it then runs the
    lost tasks again without their inputs, and the merge fails, or not, by chance.
    """
    original = MultiGPUExecutor.__init__
    if getattr(original, "__snrf__", False):
        return

    @functools.wraps(original)
    def __init__(self: MultiGPUExecutor, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.done_event = _Drained(self.task_completion_queue)

    __init__.__snrf__ = True  # type: ignore[attr-defined]
    MultiGPUExecutor.__init__ = __init__


def _fetch_side_files(plan: MergePlan, options: MergeOptions) -> None:
    """Download the base's small files that mergekit's own download leaves out, such as ``chat_template.jinja``."""
    target = plan.target
    assert target is not None
    if os.path.isdir(target.name):
        return
    hub.download(target.name, target.revision, target.side_files(), options.transformers_cache)


def rewrite(config: MergeConfiguration, plan: MergePlan, recipe_folder: str | None) -> None:
    """Change ``config`` to the modules ``copied`` and ``edited`` with absolute paths, as mergekit can plan them."""
    assert plan.recipe is not None
    # A relative path with one slash would look like a hub id to mergekit's model card, which then asks the hub.
    base = absolute(plan.recipe.target, recipe_folder)
    source = absolute(plan.recipe.source, recipe_folder)
    config.base_model = base
    config.models = None
    config.modules = {"copied": OutputModuleDefinition(models=[InputModelDefinition(model=base)])}
    if plan.edits:
        models = [
            InputModelDefinition(model=base),
            InputModelDefinition(model=source, parameters=dict(plan.recipe.source_parameters) or None),
        ]
        if plan.recipe.source_base is not None:
            # The method tells the two apart by their order.
            models.append(InputModelDefinition(model=absolute(plan.recipe.source_base, recipe_folder)))
        config.modules["edited"] = OutputModuleDefinition(models=models)
    config.parameters = {**(config.parameters or {}), "masks": str(plan.mask_path)}


def describe(plan: MergePlan, config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """Return mergekit's description of the output: literal tensor names in the modules ``copied`` and ``edited``."""
    target, decoder = plan.target, plan.target_decoder
    assert target is not None
    assert decoder is not None
    layers: list[list[WeightInfo]] = [[] for _ in range(decoder.shape.layers)]
    for edit in plan.edits:
        names = dict.fromkeys(name for name in (edit.source_name, edit.source_base_name) if name is not None)
        aliases = tuple(name for name in names if name != edit.target_name) or None
        layers[edit.site.layer].append(
            WeightInfo(name=edit.target_name, aliases=aliases, force_dtype=wider_dtype(config, edit.dtype))
        )
    # dtype and out_dtype would round int64 buffers such as position_ids through a float type.
    copied = [
        WeightInfo(name=name, force_dtype="int64" if target.tensors[name].dtype == "I64" else None)
        for name in plan.copied
    ]
    modules = {"copied": ModuleDefinition(architecture=LiteralModule(pre=copied))}
    if plan.edits:
        modules["edited"] = ModuleDefinition(architecture=LiteralModule(layers=layers))
    return ModelArchitecture(
        modules=modules,
        architectures=list(target.config.get("architectures") or []),
        model_type=target.model_type,
        tagalong_files=_tagalong_files(target, config, options),
    )


def _tagalong_files(target: Checkpoint, config: MergeConfiguration, options: MergeOptions) -> list[str]:
    left_out: set[str] = set()
    if config.chat_template:
        left_out |= CHAT_TEMPLATE_FILES
    if not options.copy_tokenizer:
        left_out |= TOKENIZER_FILES
    if config.dtype or config.out_dtype:
        # mergekit writes the configuration with the new dtype; otherwise the base's file is right to the byte.
        left_out.add("config.json")
    # mergekit makes no folders inside the output.
    return [name for name in target.side_files() if name not in left_out and "/" not in name]
