"""CPU time of the logit lens beside a forward pass, and that its memory does not grow with the probes.

    python benchmarks/lens.py --json lens.json

The model has the shape of SmolLM2-135M and random weights; a probe is 512 random tokens, eight in a batch: 256 stand
for an image, 128 for the rest of the prompt, 128 for the answer. This shape is a hard case: the head on all layers
costs 6.5 times what the whole model costs; in Qwen2.5-VL-7B it is 2.2 times.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import click
import torch
from machine import bar, peak_mb, report, show, title
from profiling import cpu_seconds, load, probe

from mergekit_snrf.evidence.lens import Lensed, LensSums, add_batch
from mergekit_snrf.profiling.measure.inputs import run_once
from mergekit_snrf.profiling.probes.batches import ProbeBatch

COST_BAR, GROWTH_BAR_MB = 2.0, 20.0
IMAGE = 7


def batch(number: int, tokens: int, vocabulary: int, size: int) -> ProbeBatch:
    """Return the batch of that number: half of its tokens are images, the last quarter the answer."""
    found = probe(number, tokens, vocabulary, size)
    found.inputs["input_ids"][:, : tokens // 2] = IMAGE
    found.answer_mask[:, : -tokens // 4] = False
    return found


@click.command()
@click.option("--tokens", default=512, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--positions", type=int, help="Of each kind in a probe; 0: all; default: that of snrf lens.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    tokens: int, batch_size: int, repeats: int, positions: int | None, threads: int, json_path: Path | None
) -> None:
    """Print times and memory, and the bars that the project promises."""
    torch.set_num_threads(threads)
    model = load(None)
    lensed = replace(Lensed.of(model, positions, "benchmark"), images=(IMAGE,))
    sums = LensSums(len(lensed.decoder.layers), lensed.head.vocabulary)
    batches = [batch(number, tokens, model.config.vocab_size, batch_size) for number in range(repeats + 2)]
    plain, lens = [], []
    for one in batches[:2]:
        add_batch(sums, lensed, one)
    early = peak_mb()
    for one in batches[2:]:
        plain.append(cpu_seconds(lambda one=one: _forward(model, one)))
        lens.append(cpu_seconds(lambda one=one: add_batch(sums, lensed, one)))
    figures = {"forward, CPU s": plain, "lens with its forward, CPU s": lens}
    title(threads)
    show(figures)
    ratio = statistics.median(after / before for before, after in zip(plain, lens, strict=True))
    growth = peak_mb() - early
    click.echo(f"positions read: {int(sums.tokens.sum())} of {sums.probes * tokens}")
    bars = [
        bar(f"lens / forward passes, {batch_size} x {tokens} tokens", ratio, COST_BAR),
        bar(f"memory after {sums.probes} probes beyond that of {2 * batch_size}, MB", growth, GROWTH_BAR_MB),
    ]
    report(json_path, "lens", threads, figures, bars, tokens=tokens, batch_size=batch_size, positions=positions)


@torch.no_grad()
def _forward(model: torch.nn.Module, one: ProbeBatch) -> None:
    run_once(model, one.inputs)


if __name__ == "__main__":
    main()
