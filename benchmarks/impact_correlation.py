"""Rank correlation of the impacts that a profile can hold with the whole-model impact of Eq. 4, on a real model.

    python examples/smollm2/prepare.py smollm2
    python benchmarks/impact_correlation.py --model smollm2 --json correlation.json

Eq. 4 removes a neuron from the model and compares the outputs: ||Model(x) - Model_without_N(x)||_2. That takes a
forward pass for every neuron and probe, so it is done for some neurons of every layer and projection, drawn at random:
the row of the projection and its bias are really zeroed. The output is the final states, or the logits that follow.
A figure is the mean over the probes of Spearman's correlation over neurons of all layers: what a threshold that is the
same everywhere, such as sigma, asks of an impact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import transformers
from machine import bar, report
from scipy.stats import spearmanr

from mergekit_snrf.models.live import LiveDecoder, find_live_decoder
from mergekit_snrf.neurons.sites import PROJECTIONS, Neuron, Site
from mergekit_snrf.profiling.measure.meter import Measure, Meter
from mergekit_snrf.profiling.probes.batches import ProbeBatch

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXTS = (
    "Natalia has 48 apples and sells half of them in April. In May she sells 12 more apples and buys 5 pears. How many "
    "apples does she have left? She sells 48 / 2 = 24 apples in April, so 24 remain. After May she has 24 - 12 = 12.",
    "The interior angles of a triangle add up to 180 degrees. If one angle is 90 degrees and another is 35 degrees, "
    "what is the third angle? The third angle is 180 - 90 - 35 = 55 degrees, so the triangle is right-angled.",
)
PROJECTED = ("attn.q", "attn.k", "attn.v", "fwd.up")
MEASURES = {
    "released": Measure(scoring="released"),
    **{
        f"{weight}, {site}": Measure(weight=weight, site=site)
        for weight in ("paper", "residual", "gradient")
        for site in ("pre_o", "post_o")
    },
}
BARS = {"residual, post_o": 0.90, "gradient, post_o": 0.95}
OUTPUTS = ("states", "logits")


def load_probes(folder: str, tokens: int) -> list[ProbeBatch]:
    """Return the texts as probes of at most so many tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    probes = []
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        mask = torch.ones_like(ids)
        probes.append(ProbeBatch((number,), {"input_ids": ids, "attention_mask": mask}, mask, mask.bool()))
    return probes


def sample(decoder: LiveDecoder, neurons: int) -> list[Neuron]:
    """Return at least so many neurons, as many of every layer and projection; fwd.down has the impacts of fwd.up."""
    sites = [Site(layer, projection) for layer in range(decoder.shape.layers) for projection in PROJECTED]
    generator = torch.Generator().manual_seed(0)
    each = -(-neurons // len(sites))
    return [
        Neuron(site, index)
        for site in sites
        for index in torch.randperm(decoder.shape.neurons(site.projection), generator=generator)[:each].tolist()
    ]


@contextmanager
def removed(decoder: LiveDecoder, neuron: Neuron) -> Iterator[None]:
    """Zero the row of a neuron and its bias for the time of the block."""
    module = decoder.layers[neuron.site.layer].get_submodule(PROJECTIONS[neuron.site.projection].module)
    parameters = [parameter for parameter in (module.weight, module.bias) if parameter is not None]
    kept = [parameter[neuron.index].clone() for parameter in parameters]
    for parameter in parameters:
        parameter[neuron.index] = 0
    try:
        yield
    finally:
        for parameter, row in zip(parameters, kept, strict=True):
            parameter[neuron.index] = row


def outputs(model: nn.Module, probe: ProbeBatch) -> dict[str, Tensor]:
    """Return the final states and the logits of a probe."""
    found = model(**probe.inputs, use_cache=False, output_hidden_states=True)
    return {"states": found.hidden_states[-1], "logits": found.logits}


def whole_model_impacts(
    model: nn.Module,
    decoder: LiveDecoder,
    neurons: list[Neuron],
    probes: list[ProbeBatch],
    progress: Callable[[list[Neuron]], Any],
) -> dict[str, Tensor]:
    """Return Eq. 4 for every output: [probes, neurons]."""
    found = {name: torch.empty(len(probes), len(neurons), dtype=torch.float64) for name in OUTPUTS}
    with torch.no_grad():
        whole = [outputs(model, probe) for probe in probes]
        with progress(neurons) as bar:
            for place, neuron in enumerate(bar):
                with removed(decoder, neuron):
                    for row, (probe, before) in enumerate(zip(probes, whole, strict=True)):
                        for name, after in outputs(model, probe).items():
                            found[name][row, place] = (after - before[name]).double().norm()
    return found


def correlations(truth: Tensor, found: Tensor, neurons: list[Neuron]) -> dict[str, float]:
    """Return the correlation over all neurons of the sample, and over those of each projection."""
    names = {"all": set(PROJECTED)} | {name: {name} for name in PROJECTED}
    table = {}
    for name, projections in names.items():
        chosen = torch.tensor([neuron.site.projection in projections for neuron in neurons])
        rows = [float(spearmanr(a[chosen], b[chosen]).statistic) for a, b in zip(truth, found, strict=True)]
        table[name] = sum(rows) / len(rows)
    return table


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--neurons", default=320, show_default=True, type=click.IntRange(2), help="At least so many are removed.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2), help="Of a probe, at most.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(folder: str, neurons: int, tokens: int, threads: int, json_path: Path | None) -> None:
    """Print the rank correlation of every measure with the impact on the whole model."""
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = find_live_decoder(model)
    probes = load_probes(folder, tokens)
    chosen = sample(decoder, neurons)
    click.echo(
        f"{folder}: {len(chosen)} neurons of {decoder.shape.layers} layers removed one by one, "
        f"{len(probes)} probes of {', '.join(str(probe.attention_mask.shape[1]) for probe in probes)} tokens"
    )
    start = time.process_time()
    truth = whole_model_impacts(model, decoder, chosen, probes, click.progressbar)
    seconds = {"removing": time.process_time() - start}
    click.echo(f"{seconds['removing']:.0f} CPU seconds\n")
    click.echo(f"{'':20}{'final states':^40}{'logits':>9}{'CPU s a':>10}")
    click.echo(f"{'':20}" + "".join(f"{name:>8}" for name in ("all", *PROJECTED)) + f"{'all':>9}{'probe':>10}")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, measure in MEASURES.items():
        meter = Meter(model, measure)
        start = time.process_time()
        impacts = [meter.impacts(probe) for probe in probes]
        seconds[name] = (time.process_time() - start) / len(probes)
        found = torch.tensor([[float(one[neuron.site][0, neuron.index]) for neuron in chosen] for one in impacts])
        table[name] = {output: correlations(truth[output], found, chosen) for output in OUTPUTS}
        click.echo(
            f"{name:20}"
            + "".join(f"{value:8.3f}" for value in table[name]["states"].values())
            + f"{table[name]['logits']['all']:9.3f}{seconds[name]:10.2f}"
        )
    verdicts = [
        bar(f"rank correlation with Eq. 4 over all layers, {name}", table[name]["states"]["all"], limit, least=True)
        for name, limit in BARS.items()
    ]
    figures = {f"{name}, CPU s": [value] for name, value in seconds.items()}
    lengths = [probe.attention_mask.shape[1] for probe in probes]
    details = {"model": folder, "neurons": len(chosen), "tokens": lengths, "correlations": table}
    report(json_path, "impact_correlation", threads, figures, verdicts, **details)


if __name__ == "__main__":
    main()
