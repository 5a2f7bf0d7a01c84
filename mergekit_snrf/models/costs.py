"""What profiling and merging a pair will cost, from shapes and sizes alone: estimates, not measurements."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.models.moments import DEFAULT_SKETCH, DENSE_LIMIT, SETS, input_sizes
from mergekit_snrf.neurons.sites import PROJECTIONS

STATISTICS_BYTES = 92
"""Bytes of statistics for each neuron of attn and fwd.up while a model is profiled."""
IMPACT_PASSES = 7
"""Forward passes that the impacts of one probe take as much time as; docs/speed.md has the measurement."""
PROBE_TOKENS = 512


@dataclass(frozen=True)
class Device:
    """What a device sustains: FLOP/s in the dtype of the weights, and bytes/s of weights read."""

    name: str
    flops: float
    bandwidth: float


DEVICES = (Device("GPU", 1e14, 1e12), Device("CPU", 2e11, 3e10))


@dataclass(frozen=True)
class Costs:
    """Bytes, FLOP and seconds of one pair.

    Attributes:
        download: bytes of the models that are not local folders.
        merged: bytes of the merged model.
        adapter: bytes of the adapter at ``rank``, in float32.
        read: bytes of the source that a merge reads at most: the five projections of every layer.
        memory: bytes of the larger model, which is loaded alone, and of the statistics.
        moments: bytes of the moments file.
        flop: of all passes of profiling.
        weights: bytes of weights read while answers are generated.
    """

    download: int
    merged: int
    adapter: int
    read: int
    memory: int
    moments: int
    flop: float
    weights: float

    @classmethod
    def of(
        cls, target: Checkpoint, source: Checkpoint, *, rank: int, limit: int, batch: int, answer: int, keep: list[int]
    ) -> Costs:
        """Estimate from headers.

        Args:
            limit: probes of each side, and of each kind to keep.
            batch: probes in a batch.
            answer: tokens generated for a probe.
            keep: the same for each kind to keep.
        """
        decoder = find_decoder(target)
        shape = decoder.shape
        names = [decoder.weight_name(site) for site in shape.sites()]
        edited = [target.tensors[name] for name in names]
        neurons = shape.layers * sum(shape.neurons(name) for name in PROJECTIONS if name != "fwd.down")
        models, batches = (target, source), ceil(limit / batch)
        parameters = [sum(tensor.parameters for tensor in model.tensors.values()) for model in models]
        passes = IMPACT_PASSES * sum(parameters) + len(keep) * parameters[0]
        return cls(
            download=sum(model.bytes for model in models if model.folder is None),
            merged=target.bytes,
            adapter=4 * rank * sum(sum(tensor.shape) for tensor in edited),
            read=sum(source.tensors[find_decoder(source).weight_name(site)].bytes for site in shape.sites()),
            memory=max(model.bytes for model in models) + STATISTICS_BYTES * neurons,
            moments=len(SETS) * sum(map(_moment_bytes, input_sizes(shape).values())),
            flop=2.0 * passes * limit * PROBE_TOKENS,
            weights=batches * (answer * (target.bytes + source.bytes) + sum(keep) * target.bytes),
        )

    def seconds(self, device: Device) -> float:
        """Return the time of profiling."""
        return self.flop / device.flops + self.weights / device.bandwidth


def _moment_bytes(size: int) -> int:
    """Return the size in a file of the moment of one input."""
    return size * (size + 1) + 4 * size if size <= DENSE_LIMIT else 2 * size * min(DEFAULT_SKETCH, size)
