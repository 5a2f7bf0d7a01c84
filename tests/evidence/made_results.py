"""Results and profiles made by hand for the tests of overlap, figures and report."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergekit_snrf.evidence.results import (
    Amplification,
    AmplifiedNeuron,
    Condition,
    Contrast,
    Interval,
    Lens,
    LensAnswer,
    LensKind,
    Measured,
    Study,
    TokenOdds,
)
from mergekit_snrf.evidence.study_results import TunedPoint, Tuning
from mergekit_snrf.neurons.maskfile import ModelProvenance
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.result.profilefile import EDGES, Profile, ProfileProvenance, SiteProfile, edge_ranks


def around(estimate: float, half: float = 0.03) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def ablation(sha256: str | None = None) -> Study:
    def row(name: str, role: str, reasoning: float, draws: int = 1) -> Condition:
        reference = role == "reference"
        change = None if reference else around(reasoning - 0.31)
        metrics = {
            "reasoning": Measured(mean=around(reasoning), change=change, malformed=0.015),
            "perception": Measured(mean=around(0.97, 0.01), change=None if reference else around(0.0, 0.01)),
        }
        neurons = 0 if reference else 255
        return Condition(name=name, role=role, draws=draws, neurons=neurons, metrics=metrics)  # type: ignore[arg-type]

    return Study(
        kind="ablation",
        model="target",
        mask="/somewhere/mask.safetensors",
        mask_sha256=sha256,
        evaluation="examples/board/evaluation.py:board",
        items={"reasoning": 400, "perception": 800},
        conditions=[
            row("target", "reference", 0.31),
            row("shared neurons off", "claim", 0.042),
            row("random neurons off", "control", 0.228, draws=5),
            row("least important neurons off", "control", 0.305),
        ],
        contrasts=[
            Contrast(
                left="shared neurons off",
                right="random neurons off",
                metric="reasoning",
                difference=Interval(estimate=-0.186, low=-0.231, high=-0.14),
            )
        ],
        verdict=["Without the shared neurons, reasoning falls by 0.186 [0.140, 0.231] more than without random ones."],
        settings={"resamples": 2000},
    )


def comparison(sha256: str | None = None) -> Study:
    values = {
        "the same update on random neurons of the same counts": 0.46,
        "least important neurons": 0.33,
        "linear, beta 0.1": 0.401,
        "linear, beta 0.5": 0.52,
        "DARE on the shared neurons": 0.47,
        "update of equal norm": 0.476,
    }

    def row(name: str, role: str, value: float) -> Condition:
        measured = Measured(mean=around(value), change=around(value - 0.31))
        edit: dict[str, Any] = {"neurons": 255, "settings": {"beta": 1.0, "rank": 16}}
        return Condition(name=name, role=role, metrics={"reasoning": measured}, **edit)  # type: ignore[arg-type]

    target = Condition(name="target alone", role="reference", metrics={"reasoning": Measured(mean=around(0.31))})
    controls = [row(name, "control", value) for name, value in values.items()]
    conditions = [target, row("SNRF", "claim", 0.493), *controls]
    return Study(
        kind="comparison",
        model="target",
        mask_sha256=sha256,
        evaluation="examples/board/evaluation.py:board",
        items={"reasoning": 400},
        conditions=conditions,
        verdict=["SNRF gains 0.183 [0.153, 0.213] over the target; the intervals do not tell it from random neurons."],
    )


def amplification() -> Amplification:
    tokens = [(" sum", 41, 2), ("plus", 30, 4), ("=", 210, 80), ("12", 22, 6), ("total", 9, 1), ("equals", 12, 3)]
    tokens += [("数学", 5, 0), ("\n", 40, 21), ("<script>alert(1)</script>", 3, 0), ("$x_1$", 4, 1), ("&amp;", 2, 0)]
    odds = [
        TokenOdds(token=token, log_odds=round(3.1 - 0.25 * rank, 3), amplified=amplified, plain=plain)
        for rank, (token, amplified, plain) in enumerate(tokens)
    ]
    falling = TokenOdds(token="therefore", log_odds=-0.8, amplified=3, plain=9)
    return Amplification(
        model="target",
        factor=10,
        probes="examples/board/profile.yml",
        count=64,
        seed=0,
        classifier="the package's word list",
        neurons=[
            AmplifiedNeuron(
                neuron="fwd.up.L2.N17", tokens=odds, totals=(1011, 987), math_share=0.7, ended=(60, 64), changed=41
            ),
            AmplifiedNeuron(neuron="attn.k.L0.N5", tokens=odds[:3], totals=(998, 987), math_share=0.3),
            AmplifiedNeuron(neuron="fwd.up.L3.N200", tokens=[falling], totals=(990, 987)),
        ],
        math_neuron_ratio=2 / 3,
        plain_math_share=0.31,
    )


SIZES = {"attn.q": 48, "attn.k": 16, "attn.v": 16, "fwd.up": 96}


def lens() -> Lens:
    kind: dict[str, Any] = {"entropy": [3.0, 2.5, 0.4], "kl": [2.0, 1.0, 0.0], "agrees": [0.1, 0.5, 1.0]}
    kinds = [LensKind(kind=name, tokens=40, top=[[("<b>", 30), ("x", 10)]] * 3, **kind) for name in ("image", "answer")]
    answer = LensAnswer(rank=[90.0, 4.0, 1.0], probability=[0.01, 0.4, 0.9], hits=[0.0, 0.5, 1.0])
    shared: dict[str, Any] = {"model": "target", "probes": "probes.jsonl", "count": 8}
    return Lens(layers=2, kinds=kinds, answer=answer, image_attention=[0.4, 0.2], **shared)


def measured_ranks(seed: int, common: int = 7, layers: int = 3, probes: int = 6) -> dict[Site, np.ndarray]:
    """Ranks [probes, neurons] of a model part of whose impacts is common to all that are made with ``common``."""
    result = {}
    for layer in range(layers):
        for place, (projection, neurons) in enumerate(SIZES.items()):
            shared = np.random.default_rng([common, layer, place]).normal(size=neurons)
            own = np.random.default_rng([seed, layer, place]).normal(size=(probes, neurons))
            impacts = 2 * shared + own
            result[Site(layer, projection)] = (-impacts).argsort(1).argsort(1) + 1
        result[Site(layer, "fwd.down")] = result[Site(layer, "fwd.up")]
    return result


def profile_of(ranks: dict[Site, np.ndarray], model: str = "target", **provenance: Any) -> Profile:
    """Return the profile that has these ranks, with 1 / rank as the impacts."""
    sites = {}
    for site, table in ranks.items():
        impacts = torch.from_numpy(1 / table).float()
        bounds = torch.tensor(edge_ranks(EDGES, table.shape[1]))
        bins = torch.nn.functional.one_hot(torch.searchsorted(bounds, torch.from_numpy(table)), len(EDGES))
        sites[site] = SiteProfile(
            impacts.amin(0),
            (torch.from_numpy(table.max(0)) / table.shape[1]).float(),
            impacts.mean(0),
            bins.sum(0).to(torch.int32),
        )
    known = ProfileProvenance(model=ModelProvenance(path=model), **provenance)
    return Profile(sites, len(next(iter(ranks.values()))), known, path=model)


def tuning(scores: bool) -> Tuning:
    """Return a choice of keep 3, with or without the scores of an evaluation."""
    points = [
        TunedPoint(
            keep=keep,
            kl=0.03 / keep,
            changed=0.1,
            kinds={"read": (0.01 / keep, 0.1), "color": (0.05 / keep, 0.1)},
            scores={"R": 0.9 - 0.01 * keep, "P": 0.9} if scores else {},
        )
        for keep in (0.05, 0.5, 2.9, 3.0, 3.1, 300.0)
    ]
    target = {"R": 0.3, "P": 0.95} if scores else {}
    return Tuning(keep=3.0, max_kl=0.01, points=tuple(points), probes={"read": 100, "color": 99}, target=target)
