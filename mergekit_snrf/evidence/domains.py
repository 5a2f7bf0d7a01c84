"""The neurons of every domain off on the items of every domain (MMNeuron), module by module, beside random neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import cycle
from operator import or_
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import SnrfError, printable
from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.ablate import CLAIM, RANDOM, REFERENCE, ablation_rows
from mergekit_snrf.evidence.drawing import COLORS, Drawing, new_figure, styled
from mergekit_snrf.evidence.evaluation import Evaluation, evaluate
from mergekit_snrf.evidence.intervals import scale_of, spoken
from mergekit_snrf.evidence.items import Scores
from mergekit_snrf.evidence.results import DomainAblation, DomainStudy, Study
from mergekit_snrf.evidence.study import Setup, run_study
from mergekit_snrf.evidence.wording import Table, scale
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.profiling.result.domains import Chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

ALL = "all"
"""The modules together."""

PLACES = {"decoder": "the text decoder", "vision": "the vision tower", "projector": "the projector", ALL: "all modules"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LONGEST_NAME = 14


def domain_sets(chosen: Sequence[Chosen]) -> dict[str, dict[str, NeuronSet]]:
    """Return the neurons of every domain by module, and those of all modules where there are several."""
    found = {one.module: one.sets for one in chosen}
    if len(chosen) > 1:
        found[ALL] = {name: reduce(or_, [one.sets[name] for one in chosen]) for name in chosen[0].sets}
    return found


def ablate_domains(
    setup: Setup,
    sets: Mapping[str, Mapping[str, NeuronSet]],
    model: PreTrainedModel,
    processor: Any,
    evaluation: Evaluation,
    *,
    draws: int = 3,
    progress: bool = False,
) -> DomainAblation:
    """Evaluate a loaded model without the neurons of each domain and module, and without as many random ones.

    Random neurons have the same counts at every layer and module. A domain without neurons in a module is left out.

    Raises:
        SnrfError: no domain has neurons, they are not the model's, or the evaluation fails.
    """
    plans = [
        (domain, module, neurons)
        for module, of_domains in sets.items()
        for domain, neurons in of_domains.items()
        if neurons.count()
    ]
    if not plans:
        raise SnrfError(None, "no domain has neurons of its own", "choose a larger share", field="top")
    known: dict[str, list[Scores]] = {REFERENCE: [evaluate(evaluation, model, processor)]}
    studies = []
    for domain, module, neurons in plans:
        called = f"neurons of {domain} in {PLACES[module]}"
        rows = ablation_rows(neurons, draws=draws, seed=setup.seed, called=called, paired=True)
        one = replace(setup, settings={**setup.settings, "domain": domain, "module": module})
        study = run_study(one, rows, model, processor, evaluation, progress=progress, known=known)
        studies.append(DomainStudy(domain=domain, module=module, study=study))
    domains = list(next(iter(sets.values())))
    verdict = [sentence for one in studies for sentence in _verdict(one)]
    return DomainAblation(domains=domains, studies=studies, verdict=verdict, settings=dict(setup.settings))


def _verdict(one: DomainStudy) -> Iterator[str]:
    """Say how a domain's own metric and the others change without its neurons."""
    study = one.study
    if one.domain not in study.items:
        return
    measured = {condition.name: condition.metrics for condition in study.conditions}
    factor, unit = scale_of(one.domain, measured)
    claim, random = (_change(study, name, one.domain) for name in (CLAIM, RANDOM))
    contrast = next(each.difference for each in study.contrasts if each.metric == one.domain)
    others = [abs(_change(study, CLAIM, metric).estimate) for metric in study.items if metric != one.domain]
    most = f"; others change by at most {factor * max(others):.1f}" if others else ""
    count = next(each.neurons for each in study.conditions if each.name == CLAIM)
    yield (
        f"Without the {count} neuron{'s' if count > 1 else ''} of {one.domain} in {PLACES[one.module]}, {one.domain} "
        f"changes by {spoken(claim, factor, '+')}{unit}, without as many random ones by "
        f"{spoken(random, factor, '+')} (difference {spoken(contrast, factor, '+')}){most}."
    )


def _change(study: Study, condition: str, metric: str) -> Any:
    return next(one for one in study.conditions if one.name == condition).metrics[metric].change


def matrix_tables(result: DomainAblation) -> list[Table]:
    """Return a table for each module: how every metric changes without a domain's neurons, and without random ones."""
    tables = []
    for module in dict.fromkeys(one.module for one in result.studies):
        studies = [one for one in result.studies if one.module == module]
        metrics = list(studies[0].study.items)
        scales = {metric: wording.scale(studies[0].study, metric) for metric in metrics}
        rows: list[tuple[object, ...]] = []
        for one in studies:
            for condition in one.study.conditions[1:]:
                name = one.domain if condition.name == CLAIM else f"as many random, {condition.draws} draws"
                changes = [spoken(_change(one.study, condition.name, m), scales[m][0], "+") for m in metrics]
                rows.append((name, condition.neurons, *changes))
        header = ("without the neurons of", "neurons", *(f"{metric}{scales[metric][1]}" for metric in metrics))
        tables.append(Table(f"Changes, {PLACES[module]}", header, rows))
    return tables


def changes(result: DomainAblation, module: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return the changes of a module as figures show them, by domain, condition and metric."""
    return {
        one.domain: {
            name: {
                metric: wording.scale(one.study, metric)[0] * _change(one.study, name, metric).estimate
                for metric in one.study.items
            }
            for name in (CLAIM, RANDOM)
        }
        for one in result.studies
        if one.module == module
    }


def counts_drawing(chosen: Sequence[Chosen]) -> Drawing:
    """Draw how many neurons of every layer are specific to each domain, a panel for each module."""
    sums = []
    for one in chosen:
        counts = zip(one.sets, one.counts.sum(1).tolist(), strict=True)
        sums.append(f"{PLACES[one.module]}: {', '.join(f'{name} {count}' for name, count in counts)}")
    text = printable(f"Lines of domain-specific neurons by layer. Over all layers, {'; '.join(sums)}.")
    return Drawing(_counts(chosen), "Domain-specific neurons by layer", text)


@styled
def _counts(chosen: Sequence[Chosen]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, panels = new_figure(0.5 + 1.6 * len(chosen), rows=len(chosen))
    for panel, one in zip(panels, chosen, strict=True):
        styles = zip(cycle(COLORS), cycle(_MARKERS), strict=False)
        for name, counts, (color, marker) in zip(one.sets, one.counts.tolist(), styles, strict=False):
            panel.plot(counts, color=color, marker=marker, markersize=4, linewidth=1.2, label=printable(name))
        panel.set_title(f"specific in {PLACES[one.module]}")
        panel.set(ylabel="neurons", ylim=(0, None), xlim=(-0.4, len(one.layers) - 0.6))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def matrix_drawing(result: DomainAblation) -> Drawing:
    """Draw the change of every metric without the neurons of each domain, and without as many random ones."""
    parts = []
    for module in dict.fromkeys(one.module for one in result.studies):
        for domain, by_condition in changes(result, module).items():
            cells = ", ".join(f"{metric} {value:+.1f}" for metric, value in by_condition[CLAIM].items())
            parts.append(f"without {domain} in {PLACES[module]}: {cells}")
    text = printable(
        f"Heat maps of changes without the neurons of a domain, beside random neurons; {'; '.join(parts)}."
    )
    return Drawing(_matrix(result), "Every domain's neurons off, on the items of every domain", text)


@styled
def _matrix(result: DomainAblation) -> Figure:
    modules = list(dict.fromkeys(one.module for one in result.studies))
    found = {module: changes(result, module) for module in modules}
    shown = [one for domains in found.values() for both in domains.values() for one in both.values()]
    widest = max(abs(value) for one in shown for value in one.values())
    height = 0.9 + sum(0.75 + 0.22 * len(domains) for domains in found.values())
    figure, panels = new_figure(height, columns=2, rows=len(modules))
    mesh = None
    for row, module in enumerate(modules):
        names = list(found[module])
        for panel, condition in zip(panels[2 * row : 2 * row + 2], (CLAIM, RANDOM), strict=True):
            metrics = list(found[module][names[0]][condition])
            grid = [[found[module][name][condition][metric] for metric in metrics] for name in names]
            mesh = panel.pcolormesh(grid, cmap="RdBu", vmin=-(widest or 1), vmax=widest or 1, edgecolors="none")
            for y, values in enumerate(grid):
                for x, value in enumerate(values):
                    color = "white" if abs(value) > 0.6 * widest else "black"
                    panel.text(
                        x + 0.5,
                        y + 0.5,
                        f"{round(value) + 0.0:+.0f}",
                        color=color,
                        ha="center",
                        va="center",
                        fontsize=8,
                    )
            panel.invert_yaxis()
            panel.set_title("as many random neurons" if condition == RANDOM else f"in {PLACES[module]}")
            panel.set_xticks(
                [x + 0.5 for x in range(len(metrics))], [_short(metric) for metric in metrics], rotation=30
            )
            panel.set_yticks([y + 0.5 for y in range(len(names))], [_short(name) for name in names])
            panel.tick_params(length=0, labelsize=8, labelleft=condition == CLAIM)
            panel.spines[["left", "bottom"]].set_visible(False)
        panels[2 * row].set_ylabel("without neurons of")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=panels, location="bottom", aspect=40, shrink=0.8, fraction=0.25 / height)
    points = all(scale(one.study, metric)[0] == 100 for one in result.studies for metric in one.study.items)
    bar.set_label(f"change{' in points' if points else ''} on the items of each column")
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")
    return figure


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
