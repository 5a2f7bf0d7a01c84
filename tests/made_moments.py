"""Moments files of random activations, and F computed from such a file with float64 numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mergekit_snrf.fusion.regmean import DenseMoment, Moment, SketchMoment
from mergekit_snrf.models.moments import INPUTS, SETS, InputSite, MomentsProvenance, moment_tensors, write_moments

# Written down here and not taken from the package: which input a projection reads belongs to the oracle.
INPUT_OF = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "up_proj": "up", "down_proj": "down"}


def sizes_of(layers: int, hidden: int, intermediate: int) -> dict[InputSite, int]:
    sizes = {"attn": hidden, "up": hidden, "down": intermediate}
    return {InputSite(layer, name): sizes[name] for layer in range(layers) for name in INPUTS}


def random_moment(size: int, seed: int, *, tokens: int, sketch: int | None = None) -> Moment:
    """The moment of correlated inputs whose spectrum falls; rank-deficient where tokens are fewer than inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((size, size)) / np.sqrt(np.arange(1, size + 1))
    x = rng.standard_normal((tokens, size)) @ mixing.T
    moment = torch.from_numpy(x.T @ x / tokens)
    if sketch is None:
        return DenseMoment.of(moment)
    values, vectors = torch.linalg.eigh(moment)
    return SketchMoment.of(vectors[:, -sketch:], values[-sketch:], float(moment.trace()))


def write_random_moments(
    path: Path,
    sizes: Mapping[InputSite, int],
    *,
    tokens: int = 400,
    sketches: Mapping[str, int] | None = None,
    **own: Any,
) -> Path:
    """Write moments of random inputs; `sketches` by input, `own` fields replace those of the provenance."""
    tensors = {}
    for number, (site, size) in enumerate(sizes.items()):
        for offset, which in enumerate(SETS):
            moment = random_moment(size, 2 * number + offset, tokens=tokens, sketch=(sketches or {}).get(site.input))
            tensors |= moment_tensors(site, which, moment, 1.0 + offset)
    provenance = MomentsProvenance.model_validate({"keep": [{"name": "read"}, {"name": "find"}], **own})
    write_moments(path, tensors, provenance)
    return path


def matrix_of(tensors: Mapping[str, torch.Tensor], stem: str) -> np.ndarray:
    """C as the format's description says it, `stem` such as `layers.0.attn.gain`."""
    if f"{stem}.factor" in tensors:
        factor = tensors[f"{stem}.factor"].double().numpy()
        return factor @ factor.T + float(tensors[f"{stem}.rest"]) * np.eye(len(factor))
    scale = tensors[f"{stem}.scale"].double().numpy()
    correlation = np.zeros((len(scale), len(scale)))
    correlation[np.triu_indices(len(scale))] = tensors[f"{stem}.correlation"].double().numpy()
    correlation += np.triu(correlation, 1).T
    return correlation * np.outer(scale, scale)


class FilterOracle:
    """F of every input of a moments file, `C_r (C_r + keep C_p + eps (1 + keep) I)^-1`."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_file(path)

    def of(self, layer: int, module: str, keep: float, *, eps: float = 1e-3) -> np.ndarray:
        stem = f"layers.{layer}.{INPUT_OF[module.rsplit('.', 1)[-1]]}"
        gain, kept = (matrix_of(self._tensors, f"{stem}.{which}") for which in ("gain", "keep"))
        return gain @ np.linalg.inv(gain + keep * kept + eps * (1 + keep) * np.eye(len(gain)))
