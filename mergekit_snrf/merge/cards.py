"""Model cards of merges and adapters; everything in them is read from the plan and its files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_snrf import __version__
from mergekit_snrf.files import markdown, references
from mergekit_snrf.merge.plan import MergePlan
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.models.moments import Moments
from mergekit_snrf.neurons.maskcard import PAPER, provenance_rows, without_folders
from mergekit_snrf.neurons.sets import count_rows

AGAIN = "## To make it again"
"""The heading behind what a card says of the model; an evaluation goes before it."""


def merge_card(plan: MergePlan, name: str, recipe: str, *, cast: str | None = None, changed: int | None = None) -> str:
    """Return the README of a merged folder; ``recipe`` is its text.

    ``cast`` is the dtype that every tensor was cast to, if the recipe sets one; ``changed`` how many of the covered
    weights differ from the target's, where that is known.
    """
    differ = "" if changed is None else f", {changed} of which differ from the target's after rounding"
    intro = (
        f"{_model(plan.target.reference)} with an update from {_model(plan.source.reference)} on chosen neurons, "
        f"merged by [Shared Neuron Low-Rank Fusion]({PAPER}) with [mergekit](https://github.com/arcee-ai/mergekit) and "
        f"mergekit-snrf. The update covers {plan.parameters_touched} weights of the text decoder{differ}; all others "
        f"are the target's{f', cast to {cast}' if cast else ''}."
    )
    parts = [intro, *_description(plan), *_reproduction(plan, recipe, "mergekit-yaml snrf.yml merged/")]
    front = _front(plan, "merge", "transformers", ["merge", "snrf"])
    return markdown.document(markdown.cell(name), parts, front)


def adapter_card(
    plan: MergePlan, name: str, recipe: str, modules: int, rank: int, base_model: str | None = None
) -> str:
    """Return the README of an adapter; ``base_model`` is the target's hub id, if not that of the plan."""
    intro = (
        f"A LoRA adapter for {_model(plan.target.reference)}: the update beta * M_S(Delta_r) that [Shared Neuron "
        f"Low-Rank Fusion]({PAPER}) adds to it from {_model(plan.source.reference)}, in {modules} modules of the text "
        f"decoder, rank {rank}. Made with mergekit-snrf."
    )
    use = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(target, "this folder")'
    again = _reproduction(plan, recipe, "snrf lora snrf.yml adapter/", "peft")
    parts = [intro, _fenced("python", use), *_description(plan), *again]
    front = _front(plan, "adapter", "peft", ["snrf", "lora"], base_model)
    return markdown.document(markdown.cell(name), parts, front)


def _front(
    plan: MergePlan, relation: str, library: str, tags: list[str], base_model: str | None = None
) -> dict[str, object]:
    paths = [path.path for model in plan.references for path in (model.model, model.lora) if path is not None]
    ids = [*([base_model] if base_model else []), *(path for path in paths if not os.path.isabs(path))]
    return {
        "base_model": list(dict.fromkeys(ids)),
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": plan.target.checkpoint.pipeline_tag,
        "tags": ["mergekit", *tags],
    }


def _description(plan: MergePlan) -> Iterable[str]:
    """Yield what was changed, and the mask that says where."""
    yield "## What was changed"
    yield markdown.table(("projection", "tensors", "neurons", "of", "share"), count_rows(plan.counts())[:-1])
    yield f"Update: {plan.update}."
    if plan.moments is not None:
        yield from _moments(plan.moments)
    if plan.mask_path is None:
        return
    digest = references.sha256(plan.mask_path)
    facts = [("file", f"`{plan.mask_path.name}`"), ("sha256", f"`{digest}`"), ("neurons", plan.mask.neurons.count())]
    yield "## Neurons"
    yield markdown.table(("", ""), [*facts, *provenance_rows(without_folders(plan.mask))])


def _moments(moments: Moments) -> Iterable[str]:
    """Yield where the moments come from, and what they protect."""
    found = moments.provenance
    kinds = [("gain", found.gain), *((f"keep: {one.get('name', '')}", one) for one in found.keep or ())]
    rows = [
        (kind, Path(str(one.get("dataset", ""))).name, one.get("count", ""), one.get("tokens", ""))
        for kind, one in kinds
        if one is not None
    ]
    yield "## Moments"
    yield f"`{Path(moments.path).name}`, sha256 `{references.sha256(moments.path)}`."
    yield markdown.table(("probes", "data set", "count", "tokens"), rows)
    yield (
        "Only what the probes to keep show is protected. The update restores what the target lost of its base more "
        "than it adds new skills of the source."
    )


def _reproduction(plan: MergePlan, recipe: str, command: str, *packages: str) -> Iterable[str]:
    # A local version, such as 2.13.0+cpu, is on no index.
    names = ("mergekit", "torch", "transformers", *packages)
    pins = " ".join(f"{name}=={version(name).partition('+')[0]}" for name in names)
    models = [
        (_name(one.reference), one.reference.model.revision or "as of the merge", f"`{one.checkpoint.config_sha256}`")
        for one in plan.models
    ]
    shared = portable(recipe, plan.inputs)
    cut = "" if shared == recipe else ", its local paths cut to their last part"
    yield AGAIN
    yield f"    pip install mergekit-snrf=={__version__} {pins}\n    {command}"
    yield f"with this as `snrf.yml`{cut}, and the files of the sha256 above where it says:"
    yield _fenced("yaml", shared.rstrip())
    yield markdown.table(("model", "revision", "sha256 of config.json"), models)


def _fenced(language: str, text: str) -> str:
    """Return a block of code that no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _model(reference: ModelReference) -> str:
    path = reference.model.path
    if os.path.isabs(path) or reference.lora is not None:
        return "`" + markdown.line(_name(reference)).replace("`", "'") + "`"
    return f"[{path}](https://huggingface.co/{path})"


def _name(reference: ModelReference) -> str:
    """Return hub ids, or the last parts of folders: the rest of their paths is private."""
    paths = [path.path for path in (reference.model, reference.lora) if path is not None]
    return " + ".join(Path(path).name if os.path.isabs(path) else path for path in paths)
