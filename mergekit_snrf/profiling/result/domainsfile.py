"""Files of counts: how often every neuron of a model is active on the tokens of several domains.

Format ``snrf-domains``, version 1, safetensors of int64. Kinds of tokens are image, prompt and answer.

- ``text.layers.{l}.active`` [domains, kinds, neurons]: tokens with an activation above zero in the text decoder;
- ``vision.layers.{l}.active``, ``projector.{i}.active`` [domains, neurons]: the same of the vision tower and the
  projector;
- ``text.tokens`` [domains, kinds], ``vision.tokens`` [domains] and ``projector.tokens`` [domains]: all tokens.

Nothing is decided in it: thresholds, kinds of tokens and assignment are chosen afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.container import Format
from mergekit_snrf.models.activations import DECODER, MODULES, activation_key
from mergekit_snrf.neurons.maskfile import RunProvenance

DOMAINS = Format("snrf-domains", 1, "make one with snrf-profile and domains: in its file", "count again")
KINDS = ("image", "prompt", "answer")
"""Kinds of tokens in the text decoder."""

_KEY = re.compile(r"(text\.layers|vision\.layers|projector)\.(0|[1-9][0-9]{0,3})\.active")


def tokens_key(module: str) -> str:
    """Return the key of the numbers of tokens of a module."""
    return activation_key(module, 0).split(".")[0] + ".tokens"


class DomainsProvenance(RunProvenance):
    """Where counts come from.

    Attributes:
        names: of the domains, in the order of the tensors.
        probes: of the domains, as in masks.
    """

    names: list[str]
    probes: list[dict[str, Any]] | None = None


@dataclass(frozen=True, repr=False)
class Domains:
    """A checked file of counts.

    Attributes:
        active: by module and layer: [domains, kinds, neurons] in the decoder, else [domains, neurons].
        tokens: by module: [domains, kinds] in the decoder, else [domains].
    """

    active: Mapping[str, list[Int64[Tensor, "domains *kinds neurons"]]]
    tokens: Mapping[str, Int64[Tensor, domains * kinds]]
    provenance: DomainsProvenance
    path: str = field(default="counts")

    @property
    def names(self) -> list[str]:
        """The domains."""
        return self.provenance.names

    def __repr__(self) -> str:
        """Return the path and the sizes."""
        sizes = ", ".join(f"{len(layers)} layers of the {module}" for module, layers in self.active.items())
        return f"<Domains {self.path}: {', '.join(self.names)}; {sizes}>"


def write_domains(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], provenance: DomainsProvenance) -> None:
    """Write a file of counts; equal arguments give equal bytes.

    Raises:
        SnrfError: the file cannot be written, or another kind of file lies there.
    """
    DOMAINS.check_replaceable(path)
    content = provenance.model_dump(mode="json", exclude_none=True)
    DOMAINS.write(path, tensors, content)


def read_domains(path: str | os.PathLike[str]) -> Domains:
    """Read and check a file of counts.

    Raises:
        SnrfError: the file is missing, damaged or of another format, a tensor is missing, unknown or of another
            shape, or there are more active tokens than tokens.
    """
    tensors, content = DOMAINS.read(path)
    provenance = DOMAINS.parsed(path, content, DomainsProvenance)
    domains = len(provenance.names)
    active: dict[str, list[Tensor]] = {}
    tokens: dict[str, Tensor] = {}
    for module in MODULES:
        stem = activation_key(module, 0).removesuffix("0")
        count = sum(key.startswith(stem) for key in tensors if _KEY.fullmatch(key))
        if not count:
            continue
        kinds = [len(KINDS)] if module == DECODER else []
        tokens[module] = _checked(path, tensors, tokens_key(module), [domains, *kinds])
        layers = [f"{activation_key(module, layer)}.active" for layer in range(count)]
        active[module] = [_checked(path, tensors, key, [domains, *kinds, None]) for key in layers]
        for key, layer in zip(layers, active[module], strict=True):
            if bool((layer < 0).any()) or bool((layer > tokens[module][..., None]).any()):
                raise SnrfError(path, f"tensor {key!r} has a count that is not in [0, tokens]", DOMAINS.again)
    if tensors or DECODER not in active:
        key = next(iter(tensors), "text.layers.0.active")
        raise SnrfError(path, f"tensor {key!r} is {'unknown' if tensors else 'missing'}", DOMAINS.again)
    return Domains(active, tokens, provenance, str(path))


def _checked(path: object, tensors: dict[str, Tensor], key: str, shape: list[int | None]) -> Tensor:
    """Take a tensor of a shape, in which None is any size, out of ``tensors``."""
    tensor = tensors.pop(key, None)
    found = None if tensor is None else [tensor.dtype, *tensor.shape]
    if tensor is None or tensor.dtype != torch.int64 or tensor.ndim != len(shape):
        raise SnrfError(path, f"tensor {key!r} must be int64 of {len(shape)} axes, found {found}", DOMAINS.again)
    if any(want is not None and size != want for size, want in zip(tensor.shape, shape, strict=True)):
        raise SnrfError(path, f"tensor {key!r} must have the shape {shape}, found {list(tensor.shape)}", DOMAINS.again)
    return tensor
