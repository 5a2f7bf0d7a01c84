"""``snrf lens``: what a model would predict after each of its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.cli.common import table
from mergekit_snrf.errors import SnrfError, naming, option
from mergekit_snrf.evidence.asked import AskedOptions, load_asked

if TYPE_CHECKING:
    from mergekit_snrf.evidence.results import Lens
    from mergekit_snrf.profiling.probes.rows import Rows


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--probes", required=True, type=click.Path(), help="A .jsonl, .parquet or .csv file, or profile.yml.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write JSON; with --tokens, HTML.")
@click.option(
    "--positions",
    type=click.IntRange(0),
    metavar="COUNT",
    help="Positions of each kind that are read in a probe, at most, evenly spaced; 0: all. Default: as many as "
    "together cost a third of a forward pass, at least 4.",
)
@click.option("--tokens", "row", type=click.IntRange(0), metavar="ROW", help="Show the top tokens of this probe only.")
@options.settings_options("asked", AskedOptions)
@options.figures_option
@common.command_options
def lens(
    model: str,
    probes: str,
    out: str | None,
    positions: int | None,
    row: int | None,
    asked: AskedOptions,
    figures: str | None,
) -> None:
    """Read MODEL layer by layer on PROBES (the logit lens).

    It answers PROBES itself. The stream after each layer goes through the model's final norm and head. Printed by layer
    and kind of position (image, prompt, answer): entropy, KL to the last layer, agreement of the top token; rank and
    probability of the answer's tokens; the share of the text's attention that goes to images.
    """
    from mergekit_snrf.evidence import lens as lenses
    from mergekit_snrf.evidence import lens_tokens as grids
    from mergekit_snrf.evidence.analysis import loaded
    from mergekit_snrf.files.writing import write_text
    from mergekit_snrf.profiling.probes.rows import load_rows

    if row is not None and figures is not None:
        raise click.UsageError("--figures does not go with --tokens")
    common.check_outputs(out, figures)
    settings: dict[str, Any] = {}
    with naming(lambda field: "--probes" if field == "dataset" else option(field)):
        how = load_asked(probes, asked.ref(model), asked)
        common.silence_progress()
        rows = load_rows(how.source, answers=False)
        chosen = rows if row is None else _only(rows, row)
        net, processor = loaded(how.model, settings, images=how.source.images is not None)
        if row is not None:
            grid = grids.lens_tokens(chosen, net, processor, how, positions=positions)
            click.echo(table(*grids.grid_text(grid)))
            if out is not None:
                write_text(out, grids.grid_html(grid))
            return
        more: dict[str, Any] = {"settings": settings, "progress": not common.is_quiet()}
        result = lenses.lens(chosen, net, processor, how, positions=positions, **more)
    click.echo(_text(result))
    for path in common.write_outputs(result, out, figures):
        click.echo(path)


def _only(rows: Rows, row: int) -> Rows:
    found = tuple(one for one in rows.rows if one.number == row)
    if not found:
        what = f"row {row} is not among the {len(rows)} probes"
        raise SnrfError(rows.source.dataset, what, "choose another, or leave out --limit", field="tokens")
    return replace(rows, rows=found, bad={})


def _text(result: Lens) -> str:
    from mergekit_snrf.evidence.lens_figures import frequent_table, lens_sentences, lens_table

    by_layer, frequent = lens_table(result), frequent_table(result)
    parts = [table(by_layer.header, by_layer.rows), f"{frequent.caption}:", table(frequent.header, frequent.rows)]
    return "\n\n".join([*parts, "\n".join(lens_sentences(result))])
