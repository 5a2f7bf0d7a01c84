"""Result files: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_results import ablation, amplification, comparison, lens, measured_ranks, profile_of, tuning

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.overlap import overlaps
from mergekit_snrf.evidence.results import Overlap, OverlapPairs, Result, read_result, write_result


def made_overlap() -> Overlap:
    profiles = [profile_of(measured_ranks(seed), name) for seed, name in ((1, "target"), (2, "source"))]
    return overlaps(profiles, top_ratio={"attn": 0.3, "fwd": 0.1}, curve=True)[0]


RESULTS: dict[str, Result] = {
    "ablation": ablation("ab" * 32),
    "comparison": comparison(),
    "overlap": made_overlap(),
    "pairs": OverlapPairs(pairs=[made_overlap()]),
    "amplification": amplification(),
    "lens": lens(),
    "tuning": tuning(True),
}


@pytest.mark.parametrize("name", RESULTS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        write_result(path, RESULTS[name])
    assert read_result(paths[0]) == RESULTS[name]
    assert type(read_result(paths[0])) is type(RESULTS[name])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # Another program reads the file without this package.
    assert json.loads(paths[0].read_text())["format"].startswith("snrf-")


def changed(result: Result, *where: str | int, value: Any) -> bytes:
    content = json.loads(result.model_dump_json())
    part = content
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    return json.dumps(content).encode()


OVERLAP, STUDY, TUNING = RESULTS["overlap"], RESULTS["ablation"], RESULTS["tuning"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is not JSON ("),
        (b"\xff\xfe", ": is not JSON ("),
        (b"[]", ": must be a mapping of keys to values, got a list; "),
        (b"{}", ": has no key 'format'; "),
        (
            b'{"format": "snrf-mask"}',
            ": key 'format': must be one of 'snrf-study', 'snrf-overlap', 'snrf-overlap-pairs', 'snrf-amplification', "
            "'snrf-lens', 'snrf-tuning', 'snrf-domain-ablation', got 'snrf-mask'; ",
        ),
        (b'{"format": "snrf-study"}', ": key 'kind' is missing; "),
        (changed(STUDY, "version", value=2), ": key 'version': must be 1, got 2; "),
        (changed(STUDY, "surprise", value=1), ": unknown key 'surprise'; "),
        (changed(STUDY, "seed", value="x"), ": key 'seed': must be a whole number, got 'x'; "),
        (changed(STUDY, "conditions", 0, "role", value="hero"), "conditions.0.role"),
        (changed(STUDY, "conditions", 0, "metrics", "reasoning", "mean", "low", value=float("nan")), "low"),
        (changed(OVERLAP, "sites", 0, "projection", value="attn.z"), "'attn.z' is none of attn.q"),
        (changed(OVERLAP, "sites", 0, "shared", value=-1), "sites.0.shared"),
        (changed(OVERLAP, "sites", 0, "shared", value=10**30), "sites.0.shared"),
        (changed(OVERLAP, "sites", 0, "shared", value=17), "of 16 neurons"),
        (changed(OVERLAP, "sites", 0, "chance", value=5.0), "5 shared by chance: impossible"),
        (changed(OVERLAP, "curve", 3, "rule", value={}), "top_ratio"),
        (changed(TUNING, "keep", value=4), "keep 4 is none of the points"),
        (changed(TUNING, "points", 1, "kinds", value={"other": [0.1, 0.2]}), "has other kinds or metrics"),
        (changed(TUNING, "target", value={}), "has other kinds or metrics"),
    ],
)
def test_other_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(SnrfError) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "--json" in str(error.value)


def test_missing_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match=r"none\.json: cannot be read"):
        read_result(tmp_path / "none.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(SnrfError, match="has 50000001 bytes"):
        read_result(huge)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match="cannot be written"):
        write_result(tmp_path / "no" / "folder.json", STUDY)
    assert list(tmp_path.iterdir()) == []
