"""`snrf frank` on three checkpoints: its numbers against float64 numpy, its recipe through mergekit-yaml."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import LAYERS, make_source, make_target, read, write
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pair import make_neurons, merge

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.results import Lens, write_result
from mergekit_snrf.fusion.frank import prior_of, source_strengths
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sites import PROJECTIONS

PREFIXES = {"base": "model.layers", "target": "language_model.model.layers", "source": "model.layers"}
positive = st.floats(1e-6, 1e6)


@dataclass(frozen=True)
class Models:
    folder: Path
    tensors: dict[str, dict[str, torch.Tensor]]

    def layer(self, which: str, layer: int) -> dict[str, np.ndarray]:
        start = f"{PREFIXES[which]}.{layer}."
        found = {name.removeprefix(start): one for name, one in self.tensors[which].items() if name.startswith(start)}
        return {name: one.double().numpy() for name, one in found.items()}

    def norms(self) -> np.ndarray:
        """n_V and n_R by layer."""
        return np.array(
            [
                [sum(((self.layer(which, layer)[name] - base) ** 2).sum() for name, base in bases.items())
                 for which in ("target", "source")]
                for layer in range(LAYERS) for bases in [self.layer("base", layer)]
            ]
        )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("frank")
    make_target(folder / "target", "llava", "hub", dtype=torch.float32)
    make_source(folder / "source", "llama", dtype=torch.float32)
    make_source(folder / "base", "llama", dtype=torch.bfloat16, seed=5)
    write_mask(folder / "mask.safetensors", make_neurons())
    # A table that older checkpoints store beside the parameters.
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(LAYERS)}
    write(folder / "source", {**read(folder / "source"), **old})
    tensors = {which: read(folder / which) for which in PREFIXES}
    return Models(
        folder, {which: {n: t for n, t in one.items() if "inv_freq" not in n} for which, one in tensors.items()}
    )


def made_lens(shares: list[float] | None) -> Lens:
    return Lens(model="m", probes="p", count=1, layers=LAYERS, kinds=[], image_attention=shares)


def run(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["frank", *map(str, words), "--quiet"])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_recipe_gives_franks_tensors(models: Models, tmp_path: Path, prior: bool, masked: bool) -> None:
    folder, norms = models.folder, models.norms()
    weights = np.full((LAYERS, 2), 0.5)
    options: list[str | Path] = ["--mask", folder / "mask.safetensors"] if masked else []
    if prior:
        shares = [0.4, 0.1, 0.15]
        write_result(tmp_path / "lens.json", made_lens(shares))
        options += ["--lens", tmp_path / "lens.json"]
        slope = np.polyfit(np.arange(LAYERS), np.log(shares), 1)[0]
        visual = np.exp(slope * np.arange(LAYERS))
        weights = np.stack([visual / visual.sum(), 1 - visual / visual.sum()], 1)
    expected = (weights * norms)[:, 1] / (weights * norms).sum(1)
    out = tmp_path / "frank.yml"
    text = run(folder / "base", folder / "target", folder / "source", *options, "-o", out)
    for layer, row in enumerate(line for line in text.splitlines() if re.match(r"\d", line)):
        cells = [float(cell) for cell in row.split()]
        shown = [layer, *norms[layer], *([weights[layer, 0]] if prior else []), expected[layer]]
        np.testing.assert_allclose(cells, shown, rtol=1e-3, atol=5e-5)
    assert ("alpha" in text) == prior
    betas = yaml.safe_load(out.read_text())["models"][0]["parameters"]["beta"]
    np.testing.assert_allclose(betas, expected, rtol=1e-12)

    merged, target = merge(out, tmp_path / "merged"), models.tensors["target"]
    neurons = make_neurons()
    edited = set()
    for layer in range(LAYERS):
        before, theirs = models.layer("target", layer), models.layer("source", layer)
        for name, projection in PROJECTIONS.items():
            key = f"{projection.module}.weight"
            full = f"{PREFIXES['target']}.{layer}.{key}"
            ours, other = before[key].astype(np.float32), theirs[key].astype(np.float32)
            # Bit for bit in float32, where the update is rounded before it is added; float64 within one rounding more.
            whole = ours + (other - ours) * np.float32(expected[layer])
            exact = before[key] + expected[layer] * (theirs[key] - before[key])
            np.testing.assert_allclose(whole, exact, rtol=3e-7, atol=3e-7)
            if masked:
                member = next(
                    (m.numpy() for site, m in neurons.items() if (site.layer, site.projection) == (layer, name)), False
                )
                member = np.broadcast_to(member, ours.shape[projection.axis])
                whole = np.where(member[:, None] if projection.axis == 0 else member, whole, ours)
            assert np.array_equal(merged[full].numpy(), whole), full
            edited.add(full)
    assert all(torch.equal(merged[name], target[name]) for name in target.keys() - edited)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=40), st.data())
def test_strengths_are_the_formula(norms: list[tuple[float, float]], data: st.DataObject) -> None:
    n = np.array(norms)
    np.testing.assert_allclose(source_strengths(norms), n[:, 1] / n.sum(1), rtol=1e-12)
    shares = data.draw(st.lists(st.floats(1e-3, 1), min_size=len(norms), max_size=len(norms)))
    prior = prior_of(shares)
    slope = np.polyfit(np.arange(len(norms)), np.log(shares), 1)[0]
    assert prior.alpha == pytest.approx(-slope, abs=1e-9)
    visual = np.exp(slope * np.arange(len(norms)))
    visual /= visual.sum()
    np.testing.assert_allclose(prior.weights, visual, rtol=1e-6)
    expected = (1 - visual) * n[:, 1] / (visual * n[:, 0] + (1 - visual) * n[:, 1])
    np.testing.assert_allclose(source_strengths(norms, prior), expected, rtol=1e-6, atol=1e-9)


def test_flat_attention_takes_nearly_all_of_the_source() -> None:
    prior = prior_of([0.3] * 28)
    assert prior.weights == (1 / 28,) * 28
    assert source_strengths([(1.0, 1.0)] * 28, prior)[5] == pytest.approx(27 / 28)


def test_what_cannot_be_computed_is_named(models: Models, tmp_path: Path) -> None:
    folder = models.folder
    three = [folder / "base", folder / "target", folder / "source"]
    write_result(tmp_path / "lens.json", made_lens(None))
    assert "--lens: has no attention to images" in run(*three, "--lens", tmp_path / "lens.json", code=1)
    write_result(tmp_path / "lens.json", made_lens([0.1, 0.0, 0.2]))
    assert "must be above 0" in run(*three, "--lens", tmp_path / "lens.json", code=1)
    other = json.loads(made_lens([0.1, 0.2, 0.3]).model_dump_json()) | {"layers": 2, "image_attention": [0.1, 0.2]}
    (tmp_path / "lens.json").write_text(json.dumps(other))
    assert "is of 2 layers, the models have 3" in run(*three, "--lens", tmp_path / "lens.json", code=1)
    same = run(folder / "source", folder / "source", folder / "source", code=1)
    assert "BASE: neither target nor source differs from the base in layer 0" in same
    make_source(tmp_path / "qwen2", "qwen2")
    assert "does not fit the target" in run(tmp_path / "qwen2", *three[1:], code=1)
    write(tmp_path / "qwen2", models.tensors["base"] | {"model.layers.1.extra": torch.ones(2)})
    (tmp_path / "qwen2" / "config.json").write_text((folder / "base" / "config.json").read_text())
    assert "layer 1 are not those of" in run(tmp_path / "qwen2", *three[1:], code=1)
    name = "model.layers.1.mlp.gate_proj.weight"
    for value, message in ((torch.full((96, 64), math.nan), "NaN or infinite"), (torch.ones(9), "has shape [96, 64]")):
        write(tmp_path / "qwen2", models.tensors["base"] | {name: value})
        assert message in run(tmp_path / "qwen2", *three[1:], code=1)
    with pytest.raises(SnrfError, match="of 1 layers"):
        prior_of([0.5])


def test_relative_paths_are_written_from_the_recipe(models: Models, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(models.folder)
    run("base", "target", "source", "--mask", "mask.safetensors", "-o", tmp_path / "frank.yml")
    written = yaml.safe_load((tmp_path / "frank.yml").read_text())
    monkeypatch.chdir("/")
    for path in (written["base_model"], written["models"][0]["model"], written["parameters"]["masks"]):
        assert not Path(path).is_absolute()
        assert (tmp_path / path).exists()
