"""Model cards of merges and adapters; everything in them is read from the plan and its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from mergekit_snrf import __version__
from mergekit_snrf.files import markdown, references
from mergekit_snrf.merge.origins import Origin, common_license, origins
from mergekit_snrf.merge.plan import MergePlan
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.models.moments import Moments
from mergekit_snrf.neurons.maskcard import PAPER, provenance_rows, without_folders
from mergekit_snrf.neurons.sets import count_rows

AGAIN = "## To make it again"
"""The heading behind what a card says of the model; an evaluation goes before it."""
NO_LICENSE = "**This model: no license is stated.** State one with `snrf card FOLDER --license ID`."
THIS_LICENSE = "This model: `{}`."
_LOADERS = {"image-text-to-text": "AutoModelForImageTextToText", "text-generation": "AutoModelForCausalLM"}
_ASK = {
    "image-text-to-text": """content = [{"type": "text", "text": "What is 12 * 7?"}]  # {"type": "image", "url": URL}
print(pipe(text=[{"role": "user", "content": content}], max_new_tokens=64))""",
    "text-generation": 'print(pipe([{"role": "user", "content": "What is 12 * 7?"}], max_new_tokens=64))',
}
_Origins = Mapping[str, Sequence[Origin]]


def merge_card(plan: MergePlan, recipe: str, *, cast: str | None = None, changed: int | None = None) -> str:
    """Return the README of a merged folder; ``recipe`` is its text.

    ``cast`` is the dtype that every tensor was cast to, if the recipe sets one; ``changed`` how many of the covered
    weights differ from the target's, where that is known.
    """
    found = origins(plan)
    differ = "" if changed is None else f", {changed} of which differ from the target's after rounding"
    intro = (
        f"{_linked(found['target'])} with an update from {_linked(found['source'])} on chosen neurons, "
        f"merged by [Shared Neuron Low-Rank Fusion]({PAPER}) with [mergekit](https://github.com/arcee-ai/mergekit) and "
        f"mergekit-snrf. The update covers {plan.parameters_touched} weights of the text decoder{differ}; all others "
        f"are the target's{f', cast to {cast}' if cast else ''}."
    )
    task = plan.target.checkpoint.pipeline_tag
    use = f'from transformers import pipeline\n\npipe = pipeline("{task}", model=".")  # this folder\n{_ASK[task]}'
    again = _reproduction(plan, found, recipe, "mergekit-yaml snrf.yml merged/")
    front = {"base_model_relation": "merge", "library_name": "transformers", "tags": ["mergekit", "merge", "snrf"]}
    return _page(plan, found, _title(found), [intro, *_body(plan, found, use), *again], front)


def adapter_card(plan: MergePlan, recipe: str, modules: int, rank: int, base_model: str | None = None) -> str:
    """Return the README of an adapter; ``base_model`` is the target's hub id, if not that of the plan."""
    found = origins(plan)
    intro = (
        f"A LoRA adapter for {_linked(found['target'])}: the update beta * M_S(Delta_r) that [Shared Neuron "
        f"Low-Rank Fusion]({PAPER}) adds to it from {_linked(found['source'])}, in {modules} modules of the text "
        f"decoder, rank {rank}. Made with mergekit-snrf."
    )
    loader = _LOADERS[plan.target.checkpoint.pipeline_tag]
    use = f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained(".")  # this folder; needs PEFT'
    again = _reproduction(plan, found, recipe, "snrf lora snrf.yml adapter/", "peft")
    front = {"base_model_relation": "adapter", "library_name": "peft", "tags": ["mergekit", "snrf", "lora"]}
    title = f"{_title(found)} (LoRA adapter)"
    return _page(plan, found, title, [intro, *_body(plan, found, use), *again], front, base_model)


def _page(
    plan: MergePlan,
    found: _Origins,
    title: str,
    parts: Iterable[str],
    front: Mapping[str, object],
    base_model: str | None = None,
) -> str:
    models = [one for of_role in found.values() for one in of_role]
    ids = list(dict.fromkeys(filter(None, [base_model, *(one.hub_id for one in models)])))
    task = {"pipeline_tag": plan.target.checkpoint.pipeline_tag}
    page = markdown.document(
        markdown.cell(title), parts, {**common_license(models), "base_model": ids, **task, **front}
    )
    for one in models:
        # Cards have no key for the revision of a base model, and may have comments.
        if one.hub_id and one.exact and one.revision:
            page = page.replace(f"\n- {one.hub_id}\n", f"\n- {one.hub_id}  # revision {one.revision}\n", 1)
    return page


def _title(found: _Origins) -> str:
    target, source = (_name(found[role]).rpartition("/")[2] for role in ("target", "source"))
    return f"{target} with an update from {source}"


def _linked(models: Sequence[Origin]) -> str:
    """Return the name of a model, as a link where its files are those of the hub."""
    if len(models) == 1 and models[0].exact:
        return f"[{models[0].name}](https://huggingface.co/{models[0].name})"
    return "`" + markdown.line(_name(models)).replace("`", "'") + "`"


def _name(models: Sequence[Origin]) -> str:
    return " + ".join(one.name for one in models)


def _body(plan: MergePlan, found: _Origins, code: str) -> Iterable[str]:
    """Yield what the model is for, what was changed, what may be wrong with it, and its license."""
    pictures = plan.target.checkpoint.pipeline_tag == "image-text-to-text"
    yield "## Intended use"
    yield (
        f"Questions about {'pictures and text' if pictures else 'text'}, with the target's chat template"
        f"{' and processor' if pictures else ''}. The update is meant for questions like those that its neurons were "
        "measured on; only an evaluation says whether it helps."
    )
    yield _fenced("python", code)
    yield from _description(plan)
    protected = (
        "Nothing is protected on purpose: the update is limited to few neurons and a low rank."
        if plan.moments is None
        else "Only what the probes to keep show is protected."
    )
    yield "## Limitations"
    yield (
        f"{protected} Whatever else the target does can get worse, so measure what you need. The update restores what "
        "the target lost of its base more than it adds new skills of the source. Errors and biases of both remain."
    )
    models = [one for of_role in found.values() for one in of_role]
    license = common_license(models).get("license")
    stated = ((one.name, one.license.get("license_name") or one.license.get("license", "not stated")) for one in models)
    yield "## License"
    yield markdown.table(("model", "license"), dict.fromkeys(stated))
    yield THIS_LICENSE.format(license) if license else NO_LICENSE


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


def _reproduction(plan: MergePlan, found: _Origins, recipe: str, command: str, *packages: str) -> Iterable[str]:
    # A local version, such as 2.13.0+cpu, is on no index.
    names = ("mergekit", "torch", "transformers", *packages)
    pins = " ".join(f"{name}=={version(name).partition('+')[0]}" for name in names)
    models = [
        (_name(found[role]), found[role][0].revision or "as of the merge", f"`{checkpoint.config_sha256}`")
        for role, checkpoint in plan.checkpoints.items()
    ]
    shared = portable(recipe, plan.inputs)
    cut = "" if shared == recipe else " (local paths are cut to their last part)"
    yield AGAIN
    yield f"Save this as `snrf.yml`{cut}, beside the files of the sha256 above:"
    yield _fenced("yaml", shared.rstrip())
    yield f"Then run, where mergekit-snrf {__version__} is cloned:"
    yield _fenced("sh", f"pip install ./mergekit-snrf {pins}\n{command}")
    yield markdown.table(("model", "revision", "sha256 of config.json"), models)


def _fenced(language: str, text: str) -> str:
    """Return a block of code that no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
