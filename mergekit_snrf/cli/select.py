"""``snrf mask select``: a mask from profiles, without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from mergekit_snrf.cli.common import command_options
from mergekit_snrf.errors import SnrfError, naming, option

Command = TypeVar("Command", bound=Callable[..., Any])


def selection_options(command: Command) -> Command:
    """Add the options of a ``Selection``."""
    for add in (
        click.option("--at-least", metavar="SHARE|COUNT", help="Active on this share or number of probes, not on all."),
        click.option("--sigma", metavar="NUMBER", help="Impacts of at least this; also by projection, as --top-ratio."),
        click.option("--top-ratio", metavar="SHARE", help="The strongest share, such as 0.1 or attn=0.3,fwd=0.1."),
    ):
        command = add(command)
    return command


@click.command()
@click.argument("profiles", nargs=-1, required=True, metavar="PROFILE...")
@click.argument("out", type=click.Path(dir_okay=False))
@selection_options
@command_options
def select(profiles: tuple[str, ...], out: str, top_ratio: str | None, sigma: str | None, at_least: str | None) -> None:
    """Write to OUT the neurons that every PROFILE finds active (Eq. 5 and 6); give --top-ratio or --sigma.

    One profile gives the neurons of one model, the profiles of target and source the shared ones.
    """
    from mergekit_snrf.files import references
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.neurons.maskfile import Provenance, write_mask
    from mergekit_snrf.profiling.result.profilefile import read_profile
    from mergekit_snrf.profiling.result.selection import Selection
    from mergekit_snrf.profiling.result.selection import select as select_neurons

    if (top_ratio is None) == (sigma is None):
        raise click.UsageError("give either --top-ratio or --sigma")
    if _is_profile(out):
        raise click.UsageError(f"OUT, {out}, is a profile, which the mask would replace; name the mask's file last")
    paths = [local_path(reference) for reference in profiles]
    contents = [read_profile(path) for path in paths]
    with naming(option):
        selection = Selection.of(top_ratio=top_ratio, sigma=sigma, at_least=at_least)
        neurons = select_neurons(contents, selection)
    sides = {content.provenance.side: content.provenance.model for content in contents}
    provenance = Provenance(
        target=sides.get("target"),
        source=sides.get("source"),
        selection=selection.rule,
        operation="select",
        inputs=[{"file": path.name, "sha256": references.sha256(path)} for path in paths],
        seed=contents[0].provenance.seed,
    )
    write_mask(out, neurons, provenance)
    click.echo(f"{out}: {neurons.count()} neurons")


def _is_profile(path: str) -> bool:
    from mergekit_snrf.profiling.result.profilefile import read_profile

    try:
        read_profile(path)
    except SnrfError:
        return False
    return True
