"""Model cards of merges and adapters, and where the models come from; all is read from the plan and its files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from mergekit.common import ModelPath

from mergekit_snrf import __version__
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files import markdown, references
from mergekit_snrf.files.markdown import front_matter
from mergekit_snrf.files.reading import read_text
from mergekit_snrf.files.references import cached_place
from mergekit_snrf.merge.plan import MergePlan, OpenedModel
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.models import hub
from mergekit_snrf.models.checkpoint import Checkpoint
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
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
# Each asks of what is made from the model at least what those before it ask.
_PERMISSIVE = ("unlicense", "cc0-1.0", "0bsd", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
_LINK = re.compile(r"https?://[^\s<>\"]{1,200}|[\w.-]{1,80}")


@dataclass(frozen=True)
class Origin:
    """A model or adapter of a merge: its name without folders, its id and revision on the hub, and its license.

    ``exact``: the files are those of the hub; otherwise the id is what the configuration says that they come from.
    ``license`` has the keys of a card: ``license``, and ``license_name`` and ``license_link`` where it says them.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    exact: bool = True
    license: Mapping[str, str] = field(default_factory=dict)


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


def origins(plan: MergePlan) -> dict[str, list[Origin]]:
    """Return where target, source and source_base come from, each with the adapter behind the model."""
    return {role: _origins(model) for role, model in plan.models.items()}


def _origins(model: OpenedModel) -> list[Origin]:
    reference = model.reference
    if reference.lora is None:
        return [_origin(reference.model, model.checkpoint)]
    # What was opened is mergekit's own folder, with the adapter merged into the model.
    return [_origin(reference.model, None), _origin(reference.lora, None)]


def _origin(part: ModelPath, opened: Checkpoint | None) -> Origin:
    place = cached_place(part.path)
    if place is not None:
        return Origin(place[0], place[0], place[1], license=_license(_read_card(part.path), place[0]))
    if os.path.isabs(part.path):
        written = str(opened.config.get("_name_or_path") or "") if opened is not None else ""
        known = written if HUB_ID.fullmatch(written) and not os.path.exists(written) else None
        return Origin(Path(part.path).name, known, exact=False, license=_license(_read_card(part.path)))
    folder = opened.folder if opened is not None else None
    of_folder = cached_place(folder) if folder is not None else None
    revision = (opened.commit if opened is not None else None) or (of_folder and of_folder[1]) or part.revision
    card = (_read_card(folder) if folder is not None else {}) or _downloaded_card(part.path, revision)
    return Origin(part.path, part.path, revision, license=_license(card, part.path))


def _read_card(folder: str | Path) -> Mapping[str, object]:
    with suppress(SnrfError):
        return front_matter(read_text(Path(folder, "README.md")))
    return {}


def _downloaded_card(name: str, revision: str | None) -> Mapping[str, object]:
    with suppress(SnrfError):
        return _read_card(hub.download(name, revision, ["README.md"], None))
    return {}


def _license(card: Mapping[str, object], hub_id: str | None = None) -> dict[str, str]:
    """Return what a card says of its license, empty where it says nothing that a card may say."""
    stated = card.get("license")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if not isinstance(stated, str) or not LICENSE.fullmatch(stated.lower()):
        return {}
    found = {"license": stated.lower()}
    for key in ("license_name", "license_link"):
        if isinstance(value := card.get(key), str) and _LINK.fullmatch(value):
            found[key] = value
    link = found.get("license_link", "")
    if hub_id and link and "://" not in link:
        found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return found


def common_license(models: Sequence[Origin]) -> dict[str, str]:
    """Return the license that all models allow: the one that they share, or the stricter where that is clear.

    Of permissive licenses the one that asks for more holds; beside permissive ones, any other. Two different other
    licenses, or a model without one, leave it open: the answer is empty.
    """
    stated = [model.license for model in models]
    if not all(stated):
        return {}
    strict = [one for one in stated if one["license"] not in _PERMISSIVE]
    if strict:
        return dict(strict[0]) if all(one == strict[0] for one in strict) else {}
    return dict(max(stated, key=lambda one: _PERMISSIVE.index(one["license"])))
