"""Run a planned merge through mergekit's planner, loader and writer.

mergekit's own tables of architectures contain few vision-language models, and mixing two architectures shuffles or
drops tensors. So the output is described by the names that lie on disk, in two modules: ``copied``, every tensor
that stays as it is, from the base alone; and ``edited``, the decoder weights with masked neurons, whose names in the
source, and in the model that it was trained from, are aliases of the base's. Their tensors without masked neurons are
never planned, so never read.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from mergekit.architecture import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from mergekit.config import InputModelDefinition, MergeConfiguration, OutputModuleDefinition
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_snrf.errors import SnrfError, first_line, os_reason
from mergekit_snrf.files.reading import parse_yaml
from mergekit_snrf.files.writing import cleaning_up_when_terminated
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.folders import CHAT_TEMPLATE_FILES, TOKENIZER_FILES, built_inside, copy_files
from mergekit_snrf.merge.method import SPEC, find_session
from mergekit_snrf.merge.plan import MergePlan
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.merge.recipe import stray_keys
from mergekit_snrf.merge.session import MergeSession
from mergekit_snrf.models import hub
from mergekit_snrf.models.shards import FLOAT_DTYPES

LOG = logging.getLogger(__name__)
_DTYPE_KEY = re.compile(rf'("(?:torch_)?dtype"\s*:\s*")({"|".join(FLOAT_DTYPES.values())})(?=")')


class _LiteralModule(ModuleArchitecture):
    """A module of tensors named one by one: those outside the layers (``pre``), and those of each layer in order."""

    def __init__(self, pre: Sequence[WeightInfo] = (), layers: Sequence[Sequence[WeightInfo]] = ()) -> None:
        self.pre = tuple(pre)
        self.layers = tuple(tuple(layer) for layer in layers)

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        return list(self.pre)

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        return []

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        return list(self.layers[index])

    def num_layers(self, config: PretrainedConfig) -> int:
        return len(self.layers)

    def num_layers_config_key(self) -> str:
        # The output's configuration is the base's.
        return ""


class FusedTensor(Task[Tensor]):
    """An edited tensor of a running session: nothing is loaded for it."""

    key: str
    name: str

    def arguments(self) -> dict[str, Task]:
        """Return no tasks."""
        return {}

    def group_label(self) -> str:
        """Return the name: mergekit's executor sorts by it, as the session does."""
        return self.name

    def execute(self, **_: Any) -> Tensor:
        """Return the tensor."""
        fused: Tensor = find_session(self.key).fused(self.name)
        return fused


class SessionPlanner(MergePlanner):
    """mergekit's planner of ``rewritten``, except that tensors which a session fuses ahead are taken from it."""

    def plan_tensor(self, weight: WeightInfo, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        """Plan one tensor of the output; an edited one is that which has a source."""
        session = session_of(self.config)
        if len(models) > 1 and session.looks_ahead:
            self._tensors.append((weight, FusedTensor(key=session.key, name=weight.name)))
        else:
            super().plan_tensor(weight, weights_in, models, cfg_reader)


def run_session(
    run_merge: Callable[..., None],
    config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
) -> None:
    """Plan an snrf merge and let mergekit's ``run_merge`` execute it; ``config_source`` is the recipe's text.

    ``config`` stays as it is: mergekit gets one of its own, with modules of literal names. Under a click command every
    problem becomes the command's error message; a caller of the Python API gets the ``SnrfError``. No shard stays.
    """
    import mergekit.merge

    context = click.get_current_context(silent=True)
    try:
        session = _open_session(config, str(out_path), options, config_source, context)
        with cleaning_up_when_terminated(), session.running(options):
            for warning in session.plan.warnings:
                LOG.warning(warning)
            if options.multi_gpu:
                _wait_for_results_of_gpus()
            _hook(mergekit.merge.__dict__)
            with _explained(str(out_path)), built_inside(str(out_path)) as building:
                run_merge(rewritten(config, session), str(building), options, config_source or config.to_yaml())
                _complete(session.plan, building, options)
    except SnrfError as error:
        if context is None or context.params.get("verbosity", 0) > 1:
            raise
        raise click.ClickException(str(error)) from None
    finally:
        # Another merge in this process may find other files in the same folders.
        LoaderCache.loaders.clear()
    # An intermediate stage of mergekit-multi is not what was asked for.
    if context is not None and not options.quiet and context.params.get("out_path") == out_path:
        folder = shlex.quote(str(out_path))
        click.echo(f"Merged into {folder}. Before you share it: snrf card {folder}", err=True)


@contextmanager
def _explained(out_path: str) -> Iterator[None]:
    """Raise what the operating system refuses, such as a full disk, as ``SnrfError``."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        what = f"the merge could not be written ({os_reason(error)})"
        raise SnrfError(out_path, what, "make room, or choose another folder") from None


def _open_session(
    config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None,
    context: click.Context | None,
) -> MergeSession:
    path = context.params.get("config_file") if context is not None else None
    recipe_folder = os.path.dirname(os.path.abspath(path)) if path else None
    draft = draft_merge(config, options, out_path=out_path, recipe_folder=recipe_folder)
    if config_source is not None:
        # mergekit drops what it does not know before anyone else sees it.
        with draft.collect():
            draft.problems += stray_keys(parse_yaml(config_source, path))
    plan = draft.finish()
    target = plan.target.checkpoint
    if not os.path.isdir(target.name):
        # mergekit's own download leaves some of the small files out, such as chat_template.jinja.
        hub.download(target.name, target.revision, target.side_files(), options.transformers_cache)
    return MergeSession(plan, config_source or config.to_yaml())


def rewritten(config: MergeConfiguration, session: MergeSession) -> MergeConfiguration:
    """Return a configuration that mergekit can plan: the modules ``copied`` and ``edited``, with absolute paths."""
    plan = session.plan
    # A relative path with one slash would look like a hub id to mergekit.
    base, *donors = [InputModelDefinition(model=model.reference) for model in plan.models.values()]
    modules = {"copied": OutputModuleDefinition(models=[base])}
    if plan.edits:
        # The method distinguishes source and source_base by their order.
        modules["edited"] = OutputModuleDefinition(models=[base, *donors])
    changes = {"base_model": base.model, "models": None, "modules": modules, "parameters": {"masks": session.key}}
    return config.model_copy(update=changes)


def architecture_of(config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """Return mergekit's description of the output: literal tensor names in the modules ``copied`` and ``edited``."""
    plan = session_of(config).plan
    target = plan.target.checkpoint
    target.register_type()
    layers: list[list[WeightInfo]] = [[] for _ in range(plan.target.decoder.shape.layers)]
    for edit in plan.edits:
        aliases = tuple(name for name in dict.fromkeys(edit.names.values()) if name != edit.target_name) or None
        dtype = plan.recipe.wider_dtype(edit.dtype)
        layers[edit.site.layer].append(WeightInfo(name=edit.target_name, aliases=aliases, force_dtype=dtype))
    # dtype and out_dtype would round int64 buffers such as position_ids through a float type.
    copied = [
        WeightInfo(name=name, force_dtype="int64" if target.tensors[name].dtype == "I64" else None)
        for name in plan.copied
    ]
    modules = {"copied": ModuleDefinition(architecture=_LiteralModule(pre=copied))}
    if plan.edits:
        modules["edited"] = ModuleDefinition(architecture=_LiteralModule(layers=layers))
    return ModelArchitecture(
        modules=modules,
        architectures=list(target.config.get("architectures") or []),
        model_type=target.model_type,
        tagalong_files=_tagalong_files(plan, config, options),
    )


def session_of(config: MergeConfiguration) -> MergeSession:
    """Return the running session of a configuration of ``rewritten``."""
    found: MergeSession = find_session(str((config.parameters or {}).get("masks")))
    return found


def _hook(names: dict[str, Any]) -> None:
    """Let ``mergekit.merge`` ask us for the architecture, planner, card and tokenizer of a running session."""
    copier = functools.partial(_copy_tokenizer, names["_copy_tokenizer"])
    hooks: dict[str, Callable[..., Any]] = {
        "get_architecture_info": architecture_of,
        "MergePlanner": SessionPlanner,
        "generate_card": _card,
        "_copy_tokenizer": copier,
    }
    for name, ours in hooks.items():
        if not getattr(names[name], "__snrf__", False):
            names[name] = _instead(names[name], ours)


def _instead(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(config: MergeConfiguration, *args: Any, **kwargs: Any) -> Any:
        return (ours if config.merge_method == SPEC.name else original)(config, *args, **kwargs)

    function.__snrf__ = True  # type: ignore[attr-defined]
    return function


def _card(config: MergeConfiguration, config_yaml: str, name: str | None = None) -> str:
    return session_of(config).card()


def _copy_tokenizer(original: Callable[..., Any], config: MergeConfiguration, *args: Any, **kwargs: Any) -> None:
    """Let mergekit write the tokenizer, which it loads where it cannot copy; its files are copied in any case."""
    try:
        original(config, *args, **kwargs)
    except Exception as error:  # mergekit would log a traceback.
        LOG.warning("%s: mergekit cannot load the tokenizer (%s)", config.base_model, first_line(error))


def _tagalong_files(plan: MergePlan, config: MergeConfiguration, options: MergeOptions) -> list[str]:
    left_out: set[str] = set()
    if config.chat_template:
        left_out |= CHAT_TEMPLATE_FILES
    if not options.copy_tokenizer:
        left_out |= TOKENIZER_FILES
    # mergekit makes no folders inside the output.
    return [name for name in plan.target.checkpoint.side_files() if name not in left_out and "/" not in name]


def _complete(plan: MergePlan, out_path: Path, options: MergeOptions) -> None:
    """Add what mergekit does not write: side files in sub-folders, and the base's own configuration.

    The recipe beside the weights, which may be shared with them, loses its local folders.
    """
    recipe = out_path / "mergekit_config.yml"
    if recipe.exists():
        recipe.write_text(portable(recipe.read_text(encoding="utf-8"), plan.inputs), encoding="utf-8")
    nested = [name for name in plan.target.checkpoint.side_files() if "/" in name]
    if nested:
        copy_files(nested, plan.target.checkpoint.local(options.transformers_cache), out_path)
    name = plan.recipe.out_dtype or plan.recipe.dtype
    if name is None:
        return
    # Nothing but the dtype differs from the base's file.
    text = _DTYPE_KEY.sub(rf"\g<1>{name}", plan.target.checkpoint.config_bytes.decode("utf-8"))
    content = json.loads(text)
    if not {"dtype", "torch_dtype"} & {key for key, value in content.items() if value is not None}:
        text = json.dumps({**content, "dtype": name}, indent=2, ensure_ascii=False) + "\n"
    (out_path / "config.json").write_text(text, encoding="utf-8")


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
