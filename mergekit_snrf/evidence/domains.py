"""The neurons of every domain off on the items of every domain (MMNeuron), module by module, beside random neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.ablate import CLAIM, RANDOM, REFERENCE, ablation_rows
from mergekit_snrf.evidence.evaluation import Evaluation, evaluate
from mergekit_snrf.evidence.intervals import scale_of, spoken
from mergekit_snrf.evidence.items import Scores
from mergekit_snrf.evidence.results import DomainAblation, DomainStudy, Study
from mergekit_snrf.evidence.study import Setup, run_study
from mergekit_snrf.evidence.tables import Table
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.profiling.result.domains import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = "all"
"""The modules together."""

PLACES = {"decoder": "the text decoder", "vision": "the vision tower", "projector": "the projector", ALL: "all modules"}


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
