"""``snrf amplify``: which tokens a neuron makes a model generate."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.cli.common import table
from mergekit_snrf.errors import SnrfError, naming, option, printable
from mergekit_snrf.evidence.asked import AskedOptions, load_asked

if TYPE_CHECKING:
    from mergekit_snrf.evidence.asked import Asked
    from mergekit_snrf.evidence.drawing import Drawing
    from mergekit_snrf.evidence.results import Amplification, AmplifiedNeuron
    from mergekit_snrf.neurons.sites import Neuron

_DETAILED = 4
_SHOWN = 5


def _neurons(named: dict[str, Any], asked: Asked, settings: dict[str, Any]) -> list[Neuron]:
    """Return the neurons that the options name, those of the model's checkpoint, and note where they are from."""
    from mergekit_snrf.evidence.amplify import pick_neurons
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder
    from mergekit_snrf.neurons.maskfile import load_mask
    from mergekit_snrf.neurons.shape import check_fit
    from mergekit_snrf.neurons.sites import Neuron

    model, file, pick = asked.model, named["names_file"], named["pick"]
    neurons = [*map(Neuron.parse, named["names"]), *_listed(file)]
    mask = None if named["mask"] is None else load_mask(named["mask"])
    if mask is not None:
        settings |= {"mask": named["mask"], "pick": pick}
        with naming({}, where=mask.path):
            neurons += pick_neurons(mask.neurons, pick, asked.source.seed)
    if model.gguf_file is None:
        checkpoint = open_checkpoint(model.model, model.revision, trust_remote_code=model.trust_remote_code)
        settings["config_sha256"] = checkpoint.config_sha256
        shape = find_decoder(checkpoint).shape
        if mask is not None:
            check_fit(mask.neurons, shape, where=mask.path, model=model.model)
        check_fit(neurons, shape, where=file, model=model.model)
    return neurons


def _listed(file: str | None) -> list[Neuron]:
    from mergekit_snrf.files.reading import read_text
    from mergekit_snrf.neurons.sites import Neuron

    if file is None:
        return []
    names = read_text(file, remedy="give a text file with one neuron a line").split()
    if not names:
        raise SnrfError(file, "names no neuron", "write one a line, such as fwd.up.L14.N12953")
    with naming({}, where=file):
        return [Neuron.parse(name) for name in names]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--neuron", "names", multiple=True, metavar="NEURON", help="Such as fwd.up.L14.N12953; repeat for more.")
@click.option("--neurons", "names_file", type=click.Path(), metavar="FILE", help="A text file, one neuron a line.")
@click.option("--mask", metavar="MASK", help="The neurons of a file, or hf://owner/repo@revision/path.")
@click.option("--pick", type=click.IntRange(1), metavar="N", help="N random neurons of MASK instead of all.")
@click.option("--factor", type=float, default=10.0, show_default=True, help="What activations are multiplied by.")
@click.option("--probes", required=True, type=click.Path(), help="A .jsonl, .parquet or .csv file, or profile.yml.")
@options.settings_options("asked", AskedOptions)
@options.json_option
@options.figures_option
@common.command_options
def amplify(
    model: str,
    probes: str,
    factor: float,
    asked: AskedOptions,
    json_file: str | None,
    figures: str | None,
    **named: Any,
) -> None:
    """Show which tokens a neuron of MODEL makes more frequent.

    Its activation is multiplied while MODEL answers PROBES. Every neuron is amplified by itself (Eq. 7, 8). Tokens are
    ranked by their log-odds against the plain answers. Math tokens are numbers, signs, LaTeX commands and words of a
    list that comes with this package.
    """
    if not (named["names"] or named["names_file"] or named["mask"]):
        raise click.UsageError("name neurons with --neuron, --neurons or --mask")
    if named["pick"] is not None and named["mask"] is None:
        raise click.UsageError("--pick goes with --mask")
    if figures is not None and find_spec("matplotlib") is None:
        raise SnrfError(None, "figures need matplotlib", "pip install 'mergekit-snrf[analysis]'")
    common.check_outputs(json_file, figures)
    with naming(lambda field: "--probes" if field == "dataset" else option(field)):
        result = _measured(probes, model, named, factor, asked)
    common.say(_report(result))
    for path in common.write_outputs(result, json_file, figures, _drawings(result)):
        common.say(path)


def _measured(probes: str, model: str, named: dict[str, Any], factor: float, how: AskedOptions) -> Amplification:
    from mergekit_snrf.evidence import amplify as amplification
    from mergekit_snrf.evidence.analysis import loaded
    from mergekit_snrf.profiling.probes.rows import load_rows

    asked = load_asked(probes, how.ref(model), how)
    settings: dict[str, Any] = {}
    neurons = _neurons(named, asked, settings)
    common.silence_progress()
    rows = load_rows(asked.source, answers=False)
    subject, processor = loaded(asked.model, settings, images=asked.source.images is not None)
    more: dict[str, Any] = {"settings": settings, "progress": not common.is_quiet()}
    return amplification.amplify(rows, subject, processor, asked, neurons, factor, **more)


def _report(result: Amplification) -> str:
    few = len(result.neurons) <= _DETAILED
    parts = [_details(neuron, result) for neuron in result.neurons] if few else [_summary(result)]
    answers = result.settings["generations"]
    parts.append(
        f"{answers} answers to {result.count} probes, plain and with each neuron amplified by {result.factor:g}.\n"
        f"log-odds: of the token in the amplified against the plain answers, 0.5 added to every count."
    )
    if result.math_neuron_ratio is not None:
        many = round(result.math_neuron_ratio * len(result.neurons))
        parts.append(
            f"{many} of {len(result.neurons)} neurons ({100 * result.math_neuron_ratio:.1f} %) are math neurons: more "
            f"than half of their at most {result.settings['top']} leading tokens are math tokens ({result.classifier})."
        )
    if result.plain_math_share is not None:
        parts[-1] += f"\nOf the tokens of the plain answers, {100 * result.plain_math_share:.1f} % are math tokens."
    return "\n\n".join(parts)


def _details(neuron: AmplifiedNeuron, result: Amplification) -> str:
    rows = [
        (_shown(token.token), f"{token.log_odds:+.2f}", token.amplified, token.plain)
        for token in neuron.tokens[: 2 * result.settings["top"]]
        if token.log_odds > 0
    ]
    rows.append(("all tokens", "", *neuron.totals))
    rows.append(("answers that ended", "", *(neuron.ended or ("-", "-"))))
    body = table((neuron.neuron, "log-odds", "amplified", "plain"), rows)
    lines = [f"{neuron.changed} of {result.settings['generations']} answers changed."]
    if neuron.math_share is not None:
        lines.append(f"{100 * neuron.math_share:.0f} % of the leading tokens are math tokens.")
    elif len(rows) == 2:
        lines.append("No token is more frequent.")
    return f"{body}\n{' '.join(lines)}"


def _summary(result: Amplification) -> str:
    rows = []
    for neuron in result.neurons:
        leading = [_shown(token.token) for token in neuron.tokens[:_SHOWN] if token.log_odds > 0]
        math = "-" if neuron.math_share is None else f"{100 * neuron.math_share:.0f} %"
        rows.append((neuron.neuron, neuron.changed, math, " ".join(leading) or "-"))
    return table(("neuron", "changed", "math", "leading tokens"), rows)


def _shown(token: str) -> str:
    return printable(repr(token))


def _drawings(result: Amplification) -> Iterator[tuple[str, Drawing]]:
    from mergekit_snrf.evidence import drawing, figures, wording

    how = f"of {wording.without_folders(result.model)} amplified by {result.factor:g}"
    for neuron in result.neurons:
        text = wording.token_bars_text(neuron)
        yield neuron.neuron, drawing.Drawing(figures.token_bars(neuron), f"{neuron.neuron} {how}", text)
