"""CPU time, extra memory and exactness of the impact of every neuron, beside a forward pass and two rivals in one run.

    python benchmarks/profiling.py --tokens 512 --tokens 128 --json profile.json

The model has the shape of SmolLM2-135M and random weights, or is ``--model``. The impacts of all five projections are
those of ``Meter.impacts``, whose time includes the forward pass that it needs. The rivals cover q and k only and no
forward pass, so every ratio to them is stated to their advantage:

- the tensor of the released code, written here from its description: for every head and every dimension the attention
  weights without it, as [heads, dim, tokens, tokens]; timed on a few layers and scaled to all;
- brute force: zero one row of q_proj or k_proj and run the attention module again; timed on a few neurons of one layer
  and scaled to all of them.

The limit is the forward pass and what no exact method can leave out: for every neuron and attended pair an exponential
and a product with V, each at the rate that this machine reaches on blocks of the size that the impacts use. Everything
else (changing the scores, sums, masks, the other projections) is on top of it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click
import torch
import transformers
from machine import bar, report, title

from mergekit_snrf.profiling.impact.blocks import QUERY_ROWS, block_size, product
from mergekit_snrf.profiling.impact.layer import attention_impact, column_norms, ffn_impact
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.notebook import profile
from mergekit_snrf.profiling.probes.batches import ProbeBatch


def load_file(name: str, path: Path) -> ModuleType:
    """Import a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from torch import Tensor, nn

BRUTE_FORCE = Path(__file__).parents[1] / "tests" / "profiling" / "brute_force.py"
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
}
FLOAT32_BAR, FLOAT64_BAR = 1e-5, 1e-12
GROWTH_PROBES = (8, 32)
# Peaks of one process differ by a few MB from run to run; probes that were kept would add far more.
GROWTH_MB = 10.0


def probe(number: int, tokens: int, vocabulary: int, size: int = 1) -> ProbeBatch:
    """Return a batch of random tokens without padding, by its number."""
    ids = torch.randint(8, vocabulary, (size, tokens), generator=torch.Generator().manual_seed(number))
    mask = torch.ones_like(ids)
    return ProbeBatch(tuple(range(size)), {"input_ids": ids, "attention_mask": mask}, mask, mask.bool())


def load(folder: str | None) -> nn.Module:
    """Return the model in float32, or one of random weights with the shape of SmolLM2-135M."""
    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.0625,  # 1.5 / sqrt(hidden_size): scores of a trained model's size, not a flat softmax.
    )
    return transformers.LlamaForCausalLM(config).eval()


def forward(model: nn.Module, batch: ProbeBatch) -> None:
    """Run the forward pass that ``Meter`` runs: without a cache and with the logits of the last position only."""
    with torch.no_grad():
        model(**batch.inputs, use_cache=False, logits_to_keep=1)


def cpu_seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Return the median CPU time of some calls."""
    seconds = []
    for _ in range(calls):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


@contextmanager
def hooked(model: nn.Module, layers: int) -> Iterator[list[dict[str, Any]]]:
    """Collect the queries, keys and the call of the attention of the first layers."""
    seen: list[dict[str, Any]] = [{} for _ in range(layers)]
    handles = []
    for found, layer in zip(seen, model.model.layers, strict=False):
        attention = layer.self_attn

        def call(_: Any, args: Any, kwargs: Any, found: dict[str, Any] = found) -> None:
            found["call"] = args, {**kwargs, "past_key_values": None}

        handles.append(attention.register_forward_pre_hook(call, with_kwargs=True))
        for name in ("q_proj", "k_proj"):

            def output(_: Any, args: Any, out: Tensor, found: dict[str, Any] = found, name: str = name) -> None:
                found[name] = out.detach()

            handles.append(getattr(attention, name).register_forward_hook(output))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def released_tensor(query: Tensor, key: Tensor, head_dim: int, limit_bytes: int) -> Tensor:
    """Return the squared change of the attention weights without each dimension of each query head: [heads, head_dim].

    S is the score of the whole head and dS_k = q_k k_k^T / sqrt(head_dim) the part of dimension k; the change is
    softmax(S - dS_k) - softmax(S), summed over queries and keys. Squares of a head serve q, and summed over a group k,
    so that one pass covers both. RoPE is left out: it moves no work. As many heads at a time as the tensor's limit
    allows, and in place where that is possible.

    query, key: [1, tokens, heads * head_dim]
    """
    q = query[0].unflatten(-1, (-1, head_dim)).transpose(0, 1)
    k = key[0].unflatten(-1, (-1, head_dim)).transpose(0, 1)
    k = k.repeat_interleave(len(q) // len(k), 0)
    tokens = q.shape[1]
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)
    step = max(1, limit_bytes // (head_dim * tokens * tokens * 4))
    found = []
    for q_heads, k_heads in zip(q.split(step), k.split(step), strict=True):
        score = q_heads @ k_heads.mT * head_dim**-0.5 + mask
        # [heads, dim, tokens, 1] * [heads, dim, 1, tokens]
        part = (q_heads.mT * head_dim**-0.5).unsqueeze(-1) * k_heads.mT.unsqueeze(-2)
        changed = torch.sub(score.unsqueeze(1), part, out=part).softmax(-1)
        del part
        found.append(changed.sub_(score.softmax(-1).unsqueeze(1)).square_().sum((-2, -1)))
    return torch.cat(found)


def brute_force(attention: nn.Module, call: tuple[Any, dict[str, Any]], neurons: int) -> None:
    """Zero a row, run the attention module, compare and restore, for some neurons spread evenly over q and k."""
    rows = [(linear, row) for linear in (attention.q_proj, attention.k_proj) for row in range(linear.out_features)]
    whole = attention(*call[0], **call[1])[0]
    for linear, row in rows[:: max(1, len(rows) // neurons)][:neurons]:
        kept = linear.weight[row].clone()
        linear.weight[row] = 0
        (attention(*call[0], **call[1])[0] - whole).norm()
        linear.weight[row] = kept


def measure_time(
    model: nn.Module, tokens: int, rounds: int, layers: int, neurons: int, limit_bytes: int
) -> dict[str, list[float]]:
    """Return the CPU seconds of one probe in every round by method; the rivals scaled to all layers and neurons."""
    batch = probe(0, tokens, model.config.vocab_size)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    depth = config.num_hidden_layers
    layers = min(layers, depth)
    total = (config.num_attention_heads + config.num_key_value_heads) * head_dim * depth
    neurons = min(neurons, total // depth)
    with hooked(model, layers) as seen:
        forward(model, batch)
    attention = model.model.layers[0].self_attn
    meter = Meter(model)

    def released() -> None:
        for found in seen:
            released_tensor(found["q_proj"], found["k_proj"], head_dim, limit_bytes)

    def brute() -> None:
        brute_force(attention, seen[0]["call"], neurons)

    def plain() -> None:
        forward(model, batch)

    def impacts() -> None:
        meter.impacts(batch)

    # The first batch of a meter also checks every layer, and the first call of each method fills buffers.
    impacts()
    names = ("forward", "impacts", "limit", "released", "brute_force")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        released()
        brute()
        # Rounds of all methods rather than all rounds of one: a slow phase of the machine then hits every method.
        for _ in range(rounds):
            seconds["forward"].append(cpu_seconds(plain, 3))
            seconds["impacts"].append(cpu_seconds(impacts))
            seconds["limit"].append(seconds["forward"][-1] + limit_seconds(config, tokens))
            seconds["released"].append(cpu_seconds(released) * depth / layers)
            # The one run of the whole module counts as one more neuron.
            seconds["brute_force"].append(cpu_seconds(brute) * total / (neurons + 1))
    return seconds


def limit_seconds(config: Any, tokens: int) -> float:
    """Return the CPU seconds of a probe's exponentials and products with V, at this machine's rates."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = max(16, tokens // 2)
    dims = max(1, min(head_dim, block_size(torch.device("cpu"), None) // (4 * QUERY_ROWS * keys)))
    scores, values = torch.rand(dims, QUERY_ROWS, keys), torch.rand(head_dim, keys)
    weights = torch.empty_like(scores)

    def rate(function: Callable[[], object]) -> float:
        calls = 1 + 2**26 // scores.numel()
        return cpu_seconds(lambda: [function() for _ in range(calls)], 3) / (calls * scores.numel())

    one = rate(lambda: torch.exp(scores, out=weights)) + rate(lambda: product(scores, values))
    # Neurons of q, and those of k once for each query head that reads them.
    neurons = 2 * config.num_attention_heads * head_dim * config.num_hidden_layers
    return one * neurons * tokens * (tokens + 1) / 2


def peak_mb(function: Callable[[], object]) -> float:
    """Return the peak resident memory of this process during a call.

    Raises:
        OSError: the system cannot forget an earlier peak.
    """
    # VmHWM, unlike ru_maxrss, is neither inherited nor kept: 5 resets it to what is resident now.
    Path("/proc/self/clear_refs").write_text("5\n")
    function()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def extra_memory(model: nn.Module, tokens: int, probes: int) -> dict[str, float]:
    """Return the peak of a warm forward pass and of profiling some probes after it, in MB of this process."""
    vocabulary = model.config.vocab_size
    forward(model, probe(0, tokens, vocabulary))
    plain = peak_mb(lambda: forward(model, probe(0, tokens, vocabulary)))
    profiled = peak_mb(lambda: profile(model, (probe(n, tokens, vocabulary) for n in range(probes))))
    found = {"forward_mb": plain, "impacts_mb": profiled, "extra_mb": profiled - plain}
    return {"tokens": tokens, "probes": probes, **found}


def fresh_memory(folder: str | None, tokens: int, probes: int, threads: int) -> dict[str, float] | None:
    """Measure ``extra_memory`` in a new process; None where the system cannot."""
    options = f"--memory-only {probes} --tokens {tokens} --threads {threads}".split()
    command = [sys.executable, __file__, *options, *([] if folder is None else ["--model", folder])]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def wall_of_impacts(folder: str | None, tokens: int) -> float:
    """Return the wall seconds of the impacts of one probe, after all who measure with this process are ready."""
    model = load(folder)
    meter, batch = Meter(model), probe(0, tokens, model.config.vocab_size)
    meter.impacts(batch)
    click.echo("ready")
    sys.stdin.readline()
    start = time.perf_counter()
    meter.impacts(batch)
    return time.perf_counter() - start


def scaling(folder: str | None, tokens: int, processes: int) -> float:
    """Return how many times as many probes that many processes of one thread measure at once as one of them alone."""
    command = [sys.executable, __file__, "--wall-only", "--tokens", str(tokens), "--threads", "1"]
    command += [] if folder is None else ["--model", folder]

    def slowest(count: int) -> float:
        running = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        # communicate() starts each in turn; they are all loaded by now.
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(process.communicate()[0]) for process in running)

    return statistics.median(processes * slowest(1) / slowest(processes) for _ in range(3))


def exactness() -> dict[str, dict[str, float]]:
    """Return by family the largest error against zeroed float64 modules, relative to the largest of the projection."""
    oracle = load_file("brute_force", BRUTE_FORCE)
    table = {}
    for name, config in FAMILIES.items():
        layer = oracle.text_layer(name, **config)
        projections = (*oracle.ATTENTION, "up_proj")
        expected = [oracle.norms(layer.differences(p, "pre_o"), layer.counted) for p in projections]
        table[name] = {}
        for dtype in (torch.float32, torch.float64):
            hidden, down = layer.hidden.to(dtype), layer.mlp.down_proj.weight.detach().to(dtype)
            actual = [
                *attention_impact(oracle.to_dtype(layer.inputs, dtype)),
                ffn_impact(hidden, column_norms(down), layer.counted),
            ]
            errors = [
                float((one.double() - other).abs().max() / other.max())
                for one, other in zip(actual, expected, strict=True)
            ]
            # max() would pass over a NaN that is not first.
            table[name][str(dtype)[6:]] = float(torch.tensor(errors).max())
    return table


def bars(
    ratios: dict[int, dict[str, float]],
    single: dict[int, dict[str, float] | None],
    growth_mb: float | None,
    errors: dict[str, dict[str, float]],
    scaled: float | None,
) -> list[dict[str, Any]]:
    """Return the promises that this run can judge; those of time and memory are made for 512 tokens."""
    found = []
    if 512 in ratios:
        found += [
            bar("impacts / forward pass at 512 tokens", ratios[512]["impacts_per_forward"], 12),
            bar("impacts / limit of this machine at 512 tokens", ratios[512]["impacts_per_limit"], 1.3),
            bar("released / impacts at 512 tokens", ratios[512]["released_per_impacts"], 3, least=True),
            bar("brute force / impacts at 512 tokens", ratios[512]["brute_force_per_impacts"], 20, least=True),
        ]
    if scaled is not None:
        found.append(bar("probes at once in two processes / in one", scaled, 1.8, least=True))
    memory = single.get(512)
    if memory is not None:
        found.append(bar("extra MB at 512 tokens", memory["extra_mb"], 100))
    if growth_mb is not None:
        few, many = GROWTH_PROBES
        found.append(bar(f"MB that {many} probes need more than {few}", growth_mb, GROWTH_MB))
    for dtype, limit in (("float32", FLOAT32_BAR), ("float64", FLOAT64_BAR)):
        found += [bar(f"{dtype} error, {name}", row[dtype], limit) for name, row in errors.items()]
    return found


@click.command()
@click.option("--model", "folder", type=click.Path(exists=True, file_okay=False), help="Random weights by default.")
@click.option("--tokens", "lengths", multiple=True, type=click.IntRange(2), default=(512, 128), show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--layers", default=2, show_default=True, type=click.IntRange(1), help="Of the released tensor's timing.")
@click.option("--neurons", default=8, show_default=True, type=click.IntRange(1), help="Of brute force's timing.")
@click.option("--released-mb", default=1000, show_default=True, type=click.IntRange(1), help="Limit of its tensor.")
@click.option("--growth-tokens", default=64, show_default=True, help="Length of the probes that are counted up.")
@click.option("--memory/--no-memory", default=True, show_default=True)
@click.option("--scaling/--no-scaling", "scales", default=True, show_default=True, help="Of two processes.")
@click.option("--memory-only", "probes", type=int, hidden=True)
@click.option("--wall-only", is_flag=True, hidden=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    folder: str | None,
    lengths: tuple[int, ...],
    rounds: int,
    threads: int,
    layers: int,
    neurons: int,
    released_mb: int,
    growth_tokens: int,
    memory: bool,
    scales: bool,
    probes: int | None,
    wall_only: bool,
    json_path: Path | None,
) -> None:
    """Print CPU seconds, extra memory and errors, and the ratios that the project promises."""
    torch.set_num_threads(threads)
    if probes is not None:
        try:
            click.echo(json.dumps(extra_memory(load(folder), lengths[0], probes)))
        except OSError:
            click.echo("null")
        return
    if wall_only:
        click.echo(wall_of_impacts(folder, lengths[0]))
        return
    title(threads)
    single: dict[int, dict[str, float] | None] = {}
    growth: list[dict[str, float] | None] = []
    if memory:
        single = {tokens: fresh_memory(folder, tokens, 1, threads) for tokens in lengths}
        growth = [fresh_memory(folder, growth_tokens, count, threads) for count in GROWTH_PROBES]
    model = load(folder)
    click.echo(
        f"{folder or 'random weights in the shape of SmolLM2'}, float32, CPU seconds a probe, medians of {rounds};\n"
        f"released: scaled from {layers} layers, q and k; brute force: scaled from {neurons} neurons, q and k"
    )
    click.echo("impacts include their forward pass; net are the same without it")
    click.echo(
        "tokens  forward  impacts    limit   released  brute force  impacts/fwd (net)  impacts/limit  released/imp  "
        "brute/imp  extra MB"
    )
    seconds, ratios = {}, {}
    figures: dict[str, list[float]] = {}
    for tokens in lengths:
        timed = measure_time(model, tokens, rounds, layers, neurons, released_mb * 10**6)
        figures |= {f"{name}, {tokens} tokens, s": values for name, values in timed.items()}
        found = seconds[tokens] = {name: statistics.median(values) for name, values in timed.items()}
        row = ratios[tokens] = {
            "impacts_per_forward": found["impacts"] / found["forward"],
            "net_impacts_per_forward": found["impacts"] / found["forward"] - 1,
            "impacts_per_limit": found["impacts"] / found["limit"],
            "released_per_impacts": found["released"] / found["impacts"],
            "brute_force_per_impacts": found["brute_force"] / found["impacts"],
        }
        need = single.get(tokens)
        click.echo(
            f"{tokens:6d}  {found['forward']:7.2f}  {found['impacts']:7.2f}  {found['limit']:7.2f}  "
            f"{found['released']:9.2f}  "
            f"{found['brute_force']:11.1f}  {row['impacts_per_forward']:10.2f} ({row['net_impacts_per_forward']:.2f})"
            f"  {row['impacts_per_limit']:13.2f}  {row['released_per_impacts']:11.2f}x"
            f"  {row['brute_force_per_impacts']:8.1f}x  "
            f"{'-' if need is None else format(need['extra_mb'], '.1f'):>8}"
        )
    few, many = growth or (None, None)
    growth_mb = None if few is None or many is None else many["extra_mb"] - few["extra_mb"]
    if few is not None and many is not None:
        click.echo(
            f"extra memory with {few['probes']} and {many['probes']} probes of {growth_tokens} tokens: "
            f"{few['extra_mb']:.1f} and {many['extra_mb']:.1f} MB"
        )
    elif memory:
        click.echo("memory was not measured: this system cannot forget an earlier peak of a process")
    errors = exactness()
    for name, error in errors.items():
        click.echo(f"{name:<8} error float32 {error['float32']:.1e}, float64 {error['float64']:.1e}")
    scaled = scaling(folder, lengths[0], 2) if scales and (os.cpu_count() or 1) > 1 else None
    verdicts = bars(ratios, single, growth_mb, errors, scaled)
    details = {
        "model": folder or "random SmolLM2-135M shape",
        "scaled_from": {"released_layers": layers, "brute_force_neurons": neurons},
        "memory": [found for found in [*single.values(), *growth] if found is not None],
    }
    report(json_path, "profiling", threads, figures, verdicts, seconds=seconds, ratios=ratios, errors=errors, **details)


if __name__ == "__main__":
    main()
