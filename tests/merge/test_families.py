"""Merges of every family and layout, through mergekit's own command, against oracles outside the code.

Edited rows and columns are compared with numpy in float64, the merged folder with transformers' ``from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SOURCE_OF, TARGETS, example_inputs, load, make_source, make_target, read
from family_table import passed
from pair import Pair, merge
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import Decoder, find_decoder
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

BETA, RANK = 0.5, 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {family: make_source(folder / family, family) for family in sorted(set(SOURCE_OF.values()))}


def some_neurons(decoder: Decoder) -> NeuronSet:
    """A third of every site, but the last layer's attn.k and fwd.down are left empty."""
    generator = torch.Generator().manual_seed(7)
    last = decoder.shape.layers - 1
    return NeuronSet(
        {
            site: torch.rand(decoder.shape.neurons(site.projection), generator=generator) < 1 / 3
            for site in decoder.shape.sites()
            if site not in (Site(last, "attn.k"), Site(last, "fwd.down"))
        }
    )


def bf16_ulp(value: np.ndarray) -> np.ndarray:
    """The distance between neighbouring bfloat16 numbers (8 significant bits) at ``value``."""
    exponent = np.floor(np.log2(np.maximum(np.abs(value), 2.0**-126)))
    return 2.0 ** (exponent - 7)


def expected_weight(target: Tensor, source: Tensor, member: Tensor, axis: int) -> np.ndarray:
    """Eq. 9-11 in float64 numpy."""
    before = target.double().numpy()
    u, s, vt = np.linalg.svd(source.double().numpy() - before, full_matrices=False)
    delta_r = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    mask = member.numpy()[:, None] if axis == 0 else member.numpy()[None, :]
    return before + BETA * np.where(mask, delta_r, 0.0)


def live_weight(model: torch.nn.Module, site: Site) -> torch.nn.Parameter:
    """The weight of a projection of the text decoder in a live model, found by module names alone."""
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith(f"layers.{site.layer}.{site.module}")
        and not any(part in name for part in ("vision", "visual", "vpm", "resampler", "connector"))
    ]
    assert len(found) == 1
    return found[0].weight


@pytest.mark.parametrize(("family", "layout"), list(TARGETS))
def test_merge_of_family(
    family: str, layout: str, sources: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target = make_target(tmp_path / "target", family, layout)
    source = sources[SOURCE_OF[family]]
    mine, theirs = find_decoder(open_checkpoint(str(target))), find_decoder(open_checkpoint(str(source)))
    neurons = some_neurons(mine)
    write_mask(tmp_path / "mask.safetensors", neurons)
    remote = ["--trust-remote-code"] if open_checkpoint(str(target)).needs_remote_code else []
    recipe, out = Pair(tmp_path, target, source, tmp_path / "mask.safetensors", neurons).recipe(), tmp_path / "out"
    before, donor, after = read(target), read(source), merge(recipe, out, *remote)
    assert after.keys() == before.keys()
    edited = {mine.weight_name(site): site for site in neurons.nonempty()}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
        if name not in edited:
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
            continue
        site = edited[name]
        member = neurons[site]
        kept = tensor[~member] if site.axis == 0 else tensor[:, ~member]
        untouched = before[name][~member] if site.axis == 0 else before[name][:, ~member]
        assert torch.equal(kept, untouched), name
        expected = expected_weight(before[name], donor[theirs.weight_name(site)], member, site.axis)
        error = np.abs(tensor.double().numpy() - expected)
        assert np.all(error <= bf16_ulp(expected)), (name, error.max())
        assert not torch.equal(tensor, before[name]), name

    merged, original = load(out), load(target)
    with torch.no_grad():
        for site in neurons.nonempty():
            weight = live_weight(original, site)
            weight.copy_(after[mine.weight_name(site)])
        inputs = example_inputs(target)
        assert torch.equal(merged(**inputs).logits, original(**inputs).logits)

    for file in target.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".py") and ".index." not in file.name:
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=bool(remote)).get_vocab()
    processor = "none"
    if any((target / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        processor = "loads" if _loads(target) else "needs torchvision"
        if processor == "loads":
            assert _loads(out)
    request.config.stash[passed][family, layout] = (mine.prefix, SOURCE_OF[family], processor)


def _loads(folder: Path) -> bool:
    try:
        AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        if "orchvision" not in str(error):
            raise
        return False
    return True
