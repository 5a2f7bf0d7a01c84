"""Moments files, second moments of a model's inputs on probes to gain and to keep, and the filters made from them.

Format ``snrf-moments``, version 1, safetensors. For every layer l, input ``attn`` (read by q, k and v), ``up`` and
``down``, and set ``gain`` and ``keep``, with the moment C scaled to trace d:

- dense: ``layers.{l}.{input}.{set}.scale`` float32 [d] and ``.correlation`` float16 [d (d + 1) / 2];
- sketch: ``.factor`` float16 [d, k] and ``.rest`` float32 [1];
- ``.clip`` float32 [1]: the norm at which inputs were clipped.

``fusion.regmean`` says what they mean. A file of a 7B model has gigabytes: only its header is read at once.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.files.container import Format
from mergekit_snrf.files.references import local_path
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.fusion.regmean import DenseMoment, Filter, Moment, SketchMoment, regmean_filter
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.neurons.maskfile import RunProvenance
from mergekit_snrf.neurons.shape import DecoderShape
from mergekit_snrf.neurons.sites import Site

MOMENTS = Format(
    "snrf-moments",
    1,
    "make one with snrf-profile and keep: in profile.yml, or with 'snrf moments'",
    "take the moments again",
    {"snrf-mask": "give a mask as masks: FILE, without update: regmean"},
)
SETS = ("gain", "keep")
INPUTS = {"attn": "self_attn.q_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
"""Inputs of a decoder layer, and the module that reads each; q, k and v read the same."""
READERS = {"attn.q": "attn", "attn.k": "attn", "attn.v": "attn", "fwd.up": "up", "fwd.down": "down"}
"""The input that each projection reads."""
DENSE_LIMIT, DEFAULT_SKETCH = 4096, 512
"""Inputs up to this size are stored dense unless a sketch is asked for, larger ones as so many eigenvectors."""

_KEY = re.compile(
    rf"layers\.(?P<layer>0|[1-9][0-9]{{0,3}})\.(?P<input>{'|'.join(INPUTS)})\.(?P<set>{'|'.join(SETS)})"
    r"\.(?P<name>scale|correlation|factor|rest|clip)"
)


@dataclass(frozen=True, order=True)
class InputSite:
    """One input of one decoder layer."""

    layer: int
    input: str

    @property
    def key(self) -> str:
        """Its key in moments files, ``layers.14.attn``."""
        return f"layers.{self.layer}.{self.input}"

    @property
    def module(self) -> str:
        """The path, below ``...layers.{layer}.``, of a module that reads it."""
        return INPUTS[self.input]

    def __str__(self) -> str:
        return self.key


def input_sizes(shape: DecoderShape) -> dict[InputSite, int]:
    """Return every input of a decoder with its size."""
    sizes = {"attn": shape.hidden_size, "up": shape.hidden_size, "down": shape.intermediate_size}
    return {InputSite(layer, name): sizes[name] for layer in range(shape.layers) for name in INPUTS}


class MomentsProvenance(RunProvenance):
    """Where moments come from.

    Attributes:
        model: the target.
        gain: probes of the set to gain, as in masks.
        keep: one entry for each kind of probes to keep.
        inputs: by key and set: tokens, how many were clipped, the largest and the median norm.
    """

    gain: dict[str, Any] | None = None
    keep: list[dict[str, Any]] | None = None
    inputs: dict[str, dict[str, dict[str, float]]] | None = None
    sketch: int | None = None


@dataclass(frozen=True)
class Moments:
    """A checked moments file; ``moment`` reads one moment at a time.

    Attributes:
        sizes: d of every input.
        sketches: k of the inputs that are stored as sketches.
        path: the file, for messages and for reading.
    """

    sizes: Mapping[InputSite, int]
    sketches: Mapping[InputSite, int]
    provenance: MomentsProvenance
    path: str

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max((site.layer for site in self.sizes), default=-1)

    def moment(self, site: InputSite, which: str) -> Moment:
        """Read one moment, ``gain`` or ``keep``.

        ``SnrfError``: the file changed, or holds values that no moment has.
        """
        with MOMENTS.opened(self.path) as (file, _):
            names = ("factor", "rest") if site in self.sketches else ("scale", "correlation")
            first, second = (file.get_tensor(f"{site.key}.{which}.{name}") for name in names)
        for name, tensor in zip(names, (first, second), strict=True):
            if not bool(tensor.isfinite().all()):
                raise self._damaged(f"{site.key}.{which}.{name}", "holds NaN or infinite values")
        try:
            if site in self.sketches:
                return SketchMoment(first, float(second))
            if bool((first < 0).any()) or bool((second.abs() > 1).any()):
                raise ValueError("holds a negative scale, or a correlation that is not in [-1, 1]")
            return DenseMoment(first, second)
        except ValueError as error:
            raise self._damaged(f"{site.key}.{which}", str(error)) from None

    def _damaged(self, tensor: str, what: str) -> SnrfError:
        return SnrfError(self.path, f"tensor {tensor!r} {what}", MOMENTS.again)

    def __repr__(self) -> str:
        return f"Moments({self.path}: {self.layers} layers, {len(self.sketches)} of {len(self.sizes)} inputs sketched)"


def read_moments(path: str | os.PathLike[str]) -> Moments:
    """Read and check the header of a moments file: names, dtypes and shapes of all tensors, and the provenance.

    Raises:
        SnrfError: the file is missing or of another format, or a tensor is missing, unknown or of another shape.
    """
    where = os.fspath(path)
    with MOMENTS.opened(where) as (file, content):
        found = {key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    sizes: dict[InputSite, int] = {}
    sketches: dict[InputSite, int] = {}
    for key, (_, shape) in found.items():
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        site = InputSite(int(match["layer"]), match["input"])
        if match["name"] == "scale" and len(shape) == 1:
            sizes[site] = shape[0]
        elif match["name"] == "factor" and len(shape) == 2:
            sizes[site], sketches[site] = shape
    for site in (InputSite(n, name) for n in range(1 + max((s.layer for s in sizes), default=0)) for name in INPUTS):
        if site not in sizes:
            raise SnrfError(where, f"has no moments of {site}", MOMENTS.again)
    expected = {key: one for site in sizes for key, one in _parts(site, sizes[site], sketches.get(site)).items()}
    for key in sorted(found.keys() | expected.keys()):
        wanted, got = (f"{one[0]} {list(one[1])}" if one else "absent" for one in (expected.get(key), found.get(key)))
        if wanted != got:
            raise SnrfError(where, f"tensor {key!r} must be {wanted}, and is {got}", MOMENTS.again)
    return Moments(sizes, sketches, MOMENTS.parsed(where, content, MomentsProvenance), where)


def moments_of(moments: str | os.PathLike[str] | Moments) -> Moments:
    """Return moments, read from a path or ``hf://owner/repo@revision/path`` if need be."""
    if isinstance(moments, Moments):
        return moments
    if not isinstance(moments, str | os.PathLike):
        raise unexpected("moments", moments, "the path of a moments file")
    return read_moments(local_path(moments))


def _parts(site: InputSite, size: int, sketch: int | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that a file holds of an input, by key."""
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"clip": ("F32", (1,))}
    if sketch is not None:
        parts |= {"factor": ("F16", (size, sketch)), "rest": ("F32", (1,))}
    else:
        parts |= {"scale": ("F32", (size,)), "correlation": ("F16", (size * (size + 1) // 2,))}
    return {f"{site.key}.{which}.{name}": part for which in SETS for name, part in parts.items()}


def moment_tensors(site: InputSite, which: str, moment: Moment, clip: float) -> dict[str, Tensor]:
    """Return what a file holds of one moment, by key."""
    stem = f"{site.key}.{which}"
    parts: dict[str, Tensor] = {"clip": torch.tensor([clip], dtype=torch.float32)}
    if isinstance(moment, DenseMoment):
        parts |= {"scale": moment.scale, "correlation": moment.correlation}
    else:
        parts |= {"factor": moment.factor, "rest": torch.tensor([moment.rest], dtype=torch.float32)}
    return {f"{stem}.{name}": tensor.cpu() for name, tensor in parts.items()}


def write_moments(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], provenance: MomentsProvenance) -> None:
    """Write a moments file from the parts of all its moments.

    ``SnrfError``: the file cannot be written, or another kind of file lies there.
    """
    MOMENTS.check_replaceable(path)
    MOMENTS.write(path, tensors, provenance.model_dump(mode="json", exclude_none=True))


# q, k and v of a layer share one filter; so few are held that memory does not grow with the depth.
_HELD = 2


class Filters:
    """F of every input, computed once and shared by the tensors that read it; for several threads."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[InputSite, float], Future[Filter]] = OrderedDict()

    def of(self, site: Site, keep: float) -> Filter:
        """Return the filter of the input that a projection reads; ``SnrfError``: the moments file changed."""
        key = _input(site), keep
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            else:
                mine = self._held[key] = Future()
                if len(self._held) > _HELD:
                    self._held.popitem(last=False)
        if found is not None:
            return found.result()
        try:
            gain, kept = (self._moments.moment(key[0], which) for which in ("gain", "keep"))
            with one_thread():
                mine.set_result(regmean_filter(gain, kept, keep))
        except BaseException as error:
            mine.set_exception(error)
            raise
        return mine.result()

    def bytes(self, site: Site) -> int:
        """Return about how many bytes it takes to compute the filter of a projection's input, in float64."""
        source, size = _input(site), self._moments.sizes[_input(site)]
        width = self._moments.sketches.get(source)
        return 40 * size * (size if width is None else 2 * width)


def _input(site: Site) -> InputSite:
    return InputSite(site.layer, READERS[site.projection])


def check_moments(moments: Moments, shape: DecoderShape, model: str) -> None:
    """Raise ``SnrfError`` unless moments are of a decoder of this shape, that of ``model``, and have probes to keep."""
    if moments.layers != shape.layers:
        what = f"has moments of {moments.layers} layers, but {model} has {shape.layers}"
        raise SnrfError(moments.path, what, "use moments of this model")
    for site, wanted in input_sizes(shape).items():
        if (size := moments.sizes[site]) != wanted:
            what = f"has moments of {size} inputs at {site}, but {model} has {wanted}"
            raise SnrfError(moments.path, what, "use moments of this model")
    if moments.provenance.keep == []:
        raise SnrfError(moments.path, "was taken without probes to keep", "add keep: to profile.yml and take it again")


def compare_moments(moments: Moments, target: Checkpoint) -> list[str]:
    """Return a warning where moments say that they were taken on another model."""
    found = moments.provenance.model
    if found is None or found.config_sha256 in (None, target.config_sha256):
        return []
    taken = found.path or "another model"
    return [f"{moments.path}: taken on {taken}, whose config.json differs from that of {target.name}"]


def filter_at(site: Site, fusion: Fusion, filters: Filters | None) -> Filter | None:
    """Return the filter of a site, None where its update needs none; ``SnrfError``: regmean without moments."""
    if fusion.update != "regmean":
        return None
    if filters is None:
        raise SnrfError(None, "is missing", "name the moments file of the target", field="moments")
    return filters.of(site, fusion.keep)
