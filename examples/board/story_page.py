"""The page of story.py: tables over all pairs, from the JSON files of the commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ABLATED = 0.1
CONTROLS = (
    "random neurons",
    "random neurons, equal norm",
    "least important neurons",
    "linear at equal P",
    "DARE, drop rate 0.5",
    "base as source",
)
Results = Mapping[str, Mapping[str, Any]]
Cell = Callable[[str], str]


def page(results: Results, items: int, draws: int) -> list[str]:
    """Return the page's lines.

    Args:
        results: of every pair, by its name.
        items: problems a task.
        draws: of random neurons and of DARE.
    """
    seeds = {pair.partition("+")[0] for pair in results}
    return [
        f"{len(results)} pairs of {len(seeds)} base seeds, {items} held-out problems a task, {draws} draws of random "
        "neurons and of DARE, 95 % intervals, percentage points.",
        "",
        "### Does RegMean give more reasoning for the same perception?",
        "",
        *_regmean(results),
        "",
        "### Does SNRF help, and is it the shared neurons that do it?",
        "",
        *_snrf(results),
        "",
        "### What happens without the shared neurons?",
        "",
        *_ablated(results),
        "",
        "### How much do the two models share?",
        "",
        *_overlaps(results),
        "",
        "### What holds, and what does not",
        "",
        *_tallied(results),
        "",
        "The intervals are not corrected for their number.",
    ]


def shown(interval: Mapping[str, float] | None, *, sign: bool = True) -> str:
    """Return an interval in percentage points."""
    if interval is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    estimate, low, high = (format(100 * interval[key], form) for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def named(study: Mapping[str, Any], condition: str) -> Mapping[str, Any]:
    """Return a condition of a study; ``claim``: the one that it is about."""
    rows = study["conditions"]
    return next(one for one in rows if condition in (one["name"], one["role"]))


def change(study: Mapping[str, Any], condition: str, metric: str) -> Mapping[str, float]:
    """Return how a condition changes a metric of the target."""
    found: Mapping[str, float] = named(study, condition)["metrics"][metric]["change"]
    return found


def contrast(study: Mapping[str, Any], right: str, metric: str) -> Mapping[str, float] | None:
    """Return the study's claim minus another condition; None where the study lacks it."""
    rows = (one for one in study["contrasts"] if one["right"] == right and one["metric"] == metric)
    return next((row["difference"] for row in rows), None)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def title(pair: str) -> str:
    """Return the heading of a pair's column."""
    base, _, tuning = pair.partition("+")
    return f"seed {base}" + (f", target of seed {tuning}" if tuning else "")


def _by_pair(results: Results, rows: Mapping[str, Cell]) -> list[str]:
    return table(["", *map(title, results)], [[name, *map(cell, results)] for name, cell in rows.items()])


def _regmean(results: Results) -> list[str]:
    """Return the table of RegMean at keep 3 and at the strength that tune chose."""

    def mean(metric: str) -> Cell:
        return lambda pair: shown(named(results[pair]["regmean"], "target")["metrics"][metric]["mean"], sign=False)

    def changed(study: str, name: str, metric: str) -> Cell:
        return lambda pair: shown(change(results[pair][study], name, metric))

    def against(study: str, name: str) -> Cell:
        return lambda pair: shown(contrast(results[pair][study], name, "R"))

    def beta(study: str) -> Cell:
        def cell(pair: str) -> str:
            found = named(results[pair][study], "linear at equal P")["settings"]
            return f"{found['beta']['estimate']:.2f}" + ("" if found["reached"] else " (P not reached)")

        return cell

    def of_base(metric: str) -> Cell:
        def cell(pair: str) -> str:
            study = results[pair]["tuned"]
            return shown(change(study, f"regmean from base, keep {results[pair]['tuning']['keep']:g}", metric))

        return cell

    def restored(pair: str) -> str:
        found = re.search(r"which is (.*?) % of", " ".join(results[pair]["regmean"]["verdict"]))
        return "-" if found is None else f"{found[1]} %"

    linear, base = "linear at equal P", "regmean from base at equal P"
    return _by_pair(
        results,
        {
            "**target**: R": mean("R"),
            "**target**: P": mean("P"),
            "**RegMean, keep 3**: change of R": changed("regmean", "claim", "R"),
            "change of P": changed("regmean", "claim", "P"),
            "linear at equal P: change of R": changed("regmean", linear, "R"),
            "its beta": beta("regmean"),
            "base as source at equal P: change of R": changed("regmean", base, "R"),
            "its share of the gain": restored,
            "SNRF: change of R": changed("regmean", "recipe snrf", "R"),
            "SNRF: change of P": changed("regmean", "recipe snrf", "P"),
            "RegMean minus linear at equal P: R": against("regmean", linear),
            "RegMean minus base at equal P: R": against("regmean", base),
            "**keep by `tune`** (KL of at most 0.01)": lambda pair: f"{results[pair]['tuning']['keep']:g}",
            "**RegMean at it**: change of R": changed("tuned", "claim", "R"),
            "change of P at it": changed("tuned", "claim", "P"),
            "linear at its P: change of R": changed("tuned", linear, "R"),
            "base as source, the same keep: change of R": of_base("R"),
            "base as source, the same keep: change of P": of_base("P"),
            "RegMean minus linear at its P: R": against("tuned", linear),
        },
    )


def _snrf(results: Results) -> list[str]:
    """Return the table of SNRF and its controls."""
    studies = {pair: found["snrf"] for pair, found in results.items()}
    first = next(iter(studies.values()))["conditions"]
    names = [one["name"] for one in first if one["role"] != "reference" and one["curve"] is None]
    rows: dict[str, Cell] = {}
    for name in [*names, "linear, beta 0.5", "linear, beta 1"]:
        for metric in ("R", "P"):
            rows[f"{name}: change of {metric}"] = lambda pair, name=name, metric=metric: shown(
                change(studies[pair], name, metric)
            )
    return _by_pair(results, rows)


def _ablated(results: Results) -> list[str]:
    """Return the table of deactivated neurons."""
    studies = {pair: found["ablation"] for pair, found in results.items()}
    first = next(iter(studies.values()))["conditions"]
    rows: dict[str, Cell] = {}
    for name in [one["name"] for one in first if one["role"] != "reference"]:
        for metric in ("R", "P"):
            rows[f"{name}: change of {metric}"] = lambda pair, name=name, metric=metric: shown(
                change(studies[pair], name, metric)
            )
        rows[f"{name}: malformed answers"] = lambda pair, name=name: (
            f"{100 * named(studies[pair], name)['metrics']['R']['malformed']:.0f} %"
        )
    counts = ", ".join(str(named(study, "claim")["neurons"]) for study in studies.values())
    about = (
        f"Top ratio {ABLATED}: {counts} neurons. A malformed answer has no final digit that can be read; it counts as "
        "wrong."
    )
    return [about, "", *_by_pair(results, rows)]


def _overlaps(results: Results) -> list[str]:
    """Return the table of shared neurons."""
    rows = []
    for pair, found in results.items():
        sites = found["overlap"]["sites"]
        shared, alone = (sum(site["shared"] for site in sites), sum(sum(site["only"]) for site in sites))
        chance = sum(site["chance"] for site in sites)
        expected = chance / (2 * shared + alone - chance)
        rows.append([title(pair), str(shared), str(shared + alone), f"{shared / (shared + alone):.0%}"])
        rows[-1].append(f"{expected:.0%}")
    return table(["top ratio 0.5", "shared", "in either", "shared / either", "by chance"], rows)


def _contrasts(results: Results) -> dict[str, list[Mapping[str, float] | None]]:
    """Return the interval of every pair, by what it is of."""
    found: dict[str, list[Mapping[str, float] | None]] = {}
    ways = {
        "RegMean": ("regmean", ("linear at equal P", "recipe snrf", "regmean from base at equal P")),
        "tuned RegMean": ("tuned", ("linear at equal P",)),
        "SNRF": ("snrf", CONTROLS),
    }
    for name, (kind, rivals) in ways.items():
        for metric in ("R", "P"):
            found[f"{metric} of {name} minus the target"] = [
                change(one[kind], "claim", metric) for one in results.values()
            ]
        for rival in rivals:
            shorter = rival.replace("regmean from base", "base as source").replace("recipe snrf", "SNRF")
            found[f"R of {name} minus {shorter}"] = [contrast(one[kind], rival, "R") for one in results.values()]
    for metric in ("R", "P"):
        found[f"{metric} with masked neurons off minus {metric} with random ones off"] = [
            contrast(one["ablation"], "random neurons", metric) for one in results.values()
        ]
    return found


def _tallied(results: Results) -> list[str]:
    """Say in how many pairs an interval lies above zero, below it, or includes it, and what that comes to."""
    rows, holds, mixed, unshown = [], [], [], []
    for name, intervals in _contrasts(results).items():
        known = [interval for interval in intervals if interval is not None]
        above = sum(interval["low"] > 0 for interval in known)
        below = sum(interval["high"] < 0 for interval in known)
        span = ", ".join(f"{100 * interval['estimate']:+.1f}" for interval in known)
        rows.append([name, span, str(above), str(len(known) - above - below), str(below)])
        if known and max(above, below) == len(known):
            holds.append(f"{name} ({'higher' if above else 'lower'})")
        else:
            (mixed if above or below else unshown).append(name)
    header = ["contrast", "points, by pair", "above zero", "includes zero", "below zero"]
    said = {
        "The same sign, zero excluded, on every pair": holds,
        "Zero excluded on some pairs only": mixed,
        "Not shown on any pair": unshown,
    }
    sentences = [f"- {title}: {'; '.join(names)}." for title, names in said.items() if names]
    return [*table(header, rows), "", *sentences]
