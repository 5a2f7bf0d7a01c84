"""The evaluation section of a model card, filled from a comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.intervals import spoken
from mergekit_snrf.evidence.results import Condition, Study
from mergekit_snrf.evidence.wording import scale, without_folders
from mergekit_snrf.files import markdown
from mergekit_snrf.merge.cards import AGAIN

_TITLE = "## Evaluation"
_SECTION = re.compile(rf"^{_TITLE}$.*?(?=^{AGAIN}$)", re.DOTALL | re.MULTILINE)


def with_evaluation(card: str, studies: Sequence[Study], where: str) -> str:
    """Return a card of this package with comparisons as its evaluation, in place of what was there.

    Args:
        card: README of a merge or adapter.
        studies: comparisons of it.
        where: the card's path, for errors.

    Raises:
        SnrfError: the card is not of this package, or a study is not a comparison of this merge.
    """
    check_card(card, where)
    for study in studies:
        _check(card, study, where)
    section = "\n\n".join([_TITLE, *(part for study in studies for part in _parts(study))])
    emptied = _SECTION.sub("", card, count=1)
    before, _, after = emptied.partition(f"\n{AGAIN}\n")
    return f"{before}\n{section}\n\n{AGAIN}\n{after}"


def check_card(card: str, where: str) -> None:
    """Raise ``SnrfError`` where a page is not a card of this package."""
    if f"\n{AGAIN}\n" not in card or "\n- snrf\n" not in card:
        raise SnrfError(where, "is not a model card of mergekit-snrf", "give the folder of a merge or an adapter")


def _check(card: str, study: Study, where: str) -> None:
    if study.kind != "comparison":
        raise SnrfError(None, f"{study.kind} is not a comparison", "give what snrf compare wrote", field="result")
    update = study.settings.get("update")
    known = {
        "the target's config.json": study.settings.get("config_sha256"),
        "the source's config.json": study.settings.get("source_config_sha256"),
        "the mask": study.mask_sha256,
        "the moments": study.settings.get("moments_sha256") if "regmean" in str(update) else None,
        "the update": f"Update: {update}." if update else None,
    }
    for what, text in known.items():
        if text and str(text) not in card:
            remedy = "compare the recipe that made this folder"
            raise SnrfError(where, f"{what} is not that of the comparison ({text})", remedy, field="result")


def _parts(study: Study) -> list[str]:
    """Return a comparison as paragraphs and a table: a row for every model, without other points of sweeps."""
    rows = [one for one in study.conditions if one.curve is None or one.role == "claim"]
    items = ", ".join(f"{count} items of {metric}" for metric, count in study.items.items())
    names = [f"{metric}{scale(study, metric)[1]}" for metric in study.items]
    header = ("", *(column for name in names for column in (name, "change")))
    return [
        f"`{markdown.line(without_folders(study.evaluation)).replace('`', '')}`, {markdown.cell(items)}; "
        f"{100 * study.level:g} % intervals, changes paired with the target. Measured with `snrf compare`.",
        markdown.table(header, [_row(study, one) for one in rows]),
        "\n".join(f"- {markdown.cell(without_folders(sentence))}" for sentence in study.verdict),
    ]


def _row(study: Study, one: Condition) -> list[str]:
    name = f"{one.name} (this model)" if one.role == "claim" else one.name
    cells = [f"{name}, {one.draws} draws" if one.draws > 1 else name]
    for metric in study.items:
        factor, value = scale(study, metric)[0], one.metrics.get(metric)
        mean, change = (None, None) if value is None else (value.mean, value.change)
        cells += ["-" if part is None else spoken(part, factor, sign) for part, sign in ((mean, ""), (change, "+"))]
    return cells
