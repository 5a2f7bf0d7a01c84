"""The rows of a comparison (Tables 1 and 2): the target, its merge, and what is simpler or more random.

A control differs from the recipe in one thing: its neurons, its update, or its source. Everything else, including the
strength of every tensor, is as in the recipe. Only the linear merge and RegMean, the rivals, move all neurons at one
strength, which is swept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergekit_snrf.evidence.controls import Merge, dare, frank, is_regmean, linear, regmean, rescaled
from mergekit_snrf.evidence.options import ComparisonOptions
from mergekit_snrf.evidence.study import Row
from mergekit_snrf.evidence.sweep import BASE, LINEAR, REGMEAN, Curve
from mergekit_snrf.evidence.verdict import Words
from mergekit_snrf.models.moments import Moments
from mergekit_snrf.models.weights import Weights
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import every_neuron

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGET, CLAIM = "target", "SNRF"
_NONE = Words()


@dataclass(frozen=True)
class Controls:
    """Which controls a comparison has; ``least`` and ``base`` of None, and no moments, leave their rows out.

    Random neurons, or DARE's masks, are drawn with the seed of ``how``, that and one, ... ``moments`` None: those of
    the recipe. ``frank`` is lambda_R of FRANK by layer, ``rivals`` the merges of other recipes of the same target.
    """

    how: ComparisonOptions
    least: NeuronSet | None = None
    base: Weights | None = None
    moments: Moments | None = None
    rivals: Mapping[str, Merge] = field(default_factory=dict)
    frank: Sequence[float] | None = None


def comparison_rows(merge: Merge, model: PreTrainedModel, controls: Controls) -> list[Row]:
    """Return the target, the claim and its controls; norms are computed from the loaded target, which stays."""
    how = controls.how
    seeds = [(how.seed + draw) % 2**32 for draw in range(how.draws)]
    rows = [Row(TARGET, "reference"), _claim(merge)]
    if merge.neurons != every_neuron(merge.shape):
        rows += _other_neurons(merge, model, controls, seeds)
    if "linear" in how.rows:
        about = "the recipe's update" if is_regmean(merge) else LINEAR.about
        curve = replace(LINEAR, about=about)
        rows += [_point(curve, beta, linear(merge, beta), {"rank": 0}) for beta in how.linear_betas]
    if "regmean" in how.rows:
        rows += _regmean_sweeps(merge, controls)
    if "dare" in how.rows:
        name = f"DARE, drop rate {how.drop_rate:g}"
        dropped = [dare(merge, how.drop_rate, one) for one in seeds]
        words = Words(
            f"DARE with drop rate {how.drop_rate:g} on the {_neurons(merge)}",
            # DARE at RegMean's strength is at another point of the trade-off.
            "" if is_regmean(merge) else "the recipe's update in place of DARE's",
        )
        settings = {"seeds": seeds, "drop_rate": how.drop_rate, "rescale": True}
        rows.append(_row(name, dropped, words, settings))
    if "frank" in how.rows and controls.frank is not None:
        rows += _franks(merge, controls.frank)
    if "base" in how.rows and controls.base is not None and not any(row.curve is BASE for row in rows):
        words = Words("the common base as source on the same neurons", "what the source learnt beyond the base")
        rows.append(_row("base as source", [replace(merge, source=controls.base, source_base=None)], words))
    for name, rival in controls.rivals.items():
        rows.append(_row(name, [rival], Words(f"the {name}"), _span(rival)))
    return rows


def _claim(merge: Merge) -> Row:
    """Return the row of the recipe; a RegMean of one strength is a point of RegMean's curve."""
    row = replace(_row(CLAIM, [merge], settings=_span(merge)), role="claim")
    if not is_regmean(merge):
        return row
    keeps = {fusion.keep for fusion in merge.fusions.values()}
    if len(keeps) > 1:
        return replace(row, name=REGMEAN.name, settings={**row.settings, "keep": [min(keeps), max(keeps)]})
    (keep,) = keeps
    settings = {**row.settings, "keep": keep}
    return replace(row, name=_named(REGMEAN, keep), curve=REGMEAN, strength=keep, settings=settings)


def _other_neurons(merge: Merge, model: PreTrainedModel, controls: Controls, seeds: Sequence[int]) -> list[Row]:
    """Return the rows that differ from the recipe in their neurons."""
    rows = []
    of_seeds: dict[str, Any] = {"seeds": list(seeds)}
    random = [replace(merge, neurons=merge.neurons.random(one)) for one in seeds]
    if "random" in controls.how.rows:
        words = Words("the same update on random neurons of the same counts", "the choice of neurons")
        rows.append(_row("random neurons", random, words, of_seeds))
    if "equal-norm" in controls.how.rows:
        norms = {site: norm * merge.fusions[site].beta for site, norm in merge.norms(model).items()}
        scaled = [rescaled(one, model, norms) for one in random]
        words = Words(
            "the same update on random neurons, rescaled to equal norm", "the choice of neurons at equal norm"
        )
        rows.append(_row("random neurons, equal norm", scaled, words, settings={**of_seeds, **_strengths(scaled)}))
    if "least" in controls.how.rows and controls.least is not None:
        words = Words("the same update on as many of the least important neurons", "the choice of important neurons")
        rows.append(_row("least important neurons", [replace(merge, neurons=controls.least)], words))
    return rows


def _franks(merge: Merge, strengths: Sequence[float]) -> list[Row]:
    """Return FRANK on the recipe's neurons, and on all if those are not all."""
    about = "" if is_regmean(merge) else "the recipe's update in place of FRANK's"
    rows, settings = [], {"beta": list(strengths), "rank": 0}
    if merge.neurons != every_neuron(merge.shape):
        words = Words(f"FRANK on the {_neurons(merge)}", about)
        rows.append(_row("FRANK", [frank(merge, strengths, everywhere=False)], words, settings))
    words = Words("FRANK on all neurons", "" if rows else about)
    return [*rows, _row("FRANK, all neurons", [frank(merge, strengths, everywhere=True)], words, settings)]


def _regmean_sweeps(merge: Merge, controls: Controls) -> list[Row]:
    """Return RegMean over falling strengths of keep, and, where a base is given, RegMean from the base."""
    moments = controls.moments or merge.moments
    if moments is None:
        return []
    keeps = sorted(controls.how.keeps, reverse=True)
    claimed = _claim(merge).strength
    rows = [_point(REGMEAN, keep, regmean(merge, keep, moments)) for keep in keeps if keep != claimed]
    if "base" not in controls.how.rows or controls.base is None:
        return rows
    source = replace(merge, source=controls.base, source_base=None)
    both = keeps if claimed is None else sorted({*keeps, claimed}, reverse=True)
    return rows + [_point(BASE, keep, regmean(source, keep, moments)) for keep in both]


def _point(curve: Curve, strength: float, merge: Merge, settings: Mapping[str, Any] | None = None) -> Row:
    row = _row(_named(curve, strength), [merge], settings={curve.key: strength, **(settings or {})})
    return replace(row, curve=curve, strength=strength)


def _named(curve: Curve, strength: float) -> str:
    return f"{curve.name}, {curve.key} {strength:g}"


def _neurons(merge: Merge) -> str:
    return "neurons of the recipe" if is_regmean(merge) else "masked neurons"


def _row(name: str, merges: Sequence[Merge], words: Words = _NONE, settings: Mapping[str, Any] | None = None) -> Row:
    return Row(name, "control", tuple(merges), merges[0].neurons.count(), words, settings=settings or {})


def _span(merge: Merge) -> dict[str, Any]:
    """Return the lowest and highest beta and rank of a merge, and what its tensors have in common."""
    fusions = list(merge.fusions.values())
    if not fusions:
        return {}
    betas, ranks = [fusion.beta for fusion in fusions], [fusion.rank for fusion in fusions]
    return {
        "beta": [min(betas), max(betas)],
        "rank": [min(ranks), max(ranks)],
        "update": sorted({fusion.update for fusion in fusions}),
        "order": sorted({fusion.order for fusion in fusions}),
    }


def _strengths(merges: Sequence[Merge]) -> dict[str, Any]:
    betas = [beta for merge in merges for beta in (merge.betas or {}).values()]
    return {
        "beta": [min(betas, default=0.0), max(betas, default=0.0)],
        "sites_above_beta_1": sum(beta > 1 for beta in betas),
        "sites_without_update": sum(beta == 0 for beta in betas),
    }
