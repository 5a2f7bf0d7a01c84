"""``snrf-profile``: find the neurons that two models share."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from mergekit_snrf.cli.common import command_options, is_quiet, share, silence_progress, table
from mergekit_snrf.errors import naming, option


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("profile", metavar="PROFILE.yml", type=click.Path())
@click.argument("mask", metavar="MASK.safetensors", type=click.Path(), required=False)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--device", help="Such as cuda, cuda:1 or cpu; overrides PROFILE.yml.")
@click.option("--dtype", help="Of the weights: auto, bfloat16, float16, float32 or float64; overrides PROFILE.yml.")
@click.option("--limit", type=click.IntRange(1), help="Probes taken from each dataset; overrides PROFILE.yml.")
@click.option("--dry-run", is_flag=True, help="Print three rendered probes of each side and exit.")
@click.option(
    "--memory-budget", metavar="SIZE", help="Size the blocks for this much memory beside the model, such as 500MB."
)
@click.option(
    "--journal-every",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How much work a killed run may lose.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that lies in the checkpoints.")
@command_options
def main(
    profile: str,
    mask: str | None,
    resume: bool,
    device: str | None,
    dtype: str | None,
    limit: int | None,
    dry_run: bool,
    memory_budget: str | None,
    journal_every: float,
    trust_remote_code: bool,
) -> None:
    """Send the probes of PROFILE.yml through both models and write MASK.safetensors, their shared neurons.

    The two profiles are written beside it. Start it under torchrun or accelerate launch to split the probes over
    several processes.
    """
    from mergekit_snrf.neurons.sites import PROJECTIONS
    from mergekit_snrf.profiling import run as runs
    from mergekit_snrf.profiling.memory import parse_size
    from mergekit_snrf.profiling.settings import load_profile_config

    if mask is None and not dry_run:
        raise click.UsageError("Missing argument 'MASK.safetensors'.")
    quiet = is_quiet()
    if os.environ.get("RANK", "0") != "0":
        # Of several processes one speaks, unless something is wrong in another one.
        logging.getLogger("mergekit_snrf").setLevel(logging.ERROR)
        quiet = True
    silence_progress(quiet=quiet)
    folder = Path(profile).parent
    with naming({field: option(field) for field in ("resume", "memory_budget")}):
        budget = None if memory_budget is None else parse_size(memory_budget)
        config = load_profile_config(profile).override(
            device=device, dtype=dtype, limit=limit, trust_remote_code=trust_remote_code or None
        )
        if dry_run:
            click.echo(runs.dry_run(config, folder=folder))
            return
        assert mask is not None
        result = runs.run(
            config,
            mask,
            folder=folder,
            resume=resume,
            memory_budget=budget,
            journal_seconds=journal_every,
            progress=not quiet,
        )
    if result is None:
        return
    for side, path in result.profiles.items():
        seconds = result.seconds[side]
        took = f"in {seconds:.0f} s" if seconds else "finished before"
        click.echo(f"{side}: {result.probes[side]} probes {took}, {path}")
    rows = []
    for projection in PROJECTIONS:
        sites = [site for site in result.neurons if site.projection == projection]
        count, whole = sum(map(result.neurons.count, sites)), sum(len(result.neurons[site]) for site in sites)
        rows.append((projection, count, whole, share(count, whole)))
    click.echo(table(("projection", "shared", "neurons", "share"), rows))
    click.echo(f"{result.mask}: {result.neurons.count()} shared neurons")


if __name__ == "__main__":
    main()
