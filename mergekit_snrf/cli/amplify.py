"""``snrf amplify``: which tokens a neuron makes a model generate."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_snrf.cli.common import (
    check_outputs,
    command_options,
    is_quiet,
    json_option,
    model_options,
    silence_progress,
    table,
)
from mergekit_snrf.cli.study import loaded, reworded
from mergekit_snrf.errors import SnrfError

if TYPE_CHECKING:
    from mergekit_snrf.evidence.results import Amplification, AmplifiedNeuron
    from mergekit_snrf.models.decoder import DecoderShape
    from mergekit_snrf.neurons.sets import Neuron

_DETAILED = 4
_SHOWN = 5
_OPTIONS = {
    "key 'template':": "--template",
    "key 'probes.images':": "--images",
    "write a value or remove the key": "write a value or leave it out",
    "leave out question and images": "leave out --question and --images",
    "leave out side": "leave out --side",
    "set template for this side of profile.yml": "give --template",
    "choose one with probes.split": "choose one in profile.yml",
    "remove probes.images": "leave out --images",
    "probes.question": "--question",
    "probes.images": "--images",
    "answer.max_new_tokens": "--max-new-tokens",
    "the keys of profile.yml": "--question, --images and --template",
    "the path of probes.dataset": "--probes",
}
"""What the profiler calls its keys, and the options of this command."""


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--neuron", "names", multiple=True, metavar="NEURON", help="Such as fwd.up.L14.N12953; repeat for more.")
@click.option("--neurons", "names_file", type=click.Path(), metavar="FILE", help="A text file, one neuron a line.")
@click.option("--mask", "mask_file", metavar="MASK", help="The neurons of a file, or hf://owner/repo@revision/path.")
@click.option("--pick", type=click.IntRange(1), metavar="N", help="N random neurons of MASK in place of all.")
@click.option("--factor", type=float, default=10.0, show_default=True, help="What activations are multiplied with.")
@click.option(
    "--probes", "probes_file", required=True, type=click.Path(), help="A .jsonl, .parquet or .csv file, or profile.yml."
)
@click.option("--question", metavar="COLUMN", help="Of the data file; default: question.")
@click.option("--images", metavar="COLUMN", help="Of the data file, one or several images a row.")
@click.option("--template", help="A format string such as '{question} calc :', in place of the chat template.")
@click.option("--side", type=click.Choice(["target", "source"]), help="Of profile.yml; default: target.")
@click.option("--limit", type=click.IntRange(1), help="Probes taken, drawn by --seed.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="At most as many in an answer; default: profile.yml's, or 128."
)
@click.option("--samples", type=click.IntRange(1), help="Answers drawn a probe, in place of the greedy one.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the drawn answers.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), help="Of --limit, --pick and --samples; default: profile.yml's, or 0."
)
@click.option("--batch-size", type=click.IntRange(1), help="Answers generated together; default: profile.yml's, or 8.")
@click.option(
    "--classifier",
    "reference",
    default="words",
    show_default=True,
    help="Of math tokens: words (a list), or path/file.py:function or package.module:function (text -> bool).",
)
@click.option(
    "--top", type=click.IntRange(1), default=10, show_default=True, help="Leading tokens that are classified."
)
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Tokens of fewer than this in the amplified answers are left out.",
)
@model_options
@json_option
@click.option("--figures", type=click.Path(file_okay=False), metavar="DIR", help="Write word clouds as SVG and PNG.")
@command_options
def amplify(
    model: str,
    names: tuple[str, ...],
    names_file: str | None,
    mask_file: str | None,
    pick: int | None,
    factor: float,
    probes_file: str,
    question: str | None,
    images: str | None,
    template: str | None,
    side: str | None,
    limit: int | None,
    max_new_tokens: int | None,
    samples: int | None,
    temperature: float,
    seed: int | None,
    batch_size: int | None,
    reference: str,
    top: int,
    min_count: int,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    json_file: str | None,
    figures: str | None,
) -> None:
    """Multiply a neuron's activation while MODEL answers PROBES, and rank the tokens that become more frequent.

    Every neuron is amplified by itself (Eq. 7, 8). Tokens are ranked by their log-odds against the plain answers. The
    math tokens are those of a list of numbers, signs, LaTeX commands and words that comes with this package. A
    classifier named in Python runs with your rights; read it first.
    """
    from mergekit_snrf.evidence import amplify as amplification
    from mergekit_snrf.evidence.results import write_result
    from mergekit_snrf.evidence.tokens import load_classifier
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder
    from mergekit_snrf.neurons.sets import Neuron
    from mergekit_snrf.neurons.shape import check_fit
    from mergekit_snrf.profiling.probes.rows import load_rows

    with reworded(_OPTIONS):
        asked = amplification.load_asked(
            probes_file,
            model,
            question=question,
            images=images,
            template=template,
            side=side,
            max_new_tokens=max_new_tokens,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
        )
    if not (names or names_file or mask_file):
        raise click.UsageError("name neurons with --neuron, --neurons or --mask")
    if pick is not None and mask_file is None:
        raise click.UsageError("--pick goes with --mask")
    if figures is not None and (find_spec("matplotlib") is None or find_spec("wordcloud") is None):
        raise SnrfError("word clouds need matplotlib and wordcloud; pip install 'mergekit-snrf[analysis]'")
    check_outputs(json_file, figures)
    sampling = amplification.Sampling(samples or 0, temperature)
    classifier = load_classifier(reference)
    settings: dict[str, object] = {"mask": mask_file, "pick": pick} if mask_file is not None else {}
    shape = None
    if asked.model.gguf_file is None:
        checkpoint = open_checkpoint(model, asked.model.revision, trust_remote_code=trust_remote_code)
        shape = find_decoder(checkpoint).shape
        settings["config_sha256"] = checkpoint.config_sha256
    masked = _masked(mask_file, pick, asked.source.seed, shape, model)
    neurons = [*map(Neuron.parse, names), *_listed(names_file), *masked]
    if shape is not None:
        check_fit(neurons, shape, where=None, model=model)
    silence_progress()
    with reworded(_OPTIONS):
        how = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        rows = load_rows(asked.source, answers=False)
        subject, processor = loaded(
            asked.model.model_copy(update=how), settings, images=asked.source.images is not None
        )
        result = amplification.amplify(
            rows,
            subject,
            processor,
            asked,
            neurons,
            factor,
            sampling=sampling,
            classifier=classifier,
            top=top,
            min_count=min_count,
            name=model,
            settings=settings,
            progress=not is_quiet(),
        )
    click.echo(_report(result, top))
    if json_file is not None:
        write_result(json_file, result)
    if figures is not None:
        for path in _draw(result, Path(figures)):
            click.echo(path)


def _listed(file: str | None) -> list[Neuron]:
    from mergekit_snrf.neurons.sets import Neuron

    if file is None:
        return []
    try:
        names = Path(file).read_text(encoding="utf-8").split()
    except OSError as error:
        raise SnrfError(f"{file}: cannot be read ({error.strerror or error}); correct the path") from None
    except UnicodeDecodeError:
        raise SnrfError(f"{file}: is not a text file; give one neuron a line") from None
    if not names:
        raise SnrfError(f"{file}: names no neuron; give one a line, such as fwd.up.L14.N12953")
    try:
        return [Neuron.parse(name) for name in names]
    except SnrfError as error:
        raise SnrfError(f"{file}: {error}") from None


def _masked(file: str | None, pick: int | None, seed: int, shape: DecoderShape | None, model: str) -> list[Neuron]:
    from mergekit_snrf.cli.study import check_mask
    from mergekit_snrf.evidence.amplify import pick_neurons
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.neurons.maskfile import read_mask

    if file is None:
        return []
    mask = read_mask(local_path(file))
    if shape is not None:
        check_mask(mask, shape, model)
    try:
        return pick_neurons(mask.neurons, pick, seed)
    except SnrfError as error:
        raise SnrfError(f"{mask.path}: {error}") from None


def _report(result: Amplification, top: int) -> str:
    few = len(result.neurons) <= _DETAILED
    parts = [_details(neuron, result, top) for neuron in result.neurons] if few else [_summary(result)]
    answers = result.settings["generations"]
    parts.append(
        f"{answers} answers to {result.count} probes, plain and with each neuron amplified by {result.factor:g}.\n"
        f"log-odds: of the token in the amplified against the plain answers, 0.5 added to every count."
    )
    if result.math_neuron_ratio is not None:
        many = round(result.math_neuron_ratio * len(result.neurons))
        parts.append(
            f"{many} of {len(result.neurons)} neurons ({100 * result.math_neuron_ratio:.1f} %) are math neurons: more "
            f"than half of their at most {top} leading tokens are math tokens ({result.classifier})."
        )
    if result.plain_math_share is not None:
        parts[-1] += f"\nOf the tokens of the plain answers, {100 * result.plain_math_share:.1f} % are math tokens."
    return "\n\n".join(parts)


def _details(neuron: AmplifiedNeuron, result: Amplification, top: int) -> str:
    rows = [
        (_shown(token.token), f"{token.log_odds:+.2f}", token.amplified, token.plain)
        for token in neuron.tokens[: 2 * top]
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
    from mergekit_snrf.evidence.wording import printable

    return printable(repr(token))


def _draw(result: Amplification, folder: Path) -> list[Path]:
    from mergekit_snrf.evidence import figures, wording

    paths = []
    for neuron in result.neurons:
        title = f"{neuron.neuron} of {wording.without_folders(result.model)} amplified by {result.factor:g}"
        paths += figures.save(figures.word_cloud(neuron), folder, neuron.neuron, title, wording.word_cloud_text(neuron))
    return paths
