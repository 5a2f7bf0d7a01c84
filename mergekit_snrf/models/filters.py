"""Filters of ``update: regmean``, made from a moments file while weights are edited."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.fusion.regmean import Filter, regmean_filter
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.moments import READERS, InputSite, Moments
from mergekit_snrf.neurons.shape import DecoderShape
from mergekit_snrf.neurons.sites import Site

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
    sizes = {"attn": shape.hidden_size, "up": shape.hidden_size, "down": shape.intermediate_size}
    for site, size in moments.sizes.items():
        if size != sizes[site.input]:
            what = f"has moments of {size} inputs at {site}, but {model} has {sizes[site.input]}"
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
