"""CPU time and memory of counting active neurons, beside the forward pass that it needs.

    python benchmarks/domains.py --json domains.json

The model has the shape of SmolLM2-135M and random weights. Rounds of both are interleaved; memory is the growth of the
process's peak from one batch to many.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import torch
from machine import bar, peak_mb, report, show
from profiling import load, probe

from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.profiling.measure.activations import ActivationCounter
from mergekit_snrf.profiling.measure.inputs import run_once


@click.command()
@click.option("--tokens", default=512, show_default=True, help="Of a probe.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--probes", default=32, show_default=True, help="For the growth of memory.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
def main(tokens: int, rounds: int, probes: int, file: Path | None) -> None:
    """Measure, print, and compare with the targets."""
    torch.set_num_threads(1)
    model = load(None)
    vocabulary = model.config.vocab_size
    counter = ActivationCounter(model, find_live_decoder(model))
    sums = counter.empty()
    seconds: dict[str, list[float]] = {"forward": [], "counting": []}
    for number in range(rounds + 1):
        batch = probe(number, tokens, vocabulary)
        for name in seconds:
            start = time.process_time()
            if name == "counting":
                counter.visit(sums, batch)
            else:
                with torch.no_grad():
                    run_once(model, batch.inputs)
            seconds[name].append(time.process_time() - start)
    seconds = {name: times[1:] for name, times in seconds.items()}
    before = peak_mb()
    for number in range(probes):
        counter.visit(sums, probe(number, tokens, vocabulary))
    growth = peak_mb() - before
    ratio = statistics.median(seconds["counting"]) / statistics.median(seconds["forward"])
    figures = {**{f"{name} s": times for name, times in seconds.items()}, "growth MB": [growth]}
    show(figures)
    bars = [
        bar("counting / forward", ratio, 1.1),
        bar(f"MB more after {probes} probes", growth, 10),
    ]
    report(file, "domains", 1, figures, bars)


if __name__ == "__main__":
    main()
