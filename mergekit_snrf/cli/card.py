"""``snrf mask card``: a README for a mask file."""

from __future__ import annotations

import click

from mergekit_snrf.cli.common import command_options


@click.command()
@click.argument("mask_file", metavar="MASK")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write it to this file instead of printing it.")
@command_options
def card(mask_file: str, out: str | None) -> None:
    """Print a model card for MASK: what it holds, where it comes from, its sha256, and a recipe that uses it.

    Everything is read from the file.
    """
    from mergekit_snrf.files import references, writing
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.fusion.fuse import Fusion
    from mergekit_snrf.neurons.maskcard import mask_card
    from mergekit_snrf.neurons.maskfile import read_mask

    path = local_path(mask_file)
    fusion = {"beta": Fusion().beta, "rank": Fusion().rank}
    text = mask_card(read_mask(path), sha256=references.sha256(path), fusion=fusion)
    if out is None:
        click.echo(text, nl=False)
        return
    with writing.replacing(out) as file:
        file.write(text.encode(errors="replace"))
    click.echo(out)
