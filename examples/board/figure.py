"""Draw reasoning and perception of the demo's models: python examples/board/figure.py out/board/scores.json OUT.svg.

Needs matplotlib. The scores are those that evaluate.py wrote with --json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import matplotlib.pyplot as plt

NAMES = {
    "target": "target (VLM)",
    "merged": "SNRF on shared neurons",
    "merged-random": "the same update on\nrandom neurons",
}
COLORS = ("#8a8f98", "#2f6fdb", "#d99a2b")
PANELS = {"reasoning": "reasoning R, %", "perception": "perception P, %"}


def models_of(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results by the name of the model's folder."""
    return {Path(name).name: result for name, result in scores["models"].items()}


@click.command()
@click.argument("scores", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(scores: Path, out: Path) -> None:
    """Write the figure."""
    # Fixed ids and no date: the same scores give the same file.
    mpl.rcParams.update(
        {"svg.hashsalt": "board", "font.size": 9, "font.family": "sans-serif", "savefig.facecolor": "white"}
    )
    models = models_of(json.loads(scores.read_text()))
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.3), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for row, folder in enumerate(NAMES):
            estimate = models[folder][metric]
            value, low, high = estimate["value"], estimate["low"], estimate["high"]
            axis.barh(row, value, color=COLORS[row], height=0.62)
            axis.errorbar(value, row, xerr=[[value - low], [high - value]], color="#222222", capsize=3, linewidth=1)
            axis.text(high + 2, row, f"{value:.0f}", va="center")
        axis.set_yticks(range(len(NAMES)), NAMES.values())
        axis.set_xlim(0, 112)
        axis.set_xticks(range(0, 101, 25))
        axis.set_title(title, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=160)


if __name__ == "__main__":
    main()
