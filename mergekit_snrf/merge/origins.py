"""Where the models of a merge come from, for its model card: hub ids, revisions, and the licenses that they state."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mergekit.common import ModelPath

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.markdown import front_matter
from mergekit_snrf.files.reading import read_text
from mergekit_snrf.files.references import cached_place
from mergekit_snrf.merge.plan import MergePlan, OpenedModel
from mergekit_snrf.models import hub
from mergekit_snrf.models.checkpoint import Checkpoint

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
        return Origin(place[0], place[0], place[1], license=_license(_card(part.path), place[0]))
    if os.path.isabs(part.path):
        written = str(opened.config.get("_name_or_path") or "") if opened is not None else ""
        known = written if HUB_ID.fullmatch(written) and not os.path.exists(written) else None
        return Origin(Path(part.path).name, known, exact=False, license=_license(_card(part.path)))
    folder = opened.folder if opened is not None else None
    of_folder = cached_place(folder) if folder is not None else None
    revision = (opened.commit if opened is not None else None) or (of_folder and of_folder[1]) or part.revision
    card = (_card(folder) if folder is not None else {}) or _downloaded_card(part.path, revision)
    return Origin(part.path, part.path, revision, license=_license(card, part.path))


def _card(folder: str | Path) -> Mapping[str, object]:
    with suppress(SnrfError):
        return front_matter(read_text(Path(folder, "README.md")))
    return {}


def _downloaded_card(name: str, revision: str | None) -> Mapping[str, object]:
    with suppress(SnrfError):
        return _card(hub.download(name, revision, ["README.md"], None))
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
