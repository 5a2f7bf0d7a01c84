"""CPU time of taking moments beside the forward passes that they need, and size and time of a moments file.

    python benchmarks/moments.py --json moments.json

The model has the shape of SmolLM2-135M and random weights; every probe is 512 random tokens, eight in a batch.
The file has the shape of Qwen2.5-VL-7B's decoder (hidden 3584, FFN 18944, 28 layers) and random activations; a few
layers are made, written and read, and bytes and seconds are scaled to all layers, of which every one is alike.
With ``--model`` (``python examples/smollm2/prepare.py smollm2``) it also measures what the file's float16 costs on real
activations: the error of D F x against the same F from factors and correlations that were not rounded, where D is
random, the questions of examples/smollm2 are to gain, and the pages of docs are to keep.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from machine import bar, peak_mb, report, show, title
from profiling import cpu_seconds, load, probe
from torch import nn
from transformers import AutoTokenizer

from mergekit_snrf.fusion.regmean import EPS, DenseMoment, SketchMoment, regmean_filter, scaled
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.moments import (
    INPUTS,
    SETS,
    InputSite,
    MomentsProvenance,
    input_sizes,
    moment_tensors,
    read_moments,
    write_moments,
)
from mergekit_snrf.profiling.measure.inputs import run_once, watched_inputs
from mergekit_snrf.profiling.result.moments import CLIP, MomentSums

QWEN_7B = {"attn": 3584, "up": 3584, "down": 18944}
LAYERS = 28
LAYER_STEP = 6
"""Of the layers on whose real activations errors are measured."""
COST_BAR = 1.3
SIZE_BARS = {None: 2.6, 256: 0.8}


def costs(
    model: nn.Module, tokens: int, batch_size: int, sketch: int | None, repeats: int
) -> tuple[list[float], list[float]]:
    """Return CPU seconds of the forward pass of a batch, and of the pass with its moments taken, alternately."""
    decoder = find_live_decoder(model, name="benchmark")
    batches = [probe(number, tokens, model.config.vocab_size, batch_size) for number in range(repeats + 1)]
    clips: dict[InputSite, float] = {}

    def clip(site: InputSite, rows: torch.Tensor) -> None:
        clips[site] = CLIP * float(rows.norm(dim=1).double().median())

    with watched_inputs(decoder, batches[0].attention_mask != 0, clip), torch.no_grad():
        run_once(model, batches[0].inputs)
    sums = MomentSums(input_sizes(decoder.shape), clips, sketch, 0)

    @torch.no_grad()
    def plainly(number: int) -> None:
        run_once(model, batches[number].inputs)

    @torch.no_grad()
    def taken(number: int) -> None:
        batch = batches[number]
        with watched_inputs(decoder, batch.attention_mask != 0, lambda site, rows: sums.sums[site].add(rows)):
            run_once(model, batch.inputs)

    taken(0)
    plain, watched = [], []
    for number in range(1, repeats + 1):
        plain.append(cpu_seconds(lambda number=number: plainly(number)))
        watched.append(cpu_seconds(lambda number=number: taken(number)))
    return plain, watched


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Append the wall seconds of a block."""
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def file_figures(folder: Path, layers: int, sketch: int | None) -> dict[str, float]:
    """Return GB and seconds of a file of all layers, scaled from a few, and the seconds of one layer's filters."""
    path = folder / "moments.safetensors"
    tensors, made, wrote, read, solved = {}, [], [], [], []
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        sites = {InputSite(layer, name): QWEN_7B[name] for name in INPUTS}
        for which in SETS:
            sums = MomentSums(sites, dict.fromkeys(sites, 1e9), sketch, 0)
            for site, size in sites.items():
                decay = torch.arange(1, size + 1).pow(-0.5)
                sums.sums[site].add(torch.randn(2048, size, generator=generator) * decay)
                with timed(made):
                    one = sums.sums[site]
                    tensors |= moment_tensors(site, which, one.moment(sums.eigenvectors(size)), one.clip)
                one.total = torch.empty(0)
    with timed(wrote):
        write_moments(path, tensors, MomentsProvenance())
    tensors.clear()
    with timed(read):
        found = read_moments(path)
        moments = {(site, which): found.moment(site, which) for site in found.sizes for which in SETS}
    for name in INPUTS:
        pair = [moments[InputSite(0, name), which] for which in SETS]
        with timed(solved):
            regmean_filter(*pair, 3.0)
    dense = sum(isinstance(moment, DenseMoment) for moment in moments.values())
    scale = LAYERS / layers
    return {
        "GB": path.stat().st_size * scale / 1e9,
        "dense share": dense / len(moments),
        "moments of sums s": sum(made) * scale,
        "write s": wrote[0] * scale,
        "read s": read[0] * scale,
        "filters s": sum(solved) * LAYERS,
    }


def rounding_errors(folder: str) -> dict[str, list[float]]:
    """Return, by form, relative errors of D F x of some layers' inputs, over their tokens to gain, at ``keep: 3``."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    decoder, root = find_live_decoder(model, name=folder), Path(__file__).parents[1]
    rows = [line for path in sorted(root.glob("examples/smollm2/*.jsonl")) for line in path.read_text().splitlines()]
    texts = {
        "gain": [json.loads(row)["question"] for row in rows],
        "keep": [path.read_text() for path in sorted(root.glob("docs/*.md"))],
    }
    seen: dict[tuple[InputSite, str], list[torch.Tensor]] = {}
    for which, which_texts in texts.items():
        for text in which_texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids

            def visit(site: InputSite, rows: torch.Tensor, which: str = which) -> None:
                if site.layer % LAYER_STEP == 0:
                    seen.setdefault((site, which), []).append(rows)

            with watched_inputs(decoder, torch.ones_like(ids, dtype=torch.bool), visit), torch.no_grad():
                run_once(model, {"input_ids": ids})
    errors: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for site in sorted({site for site, _ in seen}):
        size = input_sizes(decoder.shape)[site]
        x = {which: torch.cat(seen.pop((site, which))).double() for which in SETS}
        for which, one in x.items():
            norms = one.norm(dim=1, keepdim=True)
            x[which] = one * (CLIP * norms.median() / norms).clamp_max(1)
        delta = torch.randn(64, size, generator=generator)
        moments = {which: scaled(one.mT @ one) for which, one in x.items()}
        exact = moments["gain"] @ torch.linalg.inv(moments["gain"] + 3 * moments["keep"] + 4 * EPS * torch.eye(size))
        inputs = x["gain"].float().mT
        found = regmean_filter(*(DenseMoment.of(one) for one in moments.values()), 3.0).apply(delta)
        errors.setdefault(f"{site.input}, dense", []).append(_relative(found @ inputs, delta @ exact.float() @ inputs))
        spectra = [torch.linalg.eigh(one) for one in moments.values()]
        for k in (64, 256, 512):
            pairs = [(vectors[:, -k:], values[-k:].clamp_min(0)) for values, vectors in spectra]
            stored = [SketchMoment.of(*pair, size) for pair in pairs]
            unrounded = [
                SketchMoment((vectors * values.sqrt()).float(), max(0.0, 1 - float(values.sum()) / size))
                for vectors, values in pairs
            ]
            found, wanted = (regmean_filter(*both, 3.0).apply(delta) @ inputs for both in (stored, unrounded))
            errors.setdefault(f"{site.input}, sketch {k}", []).append(_relative(found, wanted))
    return errors


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@click.command()
@click.option("--tokens", default=512, show_default=True)
@click.option("--batch-size", default=8, show_default=True, help="Probes in a batch; 8 is profile.yml's default.")
@click.option("--repeats", default=5, show_default=True, help="0: no forward passes.")
@click.option("--layers", default=2, show_default=True, help="Layers of the file that are made; 0: no file.")
@click.option("--model", "folder", type=click.Path(exists=True), help="SmolLM2's folder, for the errors of float16.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    tokens: int,
    batch_size: int,
    repeats: int,
    layers: int,
    folder: str | None,
    threads: int,
    json_path: Path | None,
) -> None:
    """Print times and sizes, and the bars that the project promises."""
    torch.set_num_threads(threads)
    figures, bars = {}, []
    for form, errors in rounding_errors(folder).items() if folder else ():
        click.echo(f"error of D F x, {form:<16} median {statistics.median(errors):.1e}, largest {max(errors):.1e}")
        figures[f"error of D F x, {form}"] = errors
    model = load(None)
    for label, sketch in (("dense", None), ("sketch 256", 256)) if repeats else ():
        plain, watched = costs(model, tokens, batch_size, sketch, repeats)
        ratio = statistics.median(after / before for before, after in zip(plain, watched, strict=True))
        figures |= {f"forward, beside {label}, CPU s": plain, f"moments, {label}, CPU s": watched}
        bars.append(bar(f"taking moments / forward passes, {label}, {batch_size} x {tokens} tokens", ratio, COST_BAR))
    del model
    title(threads)
    show(figures)
    for sketch, limit in SIZE_BARS.items() if layers else ():
        work = Path(tempfile.mkdtemp(prefix="snrf-moments-"))
        try:
            found = file_figures(work, layers, sketch)
        finally:
            shutil.rmtree(work)
        label = "default" if sketch is None else f"sketch {sketch}"
        click.echo(
            f"7B file, {label}, from {layers} of {LAYERS} layers: "
            + ", ".join(f"{k} {v:.3g}" for k, v in found.items())
        )
        figures |= {f"7B file, {label}, {name}": [value] for name, value in found.items()}
        bars.append(bar(f"moments file of 7B shape, {label}, GB", found["GB"], limit))
    click.echo(f"peak memory {peak_mb() / 1e3:.2f} GB")
    report(json_path, "moments", threads, figures, bars, tokens=tokens, batch_size=batch_size, layers=layers)


if __name__ == "__main__":
    main()
