"""``snrf patch``: merge by rewriting the changed bytes of a copy of the target."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_snrf.cli.common import cache_options, command_options, is_quiet, size


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out_path", metavar="OUT", type=click.Path())
@click.option("--hard-links", is_flag=True, help="Link shards without edits; changing one later changes both.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier merge in OUT when the new one is complete.")
@click.option(
    "--workers", type=click.IntRange(1), default=2, show_default=True, help="Tensors computed at once, a thread each."
)
@cache_options
@click.option("--trust-remote-code", is_flag=True, help="For checkpoints whose configuration is code.")
@click.option("--write-model-card/--no-write-model-card", default=True, help="Output README.md with the recipe.")
@command_options
def patch(
    recipe: str,
    out_path: str,
    hard_links: bool,
    overwrite: bool,
    workers: int,
    transformers_cache: str | None,
    lora_merge_cache: str | None,
    trust_remote_code: bool,
    write_model_card: bool,
) -> None:
    """Merge RECIPE into OUT by copying the target's shards and rewriting only the bytes that change.

    The tensors are bit-identical to those of mergekit-yaml; a recipe that sets dtype is refused.
    """
    from mergekit.options import MergeOptions

    from mergekit_snrf.merge.patch import patch_merge

    options = MergeOptions(
        transformers_cache=transformers_cache,
        lora_merge_cache=lora_merge_cache,
        trust_remote_code=trust_remote_code,
        write_model_card=write_model_card,
        quiet=is_quiet(),
    )
    from mergekit_snrf.merge.recipefile import load_recipe

    config = load_recipe(recipe)
    done = patch_merge(
        config,
        Path(recipe).read_text(encoding="utf-8"),
        options,
        out_path,
        recipe_folder=str(Path(recipe).resolve().parent),
        hard_links=hard_links,
        workers=workers,
        overwrite=overwrite,
    )
    click.echo(f"{out_path}: {size(done.bytes_written)} rewritten; shards: {done.copied} copied, {done.linked} linked")
