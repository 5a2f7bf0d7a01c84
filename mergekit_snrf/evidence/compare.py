"""The rows of a comparison (Tables 1 and 2): the target, its merge, and what is simpler or more random.

A control differs from the recipe in one thing: its neurons, its update, or its source. Everything else, including the
strength of every tensor, is as in the recipe. Only the linear merge, a rival, moves all neurons at one strength.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergekit_snrf.evidence.controls import Merge, dare, linear, rescaled
from mergekit_snrf.evidence.study import Row
from mergekit_snrf.evidence.verdict import Words
from mergekit_snrf.models.weights import Weights
from mergekit_snrf.neurons.sets import NeuronSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = ("random", "equal-norm", "least", "linear", "dare", "base")
TARGET, CLAIM = "target", "SNRF"
_NONE = Words()


@dataclass(frozen=True)
class Controls:
    """Which controls a comparison has.

    Attributes:
        rows: of ``ROWS``.
        draws: sets of random neurons, or of DARE's masks, drawn with ``seed``, ``seed + 1``, ...
        seed: of the first draw.
        least: the least important neurons; None leaves that row out.
        base: weights of the model that target and source were trained from; None leaves that row out.
        linear_betas: strengths of the linear merge, rising.
        drop_rate: of DARE.
    """

    rows: Collection[str] = ROWS
    draws: int = 3
    seed: int = 0
    least: NeuronSet | None = None
    base: Weights | None = None
    linear_betas: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0)
    drop_rate: float = 0.5


def comparison_rows(merge: Merge, model: PreTrainedModel, controls: Controls) -> list[Row]:
    """Return the target, the claim and its controls; norms are computed from the loaded target, which stays as it is.

    Raises:
        SnrfError: a value is out of range, or a weight is not finite.
    """
    seeds = [(controls.seed + draw) % 2**32 for draw in range(controls.draws)]
    of_seeds: dict[str, Any] = {"seeds": seeds}
    random = [replace(merge, neurons=merge.neurons.random(one)) for one in seeds]
    rows = [Row(TARGET, "reference"), replace(_row(CLAIM, [merge], settings=_span(merge)), role="claim")]
    if "random" in controls.rows:
        words = Words("the same update on random neurons of the same counts", "the choice of neurons")
        rows.append(_row("random neurons", random, words, of_seeds))
    if "equal-norm" in controls.rows:
        norms = {site: norm * merge.fusions[site].beta for site, norm in merge.norms(model).items()}
        scaled = [rescaled(one, model, norms) for one in random]
        words = Words(
            "the same update on random neurons, rescaled to equal norm", "the choice of neurons at equal norm"
        )
        rows.append(_row("random neurons, equal norm", scaled, words, settings={**of_seeds, **_strengths(scaled)}))
    if "least" in controls.rows and controls.least is not None:
        words = Words("the same update on as many of the least important neurons", "the choice of important neurons")
        rows.append(_row("least important neurons", [replace(merge, neurons=controls.least)], words))
    if "linear" in controls.rows:
        for beta in controls.linear_betas:
            settings = {"beta": beta, "rank": 0}
            row = _row(f"linear, beta {beta:g}", [linear(merge, beta)], settings=settings)
            rows.append(replace(row, beta=beta))
    if "dare" in controls.rows:
        name = f"DARE, drop rate {controls.drop_rate:g}"
        dropped = [dare(merge, controls.drop_rate, one) for one in seeds]
        words = Words(
            f"DARE with drop rate {controls.drop_rate:g} on the masked neurons",
            "the recipe's update in place of DARE's",
        )
        settings = {**of_seeds, "drop_rate": controls.drop_rate, "rescale": True}
        rows.append(_row(name, dropped, words, settings))
    if "base" in controls.rows and controls.base is not None:
        words = Words("the common base as source on the same neurons", "what the source learnt beyond the base")
        rows.append(_row("base as source", [replace(merge, source=controls.base, source_base=None)], words))
    return rows


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
