"""One self-contained HTML page about a mask and what was measured with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_snrf import __version__
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.intervals import spoken
from mergekit_snrf.evidence.overlap import by_projection, overlaps, total
from mergekit_snrf.evidence.results import (
    Amplification,
    Condition,
    Overlap,
    OverlapPairs,
    Result,
    SiteOverlap,
    Study,
)
from mergekit_snrf.files import references
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sets import PROJECTIONS, Site
from mergekit_snrf.profiling.result.profilefile import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLOUDS = 12
_TOKENS = 10
_COUNT_COLUMNS = ("shared", "first only", "second only", *wording.COUNT_COLUMNS)

_COMMANDS = {
    "overlap": ("The overlap of both models", "snrf overlap TARGET.profile SOURCE.profile --curve --json overlap.json"),
    "ablation": (
        "Whether these neurons matter",
        "snrf ablate MODEL --mask MASK --eval EVAL --json ablation.json",
    ),
    "comparison": (
        "Whether the merge beats what is easier",
        "snrf compare RECIPE.yml --eval EVAL --json comparison.json",
    ),
    "amplification": (
        "What single neurons promote",
        "snrf amplify MODEL --neuron NEURON --factor 10 --probes PROBES --json amplification.json",
    ),
}


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row.

    Attributes:
        words: the columns that hold words, which are flush left.
        folded: shown only when the reader unfolds it.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    words: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure as an SVG element, with a caption."""

    svg: str
    caption: str


@dataclass
class Section:
    """A part of the report: warnings, sentences, drawings and tables under a title."""

    name: str
    title: str
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def report(mask: Mask, profiles: Sequence[Profile] = (), results: Sequence[Result] = ()) -> str:
    """Return the report as HTML: no scripts, nothing loaded, equal inputs give equal text.

    Args:
        mask: as ``read_mask`` returns it.
        profiles: of the models, for their overlap under the mask's own selection rule (top ratio 0.1 if it has none).
        results: of the analyses, in the order to show them.

    Raises:
        SnrfError: the mask's file cannot be read, or the profiles are of different shapes.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    digest = references.sha256(mask.path)
    draw = _Drawer()
    sections = [_mask_section(mask, draw)]
    computed = _from_profiles(mask, profiles)
    read = [pair for result in results for pair in _overlaps_in(result)]
    sections += [_overlap_section(title, pair, draw) for title, pair in _titled(computed, read)]
    for result in results:
        if isinstance(result, Study):
            sections.append(_study_section(result, digest, draw))
        elif isinstance(result, Amplification):
            sections.append(_amplification_section(result, draw))
    environment = Environment(
        loader=PackageLoader("mergekit_snrf.evidence", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    shown = {section.name for section in sections}
    return environment.get_template("report.html.jinja").render(
        title=_title(mask),
        file=Path(mask.path).name,
        digest=digest,
        sections=[*sections, _provenance_section(mask, digest)],
        missing=[words for name, words in _COMMANDS.items() if name not in shown],
        version=__version__,
    )


def _finalize(value: object) -> object:
    """Write out characters that are not for display; markup made here passes."""
    return value if hasattr(value, "__html__") else wording.printable(str(value))


class _Drawer:
    """Turns figures into drawings whose ids differ."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, figure: Figure, caption: str, text: str) -> Drawing:
        from markupsafe import Markup

        from mergekit_snrf.evidence.figures import svg

        self._count += 1
        # The SVG is built by an XML writer, which escapes every text in it.
        return Drawing(Markup(svg(figure, caption, text, f"f{self._count}", "currentColor")), caption)


def _title(mask: Mask) -> str:
    models = (mask.provenance.target, mask.provenance.source)
    target, source = (
        wording.without_folders(model.path) if model is not None and model.path else None for model in models
    )
    if target and source:
        return f"Shared neurons of {target} and {source}"
    return f"Neurons of {target or source or Path(mask.path).name}"


def _mask_section(mask: Mask, draw: _Drawer) -> Section:
    from mergekit_snrf.evidence.figures import mask_map

    neurons = mask.neurons
    counts = wording.counts_of(neurons)
    section = Section("mask", "Where the neurons live")
    if not neurons:
        section.sentences.append("The mask is empty.")
        return section
    count, size = counts["all"]
    densest = max((name for name in counts if name != "all"), key=lambda name: counts[name][0] / counts[name][1])
    section.sentences.append(
        f"The mask holds {count} of {size} neurons ({wording.percent(count / size)}) in the layers and projections "
        f"that it lists; {densest} is the densest ({wording.percent(counts[densest][0] / counts[densest][1])})."
    )
    section.drawings.append(draw(mask_map(neurons), "Neurons by layer and projection", wording.mask_map_text(neurons)))
    rows = [(name, n, of, wording.percent(n / of)) for name, (n, of) in counts.items()]
    section.tables.append(Table("By projection", ("projection", "neurons", "of", "share"), rows))
    layers = sorted({site.layer for site in neurons})
    by_layer = [(layer, *(neurons.count(Site(layer, name)) for name in PROJECTIONS)) for layer in layers]
    section.tables.append(Table("By layer", ("layer", *PROJECTIONS), by_layer, folded=True))
    return section


def _from_profiles(mask: Mask, profiles: Sequence[Profile]) -> list[Overlap]:
    if len(profiles) < 2:
        if profiles:
            raise SnrfError(f"{profiles[0].path}: an overlap needs the profiles of two models, give both")
        return []
    rule = {
        name: value
        for name, value in (mask.provenance.selection or {}).items()
        if name in ("top_ratio", "sigma") or (name == "at_least" and type(value) in (int, float))
    }
    if not rule.keys() & {"top_ratio", "sigma"}:
        rule = {"top_ratio": 0.1}
    return overlaps(profiles, curve=True, **rule)


def _overlaps_in(result: Result) -> list[Overlap]:
    if isinstance(result, OverlapPairs):
        return result.pairs
    return [result] if isinstance(result, Overlap) else []


def _titled(computed: Sequence[Overlap], read: Sequence[Overlap]) -> list[tuple[str, Overlap]]:
    """Give every overlap a title of its own; of those that say the same only one is kept, with a curve if one has it.

    Args:
        computed: of the given profiles.
        read: of result files.
    """
    kept: dict[str, tuple[str, Overlap]] = {}
    for origin, overlap in [*(("profiles", one) for one in computed), *(("a result file", one) for one in read)]:
        content = _content(overlap)
        if content not in kept or (overlap.curve and not kept[content][1].curve):
            kept[content] = kept.get(content, (origin, overlap))[0], overlap
    titles = [f"Overlap of {overlap.names[0]} and {overlap.names[1]}" for _, overlap in kept.values()]
    for more in (
        [f" by {wording.rule(one.rule)}" for _, one in kept.values()],
        [f", of {o}" for o, _ in kept.values()],
    ):
        counts = Counter(titles)
        titles = [title + part if counts[title] > 1 else title for title, part in zip(titles, more, strict=True)]
    counts, seen = Counter(titles), Counter[str]()
    unique = []
    for title in titles:
        seen[title] += 1
        unique.append(f"{title} ({seen[title]})" if counts[title] > 1 else title)
    return [(title, overlap) for title, (_, overlap) in zip(unique, kept.values(), strict=True)]


def _content(overlap: Overlap) -> str:
    """Return what an overlap says of its sites, whichever of the two models comes first."""
    order = sorted((0, 1), key=lambda side: overlap.names[side])
    sites = [
        [site.layer, site.projection, site.neurons, site.shared, *(site.only[side] for side in order)]
        for site in sorted(overlap.sites, key=_site_order)
    ]
    return json.dumps([[overlap.names[side] for side in order], overlap.rule, sites], sort_keys=True)


def _overlap_section(title: str, overlap: Overlap, draw: _Drawer) -> Section:
    from mergekit_snrf.evidence.figures import overlap_curve, overlap_diagram, overlap_map

    first, second = overlap.names
    section = Section("overlap", title)
    section.sentences.append(f"By {wording.rule(overlap.rule)}: {wording.chance_sentence(total(overlap.sites))}")
    section.drawings.append(
        draw(overlap_diagram(overlap), "Shared and model-only neurons, in true area", wording.overlap_text(overlap))
    )
    if overlap.curve:
        section.drawings.append(draw(overlap_curve(overlap), "Overlap by top ratio", wording.curve_text(overlap)))
    section.drawings.append(
        draw(overlap_map(overlap), "Overlap by layer and projection", wording.overlap_map_text(overlap))
    )
    rows = [(name, *wording.count_cells(counts)) for name, counts in by_projection(overlap).items()]
    section.tables.append(
        Table(f"By projection; first is {first}, second is {second}", ("projection", *_COUNT_COLUMNS), rows)
    )
    sites = sorted(overlap.sites, key=_site_order)
    by_layer = [(f"{site.layer} {site.projection}", *wording.count_cells(site)) for site in sites]
    section.tables.append(Table("By layer and projection", ("layer", *_COUNT_COLUMNS), by_layer, folded=True))
    return section


def _site_order(site: SiteOverlap) -> tuple[int, int]:
    return site.layer, list(PROJECTIONS).index(site.projection)


def _study_section(study: Study, digest: str, draw: _Drawer) -> Section:
    from mergekit_snrf.evidence.figures import study_intervals

    titles = {"ablation": "Do these neurons matter?", "comparison": "Does the merge beat what is easier?"}
    section = Section(
        study.kind, f"{titles[study.kind]} ({wording.without_folders(study.model)})", sentences=list(study.verdict)
    )
    if study.mask_sha256 not in (None, digest):
        section.warnings.append(
            f"Measured with another mask (sha256 {study.mask_sha256}): this says nothing about the mask of this report."
        )
    level = f"{100 * study.level:g} %"
    for metric in dict.fromkeys(metric for condition in study.conditions for metric in condition.metrics):
        factor, unit = wording.scale(study, metric)
        items = f", {study.items[metric]} items" if metric in study.items else ""
        caption = f"{metric}{unit}{items}, {level} intervals"
        text = wording.study_text(study, metric)
        section.drawings.append(draw(study_intervals(study, metric), f"{metric}{unit}", text))
        header = ("condition", "mean", "change", "malformed", "neurons", "draws", "role")
        rows = [_condition_row(one, metric, factor) for one in study.conditions if metric in one.metrics]
        section.tables.append(Table(caption, header, rows, frozenset({6})))
    if study.contrasts:
        contrasts = []
        for one in study.contrasts:
            factor, unit = wording.scale(study, one.metric)
            difference = spoken(one.difference, factor, "+")
            contrasts.append((f"{one.left} minus {one.right}", f"{one.metric}{unit}", difference))
        caption = f"Paired differences, {level} intervals"
        section.tables.append(Table(caption, ("conditions", "metric", "difference"), contrasts, frozenset({1})))
    repeat = {
        "model": study.model,
        "mask": study.mask,
        "mask sha256": study.mask_sha256,
        "evaluation": study.evaluation,
        "seed": study.seed,
        **study.settings,
        **{one.name: wording.rule(one.settings) for one in study.conditions if one.settings},
    }
    section.tables.append(_settings("To repeat it", repeat))
    return section


def _condition_row(condition: Condition, metric: str, factor: float) -> tuple[object, ...]:
    measured = condition.metrics[metric]
    change = "-" if measured.change is None else spoken(measured.change, factor, "+")
    malformed = wording.percent(measured.malformed)
    mean = spoken(measured.mean, factor)
    return condition.name, mean, change, malformed, condition.neurons, condition.draws, condition.role


def _amplification_section(amplification: Amplification, draw: _Drawer) -> Section:
    from mergekit_snrf.evidence.figures import word_cloud

    section = Section("amplification", "What single neurons promote")
    count, ratio = len(amplification.neurons), amplification.math_neuron_ratio
    section.sentences.append(
        f"The activation of {count} {'neuron' if count == 1 else 'neurons'}, one at a time, was multiplied by "
        f"{amplification.factor:g} on {amplification.count} probes."
    )
    if ratio is not None:
        plain = amplification.plain_math_share
        classifier = wording.without_folders(amplification.classifier or "classifier not stated")
        section.sentences.append(
            f"{round(ratio * count)} of {count} ({wording.percent(ratio)}) are math neurons, with more than half of "
            f"the leading tokens math tokens ({classifier})"
            + ("." if plain is None else f"; of the tokens of the plain answers, {wording.percent(plain)} are.")
        )
    clouds = [neuron for neuron in amplification.neurons if wording.leading(neuron, 1)]
    for neuron in clouds[:_CLOUDS]:
        section.drawings.append(draw(word_cloud(neuron), neuron.neuron, wording.word_cloud_text(neuron)))
    rows = [
        (
            neuron.neuron,
            ", ".join(wording.token_text(token) for token in wording.leading(neuron, _TOKENS)) or "-",
            *neuron.totals,
            "-" if neuron.changed is None else neuron.changed,
            wording.percent(neuron.math_share),
        )
        for neuron in amplification.neurons
    ]
    header = (
        "neuron",
        "leading tokens: log-odds (amplified:plain)",
        "tokens amplified",
        "tokens plain",
        "answers changed",
        "math tokens",
    )
    section.tables.append(Table("Leading tokens", header, rows, frozenset({1})))
    repeat = {
        "model": amplification.model,
        "factor": amplification.factor,
        "probes": amplification.probes,
        "seed": amplification.seed,
        **amplification.settings,
    }
    section.tables.append(_settings("To repeat it", repeat))
    return section


def _settings(caption: str, content: Mapping[str, Any]) -> Table:
    return Table(caption, ("setting", "value"), _flat(content), frozenset({1}))


def _flat(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write nested mappings as lines ``target probes count``, other values as JSON, and no local folders."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        name = wording.without_folders(str(key))
        if isinstance(value, Mapping):
            rows += [(f"{name} {inner}", text) for inner, text in _flat(value)]
        elif value is not None:
            # A template is text for a model, where a slash is no folder.
            shown = value if key == "template" else _without_folders(value)
            rows.append((name, shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)))
    return rows


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return wording.without_folders(value)
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if isinstance(value, Mapping):
        return {wording.without_folders(str(key)): _without_folders(part) for key, part in value.items()}
    return value


def _provenance_section(mask: Mask, digest: str) -> Section:
    known = mask.provenance.model_dump(mode="json", exclude_none=True)
    inputs = {f"input {number}": entry for number, entry in enumerate(known.pop("inputs", []), 1)}
    content = {"file": Path(mask.path).name, "sha256": digest, **known, **inputs}
    return Section("provenance", "Where the mask comes from", tables=[_settings("Provenance", content)])
