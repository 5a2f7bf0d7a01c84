"""What a GPU would have to do for one probe of Qwen2.5-VL-7B's shape and for one merged tensor, counted without one.

    python benchmarks/device_budget.py --gpu A100-80GB --tokens 512

Operations are seen by a ``TorchDispatchMode``. The forward pass of a layer, the impacts (fused attention) and the
moments of its inputs run on torch's ``meta`` device at the real shape: they compute nothing, and whatever would wait
for the device would fail there. Layers are alike, so one is counted and multiplied. The tensors of a merge run on this
CPU at the real shape, as the number of passes of their update depends on their values.

The bound of an operation is the largest of a launch, its bytes over the bandwidth, and its FLOPs over the peak of its
dtype. Views and allocations cost nothing; every other operation counts as one launch that reads its inputs and writes
its outputs once. Real kernels reach less than the peaks, so a real run takes longer than the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
import transformers
from machine import bar, report
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mergekit_snrf.fusion.fuse import Fusion, fuse_neurons
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.moments import input_sizes
from mergekit_snrf.profiling.impact.blocks import Positions
from mergekit_snrf.profiling.measure.capture import CapturedLayer, run_layers
from mergekit_snrf.profiling.measure.inputs import run_once, watched_inputs
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.result.moments import MomentSums

QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
LAYERS = 28
TENSORS = {"attn.q 3584 x 3584": (3584, 3584), "fwd.up 18944 x 3584": (18944, 3584)}
LAUNCH_BAR = 1400
"""Launches of the impacts of one layer; a loop that grows shows here."""

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operations whose result the host needs before it can continue."""
FREE = {"detach", "lift_fresh", "_unsafe_view"}
FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Gpu:
    """Peaks of a device as its maker states them, without sparsity; TF32 is off where impacts are computed."""

    half_tflops: float
    single_tflops: float
    tb_per_s: float


GPUS = {
    "A100-80GB": Gpu(312, 19.5, 2.0),
    "H100-SXM": Gpu(989, 67, 3.35),
    "RTX-4090": Gpu(165, 82.6, 1.01),
}


class Operation(NamedTuple):
    """One launch."""

    name: str
    moved: int
    flops: int
    half: bool

    def seconds(self, gpu: Gpu, launch: float) -> float:
        """Return the least time that a GPU needs."""
        peak = gpu.half_tflops if self.half else gpu.single_tflops
        return max(launch, self.moved / gpu.tb_per_s / 1e12, self.flops / peak / 1e12)


class _Fused(TorchFunctionMode):
    """Takes fused attention for one operation; on other devices than CUDA torch would compose it of several."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or args[0].device.type != "meta":
            return function(*args, **kwargs)
        query, key, value = args[:3]
        mask = kwargs.get("attn_mask")
        with self.counted.paused():
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
        pairs = query.shape[:-1].numel() * key.shape[-2] / (2 if kwargs.get("is_causal") else 1)
        flops = int(2 * pairs * (query.shape[-1] + value.shape[-1]))
        moved = sum(map(size, [query, key, value, output, *([] if mask is None else [mask])]))
        self.counted.operations.append(Operation("sdpa", moved, flops, query.dtype in _HALF))
        return output


class Counted(TorchDispatchMode):
    """Records the launches within its block, and the operations that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.waits: Counter[str] = Counter()
        self._counts = True
        self._fused = _Fused(self)

    def __enter__(self) -> Counted:
        self._fused.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fused.__exit__(*error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing for the time of a block."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if not self._counts:
            return output
        name = function.overloadpacket.__name__
        before, after = ([one for one in tree_leaves(tree) if isinstance(one, Tensor)] for tree in (args, output))
        if name in WAITS or (name in ("index", "index_put", "index_put_") and _by_mask(args)):
            self.waits[name] += 1
        if name in FREE or function.is_view or (name == "_to_copy" and _crosses(before, after)):
            return output
        flops = (
            flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=output)
            if (function.overloadpacket in flop_registry)
            else sum(one.numel() for one in after)
        )
        half = bool(before) and before[0].dtype in _HALF
        touched = [before[-1], before[-1]] if name == "index_put_" else before + after
        self.operations.append(Operation(name, sum(map(size, touched)), int(flops), half))
        return output

    def seconds(self, gpu: Gpu, launch: float) -> float:
        """Return the sum of the bounds of all operations."""
        return sum(operation.seconds(gpu, launch) for operation in self.operations)


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; elements that a broadcast repeats count once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def _by_mask(args: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1]))


def _crosses(before: list[Tensor], after: list[Tensor]) -> bool:
    """Return whether a copy comes from another device: what is found once a batch is no launch of a layer."""
    return bool(before and after) and before[0].device != after[0].device


def layer_model(shape: dict[str, int], dtype: torch.dtype) -> nn.Module:
    """Return a decoder of two layers of a shape, without memory; Qwen2 has the layers of Qwen2.5-VL's decoder."""
    with torch.device("meta"):
        config = transformers.Qwen2Config(**shape, num_hidden_layers=2, attn_implementation="sdpa")
        return transformers.Qwen2ForCausalLM(config).to(dtype).eval()


def count_layer(shape: dict[str, int], tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Counted]:
    """Return the launches of one decoder layer on one probe: of its forward pass, its impacts, and its moments."""
    model = layer_model(shape, dtype)
    meter = Meter(model, backend="sdpa")
    # What a batch knows about its tokens is found on the CPU, before the layers.
    counted = torch.ones(1, tokens, dtype=torch.bool)
    positions = Positions(counted)
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    found = {"forward pass": Counted(), "impacts": Counted(), "moments": Counted()}

    def forward() -> None:
        # Given as it is without padding: to look whether there is any, the model would ask the device.
        run_once(model, {"input_ids": ids, "attention_mask": {"full_attention": None}})

    def visit(layer: CapturedLayer) -> None:
        # The first layer finds what all layers share; the second is like all others.
        if layer.index == 0:
            meter.layer_impacts(layer, positions, counted)
            return
        with found["impacts"]:
            meter.layer_impacts(layer, positions, counted)

    run_layers(meter.decoder, forward, counted, visit)
    decoder = find_live_decoder(model, name="model")
    sums = MomentSums(input_sizes(decoder.shape), dict.fromkeys(input_sizes(decoder.shape), 1.0), None, 0)
    for one in sums.sums.values():
        one.total, one.counts, one.largest = (part.to("meta") for part in (one.total, one.counts, one.largest))

    def add(site: Any, rows: Tensor) -> None:
        if site.layer == 1:
            with found["moments"]:
                sums.sums[site].add(rows)

    with watched_inputs(decoder, counted, add), torch.no_grad():
        forward()
    with torch.no_grad(), _of_layer(model, found["forward pass"]):
        forward()
    return found


@contextmanager
def _of_layer(model: nn.Module, counted: Counted) -> Iterator[None]:
    """Count what the second layer of a model does."""
    layer = model.get_submodule("model.layers.1")
    handles = [
        layer.register_forward_pre_hook(lambda *_: counted.__enter__() and None),
        layer.register_forward_hook(lambda *_: counted.__exit__(None, None, None)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_tensor(rows: int, columns: int, rank: int) -> Counted:
    """Return the launches of the update of a tenth of the rows of a bfloat16 matrix, run on this CPU."""
    generator = torch.Generator().manual_seed(0)
    side = min(rows, columns, 512)
    left, right = (torch.randn(n, side, generator=generator) for n in (rows, columns))
    delta = (left * torch.arange(1, side + 1).pow(-0.5)) @ right.mT * 1e-3
    target = torch.randn(rows, columns, generator=generator)
    source = (target + delta).to(torch.bfloat16)
    neurons = torch.rand(rows, generator=generator) < 0.1
    counted = Counted()
    with counted, torch.no_grad():
        fuse_neurons(target.to(torch.bfloat16), source, neurons, 0, Fusion(rank=rank))
    return counted


def text_of(name: str, counted: Counted, gpu: Gpu, launch: float, scale: int) -> str:
    """Return one line of a table."""
    operations = counted.operations
    by_launch = sum(operation.seconds(gpu, 0) < launch for operation in operations)
    flops = {half: sum(o.flops for o in operations if o.half is half) for half in (True, False)}
    return (
        f"{name:<22} {len(operations) * scale:8d} {by_launch / max(1, len(operations)):9.0%} "
        f"{sum(o.moved for o in operations) * scale / 1e9:9.2f} {flops[True] * scale / 1e12:10.3f} "
        f"{flops[False] * scale / 1e12:10.3f} {counted.seconds(gpu, launch) * scale * 1e3:11.2f} "
        f"{sum(counted.waits.values()) * scale:6d}"
    )


@click.command()
@click.option("--gpu", "name", type=click.Choice(list(GPUS)), default="A100-80GB", show_default=True)
@click.option("--tflops", type=float, help="Peak of bfloat16; default: that of --gpu.")
@click.option("--single-tflops", type=float, help="Peak of float32 without TF32; default: that of --gpu.")
@click.option("--bandwidth", type=float, help="TB/s; default: that of --gpu.")
@click.option("--launch-us", default=5.0, show_default=True, help="Least time of an operation.")
@click.option("--tokens", default=512, show_default=True, help="Of the probe.")
@click.option("--rank", default=16, show_default=True, help="Of the update of the merged tensors.")
@click.option("--merge/--no-merge", default=True, show_default=True)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    name: str,
    tflops: float | None,
    single_tflops: float | None,
    bandwidth: float | None,
    launch_us: float,
    tokens: int,
    rank: int,
    merge: bool,
    file: Path | None,
) -> None:
    """Print launches, bytes, FLOPs and the bound of the time."""
    usual = GPUS[name]
    gpu = Gpu(tflops or usual.half_tflops, single_tflops or usual.single_tflops, bandwidth or usual.tb_per_s)
    launch = launch_us * 1e-6
    click.echo(
        f"{name}: {gpu.half_tflops:g} TFLOP/s bfloat16, {gpu.single_tflops:g} float32, {gpu.tb_per_s:g} TB/s, "
        f"{launch_us:g} us a launch"
    )
    click.echo(f"one probe of {tokens} tokens, {LAYERS} layers (one counted, times {LAYERS}); each tensor once")
    click.echo(f"{'':<22} launches  launch-bound  GB moved TFLOP half TFLOP single bound, ms  waits")
    parts = count_layer(QWEN_7B, tokens)
    rows = {part: (counted, LAYERS) for part, counted in parts.items()}
    if merge:
        rows |= {tensor: (count_tensor(*shape, rank), 1) for tensor, shape in TENSORS.items()}
    for part, (counted, scale) in rows.items():
        click.echo(text_of(part, counted, gpu, launch, scale))
        if counted.waits:
            click.echo(f"{'':<22} waits: {', '.join(f'{n} {what}' for what, n in counted.waits.most_common())}")
    verdicts = [
        bar("launches of the impacts of a layer", len(parts["impacts"].operations), LAUNCH_BAR),
        bar("waits for the device inside a layer", sum(sum(c.waits.values()) for c in parts.values()), 0),
    ]
    figures = {
        f"{part}, bound ms": [counted.seconds(gpu, launch) * scale * 1e3] for part, (counted, scale) in rows.items()
    }
    report(file, "device_budget", torch.get_num_threads(), figures, verdicts, gpu=name, tokens=tokens)


if __name__ == "__main__":
    main()
