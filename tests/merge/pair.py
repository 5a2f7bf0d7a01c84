"""A tiny LLaVA target, a Llama source and a mask for them; recipes, and mergekit's own command run in this process."""

from __future__ import annotations

import copy
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import HEADS, INTERMEDIATE, KV_HEADS, LAYERS, TARGETS, make_source, make_target, read
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge import install
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.plan import PlanDraft
from mergekit_snrf.models import shards
from mergekit_snrf.models.shards import ByteRange
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

HEAD_DIM = 16
# Written down here and not taken from the package: what a neuron is belongs to the oracle.
MODULES = {
    "attn.q": ("self_attn.q_proj", 0, HEADS * HEAD_DIM),
    "attn.k": ("self_attn.k_proj", 0, KV_HEADS * HEAD_DIM),
    "attn.v": ("self_attn.v_proj", 0, KV_HEADS * HEAD_DIM),
    "fwd.up": ("mlp.up_proj", 0, INTERMEDIATE),
    "fwd.down": ("mlp.down_proj", 1, INTERMEDIATE),
}
# Sites that the mask leaves out, so that tensors of the source exist that no merge needs.
UNMASKED = {(1, "attn.q"), (2, "fwd.down"), (2, "attn.v")}


@dataclass(frozen=True)
class Pair:
    """Where target, source and mask lie, and which neurons the mask holds."""

    folder: Path
    target: Path
    source: Path
    mask: Path
    neurons: NeuronSet

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe that works; `changes` replace its top-level entries, and None removes one.

        `parameters` are added to the top-level ones, `source` to those of the source; None removes one there too.
        """
        recipe: dict[str, Any] = {
            "merge_method": "snrf",
            "base_model": str(self.target),
            "models": [{"model": str(self.source), "parameters": {"beta": 0.5, "rank": 4}}],
            "parameters": {"masks": str(self.mask)},
        }
        changes = copy.deepcopy(changes)
        _update(recipe["parameters"], changes.pop("parameters", {}))
        _update(recipe["models"][0]["parameters"], changes.pop("source", {}))
        _update(recipe, changes)
        return recipe


def _update(entries: dict[str, Any], changes: dict[str, Any]) -> None:
    entries.update(changes)
    for name in [name for name, value in entries.items() if value is None]:
        del entries[name]


def make_pair(folder: Path, *, dtype: torch.dtype = torch.bfloat16, source_dtype: torch.dtype = torch.bfloat16) -> Pair:
    """Write target, source and mask below `folder`."""
    neurons = make_neurons()
    folder.mkdir(parents=True, exist_ok=True)
    write_mask(folder / "mask.safetensors", neurons)
    return Pair(
        folder,
        make_target(folder / "target", "llava", "hub", dtype=dtype),
        make_source(folder / "source", "llama", dtype=source_dtype),
        folder / "mask.safetensors",
        neurons,
    )


def make_neurons(seed: int = 0, layers: int = LAYERS) -> NeuronSet:
    """Every fifth neuron or so of every layer and projection that is not in UNMASKED."""
    generator = np.random.default_rng(seed)
    members = {}
    for layer in range(layers):
        for name, (_, _, count) in MODULES.items():
            member = generator.random(count) < 0.2
            member[generator.integers(count)] = True
            if (layer, name) not in UNMASKED:
                members[Site(layer, name)] = torch.from_numpy(member)
    return NeuronSet(members)


def target_name(site: Site) -> str:
    """The name of a projection's weight in the target."""
    return f"{TARGETS['llava', 'hub']}.{site.layer}.{MODULES[site.projection][0]}.weight"


def source_name(site: Site) -> str:
    """The name of a projection's weight in the source."""
    return f"model.layers.{site.layer}.{MODULES[site.projection][0]}.weight"


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(recipe: dict[str, Any] | Path, out: Path, *flags: str) -> Result:
    """Run `mergekit-yaml RECIPE OUT FLAGS` in this process, as in a fresh one."""
    path = recipe if isinstance(recipe, Path) else write_recipe(out.with_name(f"{out.name}.yml"), recipe)
    install()
    LoaderCache.loaders.clear()
    return CliRunner().invoke(mergekit_yaml, [str(path), str(out), "--quiet", *flags], prog_name="mergekit-yaml")


def merge(recipe: dict[str, Any] | Path, out: Path, *flags: str) -> dict[str, Tensor]:
    """Merge, and return the tensors of the output."""
    result = run(recipe, out, *flags)
    if result.exit_code:
        raise AssertionError(result.output) from result.exception
    return read(out)


def plan(recipe: dict[str, Any], out: Path | None = None, **options: Any) -> PlanDraft:
    """Plan a merge as the command does before it."""
    return draft_merge(
        MergeConfiguration.model_validate(recipe), MergeOptions(**options), out_path=None if out is None else str(out)
    )


def problem(recipe: dict[str, Any], out: Path | None = None, **options: Any) -> SnrfError:
    """Plan a merge that cannot run for one reason; return it."""
    problems = plan(recipe, out, **options).problems
    assert len(problems) == 1, problems
    return problems[0]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in actual.items()} == {n: t.dtype for n, t in expected.items()}
    assert [name for name, tensor in actual.items() if not same_bits(tensor, expected[name])] == []


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal to the bit, NaN and the sign of zero included."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def files(folder: Path) -> dict[str, int]:
    """Names and sizes of the files of a folder, empty if there is none."""
    return {name: os.path.getsize(folder / name) for name in os.listdir(folder)} if folder.exists() else {}


@contextmanager
def recorded_reads() -> Iterator[dict[Path, list[str]]]:
    """The tensors that are read in the block, by folder, once for each time that all bytes of one are read."""
    reads: dict[Path, list[str]] = defaultdict(list)
    of_shards, of_mergekit, lock = shards._read, LazyTensorLoader.get_tensor, threading.Lock()
    rows: Counter[tuple[Path, str]] = Counter()

    def read_rows(where: ByteRange, start: int, end: int, shape: tuple[int, ...]) -> Tensor:
        (name,) = (n for n, other in shards.byte_ranges(where.path).items() if other.offset == where.offset)
        with lock:
            rows[where.path.parent, name] += end - start
            if rows[where.path.parent, name] % where.shape[0] == 0:
                reads[where.path.parent].append(name)
        return of_shards(where, start, end, shape)

    def get_tensor(self: LazyTensorLoader, key: str, *args: Any, **options: Any) -> Tensor | None:
        reads[Path(self.index.base_path)].append(key)
        return of_mergekit(self, key, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_read", read_rows)
        patch.setattr(LazyTensorLoader, "get_tensor", get_tensor)
        yield reads


def refused(recipe: dict[str, Any], out: Path, *flags: str) -> list[str]:
    """Merge in vain; return the problems named, one or the entries of a numbered list."""
    before = files(out) if out.is_dir() else out.exists()
    result = run(recipe, out, *flags)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert (files(out) if out.is_dir() else out.exists()) == before
    assert "Traceback" not in result.output
    first, *others = result.output[result.output.index("Error: ") + len("Error: ") :].strip().split("\n")
    if not others:
        return [first]
    assert first == f"the merge cannot run, there are {len(others)} problems:"
    assert [line[:5] for line in others] == [f"  {number}. " for number in range(1, len(others) + 1)]
    return [line[5:] for line in others]


def one(recipe: dict[str, Any], out: Path, *flags: str) -> str:
    """Merge in vain for one reason; return it."""
    problems = refused(recipe, out, *flags)
    assert len(problems) == 1, problems
    return problems[0]
