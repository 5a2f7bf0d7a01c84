"""Write the measured tables of docs/speed.md from the files of ``make bench``: python benchmarks/table.py build/bench.

Medians of the rounds; the ratios are those that the benchmarks themselves have judged.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click

PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
SIZES = {"0.5B": "0.5B", "7B-4layers": "4 layers of 7B shape"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(measured: dict[str, Any], name: str) -> str:
    """Return wall time, CPU time and peak memory of one command, empty where it was not measured."""
    figures = measured["figures"]
    if f"{name}, wall s" not in figures:
        return ""
    wall, cpu, peak = (statistics.median(figures[f"{name}, {unit}"]) for unit in ("wall s", "CPU s", "peak MB"))
    return f"{wall:.1f} s, {cpu:.1f} s, {peak / 1000:.2f} GB"


def names(measured: dict[str, Any]) -> list[str]:
    """Return the names of the measured commands, in their order."""
    return list(dict.fromkeys(name.removesuffix(", wall s") for name in measured["figures"] if ", wall s" in name))


def commands(files: dict[tuple[str, str], dict[str, Any]], sizes: list[str]) -> str:
    """Return the table of all commands; linear is measured by both benchmarks, so it stands beside each."""
    rows = []
    for kind, title in (("merge", "`mergekit-yaml`"), ("patch", "in the same rounds")):
        found = [files[kind, size] for size in sizes if (kind, size) in files]
        for name in dict.fromkeys(name for one in found for name in names(one) if "workers" not in name):
            rows.append([f"{name} ({title})" if name == "linear" else name])
            rows[-1] += [cells(files[kind, size], name) if (kind, size) in files else "" for size in sizes]
    return table(["", *(f"{SIZES[size]}: wall, CPU, peak memory" for size in sizes)], rows)


def workers(files: dict[tuple[str, str], dict[str, Any]], sizes: list[str]) -> str:
    """Return the table of the wall time by the number of workers."""
    found = {size: files["merge", size] for size in sizes if ("merge", size) in files}
    labels = [name for one in found.values() for name in names(one) if name.endswith("workers")]
    rows = [[name, *(cells(one, name) for one in found.values())] for name in dict.fromkeys(labels)]
    return table(["", *(f"{SIZES[size]}: wall, CPU, peak memory" for size in found)], rows)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--page", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=PAGE)
def main(folder: Path, page: Path) -> None:
    """Replace the generated part of docs/speed.md."""
    loaded = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    merging = [one for one in loaded if one["benchmark"] in ("merge", "patch", "imports")]
    profiling = [one for one in loaded if one["benchmark"] in ("profiling", "lowrank")]
    text = page.read_text(encoding="utf-8")
    if merging:
        whole = [one for one in merging if one["benchmark"] != "imports" and not one.get("sketch")]
        files = {(one["benchmark"], one["size"]): one for one in whole}
        sizes = [size for size in SIZES if any(size == found for _, found in files)]
        mergekit = merging[0]["machine"]["packages"]["mergekit"]
        parts = [
            f"{measured_on(merging[0])}, mergekit {mergekit}; two bf16 checkpoints, a tenth of all neurons "
            "(`regmean`: all), cold cache, medians.",
            bars_of(merging),
            commands(files, sizes),
            "By the number of tensors that are fused at once (`--num-threads`):",
            workers(files, sizes),
        ]
        text = replaced(text, "merging", parts)
    if profiling:
        text = replaced(text, "profiling", [f"{measured_on(profiling[0])}; medians.", bars_of(profiling)])
    page.write_text(text, encoding="utf-8")


def measured_on(one: dict[str, Any]) -> str:
    """Return which machine a file is from."""
    machine = one["machine"]
    memory, version = machine["memory_gib"], machine["packages"]["torch"]
    return f"Measured on {machine['cores']} cores of {machine['cpu']}, {memory} GiB, torch {version}"


def bars_of(loaded: list[dict[str, Any]]) -> str:
    """Return the table of all promises."""
    order = ["merge", "patch", "imports", "profiling", "lowrank"]
    rows = []
    for one in sorted(loaded, key=lambda one: order.index(one["benchmark"])):
        of = " ".join(filter(None, [f"`{one['benchmark']}.py`", SIZES.get(one.get("size", "")), _of(one)]))
        for entry in one["bars"]:
            value = entry["value"]
            shown = f"{value:.2f}" if value == 0 or 0.01 <= value < 1000 else f"{value:.1e}"
            rows.append([entry["bar"], shown if entry["met"] else f"{shown}: **missed**", of])
    return table(["target", "measured", "benchmark"], rows)


def replaced(text: str, name: str, parts: list[str]) -> str:
    """Return the page with one generated part replaced."""
    start, end = f"<!-- {name}: generated by benchmarks/table.py -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    generated = "\n\n".join(parts)
    return f"{before}{start}\n{generated}\n{end}{rest.split(end)[1]}"


def _of(one: dict[str, Any]) -> str:
    return f"(`--sketch {one['sketch']}`)" if one.get("sketch") else ""


if __name__ == "__main__":
    main()
