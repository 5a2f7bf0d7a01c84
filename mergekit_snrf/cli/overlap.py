"""``snrf overlap``: what profiles share, next to what chance would give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import check_outputs, command_options, say, table, write_outputs
from mergekit_snrf.cli.options import figures_option, json_option, selection_options
from mergekit_snrf.errors import naming, option, printable

if TYPE_CHECKING:
    from mergekit_snrf.evidence.results import Overlap
    from mergekit_snrf.evidence.wording import Table

_NOTE = (
    "Shares are of the union of both sets. chance is what random sets of the same sizes share on average, z how many\n"
    "standard deviations lie between. fwd.up and fwd.down have the same ranks in a profile, which z allows for."
)
_SHOWN_RATIOS = ("0.01", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5")


@click.command()
@click.argument("profiles", nargs=-1, required=True, metavar="A.PROFILE B.PROFILE [MORE...]")
@selection_options
@click.option("--layers", is_flag=True, help="Also print every layer.")
@click.option("--curve", is_flag=True, help="Also compute top ratios from 0.01 to 0.5.")
@json_option
@figures_option
@command_options
def overlap(
    profiles: tuple[str, ...],
    rule: dict[str, Any],
    layers: bool,
    curve: bool,
    json_file: str | None,
    figures: str | None,
) -> None:
    """Show which neurons the models of two profiles share.

    Beside what chance would give (Fig. 3, 4, 8). More than two profiles are compared two by two. No model is loaded.
    """
    from mergekit_snrf.evidence.overlap import overlap as overlapping
    from mergekit_snrf.evidence.results import Overlap

    check_outputs(json_file, figures)
    with naming(option):
        result = overlapping(*profiles, curve=curve, **rule)
    pairs = [result] if isinstance(result, Overlap) else result.pairs
    say(_text(pairs))
    if layers or curve:
        for pair in pairs:
            say(_details(pair, layers, named=len(pairs) > 1))
    say(f"\n{_NOTE}")
    for path in write_outputs(result, json_file, figures):
        say(path)


def _text(pairs: list[Overlap]) -> str:
    from mergekit_snrf.evidence.overlap import total
    from mergekit_snrf.evidence.wording import chance_sentence, counts_table, projections_table, rule

    by = f"selected by {rule(pairs[0].rule)}"
    if len(pairs) > 1:
        return f"{by}\n\n{_shown(counts_table('', 'A, B', [(_name(pair), total(pair.sites)) for pair in pairs]))}"
    (pair,) = pairs
    heading = f"A  {printable(pair.names[0])}\nB  {printable(pair.names[1])}\n{by}"
    return f"{heading}\n\n{_shown(projections_table(pair))}\n\n{chance_sentence(total(pair.sites))}"


def _shown(found: Table) -> str:
    return table(found.header, found.rows)


def _name(pair: Overlap) -> str:
    return printable(f"{pair.names[0]}, {pair.names[1]}")


def _details(pair: Overlap, layers: bool, named: bool) -> str:
    from mergekit_snrf.evidence.wording import counts_table, layers_table

    parts = [f"\n{_name(pair)}"] if named else []
    if layers:
        parts.append(f"\n{_shown(layers_table(pair))}")
    if pair.curve:
        points = {f"{point.rule['top_ratio']:g}": point for point in pair.curve}
        # Hits know the edges of their bins only; those are few enough to show all of them.
        shown = set(points if "at_least" in pair.curve[0].rule else _SHOWN_RATIOS)
        rows = [(ratio, points[ratio]) for ratio in points if ratio in shown]
        parts.append(f"\n{_shown(counts_table('', 'top ratio', rows))}")
    return "\n".join(parts)
