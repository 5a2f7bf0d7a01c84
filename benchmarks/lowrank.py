"""Time, accuracy and memory of the rank-r update, beside a full SVD and a Gram matrix in one run.

    python benchmarks/lowrank.py --json lowrank.json

Delta is made with known singular values i^-0.5 and rounded to bfloat16 (``power``), or it is Gaussian (``flat``, the
spectrum that separates least). The singular vectors of ``power`` are two rounds of random signs, an orthonormal
Hartley transform (by FFT) and a random permutation on either side: dense, orthogonal, and far cheaper than a QR.

Seconds are CPU seconds of one thread. What is timed for ours is everything: norm, subspace and the masked rows, a tenth
of the neurons; for the others it is the decomposition alone. A ratio is the median of the rounds' ratios.
Memory is the rise of the peak resident size of a fresh process that holds nothing but Delta.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import bar, report, title
from torch import Tensor

from mergekit_snrf.fusion.lowrank import Certificate, certified_factors, certified_subspace, gram

# Neurons are rows, as the merge sees them: fwd.down is a transposed view.
SHAPES = {"q": (3584, 3584), "kv": (512, 3584), "up": (18944, 3584), "down": (3584, 18944), "4096": (4096, 4096)}
QUICK = ("q", "kv")
RANKS = (4, 16, 64)
BARS = {"q": 25.0, "up": 15.0}
ERROR, DEFICIT = 1e-3, 1e-6


def certified_rows(delta: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Certificate]:
    """Return the masked rows of the truncated difference, as a merge forms them, and their certificate."""
    left, right, certificate = certified_factors(delta, rank, rows)
    return (right if left is None else left @ right), certificate


def hartley(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rows of ``vectors`` after a random orthogonal transform."""
    length = vectors.shape[1]
    for _ in range(2):
        signs = torch.randint(0, 2, (length,), generator=generator) * 2 - 1
        spectrum = torch.fft.fft(vectors * signs)
        vectors = ((spectrum.real - spectrum.imag) / math.sqrt(length))[:, torch.randperm(length, generator=generator)]
    return vectors


def with_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """Return a float32 matrix with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    small, large = min(rows, columns), max(rows, columns)
    wide = torch.zeros(small, large, dtype=torch.float64)
    wide.diagonal().copy_(values)
    tall = hartley(hartley(wide, generator).mT.contiguous(), generator)
    return (tall if rows >= columns else tall.mT).to(torch.float32).contiguous()


def make_delta(rows: int, columns: int, spectrum: str) -> Tensor:
    """Return a float32 Delta with the named spectrum."""
    if spectrum == "flat":
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    values = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -0.5
    return with_values(rows, columns, values).bfloat16().float()


def tenth(delta: Tensor) -> Tensor:
    """Return a random tenth of the rows, sorted."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(len(delta), generator=generator)[: max(1, len(delta) // 10)].sort().values


def decompose(delta: Tensor, method: str | int) -> Any:
    """Do what is timed: ``svd``, ``gram``, or the masked update of the given rank."""
    if method == "svd":
        return torch.linalg.svd(delta, full_matrices=False)
    if method == "gram":
        return torch.linalg.eigh(gram(delta))
    return certified_rows(delta, int(method), tenth(delta))


def errors(delta: Tensor, rank: int, rows: Tensor, eigen: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the relative error of the masked update and the energy deficit, against float64."""
    values, vectors = eigen[0].flip(0)[:rank], eigen[1][:, -rank:].flip(1)
    exact = delta.to(torch.float64)
    found, _ = certified_rows(delta, rank, rows)
    subspace = certified_subspace(delta, rank, rows=rows)
    basis, _ = torch.linalg.qr(subspace.basis.to(torch.float64))
    if subspace.axis == 1:
        wanted, kept = exact[rows] @ vectors @ vectors.mT, exact @ basis
    else:
        wanted, kept = vectors[rows] @ (vectors.mT @ exact), basis.mT @ exact
    size, best = float(wanted.norm()), float(values.sum())
    if best <= 0:
        return float(found.norm()), 0.0
    # Rows that hold nothing of the update but rounding are measured against the whole.
    size = size if size > 1e-6 * math.sqrt(best) else math.sqrt(best)
    return float((found - wanted).norm()) / size, max(0.0, 1 - float(kept.square().sum()) / best)


def resident(field: str) -> float:
    """Return a size of this process from the kernel, in MB; NaN where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def extra_memory(file: str, transposed: bool, method: str | int) -> float:
    """Return by how many MB the peak of this process rises above Delta; call it in a fresh process."""
    torch.set_num_threads(1)
    for warm in ("svd", "gram", 4):
        decompose(torch.randn(64, 48), warm)
    delta = torch.from_numpy(np.load(file))
    before = resident("VmRSS")
    decompose(delta.mT if transposed else delta, method)
    return max(0.0, resident("VmHWM") - before)


def in_fresh_process(file: str, transposed: bool, method: str | int) -> float:
    """Return ``extra_memory`` of a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(extra_memory, file, transposed, method).result()


def measure(name: str, spectrum: str, rounds: int, memory: bool) -> dict[str, Any]:
    """Return the figures of one shape and spectrum."""
    stored = make_delta(*SHAPES[name], spectrum)
    delta = stored.mT if name == "down" else stored
    methods: list[str | int] = [*RANKS, "gram", "svd"]
    times: dict[str | int, list[float]] = {method: [] for method in methods}
    certificates, eigen = {}, None
    for _ in range(rounds):
        for method in methods:
            start = time.process_time()
            result = decompose(delta, method)
            times[method].append(time.process_time() - start)
            if method == "gram":
                eigen = result
            elif method != "svd":
                certificates[method] = result[1]
            del result
    assert eigen is not None
    peaks: dict[str | int, float] = {}
    if memory:
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/delta.npy"
            np.save(file, stored.numpy())
            peaks = {method: in_fresh_process(file, name == "down", method) for method in methods}
    rows: dict[str, Any] = {}
    for rank in RANKS:
        error, deficit = errors(delta, rank, tenth(delta), eigen)
        certificate = certificates[rank]
        rows[str(rank)] = {
            "seconds": statistics.median(times[rank]),
            "svd_ratio": statistics.median(a / b for a, b in zip(times["svd"], times[rank], strict=True)),
            "gram_ratio": statistics.median(a / b for a, b in zip(times["gram"], times[rank], strict=True)),
            "method": certificate.method,
            "passes": certificate.passes,
            "error": error,
            "est": certificate.est,
            "energy_deficit": deficit,
            "gap": certificate.gap,
            "extra_mb": peaks.get(rank),
        }
    return {
        "shape": list(SHAPES[name]),
        "spectrum": spectrum,
        "delta_mb": stored.numel() * 4 / 2**20,
        "svd_seconds": statistics.median(times["svd"]),
        "gram_seconds": statistics.median(times["gram"]),
        "svd_extra_mb": peaks.get("svd"),
        "gram_extra_mb": peaks.get("gram"),
        "ranks": rows,
        "rounds": {str(method): spent for method, spent in times.items()},
    }


def spectra(rows: int, columns: int) -> dict[str, Tensor]:
    """Return one Delta of every kind that the accuracy bar lists."""
    generator = torch.Generator().manual_seed(3)
    side = min(rows, columns)
    index = torch.arange(1, side + 1, dtype=torch.float64)
    power, few = index**-0.5, torch.where(index <= 12, index**-0.5, 0.0)
    gaussian = torch.randn(rows, columns, generator=generator)
    is_row, is_column = torch.arange(rows)[:, None] == 5, torch.arange(columns) == 5
    return {
        "power law": with_values(rows, columns, power),
        "flat Gaussian": gaussian,
        "exactly rank 12": with_values(rows, columns, few),
        "rank 12 + noise": with_values(rows, columns, few) + gaussian * (1e-3 / math.sqrt(side)),
        "rank-deficient": with_values(rows, columns, torch.where(index <= side // 2, power, 0.0)),
        "pairs of equal values": with_values(rows, columns, power[(index.long() - 1) // 2]),
        "40 equal values": with_values(rows, columns, torch.where(index <= 40, 1.0, 0.5 * power)),
        "zero": torch.zeros(rows, columns),
        "norm 1e-20": with_values(rows, columns, power / power.norm()) * 1e-20,
        "norm 1e18": with_values(rows, columns, power / power.norm()) * 1e18,
        "one nonzero row": torch.where(is_row, gaussian, 0.0),
        "outlier column": torch.where(is_column, 1e4 * gaussian, gaussian),
        "outlier row": torch.where(is_row, 1e4 * gaussian, gaussian),
    }


def accuracy(shape: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Return, for every spectrum, the worst figures over ranks and masks."""
    worst = {}
    for name, delta in spectra(*shape).items():
        eigen = torch.linalg.eigh(gram(delta))
        kept: list[tuple[float, float, str, bool]] = []
        for rank in RANKS:
            for rows in (tenth(delta), torch.tensor([0, 1, 2, 3, 4, 6, 7])):
                certificate = certified_rows(delta, rank, rows)[1]
                error, deficit = errors(delta, rank, rows, eigen)
                kept.append((error, deficit, certificate.method, certificate.degenerate))
        unique = [error for error, _, _, degenerate in kept if not degenerate]
        worst[name] = {
            "error": max(unique) if unique else None,
            "energy_deficit": max(deficit for _, deficit, _, _ in kept),
            "methods": sorted({method for _, _, method, _ in kept}),
            "degenerate": f"{sum(degenerate for *_, degenerate in kept)} of {len(kept)}",
        }
    return worst


def show(result: dict[str, Any]) -> None:
    """Print the figures of one shape and spectrum."""
    shape = "x".join(map(str, result["shape"]))
    extra = "" if result["svd_extra_mb"] is None else (
        f"; extra MB {result['svd_extra_mb']:.0f} and {result['gram_extra_mb']:.0f} (Delta {result['delta_mb']:.0f})"
    )  # fmt: skip
    click.echo(
        f"\n{shape} {result['spectrum']}: svd {result['svd_seconds']:.2f} s, "
        f"float64 Gram {result['gram_seconds']:.2f} s{extra}"
    )
    click.echo("  rank  seconds   svd/ours  Gram/ours  passes  method           error    est      deficit  extra MB")
    for rank, row in result["ranks"].items():
        extra = "-" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        click.echo(
            f"  {rank:>4}  {row['seconds']:7.3f}  {row['svd_ratio']:8.1f}x  {row['gram_ratio']:8.1f}x  "
            f"{row['passes']:6d}  {row['method']:15s}  {row['error']:.1e}  {row['est']:.1e}  "
            f"{row['energy_deficit']:.1e}  {extra:>8}"
        )


def bars(results: list[dict[str, Any]], worst: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return every bar with the figure that was measured."""
    rows = [row for result in results for row in result["ranks"].values()]
    figures = [figure for shape in worst.values() for figure in shape.values()]
    found = []
    for name, least in BARS.items():
        for result in results:
            if result["shape"] == list(SHAPES[name]) and result["spectrum"] == "power":
                ratio = result["ranks"]["16"]["svd_ratio"]
                found.append(bar(f"{name}, power law, r = 16: svd / ours", ratio, least, least=True))
    found.append(bar("error of the masked update", max(r["error"] for r in [*rows, *figures] if r["error"]), ERROR))
    found.append(bar("energy deficit", max(row["energy_deficit"] for row in [*rows, *figures]), DEFICIT))
    for result in results:
        peaks = [row["extra_mb"] for row in result["ranks"].values() if row["extra_mb"] is not None]
        if peaks:
            shape = "x".join(map(str, result["shape"]))
            found.append(
                bar(f"{shape} {result['spectrum']}: extra memory / Delta", max(peaks) / result["delta_mb"], 0.5)
            )
    return found


@click.command()
@click.option("--quick", is_flag=True, help="Two shapes, the power law, one round.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Only these; repeatable.")
@click.option("--memory/--no-memory", default=True, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(quick: bool, rounds: int, shapes: tuple[str, ...], memory: bool, json_file: Path | None) -> None:
    """Measure the rank-r update beside torch.linalg.svd and a float64 Gram matrix."""
    torch.set_num_threads(1)
    title(1)
    results = []
    for name in shapes or (QUICK if quick else tuple(SHAPES)):
        for spectrum in ("power",) if quick else ("power", "flat"):
            results.append(measure(name, spectrum, 1 if quick else rounds, memory))
            show(results[-1])
    worst = {}
    for shape in ((1100, 800), (800, 1100)):
        label = "x".join(map(str, shape))
        worst[label] = accuracy(shape)
        click.echo(f"\n{label}, worst of ranks {RANKS} and two masks")
        for kind, figure in worst[label].items():
            error = "-" if figure["error"] is None else f"{figure['error']:.1e}"
            click.echo(
                f"  {kind:22s} error {error:8s} deficit {figure['energy_deficit']:.1e}  "
                f"degenerate {figure['degenerate']}  {', '.join(figure['methods'])}"
            )
    verdicts = bars(results, worst)
    figures = {}
    for result in results:
        shape = "x".join(map(str, result["shape"]))
        for method, spent in result["rounds"].items():
            name = f"rank {method}" if method.isdigit() else method
            figures[f"{shape} {result['spectrum']}, {name}, CPU s"] = spent
    report(json_file, "lowrank", 1, figures, verdicts, results=results, accuracy=worst)


if __name__ == "__main__":
    main()
