"""Overlaps against Python's sets, scipy's hypergeometric distribution, and simulated draws."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from made_results import SIZES, measured_ranks, profile_of
from scipy.stats import hypergeom

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.overlap import by_projection, chance, names_of, overlap_of, overlaps, total
from mergekit_snrf.evidence.results import Counts, Overlap, OverlapPairs, OverlapPoint, read_result
from mergekit_snrf.evidence.wording import chance_sentence
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import Profile, write_profile

RANKS = {"target": measured_ranks(1), "source": measured_ranks(2)}


@pytest.fixture(scope="module")
def pair() -> list[Profile]:
    return [profile_of(ranks, name) for name, ranks in RANKS.items()]


def names(ranks: dict[Site, np.ndarray], ratio: float, needed: int | None = None) -> set[str]:
    """Eq. 5 by counting: the neurons that are among the strongest on enough probes."""
    found = set()
    for site, table in ranks.items():
        hits = (table <= math.floor(round(ratio * table.shape[1], 9))).sum(0)
        wanted = len(table) if needed is None else needed
        found |= {f"{site.projection}.L{site.layer}.N{index}" for index in np.flatnonzero(hits >= wanted)}
    return found


@st.composite
def two_sets(draw: st.DrawFn) -> tuple[NeuronSet, NeuronSet]:
    sites = draw(st.dictionaries(st.tuples(st.integers(0, 3), st.sampled_from(list(PROJECTIONS))), st.integers(1, 12)))
    sides: tuple[dict[Site, torch.Tensor], dict[Site, torch.Tensor]] = ({}, {})
    for (layer, projection), neurons in sites.items():
        for side in sides:
            members = draw(st.lists(st.booleans(), min_size=neurons, max_size=neurons))
            side[Site(layer, projection)] = torch.tensor(members)
    return NeuronSet(sides[0]), NeuronSet(sides[1])


@given(two_sets())
def test_counts_are_those_of_sets(sets: tuple[NeuronSet, NeuronSet]) -> None:
    first, second = ({str(neuron) for neuron in one.neurons()} for one in sets)
    overlap = overlap_of(*sets, ("a", "b"), {})
    counts = total(overlap.sites)
    assert (counts.shared, counts.only) == (len(first & second), (len(first - second), len(second - first)))
    assert counts.union == len(first | second) == counts.shared + sum(counts.only)
    assert counts.neurons == sum(len(member) for member in sets[0].values())
    assert 0 <= counts.chance <= min(len(first), len(second)) + 1e-9
    assert counts.chance >= len(first) + len(second) - counts.neurons - 1e-9
    if counts.union:
        assert counts.share == len(first & second) / len(first | second)
        assert counts.chance_share is not None
        assert 0 <= counts.chance_share <= 1 + 1e-9
    else:
        assert counts.share is counts.chance_share is None
    for name, (shared, only_first, only_second) in counts.projections.items():
        assert shared == sum(neuron.startswith(f"{name}.") for neuron in first & second)
        assert only_first == sum(neuron.startswith(f"{name}.") for neuron in first - second)
        assert only_second == sum(neuron.startswith(f"{name}.") for neuron in second - first)


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")
@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_chance_is_hypergeometric(sizes: tuple[int, int, int]) -> None:
    neurons, first, second = sizes
    mean, deviation = chance(neurons, first, second)
    expected, variance = hypergeom.stats(neurons, first, second, moments="mv")
    assert mean == pytest.approx(expected, abs=1e-12)
    assert deviation == pytest.approx(math.sqrt(variance) if neurons > 1 else 0.0, abs=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_total_deviation_against_draws(tied: bool) -> None:
    """With fwd.up and fwd.down tied, as in a profile, the deviation is that of simulated draws; untied it is larger."""
    generator = np.random.default_rng(0)
    sizes = {"attn.q": (30, 10, 6), "attn.k": (12, 5, 5), "fwd.up": (40, 16, 12), "fwd.down": (40, 16, 12)}
    layers, draws = 3, 4000

    def draw(neurons: int, count: int) -> np.ndarray:
        return generator.permuted(np.tile(np.arange(neurons) < count, (draws, 1)), axis=1)

    shared = np.zeros(draws)
    members: tuple[dict[Site, torch.Tensor], dict[Site, torch.Tensor]] = ({}, {})
    for layer in range(layers):
        for projection, (neurons, a, b) in sizes.items():
            if projection != "fwd.down" or not tied:
                both = (draw(neurons, a) & draw(neurons, b)).sum(1)
            shared += both
            for side, count in zip(members, (a, b), strict=True):
                side[Site(layer, projection)] = torch.arange(neurons) < count
    counts = total(overlap_of(NeuronSet(members[0]), NeuronSet(members[1]), ("a", "b"), {}).sites)
    assert counts.chance == pytest.approx(shared.mean(), rel=0.01)
    if tied:
        assert counts.deviation == pytest.approx(shared.std(), rel=0.05)
    else:
        assert counts.deviation > 1.15 * shared.std()


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.29, 0.5, 1.0])
def test_overlap_of_profiles(pair: list[Profile], ratio: float) -> None:
    first, second = (names(ranks, ratio) for ranks in RANKS.values())
    (overlap,) = overlaps(pair, top_ratio=ratio)
    counts = total(overlap.sites)
    assert (counts.shared, *counts.only) == (len(first & second), len(first - second), len(second - first))
    expected = 0.0
    for layer in range(3):
        for name, neurons in {**SIZES, "fwd.down": SIZES["fwd.up"]}.items():
            a, b = (sum(one.startswith(f"{name}.L{layer}.") for one in side) for side in (first, second))
            expected += hypergeom.stats(neurons, a, b, moments="m")
    assert counts.chance == pytest.approx(expected)
    assert overlap.names == ("target", "source")
    assert overlap.rule == {"top_ratio": ratio}


def test_at_least_and_split_ratio(pair: list[Profile]) -> None:
    (overlap,) = overlaps(pair, top_ratio={"attn": 0.5, "fwd": 0.1}, at_least=4)
    for side, ranks in zip((0, 1), RANKS.values(), strict=True):
        sizes = {name: counts.shared + counts.only[side] for name, counts in by_projection(overlap).items()}
        attention, ffn = names(ranks, 0.5, 4), names(ranks, 0.1, 4)
        # A top ratio of 0.1 of 96 neurons is bin 0.1's upper edge, so the hits know it.
        assert sizes["attn.k"] == sum(name.startswith("attn.k") for name in attention)
        assert sizes["fwd.down"] == sizes["fwd.up"] == sum(name.startswith("fwd.up") for name in ffn)


def test_curve(pair: list[Profile]) -> None:
    (overlap,) = overlaps(pair, top_ratio=0.1, curve=True)
    assert [point.rule["top_ratio"] for point in overlap.curve] == [percent / 100 for percent in range(1, 51)]
    for point in overlap.curve[::7]:
        first, second = (names(ranks, point.rule["top_ratio"]) for ranks in RANKS.values())
        assert (point.shared, *point.only) == (len(first & second), len(first - second), len(second - first))
    assert overlap.curve[9] == total(overlap.sites, overlap.rule)


def test_curve_with_at_least_keeps_to_the_edges(pair: list[Profile], caplog: pytest.LogCaptureFixture) -> None:
    (overlap,) = overlaps(pair, top_ratio=0.1, at_least=0.5, curve=True)
    ratios = [point.rule["top_ratio"] for point in overlap.curve]
    assert (ratios[0], ratios[-1], len(ratios), caplog.text) == (0.001, 0.5, 17, "")
    first, second = (names(ranks, 0.3, 3) for ranks in RANKS.values())
    assert overlap.curve[-2].shared == len(first & second)


def test_identical_profiles_share_everything_and_no_choice_has_no_z(pair: list[Profile]) -> None:
    counts = total(overlaps([pair[0], pair[0]], top_ratio=0.2)[0].sites)
    assert (counts.share, counts.only) == (1, (0, 0))
    assert counts.z is not None
    assert counts.z > 20
    counts = total(overlaps(pair, top_ratio=1.0)[0].sites)
    assert counts.share == counts.chance_share == 1
    assert counts.z is None


def test_names(pair: list[Profile]) -> None:
    assert names_of(pair) == ["target", "source"]
    local = profile_of(RANKS["target"], "/models/here/qwen")
    hub = profile_of(RANKS["target"], "Qwen/Qwen2.5")
    nameless = replace(pair[0], provenance=type(pair[0].provenance)(), path="/somewhere/x.profile")
    assert names_of([local, hub, nameless]) == ["qwen", "Qwen/Qwen2.5", "x.profile"]
    twice = [replace(pair[0], path="/a/easy"), replace(pair[0], path="/a/hard")]
    assert names_of(twice) == ["target (easy)", "target (hard)"]


def test_different_shapes(pair: list[Profile]) -> None:
    smaller = {site: table for site, table in RANKS["source"].items() if site.layer < 2}
    with pytest.raises(SnrfError, match=r"small: has 0 neurons at layers\.2\.attn\.k"):
        overlaps([pair[0], profile_of(smaller, "small")], top_ratio=0.1)


@pytest.fixture
def folder(tmp_path: Path, pair: list[Profile], monkeypatch: pytest.MonkeyPatch) -> Path:
    for profile in pair:
        write_profile(tmp_path / f"{profile.path}.profile", profile)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snrf(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["overlap", *arguments])


def test_command(folder: Path) -> None:
    result = snrf("target.profile", "source.profile", "--layers", "--json", "o.json")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
    overlap = read_result("o.json")
    assert isinstance(overlap, Overlap)
    first, second = (names(ranks, 0.1) for ranks in RANKS.values())
    shared, union = len(first & second), len(first | second)
    shown = ["all", str(shared), str(len(first - second)), str(len(second - first)), str(union)]
    assert lines["all"][:5] == shown
    assert lines["all"][5] == f"{100 * shared / union:.1f}"
    assert lines["all"][7] == f"{total(overlap.sites).chance:.1f}"
    assert f"{shared} of the union's {union} neurons are shared" in result.stdout
    for layer in range(3):
        held = sum(name.startswith(f"attn.q.L{layer}.") for name in first & second)
        assert f"\n{layer} attn.q" in result.stdout
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"{layer} attn.q "))
        assert row.split()[2] == str(held)


def test_command_sigma_and_curve(folder: Path) -> None:
    result = snrf("target.profile", "source.profile", "--sigma", "0.1", "--curve", "--json", "o.json")
    assert (result.exit_code, result.stderr) == (0, "")
    overlap = read_result("o.json")
    assert isinstance(overlap, Overlap)
    # Impacts are 1 / rank, so a threshold of 0.1 keeps the first ten of each projection.
    kept = [{(site, i) for site, t in r.items() for i in np.flatnonzero(t.max(0) <= 10)} for r in RANKS.values()]
    assert total(overlap.sites).shared == len(kept[0] & kept[1])
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("0.")]
    assert [row[0] for row in rows] == ["0.01", *(f"{percent / 100:g}" for percent in range(5, 51, 5))]
    points = {f"{point.rule['top_ratio']:g}": point for point in overlap.curve}
    assert [int(row[1]) for row in rows] == [points[row[0]].shared for row in rows]


def test_command_with_three_profiles(folder: Path) -> None:
    write_profile(folder / "third.profile", profile_of(measured_ranks(3), "third"))
    arguments = ["target.profile", "source.profile", "third.profile", "--curve", "--json", "o.json", "--figures", "f/g"]
    result = snrf(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    pairs = read_result("o.json")
    assert isinstance(pairs, OverlapPairs)
    assert [pair.names for pair in pairs.pairs] == [("target", "source"), ("target", "third"), ("source", "third")]
    for pair in pairs.pairs:
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"{pair.names[0]}, {pair.names[1]} "))
        assert int(row.split()[2]) == total(pair.sites).shared
    drawn = sorted(path.name for path in (folder / "f/g").iterdir())
    kinds = [f"{kind}-{number}" for kind in ("curve", "layers", "overlap") for number in (1, 2, 3)]
    assert drawn == [f"{kind}.{ending}" for kind in kinds for ending in ("png", "svg")]


def test_figures_of_the_command_are_reproducible(folder: Path) -> None:
    """A process with another hash seed writes the same bytes, and the SVGs say the numbers."""
    arguments = ["target.profile", "source.profile", "--curve"]
    assert snrf(*arguments, "--json", "1.json", "--figures", "1").exit_code == 0
    command = [sys.executable, "-c", "from mergekit_snrf.cli.snrf import main; main()", "overlap"]
    command += [*arguments, "--json", "2.json", "--figures", "2"]
    environment = {**os.environ, "PYTHONHASHSEED": "2"}
    subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
    files = sorted(path.name for path in (folder / "1").iterdir())
    assert files == [f"{kind}.{end}" for kind in ("curve", "layers", "overlap") for end in ("png", "svg")]
    for name in files:
        assert (folder / "1" / name).read_bytes() == (folder / "2" / name).read_bytes(), name
    assert (folder / "1.json").read_bytes() == (folder / "2.json").read_bytes()
    shared = len(names(RANKS["target"], 0.1) & names(RANKS["source"], 0.1))
    assert f"{shared} shared" in (folder / "1/overlap.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["target.profile"], 1, "at least two profiles"),
        (
            ["target.profile", "source.profile", "--top-ratio", "0.1", "--sigma", "1"],
            1,
            "give exactly one of top_ratio and sigma",
        ),
        (["target.profile", "nothing.profile"], 1, "nothing.profile: no such file"),
        (["target.profile", "small.profile"], 1, "has 0 neurons at layers.2.attn.k"),
        (["target.profile", "source.profile", "--sigma", "1", "--at-least", "0.5"], 1, "at_least counts ranks"),
        (["target.profile", "source.profile", "--figures", "target.profile/x"], 1, "cannot be made"),
        (["target.profile", "source.profile", "--json", "no/where.json"], 1, "no/where.json: cannot be written"),
    ],
)
def test_command_errors(folder: Path, arguments: list[str], code: int, message: str) -> None:
    write_profile(folder / "small.profile", profile_of({s: t for s, t in RANKS["source"].items() if s.layer < 2}))
    result = snrf(*arguments)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (code, True)
    assert message in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1


def test_names_cannot_command_the_terminal(folder: Path) -> None:
    write_profile(folder / "evil.profile", profile_of(RANKS["source"], "a\x1b[31mb\nall  9999\u202e"))
    result = snrf("target.profile", "evil.profile", "--json", "o.json", "--figures", "f")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\x1b[31mb\\nall  9999\\u202e" in result.stdout
    assert json.loads(Path("o.json").read_text())["names"][1] == "a\x1b[31mb\nall  9999\u202e"
    assert "\x1b" not in Path("f/overlap.svg").read_text()


def test_total_of_nothing() -> None:
    assert total([]) == OverlapPoint(rule={}, neurons=0, shared=0, only=(0, 0), chance=0, deviation=0, projections={})


@pytest.mark.parametrize(
    ("shared", "deviation", "verdict"),
    [
        (20, 3.0, "more than chance explains (z = 3.3)"),
        (12, 3.0, "no more and no less than chance explains (z = 0.7)"),
        (0, 3.0, "less than chance explains (z = -3.3)"),
        (10, 0.0, "and could share no other number."),
    ],
)
def test_sentence_says_no_more_than_chance_allows(shared: int, deviation: float, verdict: str) -> None:
    counts = Counts(neurons=200, shared=shared, only=(30, 30), chance=10.0, deviation=deviation)
    sentence = chance_sentence(counts)
    assert sentence.startswith(f"{shared} of the union's {shared + 60} neurons are shared (")
    assert verdict in sentence
    assert "random sets of the same sizes would share 10.0" in sentence
