"""``snrf patch``: merge by rewriting the changed bytes of a copy of the target."""

from __future__ import annotations

import os
from typing import Any

import click

from mergekit_snrf.cli.common import command_options, is_quiet, size
from mergekit_snrf.cli.options import device_options, recipe_argument, recipe_options, workers_option


@click.command()
@recipe_argument
@click.argument("out_path", metavar="OUT", type=click.Path())
@click.option("--hard-links", is_flag=True, help="Link shards without edits; changing one later changes both.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier merge in OUT when the new one is complete.")
@workers_option
@recipe_options
@device_options
@click.option("--write-model-card/--no-write-model-card", default=True, help="Output README.md with the recipe.")
@command_options
def patch(
    recipe: str,
    out_path: str,
    hard_links: bool,
    overwrite: bool,
    workers: int | None,
    reading: dict[str, Any],
    write_model_card: bool,
) -> None:
    """Merge RECIPE into OUT faster: rewrite only what changes.

    The target's shards are copied, and only the bytes of the masked neurons written again. The tensors are
    bit-identical to those of mergekit-yaml; a recipe that sets dtype is refused.
    """
    from mergekit_snrf.merge.imports import import_recipe_types

    import_recipe_types()
    from mergekit_snrf.merge.patch import patch_merge
    from mergekit_snrf.merge.recipefile import MergeOptions, load_recipe, recipe_text

    options = MergeOptions(**reading, quiet=is_quiet(), write_model_card=write_model_card)
    done = patch_merge(
        load_recipe(recipe),
        recipe_text(recipe),
        options,
        out_path,
        recipe_folder=os.path.dirname(os.path.realpath(recipe)),
        hard_links=hard_links,
        workers=workers,
        overwrite=overwrite,
    )
    click.echo(f"{out_path}: {size(done.bytes_written)} rewritten; shards: {done.copied} copied, {done.linked} linked")
