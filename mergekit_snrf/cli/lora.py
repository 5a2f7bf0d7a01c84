"""``snrf lora``: the update of a merge as a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mergekit_snrf.cli.common import cache_options, command_options, is_quiet, size
from mergekit_snrf.errors import naming


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
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
@click.option(
    "--workers", type=click.IntRange(1), default=2, show_default=True, help="Tensors computed at once, a thread each."
)
@cache_options
@click.option("--trust-remote-code", is_flag=True, help="For checkpoints whose configuration is code.")
@command_options
def lora(
    recipe: str,
    out_path: str,
    dtype: Literal["float32", "bfloat16", "float16"],
    rank: int | None,
    base_model: str | None,
    overwrite: bool,
    workers: int,
    transformers_cache: str | None,
    lora_merge_cache: str | None,
    trust_remote_code: bool,
) -> None:
    """Write the update of RECIPE as a PEFT adapter for its base_model into OUT, in place of a whole model."""
    from mergekit.options import MergeOptions

    from mergekit_snrf.merge.lora import AdapterSettings, export_adapter
    from mergekit_snrf.merge.recipefile import load_recipe

    options = MergeOptions(
        transformers_cache=transformers_cache,
        lora_merge_cache=lora_merge_cache,
        trust_remote_code=trust_remote_code,
        quiet=is_quiet(),
    )
    with naming({"adapter rank": "--rank"}):
        done = export_adapter(
            load_recipe(recipe),
            Path(recipe).read_text(encoding="utf-8"),
            options,
            out_path,
            settings=AdapterSettings(dtype=dtype, rank=rank, base_model=base_model),
            recipe_folder=str(Path(recipe).resolve().parent),
            workers=workers,
            overwrite=overwrite,
        )
    click.echo(f"{out_path}: {done.modules} modules of rank {done.rank}, {size(done.bytes)}")
