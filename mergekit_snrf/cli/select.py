"""``snrf mask select``: a mask from profiles, without loading a model."""

from __future__ import annotations

from typing import Any

import click

from mergekit_snrf.cli.common import command_options
from mergekit_snrf.cli.options import selection_options
from mergekit_snrf.errors import SnrfError, naming, option


@click.command()
@click.argument("profiles", nargs=-1, required=True, metavar="PROFILE...")
@click.argument("out", type=click.Path(dir_okay=False))
@selection_options
@command_options
def select(profiles: tuple[str, ...], out: str, rule: dict[str, Any]) -> None:
    """Write to OUT the neurons that every PROFILE finds active (Eq. 5 and 6); give --top-ratio or --sigma.

    One profile gives the neurons of one model, the profiles of target and source the shared ones.
    """
    from mergekit_snrf.files import references
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.neurons.maskfile import Provenance, write_mask
    from mergekit_snrf.profiling.result.profilefile import read_profile
    from mergekit_snrf.profiling.result.selection import Selection
    from mergekit_snrf.profiling.result.selection import select as select_neurons

    if (rule["top_ratio"] is None) == (rule["sigma"] is None):
        raise click.UsageError("give either --top-ratio or --sigma")
    if _is_profile(out):
        raise click.UsageError(f"OUT, {out}, is a profile, which the mask would replace; name the mask's file last")
    paths = [local_path(reference) for reference in profiles]
    contents = [read_profile(path) for path in paths]
    with naming(option):
        selection = Selection.of(**rule)
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
