"""The sections of a report: sentences, figures and tables of one result each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.overlap import by_projection, total
from mergekit_snrf.evidence.results import Amplification, Overlap, SiteOverlap, Study
from mergekit_snrf.evidence.tables import Table, settings_table, study_table
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLOUDS = 12
_TOKENS = 10
_COUNT_COLUMNS = ("shared", "first only", "second only", *wording.COUNT_COLUMNS)


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


class Drawer:
    """Turns figures into drawings whose ids differ."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, figure: Figure, caption: str, text: str) -> Drawing:
        """Return a figure with a caption and an alternative text."""
        from markupsafe import Markup

        from mergekit_snrf.evidence.figures import svg

        self._count += 1
        # The SVG is built by an XML writer, which escapes every text in it.
        return Drawing(Markup(svg(figure, caption, text, f"f{self._count}", "currentColor")), caption)


def mask_section(mask: Mask, draw: Drawer) -> Section:
    """Show where the neurons of a mask are."""
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


def overlap_section(title: str, overlap: Overlap, draw: Drawer) -> Section:
    """Show an overlap: circles, curve, map and counts."""
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
    sites = sorted(overlap.sites, key=site_order)
    by_layer = [(f"{site.layer} {site.projection}", *wording.count_cells(site)) for site in sites]
    section.tables.append(Table("By layer and projection", ("layer", *_COUNT_COLUMNS), by_layer, folded=True))
    return section


def site_order(site: SiteOverlap) -> tuple[int, int]:
    """Return the key that orders sites by layer, then as ``PROJECTIONS``."""
    return site.layer, list(PROJECTIONS).index(site.projection)


def study_section(study: Study, digest: str, draw: Drawer) -> Section:
    """Show a study: its verdict, its trade-offs, a figure and a table per metric, and how to repeat it."""
    from mergekit_snrf.evidence.curves import tradeoff, tradeoff_text, tradeoffs
    from mergekit_snrf.evidence.figures import study_intervals

    titles = {"ablation": "Do these neurons matter?", "comparison": "Does the merge beat simpler baselines?"}
    title = f"{titles[study.kind]} ({wording.without_folders(study.model)})"
    section = Section(study.kind, title, sentences=list(study.verdict))
    if study.mask_sha256 not in (None, digest):
        section.warnings.append(
            f"Measured with another mask (sha256 {study.mask_sha256}): this says nothing about the mask of this report."
        )
    for gain, keep in tradeoffs(study):
        caption = f"{gain} against {keep}, {100 * study.level:g} % intervals of the changes to the target"
        section.drawings.append(draw(tradeoff(study, gain, keep), caption, tradeoff_text(study, gain, keep)))
    for metric in dict.fromkeys(metric for condition in study.conditions for metric in condition.metrics):
        unit = wording.scale(study, metric)[1]
        text = wording.study_text(study, metric)
        section.drawings.append(draw(study_intervals(study, metric), f"{metric}{unit}", text))
        table = study_table(study, metric)
        section.tables.append(replace(table, caption=f"{table.caption}, {100 * study.level:g} % intervals"))
    repeat = {
        "model": study.model,
        "mask": study.mask,
        "mask sha256": study.mask_sha256,
        "evaluation": study.evaluation,
        "seed": study.seed,
        **study.settings,
        **{one.name: wording.rule(one.settings) for one in study.conditions if one.settings},
    }
    section.tables.append(settings_table("To repeat it", repeat))
    return section


def amplification_section(amplification: Amplification, draw: Drawer) -> Section:
    """Show amplified neurons: word clouds and leading tokens."""
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
    section.tables.append(settings_table("To repeat it", repeat))
    return section


def provenance_section(mask: Mask, digest: str) -> Section:
    """Show the provenance of a mask."""
    known = mask.provenance.model_dump(mode="json", exclude_none=True)
    inputs = {f"input {number}": entry for number, entry in enumerate(known.pop("inputs", []), 1)}
    content = {"file": Path(mask.path).name, "sha256": digest, **known, **inputs}
    return Section("provenance", "Where the mask comes from", tables=[settings_table("Provenance", content)])
