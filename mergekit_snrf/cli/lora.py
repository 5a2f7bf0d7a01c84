"""``snrf lora``: the update of a merge as a PEFT adapter."""

from __future__ import annotations

import os
from typing import Any, Literal

import click

from mergekit_snrf.cli.common import command_options, is_quiet, size
from mergekit_snrf.cli.options import device_options, recipe_argument, recipe_options, workers_option
from mergekit_snrf.errors import naming


@click.command()
@recipe_argument
@click.argument("out_path", metavar="OUT", type=click.Path())
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the adapter's matrices; float32 is exact.",
)
@click.option(
    "--rank", type=click.IntRange(1), help="Rank of all modules, padded with zeros; default: the largest of the update."
)
@click.option("--base-model", metavar="HUB_ID", help="The target's hub id, for adapter_config.json.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier adapter in OUT when the new one is complete.")
@workers_option
@recipe_options
@device_options
@command_options
def lora(
    recipe: str,
    out_path: str,
    dtype: Literal["float32", "bfloat16", "float16"],
    rank: int | None,
    base_model: str | None,
    overwrite: bool,
    workers: int | None,
    reading: dict[str, Any],
) -> None:
    """Write the update of RECIPE as a PEFT adapter into OUT.

    The adapter is for the recipe's base_model, in place of a whole model.
    """
    from mergekit_snrf.merge.imports import import_recipe_types

    import_recipe_types()
    from mergekit_snrf.merge.lora import AdapterSettings, export_adapter
    from mergekit_snrf.merge.recipefile import MergeOptions, load_recipe, recipe_text

    options = MergeOptions(**reading, quiet=is_quiet())
    with naming({"adapter rank": "--rank"}):
        done = export_adapter(
            load_recipe(recipe),
            recipe_text(recipe),
            options,
            out_path,
            settings=AdapterSettings(dtype=dtype, rank=rank, base_model=base_model),
            recipe_folder=os.path.dirname(os.path.realpath(recipe)),
            workers=workers,
            overwrite=overwrite,
        )
    click.echo(f"{out_path}: {done.modules} modules of rank {done.rank}, {size(done.bytes)}")
