"""The sections of a report: sentences, figures and tables of one result each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.drawing import Drawing
from mergekit_snrf.evidence.overlap import total
from mergekit_snrf.evidence.results import Amplification, DomainAblation, Lens, Overlap, Study, Tuning
from mergekit_snrf.evidence.wording import (
    Table,
    layers_table,
    projections_table,
    settings_table,
    study_table,
    tuning_table,
)
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

_DRAWN = 12
_TOKENS = 10
_TITLES = {"ablation": "Do these neurons matter?", "comparison": "Does the merge beat simpler baselines?"}
_LEADING = "leading tokens: log-odds (amplified:plain)"


@dataclass
class Section:
    """A part of the report: warnings, sentences, drawings and tables under a title."""

    name: str
    title: str
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def mask_section(mask: Mask) -> Section:
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
    text = wording.mask_map_text(neurons)
    section.drawings.append(Drawing(mask_map(neurons), "Neurons by layer and projection", text))
    rows = [(name, n, of, wording.percent(n / of)) for name, (n, of) in counts.items()]
    section.tables.append(Table("By projection", ("projection", "neurons", "of", "share"), rows))
    layers = sorted({site.layer for site in neurons})
    by_layer = [(layer, *(neurons.count(Site(layer, name)) for name in PROJECTIONS)) for layer in layers]
    section.tables.append(Table("By layer", ("layer", *PROJECTIONS), by_layer, folded=True))
    return section


def overlap_drawings(overlap: Overlap) -> dict[str, Drawing]:
    """Return the figures of an overlap by the names of their files: circles, curve and map."""
    from mergekit_snrf.evidence import figures

    circles, heat = "Shared and model-only neurons, in true area", "Overlap by layer and projection"
    drawings = {"overlap": Drawing(figures.overlap_diagram(overlap), circles, wording.overlap_text(overlap))}
    if overlap.curve:
        text = wording.curve_text(overlap)
        drawings["curve"] = Drawing(figures.overlap_curve(overlap), "Overlap by top ratio", text)
    return {**drawings, "layers": Drawing(figures.overlap_map(overlap), heat, wording.overlap_map_text(overlap))}


def overlap_section(title: str, overlap: Overlap) -> Section:
    """Show an overlap: circles, curve, map and counts."""
    first, second = overlap.names
    by_projection = projections_table(overlap, f"By projection; A is {first}, B is {second}")
    return Section(
        "overlap",
        title,
        [f"By {wording.rule(overlap.rule)}: {wording.chance_sentence(total(overlap.sites))}"],
        drawings=list(overlap_drawings(overlap).values()),
        tables=[by_projection, layers_table(overlap)],
    )


def metric_drawings(study: Study) -> dict[str, Drawing]:
    """Return the intervals of every metric of a study, by the name of a file."""
    from mergekit_snrf.evidence.figures import study_intervals

    drawings = {}
    for metric in _metrics(study):
        caption = f"{metric}{wording.scale(study, metric)[1]}"
        drawing = Drawing(study_intervals(study, metric), caption, wording.study_text(study, metric))
        drawings[re.sub(r"\W+", "-", metric)] = drawing
    return drawings


def _metrics(study: Study) -> list[str]:
    return list(dict.fromkeys(metric for condition in study.conditions for metric in condition.metrics))


def study_section(study: Study, digest: str, neurons: NeuronSet) -> Section:
    """Show a study: its verdict, its trade-offs, a figure and a table per metric, and how to repeat it."""
    from mergekit_snrf.evidence.curves import tradeoff_drawings

    title = f"{_TITLES[study.kind]} ({wording.without_folders(study.model)})"
    section = Section(study.kind, title, [*study.verdict, *study.notes])
    if study.neurons_sha256 not in (None, neurons.sha256()):
        file = f" (sha256 {study.mask_sha256})" if study.mask_sha256 else ""
        section.warnings.append(
            f"Measured with the neurons of another mask{file}: this says nothing about the mask of this report."
        )
    elif study.neurons_sha256 is None and study.mask_sha256 not in (None, digest):
        section.warnings.append(
            f"Measured with another mask file (sha256 {study.mask_sha256}), without a digest of its neurons: "
            f"they may not be those of this report."
        )
    section.drawings += [*tradeoff_drawings(study).values(), *metric_drawings(study).values()]
    for metric in _metrics(study):
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


def domains_section(result: DomainAblation) -> Section:
    """Show the ablation of every domain's neurons: a heat map, a table for each module, and how to repeat it."""
    from mergekit_snrf.evidence.domains import matrix_drawing, matrix_tables

    study = result.studies[0].study
    title = f"Each domain's neurons off ({wording.without_folders(study.model)})"
    tables = [replace(table, caption=f"{table.caption}, 95 % intervals") for table in matrix_tables(result)]
    repeat = {"model": study.model, "evaluation": study.evaluation, "seed": study.seed, **result.settings}
    drawings = [matrix_drawing(result)]
    return Section(
        "domains", title, list(result.verdict), [], drawings, [*tables, settings_table("To repeat it", repeat)]
    )


def tuning_section(tuning: Tuning) -> Section:
    """Show how the strength of RegMean was chosen."""
    from mergekit_snrf.evidence.curves import tuning_drawing

    section = Section("tuning", "How strongly does RegMean keep?", wording.tuning_sentences(tuning))
    section.drawings.append(tuning_drawing(tuning))
    section.tables += [tuning_table(tuning), settings_table("To repeat it", tuning.settings)]
    return section


def amplification_section(amplification: Amplification) -> Section:
    """Show amplified neurons: bars and leading tokens."""
    from mergekit_snrf.evidence.figures import token_bars

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
    leading = [neuron for neuron in amplification.neurons if wording.leading(neuron, 1)]
    section.drawings += [
        Drawing(token_bars(neuron), neuron.neuron, wording.token_bars_text(neuron)) for neuron in leading[:_DRAWN]
    ]
    header = ("neuron", _LEADING, "tokens amplified", "tokens plain", "answers changed", "math tokens")
    rows: list[tuple[object, ...]] = []
    for neuron in amplification.neurons:
        tokens = ", ".join(wording.token_text(token) for token in wording.leading(neuron, _TOKENS)) or "-"
        changed = "-" if neuron.changed is None else neuron.changed
        rows.append((neuron.neuron, tokens, *neuron.totals, changed, wording.percent(neuron.math_share)))
    section.tables.append(Table("Leading tokens", header, rows, frozenset({1})))
    repeat = {name: getattr(amplification, name) for name in ("model", "factor", "probes", "seed")}
    section.tables.append(settings_table("To repeat it", {**repeat, **amplification.settings}))
    return section


def lens_section(lens: Lens) -> Section:
    """Show a logit lens: a line for each kind of position, the answer's tokens and the attention to images."""
    from mergekit_snrf.evidence import lens_figures as view

    title = f"What {wording.without_folders(lens.model)} would predict after each layer"
    section = Section("lens", title, view.lens_sentences(lens), drawings=list(view.lens_drawings(lens).values()))
    section.tables += [replace(view.lens_table(lens), folded=True), view.frequent_table(lens)]
    section.tables.append(settings_table("To repeat it", {"model": lens.model, "probes": lens.probes, **lens.settings}))
    return section


def provenance_section(mask: Mask, digest: str) -> Section:
    """Show the provenance of a mask."""
    known = mask.provenance.model_dump(mode="json", exclude_none=True)
    inputs = {f"input {number}": entry for number, entry in enumerate(known.pop("inputs", []), 1)}
    content = {"file": Path(mask.path).name, "sha256": digest, **known, **inputs}
    return Section("provenance", "Where the mask comes from", tables=[settings_table("Provenance", content)])
