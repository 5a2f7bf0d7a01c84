from __future__ import annotations

import itertools
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.maskfile import ModelProvenance
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.result.profilefile import (
    EDGES,
    Profile,
    ProfileProvenance,
    SiteProfile,
    edge_ranks,
    read_profile,
    write_profile,
)

KEY, UP = Site(0, "attn.k"), Site(0, "fwd.up")


def site_profile(ranks: list[list[int]], impacts: list[list[float]] | None = None) -> SiteProfile:
    """The statistics of one site from its ranks [probes][neurons]."""
    table = torch.tensor(ranks)
    values = torch.tensor(impacts) if impacts else 1.0 / table
    bounds = torch.tensor(edge_ranks(EDGES, table.shape[1]))
    bins = torch.nn.functional.one_hot(torch.searchsorted(bounds, table), len(EDGES))
    return SiteProfile(
        values.amin(0), (table.amax(0) / table.shape[1]).float(), values.mean(0), bins.sum(0).to(torch.int32)
    )


def profile(**sites: list[list[int]]) -> Profile:
    """A profile of layer 0, with ranks by projection: ``attn_k=[[1, 2], [2, 1]]``."""
    parts = {Site(0, name.replace("_", ".")): site_profile(ranks) for name, ranks in sites.items()}
    return Profile(parts, len(next(iter(sites.values()))))


def rewrite(path: Path, content: dict) -> None:
    """Replace the JSON object in the metadata of a profile file."""
    metadata = {"format": "snrf-profile", "version": "1", "snrf": json.dumps(content)}
    save_file(load_file(path), path, metadata=metadata)


def metadata(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]


def test_file_comes_back_as_it_was_written(tmp_path):
    provenance = ProfileProvenance(
        side="target", model=ModelProvenance(path="owner/model", model_type="llama"), seed=3, fingerprint="f" * 64
    )
    written = replace(profile(attn_k=[[1, 3, 2], [3, 1, 2]], fwd_up=[[2, 1], [2, 1]]), provenance=provenance)
    path = tmp_path / "m.target.profile.safetensors"
    write_profile(path, written)
    first = path.read_bytes()
    back = read_profile(path)
    assert back.provenance == provenance
    assert (back.count, back.edges, back.path) == (2, EDGES, str(path))
    assert len(repr(back)) < 200 + len(str(path))
    assert back.sites.keys() == written.sites.keys()
    for site, statistics in back.sites.items():
        for name in ("min_impact", "max_rank", "mean_impact", "hits", "ranks"):
            assert torch.equal(getattr(statistics, name), getattr(written.sites[site], name))
    write_profile(path, back)
    assert path.read_bytes() == first


def test_file_has_the_names_of_the_format_and_states_its_bins(tmp_path):
    path = tmp_path / "p.safetensors"
    write_profile(path, profile(attn_k=[[1, 2]]))
    names = {f"layers.0.attn.k.{name}" for name in ("min_impact", "max_rank", "mean_impact", "hits")}
    assert load_file(path).keys() == names
    found = metadata(path)
    assert (found["format"], found["version"]) == ("snrf-profile", "1")
    assert json.loads(found["snrf"])["edges"][:3] == ["0.001", "0.0015", "0.002"]


def test_edges_are_evenly_spaced_in_the_logarithm_up_to_rounding():
    shares = [float(edge) for edge in EDGES]
    assert all(1.3 < b / a < 1.7 for a, b in itertools.pairwise(shares))


@given(neurons=st.integers(1, 2**23), data=st.data())
def test_rank_comes_back_from_a_float32_share(neurons, data):
    rank = data.draw(st.integers(1, neurons))
    share = torch.tensor(rank, dtype=torch.float32) / neurons
    assert round(float(share.double()) * neurons) == rank


def test_mask_file_is_no_profile(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_file(
        {"layers.0.attn.k": torch.ones(3, dtype=torch.bool)}, path, metadata={"format": "snrf-mask", "version": "1"}
    )
    with pytest.raises(SnrfError, match=r"a snrf-profile file is needed.*; a mask is made from profiles"):
        read_profile(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.attn.k.hits", torch.zeros(2, len(EDGES), dtype=torch.int32), "does not add up to the 1 probes"),
        ("layers.0.attn.k.hits", torch.ones(2, 3, dtype=torch.int32), "has 3 bins for 19 edges"),
        ("layers.0.attn.k.max_rank", torch.tensor([0.5, 1.5]), r"not in \(0, 1\]"),
        ("layers.0.attn.k.max_rank", torch.tensor([0.5, torch.nan]), r"not in \(0, 1\]"),
        ("layers.0.attn.k.min_impact", torch.tensor([0.5, torch.nan]), "negative, infinite or NaN"),
        ("layers.0.attn.k.min_impact", torch.tensor([0.5, 1.0, 2.0]), "must be torch.float32 of shape"),
        ("layers.0.attn.k.mean_impact", torch.tensor([1, 2]), "must be torch.float32 of shape"),
        ("layers.0.attn.x.mean_impact", torch.tensor([1.0, 2.0]), "unknown projection 'attn.x'"),
        ("layers.0.attn.k.median", torch.tensor([1.0, 2.0]), "is not a statistic"),
        ("layers.0.attn.k.hits", None, r"'layers\.0\.attn\.k\.hits' is missing"),
    ],
)
def test_file_with_an_impossible_tensor_is_refused(tmp_path, name, tensor, message):
    path = tmp_path / "p.safetensors"
    write_profile(path, profile(attn_k=[[1, 2]]))
    changed = {key: value for key, value in {**load_file(path), name: tensor}.items() if value is not None}
    save_file(changed, path, metadata=metadata(path))
    with pytest.raises(SnrfError, match=message) as caught:
        read_profile(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "lacks 'count' or 'edges'"),
        ({"count": 0}, "at least one probe"),
        ({"count": 10**40}, "at least one probe, and fewer than"),
        ({"edges": [*EDGES[:-1], "0.9"]}, "must rise from above 0 to 1"),
        ({"edges": [*EDGES[:-1], "x"]}, "must rise from above 0 to 1"),
        ({"seed": "many"}, "key 'seed': must be a whole number, got 'many'; make the profile again"),
    ],
)
def test_file_with_impossible_metadata_is_refused(tmp_path, change, message):
    path = tmp_path / "p.safetensors"
    write_profile(path, profile(attn_k=[[1, 2]]))
    rewrite(path, {**json.loads(metadata(path)["snrf"]), **change})
    with pytest.raises(SnrfError, match=message):
        read_profile(path)
