"""Pairs of random checkpoints with the shapes of real ones, masks and recipes, for the benchmarks of merging."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from mergekit_snrf.fusion.regmean import DenseMoment, Moment, SketchMoment
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.moments import (
    DENSE_LIMIT,
    INPUTS,
    SETS,
    InputSite,
    MomentsProvenance,
    moment_tensors,
    write_moments,
)
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet

SHAPES = {
    "0.1B": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7B-4layers": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip


MERGEKIT = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
SNRF = [sys.executable, "-c", "from mergekit_snrf.cli.snrf import main; main()"]


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """Give a folder for checkpoints and outputs; a temporary one where none is given."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="snrf-") as folder:
        yield Path(folder)


def make_checkpoint(folder: Path, shape: dict[str, Any], seed: int, drift: Path | None = None) -> None:
    """Write a random bf16 Qwen2 checkpoint in one file, ``drift`` plus a difference if given."""
    config = Qwen2Config(vocab_size=151936, architectures=["Qwen2ForCausalLM"], dtype="bfloat16", **shape)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        sizes = {name: tuple(weight.shape) for name, weight in Qwen2ForCausalLM(config).named_parameters()}
    tensors = {name: _random(size, generator, drifting=drift is not None) for name, size in sizes.items()}
    if drift is not None:
        with safe_open(drift / "model.safetensors", "pt") as base:
            tensors = {name: base.get_tensor(name) + tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random(size: tuple[int, ...], generator: torch.Generator, *, drifting: bool) -> torch.Tensor:
    """Draw a weight, or a difference a tenth as large whose singular values fall off about as i^-0.5."""
    weight = torch.randn(size, generator=generator) * 0.02
    if drifting and len(size) == 2:
        axis = 0 if size[0] <= size[1] else 1
        decay = torch.arange(1, size[axis] + 1).pow(-0.5)
        decay *= 0.1 / decay.square().mean().sqrt()
        weight *= decay[:, None] if axis == 0 else decay[None, :]
    return weight.bfloat16()


def make_pair(work: Path, size: str) -> None:
    """Make the checkpoints ``base`` and ``source`` in a folder, unless they are there."""
    if not (work / "source" / "model.safetensors").exists():
        make_checkpoint(work / "base", SHAPES[size], 0)
        make_checkpoint(work / "source", SHAPES[size], 1, drift=work / "base")


def write_random_moments(path: Path, hidden: int, wide: int, layers: int, sketch: int | None = None) -> Path:
    """Write moments of random inputs with a falling spectrum; all layers hold the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"attn": hidden, "up": hidden, "down": wide}
    tensors = {}
    for number, name in enumerate(INPUTS):
        for offset, which in enumerate(SETS):
            generator.manual_seed(2 * number + offset)
            moment = _random_moment(sizes[name], sketch, generator)
            for layer in range(layers):
                tensors |= moment_tensors(InputSite(layer, name), which, moment, 1.0)
    write_moments(path, tensors, MomentsProvenance())
    return path


def _random_moment(size: int, sketch: int | None, generator: torch.Generator) -> Moment:
    values = torch.arange(1, size + 1, dtype=torch.float64).pow(-1)
    if sketch is None and size <= DENSE_LIMIT:
        inputs = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
        mixed = inputs * values.sqrt() @ torch.randn(size, size, generator=generator, dtype=torch.float64)
        return DenseMoment.of(mixed.mT @ mixed)
    width = min(sketch or 512, size)
    vectors = torch.linalg.qr(torch.randn(size, width, generator=generator, dtype=torch.float64)).Q
    return SketchMoment.of(vectors, values[:width], float(values.sum()))


def write_recipes(work: Path, rank: int, sketch: int | None = None) -> dict[str, Path]:
    """Write masks, moments and recipes; return the recipes by name."""
    shape = find_decoder(open_checkpoint(str(work / "base"))).shape
    generator = torch.Generator().manual_seed(0)
    everywhere = NeuronSet(
        {site: torch.rand(shape.neurons(site.projection), generator=generator) < 0.1 for site in shape.sites()}
    )
    write_mask(work / "all.safetensors", everywhere)
    write_mask(work / "one.safetensors", NeuronSet({s: m for s, m in everywhere.items() if s.layer == 0}))
    snrf = (
        f"merge_method: snrf\nbase_model: {work}/base\nmodels:\n  - model: {work}/source\n"
        f"    parameters: {{rank: {rank}}}\nparameters:\n  masks: {work}/"
    )
    recipes = {
        "passthrough": f"merge_method: passthrough\nmodels:\n  - model: {work}/base\n",
        "linear": f"merge_method: linear\nmodels:\n  - model: {work}/base\n    parameters: {{weight: 0.5}}\n"
        f"  - model: {work}/source\n    parameters: {{weight: 0.5}}\n",
        "snrf": snrf + "all.safetensors\n",
        "snrf in one layer": snrf + "one.safetensors\n",
    }
    moments = work / f"all-{sketch or 'dense'}.moments.safetensors"
    if not moments.exists():
        write_random_moments(moments, shape.hidden_size, shape.intermediate_size, shape.layers, sketch)
    recipes["regmean"] = (
        f"merge_method: snrf\nbase_model: {work}/base\nmodels:\n  - model: {work}/source\n"
        f"parameters: {{update: regmean, moments: {moments}, keep: 3}}\n"
    )
    paths = {}
    for name, text in recipes.items():
        paths[name] = work / f"{name.replace(' ', '-')}-{rank}.yml"
        paths[name].write_text(text)
    return paths
