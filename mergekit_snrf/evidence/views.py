"""How results, masks, profiles, edits and checkpoints are shown: as tables, as data frames, and as figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from html import escape
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import SnrfError, did_you_mean, printable
from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.drawing import Drawing
from mergekit_snrf.evidence.overlap import total
from mergekit_snrf.evidence.results import Counts, DomainAblation, Lens, Overlap, OverlapPairs, Study, Sweep, Tuning
from mergekit_snrf.evidence.sections import metric_drawings, overlap_drawings
from mergekit_snrf.evidence.wording import Table, counts_table, projections_table, settings_table, study_table
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.edits import Edit
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sets import NeuronSet, count_rows
from mergekit_snrf.profiling.result.profilefile import Profile
from mergekit_snrf.profiling.result.selection import select

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_TOP_RATIO = 0.1


@dataclass(frozen=True)
class View:
    """What a page shows of an object, without figures."""

    tables: Sequence[Table]
    sentences: Sequence[str] = ()


@singledispatch
def view(one: Any) -> View:
    """Return the tables and sentences of an object; below its repr, which is the heading."""
    raise TypeError(f"{type(one).__name__} has no tables")


def html(one: Any) -> str:
    """Return an object as HTML; all text is escaped, since names come from files."""
    found = view(one)
    parts = [f"<p><b>{_text(repr(one))}</b></p>"]
    for table in found.tables:
        lines = [_line("th", table.header), *(_line("td", row) for row in table.rows)]
        outer, caption = ("details", "summary") if table.folded else ("div", "p")
        shown = f"<{caption}>{_text(table.caption)}</{caption}>" if table.caption else ""
        parts.append(f"<{outer}>{shown}<table>{''.join(lines)}</table></{outer}>")
    parts += [f"<p>{_text(sentence)}</p>" for sentence in found.sentences]
    return f"<div>{''.join(parts)}</div>"


def _line(tag: str, cells: Sequence[object]) -> str:
    first, *others = (_text(str(cell)) for cell in cells)
    rest = "".join(f"<{tag}>{cell}</{tag}>" for cell in others)
    return f'<tr><{tag} style="text-align: left">{first}</{tag}>{rest}</tr>'


def _text(text: str) -> str:
    return escape(printable(text))


@view.register
def _(one: Study) -> View:
    return View([study_table(one, metric) for metric in one.items], [*one.verdict, *one.notes])


@view.register(Edit)
@view.register(Sweep)
def _(one: Sweep | Edit) -> View:
    return view(one.study) if isinstance(one, Sweep) and one.study is not None else View([])


@view.register
def _(one: Overlap) -> View:
    caption = f"A is {one.names[0]}, B is {one.names[1]}, selected by {wording.rule(one.rule)}"
    return View([projections_table(one, caption)], [wording.chance_sentence(total(one.sites))])


@view.register
def _(one: OverlapPairs) -> View:
    rows: list[tuple[str, Counts]] = [(" and ".join(pair.names), total(pair.sites)) for pair in one.pairs]
    return View([counts_table(f"Selected by {wording.rule(one.pairs[0].rule)}", "A and B", rows)])


@view.register
def _(one: NeuronSet) -> View:
    return View([Table("", ("projection", "layers", "neurons", "of", "share"), count_rows(one.by_projection()))])


@view.register
def _(one: Mask) -> View:
    known = one.provenance.model_dump(mode="json", exclude_none=True)
    return View([*view(one.neurons).tables, *_facts(known)])


@view.register
def _(one: Profile) -> View:
    projections = dict.fromkeys(site.projection for site in one.sites)
    rows = [
        (name, len(sizes), sum(sizes))
        for name in projections
        for sizes in [[found.neurons for site, found in one.sites.items() if site.projection == name]]
    ]
    known = one.provenance.model_dump(mode="json", exclude_none=True)
    return View([Table("", ("projection", "layers", "neurons"), rows), *_facts(known)])


@view.register
def _(one: Checkpoint) -> View:
    facts = {name: getattr(one, name) for name in ("revision", "commit", "config_sha256")}
    return View(_facts(facts))


def _facts(content: Mapping[str, Any]) -> list[Table]:
    table = settings_table("Where it comes from", content)
    return [replace(table, folded=True)] if table.rows else []


@singledispatch
def _rows(one: Any) -> Iterator[dict[str, Any]]:
    """Yield what becomes the rows of a data frame; columns of several rows at once are lists or arrays."""
    raise TypeError(f"{type(one).__name__} has no rows")


def frame(one: Any) -> DataFrame:
    """Return the numbers of a result, mask or profile, unrounded, as a data frame."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        remedy = "pip install 'mergekit-snrf[analysis]'"
        raise SnrfError(None, f"data frames need the package {error.name}", remedy) from None
    parts = [one]
    if isinstance(one, Sweep):
        parts = [] if one.study is None else [one.study]
    elif isinstance(one, OverlapPairs):
        parts = list(one.pairs)
    blocks = [pd.DataFrame(row) for part in parts for row in _rows(part.neurons if isinstance(part, Mask) else part)]
    return pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame()


@_rows.register
def _(one: Study) -> Iterator[dict[str, Any]]:
    against = {(each.right, each.metric): each.difference for each in one.contrasts}
    for condition in one.conditions:
        facts = {name: getattr(condition, name) for name in ("role", "neurons", "draws", "curve")}
        for metric, measured in condition.metrics.items():
            intervals = {"mean": measured.mean, "change": measured.change}
            intervals["claim_minus_it"] = against.get((condition.name, metric))
            numbers: dict[str, float | None] = {"strength": condition.strength, "malformed": measured.malformed}
            for name, interval in intervals.items():
                ends = (None, None, None) if interval is None else (interval.estimate, interval.low, interval.high)
                numbers |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            known = {name: math.nan if value is None else value for name, value in numbers.items()}
            yield {"condition": [condition.name], "metric": metric, **facts, **known}


@_rows.register
def _(one: Overlap) -> Iterator[dict[str, Any]]:
    for site in one.sites:
        counts = {"neurons": site.neurons, "shared": site.shared, "a_only": site.only[0], "b_only": site.only[1]}
        chance = {name: getattr(site, name) for name in ("share", "chance", "deviation", "chance_share", "z")}
        yield {"a": [one.names[0]], "b": one.names[1], **_place(site), **counts, **chance}


@_rows.register
def _(one: NeuronSet) -> Iterator[dict[str, Any]]:
    for site, member in one.items():
        yield {"neuron": member.nonzero().flatten().numpy(), **_place(site)}


@_rows.register
def _(one: Profile) -> Iterator[dict[str, Any]]:
    for site, found in one.sites.items():
        statistics = {name: getattr(found, name).numpy() for name in ("min_impact", "mean_impact", "max_rank")}
        yield {"neuron": range(found.neurons), **_place(site), **statistics}


def _place(site: Any) -> dict[str, Any]:
    return {"layer": site.layer, "projection": site.projection}


@singledispatch
def drawings(one: Any) -> dict[str, Drawing]:
    """Return the figures of an object by the names of their files, the most telling one first."""
    raise TypeError(f"a {type(one).__name__} has no figures")


def plot(one: Any, figure: str | None = None) -> Figure:
    """Return one figure of an object; None: the first."""
    found = drawings(one)
    name = next(iter(found), "") if figure is None else figure
    if name not in found:
        what = f"{name!r} is not a figure of it" if found else "has no figures"
        raise SnrfError(None, what, did_you_mean(name, found, "figures are") if found else None, field="figure")
    return found[name].figure


@drawings.register
def _(one: Study) -> dict[str, Drawing]:
    from mergekit_snrf.evidence.curves import tradeoff_drawings

    return {**tradeoff_drawings(one), **metric_drawings(one)}


@drawings.register
def _(one: Sweep) -> dict[str, Drawing]:
    return {} if one.study is None else drawings(one.study)


@drawings.register
def _(one: Overlap) -> dict[str, Drawing]:
    caption = f"Overlap of {printable(', '.join(one.names))}"
    return {kind: replace(drawing, caption=caption) for kind, drawing in overlap_drawings(one).items()}


@drawings.register
def _(one: OverlapPairs) -> dict[str, Drawing]:
    return {
        f"{kind}-{number}": drawing
        for number, pair in enumerate(one.pairs, 1)
        for kind, drawing in drawings(pair).items()
    }


@drawings.register
def _(one: Lens) -> dict[str, Drawing]:
    from mergekit_snrf.evidence.lens_figures import lens_drawings

    return lens_drawings(one)


@drawings.register
def _(one: DomainAblation) -> dict[str, Drawing]:
    from mergekit_snrf.evidence.domains import matrix_drawing

    return {"matrix": matrix_drawing(one)}


@drawings.register
def _(one: Tuning) -> dict[str, Drawing]:
    from mergekit_snrf.evidence.curves import tuning_drawing

    return {"keep": tuning_drawing(one)}


@drawings.register
def _(one: NeuronSet) -> dict[str, Drawing]:
    from mergekit_snrf.evidence.figures import mask_map

    return {"layers": Drawing(mask_map(one), "Neurons by layer and projection", wording.mask_map_text(one))}


@drawings.register
def _(one: Mask) -> dict[str, Drawing]:
    return drawings(one.neurons)


@drawings.register
def _(one: Profile) -> dict[str, Drawing]:
    """Draw where the neurons are that are among the strongest tenth on every probe."""
    return drawings(select([one], top_ratio=_TOP_RATIO))
