"""The board pair under the logit lens, with FRANK's strengths: a section for examples/board/README.md.

python examples/board/lens.py        # prints it
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from story_page import table

HERE = Path(__file__).resolve().parent


def lens_section(folder: Path, target: Path = HERE / "target", probes: Path = HERE / "profile.yml") -> str:
    """Run ``snrf lens`` and ``snrf frank`` as a user types them, and return what they show as Markdown.

    Args:
        folder: for lens.json and the figures.
        target: the vision-language model.
        probes: a profile.yml with it.
    """
    out = folder / "lens.json"
    _snrf("lens", target, "--probes", probes, "--positions", "0", "-o", out, "--figures", folder)
    lens = json.loads(out.read_text())
    strengths = _snrf("frank", HERE / "base", target, HERE / "source")
    layers = range(lens["layers"] + 1)
    rows = [("entropy, " + one["kind"], *(f"{value:.2f}" for value in one["entropy"])) for one in lens["kinds"]]
    rows += [
        ("KL to the last layer, " + one["kind"], *(f"{value:.2f}" for value in one["kl"])) for one in lens["kinds"]
    ]
    rows.append(("the answer's token is the most probable", *(_percent(value) for value in lens["answer"]["hits"])))
    rows.append(("attention of text to images", "", *(_percent(value) for value in lens["image_attention"])))
    header = ("nats, by layer", *map(str, layers))
    return "\n".join(
        [
            "### What does each layer see?",
            "",
            f"The [logit lens](../../docs/lens.md) of the target on {lens['count']} calc probes. Layer 0 is before "
            "the first layer.",
            "",
            *table(header, rows),
            "",
            _verdict(lens),
            "",
            "[FRANK](../../docs/recipe.md#frank) on this pair (`snrf frank`):",
            "",
            *("    " + line for line in strengths.strip().splitlines() if line),
        ]
    )


def _verdict(lens: dict[str, Any]) -> str:
    """Say which of MMNeuron's three stages of image tokens the entropies show."""
    entropy = next(one["entropy"] for one in lens["kinds"] if one["kind"] == "image")
    falls = [before - after for before, after in pairwise(entropy)]
    steepest = falls.index(max(falls)) + 1
    rises = "rises" if falls[-1] < 0 else "does not rise"
    return (
        f"MMNeuron's stages of image tokens: the entropy falls most at layer {steepest}, and {rises} at the last one."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _snrf(*words: object) -> str:
    program = Path(sys.executable).with_name("snrf")
    return subprocess.run([program, *map(str, words), "--quiet"], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(lens_section(Path(place)))
