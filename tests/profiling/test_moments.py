"""Moments of live tiny models against float64 numpy, from inputs that the tests see for themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import LAYERS, SOURCE_OF, example_inputs, load, make_source, make_target, read, write
from click.testing import CliRunner
from forked import forked_ranks
from made_moments import matrix_of
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from test_run import config_of, write_probes
from test_run import write_config as write_profile_yml

from mergekit_snrf.cli.profile import main as snrf_profile
from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge import install
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.models.moments import InputSite, read_moments
from mergekit_snrf.profiling import moments as taking
from mergekit_snrf.profiling.moments import take_moments
from mergekit_snrf.profiling.probes.batches import Probes, prepare, probe_batches
from mergekit_snrf.profiling.probes.rows import load_rows
from mergekit_snrf.profiling.settings import ProfileConfig, load_profile_config

ODD = {"hidden_size": 52, "intermediate_size": 91}


def write_config(folder: Path, family: str, **keys: Any) -> Path:
    """Image probes to gain and two kinds to keep, of images where the family's processor loads, and of text."""
    keep = [
        {**config_of(family)["target"]["probes"], "name": "see", "limit": 3, "max_new_tokens": 2},
        {"dataset": "text.jsonl", "question": "question", "name": "read", "limit": 5},
    ]
    return write_profile_yml(folder, family, **{"source": None, "keep": keep, "dtype": "float64", **keys})


def make_folder(folder: Path, family: str, decoder: dict[str, int] | None = None) -> Path:
    make_target(folder / "target", family, "hub", dtype=torch.float32, decoder=decoder)
    write_probes(folder)
    return folder


def make_massive(target: Path) -> None:
    """Let one token, the first of every prompt, put a number into the first layer's down input far beyond others."""
    tensors = read(target)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    layers = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight")).removesuffix(
        "up_proj.weight"
    )
    token = example_inputs(target)["input_ids"][0, 0]
    direction = tensors[name][token] / tensors[name][token].norm()
    tensors[name][token] = 40 * tensors[name].norm(dim=1).mean() * direction
    for projection in ("up_proj", "gate_proj"):
        tensors[f"{layers}{projection}.weight"][5] += 30 * direction
    write(target, tensors)


def gathered(config: ProfileConfig, folder: Path) -> dict[str, list[list[dict[InputSite, np.ndarray]]]]:
    """For `gain` and each kind to keep, by group, the unpadded inputs of every layer as modules beside the five see."""
    sources = {"gain": (config.kind("target").source, config.answer)}
    sources |= {kind.name: (kind.source, kind.rule) for kind in config.kept()}
    found: dict[str, list[list[dict[InputSite, np.ndarray]]]] = {}
    for name, (source, rule) in sources.items():
        model, processor = load_model(config.kind("target").model, images=source.images is not None)
        rows = load_rows(source, answers=False, folder=folder)
        probes: Probes = prepare(
            rows, processor, rule=rule, batch_size=config.batch_size, token_limit=None, config=model.config
        )
        groups: list[list[dict[InputSite, np.ndarray]]] = [[] for _ in probes.groups]
        for group in range(len(probes.groups)):
            for batch in probe_batches(probes, model, processor, rule=rule, device="cpu", groups={group}):
                groups[group].append(seen_inputs(model, batch.inputs, batch.attention_mask.bool()))
        found[name] = groups
    return found


def seen_inputs(model: Any, inputs: Any, counted: torch.Tensor) -> dict[InputSite, np.ndarray]:
    names = ("language_model", "text_model")
    text = next((getattr(model.model, name) for name in names if hasattr(model.model, name)), model.model)
    gates: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(lambda _, args, out: gates.append((args[0], out)))
        for layer in text.layers
    ]
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        seen = {}
        for index, (layer, (entering, gate)) in enumerate(zip(text.layers, gates, strict=True)):
            products = layer.mlp.act_fn(gate) * layer.mlp.up_proj(entering)
            for name, tensor in (
                ("attn", layer.input_layernorm(hidden[index])),
                ("up", entering),
                ("down", products),
            ):
                assert tensor.dtype == torch.float64
                seen[InputSite(index, name)] = tensor[counted].numpy()
    for hook in hooks:
        hook.remove()
    return seen


def rows_of(groups: list[list[dict[InputSite, np.ndarray]]], site: InputSite) -> np.ndarray:
    return np.concatenate([batch[site] for group in groups for batch in group])


def clipped_moment(x: np.ndarray, clip: float) -> np.ndarray:
    """Trace d, of the inputs shortened to `clip`."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    x = x * np.minimum(1, clip / lengths)
    return x.T @ x * x.shape[1] / np.square(x).sum()


def lower_median(groups: list[list[dict[InputSite, np.ndarray]]], site: InputSite) -> float:
    norms = np.sort(np.linalg.norm(rows_of(groups, site), axis=1))
    return float(norms[(len(norms) - 1) // 2])


@pytest.mark.parametrize(
    ("family", "decoder", "massive"),
    [
        ("llama", ODD, False),
        ("llama", None, True),
        ("llava", None, False),
        ("qwen2_5_vl", {"intermediate_size": 77}, False),
        ("idefics3", None, False),
    ],
)
def test_moments_are_those_of_numpy(family, decoder, massive, tmp_path):
    folder = make_folder(tmp_path, family, decoder)
    if massive:
        make_massive(folder / "target")
    config = load_profile_config(write_config(folder, family))
    found = take_moments(config, tmp_path / "m.safetensors", folder=folder, progress=False)
    assert found is not None
    groups, stored = gathered(config, folder), load_file(tmp_path / "m.safetensors")
    kinds = [groups[kind.name] for kind in config.kept()]
    assert len(found.sizes) == 3 * LAYERS
    for site, size in found.sizes.items():
        facts = (found.provenance.inputs or {})[site.key]
        gain_clip = 3 * lower_median(groups["gain"][:1], site)
        keep_clip = 3 * lower_median([kind[0] for kind in kinds], site)
        clips = [float(stored[f"{site.key}.{which}.clip"]) for which in ("gain", "keep")]
        assert clips == pytest.approx([gain_clip, keep_clip], rel=1e-6)
        gain = clipped_moment(rows_of(groups["gain"], site), gain_clip)
        keep = np.mean([clipped_moment(rows_of(kind, site), keep_clip) for kind in kinds], axis=0)
        for which, moment, inputs in (
            ("gain", gain, rows_of(groups["gain"], site)),
            ("keep", keep, np.concatenate([rows_of(kind, site) for kind in kinds])),
        ):
            limit = gain_clip if which == "gain" else keep_clip
            lengths = np.linalg.norm(inputs, axis=1)
            assert facts[which]["tokens"] == len(inputs)
            assert facts[which]["clipped"] == np.sum(lengths > limit)
            assert facts[which]["largest"] == pytest.approx(lengths.max(), rel=1e-5)
            scales = np.sqrt(np.outer(np.diag(moment), np.diag(moment)))
            errors = np.abs(matrix_of(stored, f"{site.key}.{which}") - moment) / scales
            assert errors.max() < 6e-4, (site, which)
            assert np.trace(moment) == pytest.approx(size)
    first = (found.provenance.inputs or {})["layers.0.down"]["gain"]
    assert (first["largest"] > 20 * first["median"] and first["clipped"] >= 8) == massive


@pytest.mark.parametrize(("sketch", "exact"), [(60, True), (12, False)])
def test_sketches_hold_the_leading_directions(sketch, exact, tmp_path):
    folder = make_folder(tmp_path, "llama")
    config = load_profile_config(write_config(folder, "llama"))
    dense = take_moments(config, tmp_path / "dense.safetensors", folder=folder, progress=False)
    config = config.model_copy(update={"sketch": sketch})
    found = take_moments(config, tmp_path / "m.safetensors", folder=folder, progress=False)
    assert dense is not None
    assert found is not None
    stored, whole = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "dense.safetensors")
    for site, size in found.sizes.items():
        for which in ("gain", "keep"):
            stem = f"{site.key}.{which}"
            moment, mine = matrix_of(whole, stem), matrix_of(stored, stem)
            values, vectors = np.linalg.eigh(moment)
            lead = (vectors[:, -sketch:] * values[-sketch:]) @ vectors[:, -sketch:].T
            best = lead + (size - np.trace(lead)) / size * np.eye(size)
            assert stored[f"{stem}.factor"].shape == (size, sketch)
            assert np.trace(mine) == pytest.approx(size, rel=1e-4)
            error = np.linalg.norm(mine - best) / np.linalg.norm(moment)
            assert error < (2e-3 if exact else 0.3), (stem, error)


def test_padding_and_batches_do_not_count(tmp_path, monkeypatch):
    """One probe a batch has no padding. The clip is fixed, since another first group would have another median."""
    folder = make_folder(tmp_path, "qwen2")
    written = []
    for size in (1, 5):
        config = load_profile_config(write_config(folder, "qwen2", batch_size=size))
        monkeypatch.setattr(taking, "_clips", lambda norms: dict.fromkeys(norms, 6.0))
        take_moments(config, tmp_path / f"{size}.safetensors", folder=folder, progress=False)
        written.append(load_file(tmp_path / f"{size}.safetensors"))
    for key, tensor in written[0].items():
        torch.testing.assert_close(written[1][key], tensor, rtol=1e-3, atol=1e-3)


def test_profiling_writes_the_same_moments_in_its_own_passes(tmp_path):
    folder = make_folder(tmp_path, "idefics3")
    make_source(folder / "source", SOURCE_OF["idefics3"], dtype=torch.float32)
    path = write_config(folder, "idefics3", source=config_of("idefics3")["source"])
    result = CliRunner().invoke(snrf_profile, [str(path), str(tmp_path / "mask.safetensors")])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(snrf, ["moments", str(path), str(tmp_path / "alone.safetensors")]).exit_code == 0
    mine, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("mask.moments", "alone"))
    for key, tensor in alone.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-3)
    shown = CliRunner().invoke(snrf, ["moments", "show", str(tmp_path / "alone.safetensors")])
    assert shown.exit_code == 0
    assert "keep see: 3 probes of image.jsonl" in shown.output


def test_from_profile_yml_to_a_loaded_merge(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, "idefics3")
    make_source(folder / "source", SOURCE_OF["idefics3"], dtype=torch.float32)
    path = write_config(folder, "idefics3", source=config_of("idefics3")["source"], dtype="auto")
    recipe = folder / "regmean.yml"
    recipe.write_text(
        "merge_method: snrf\nbase_model: target\nmodels: [{model: source}]\n"
        "parameters: {update: regmean, moments: mask.moments.safetensors, keep: 3}\n"
    )
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(snrf_profile, [path.name, "mask.safetensors"])
    assert done.exit_code == 0, done.output
    install()
    merged = CliRunner().invoke(mergekit_yaml, [recipe.name, "merged", "--quiet"])
    assert merged.exit_code == 0, merged.output
    inputs = example_inputs(folder / "target")
    with torch.no_grad():
        before, after = (load(folder / name)(**inputs).logits for name in ("target", "merged"))
    assert bool(after.isfinite().all())
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
    assert "update: regmean" in (folder / "merged" / "mergekit_config.yml").read_text()


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    passes = [0]
    real = taking.run_once

    def run(*args: Any) -> None:
        if passes[0] == after:
            raise KeyboardInterrupt
        passes[0] += 1
        real(*args)

    monkeypatch.setattr(taking, "run_once", run)


# The first passes find the norms to clip at: 1 of the probes to gain, then 3 groups, then 1 + 1 of those to keep.
@pytest.mark.parametrize("after", [3, 5, 8])
def test_an_interrupted_run_resumes_to_the_same_bytes(after, tmp_path, monkeypatch):
    folder = make_folder(tmp_path, "llama")
    config = load_profile_config(write_config(folder, "llama", dtype="float32"))
    out = tmp_path / "m.safetensors"

    def take(path: Path, **options: Any) -> bytes:
        take_moments(config, path, folder=folder, progress=False, journal_seconds=0, **options)
        return path.read_bytes()

    whole = take(tmp_path / "whole.safetensors")
    with monkeypatch.context() as patch:
        stopping(patch, after)
        with pytest.raises(KeyboardInterrupt):
            take(out)
    assert not out.exists()
    with pytest.raises(SnrfError, match="resume"):
        take(out)
    assert take(out, resume=True) == whole
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["m.safetensors", "whole.safetensors"]


def test_two_processes_take_the_moments_of_one(tmp_path):
    folder = make_folder(tmp_path, "llama")
    path = write_config(folder, "llama", dtype="float32", batch_size=2)
    config = load_profile_config(path)
    take_moments(config, tmp_path / "one.safetensors", folder=folder, progress=False)
    out = tmp_path / "two.safetensors"
    assert forked_ranks(lambda: snrf(["moments", "take", str(path), str(out)])) == [0, 0]
    one, two = load_file(tmp_path / "one.safetensors"), load_file(out)
    assert one.keys() == two.keys()
    # Float64 sums in another order: at most the last bit of a stored number.
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=2e-3 if tensor.dtype == torch.float16 else 1e-6)
    assert read_moments(out).provenance.inputs == read_moments(tmp_path / "one.safetensors").provenance.inputs


def test_few_tokens_are_a_warning_with_the_number(tmp_path, caplog):
    folder = make_folder(tmp_path, "llama", {"intermediate_size": 400})
    config = load_profile_config(write_config(folder, "llama", limit=2))
    take_moments(config, tmp_path / "m.safetensors", folder=folder, progress=False)
    assert any("at least 2000 are advised" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"keep": []}, "keep"),
        ({"keep": [{"dataset": "text.jsonl", "question": "absent"}]}, "keep.0.question"),
        ({"keep": [{"dataset": "text.jsonl", "question": "question", "images": "absent"}]}, "keep.0.images"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(keys, field, tmp_path, monkeypatch):
    folder = make_folder(tmp_path, "llama")
    monkeypatch.setattr("mergekit_snrf.profiling.groups.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    config = load_profile_config(write_config(folder, "llama", **keys))
    with pytest.raises(SnrfError) as caught:
        take_moments(config, tmp_path / "m.safetensors", folder=folder, progress=False)
    assert field in str(caught.value)
