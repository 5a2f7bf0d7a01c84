"""``snrf report``: one HTML file about a mask and what was measured with it."""

from __future__ import annotations

import click

from mergekit_snrf.cli.common import command_options


@click.command()
@click.argument("mask_file", metavar="MASK")
@click.argument("out", metavar="OUT.html", type=click.Path(dir_okay=False))
@click.option("--profile", "profiles", multiple=True, metavar="PROFILE", help="Of both models, for their overlap.")
@click.option(
    "--result",
    "results",
    multiple=True,
    type=click.Path(dir_okay=False),
    metavar="JSON",
    help="What lens, or ablate, compare, moments tune, overlap or amplify with --json, wrote.",
)
@command_options
def report(mask_file: str, out: str, profiles: tuple[str, ...], results: tuple[str, ...]) -> None:
    """Write a report about MASK to OUT.html.

    It is one file that loads nothing: figures, tables and provenance. --profile and --result may be given several
    times.
    """
    from mergekit_snrf.evidence import report as html
    from mergekit_snrf.evidence.results import read_result
    from mergekit_snrf.files import writing
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.neurons.maskfile import read_mask
    from mergekit_snrf.profiling.result.profilefile import read_profile

    mask = read_mask(local_path(mask_file))
    page = html.report(
        mask,
        [read_profile(local_path(reference)) for reference in profiles],
        [read_result(path) for path in results],
    )
    with writing.replacing(out) as file:
        file.write(page.encode())
    click.echo(out)
