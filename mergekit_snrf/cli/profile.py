"""``snrf-profile``: find the neurons that two models share."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click

from mergekit_snrf import __version__
from mergekit_snrf.cli.common import command_options, is_quiet, silence_progress, size, table
from mergekit_snrf.cli.options import run_options
from mergekit_snrf.errors import SnrfError, naming, option


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("profile", metavar="PROFILE.yml", type=click.Path())
@click.argument("mask", metavar="MASK.safetensors", type=click.Path(), required=False)
@run_options
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
@click.option("--overwrite", is_flag=True, help="Replace a finished MASK.")
@click.version_option(__version__, prog_name="mergekit-snrf")
@command_options
def main(
    profile: str,
    mask: str | None,
    resume: bool,
    overrides: dict[str, Any],
    dry_run: bool,
    memory_budget: str | None,
    journal_every: float,
    overwrite: bool,
) -> None:
    """Find the neurons that both models of PROFILE.yml use.

    The probes are sent through both models, and the neurons that are strongest in both written to MASK.safetensors.
    The two profiles are written beside it. With domains in place of target and source, count instead how often every
    neuron of one model is active on each domain, for snrf domains. Start it under torchrun or accelerate launch to
    split the probes over several processes.
    """
    from mergekit_snrf.neurons.sets import count_rows
    from mergekit_snrf.profiling import run as runs
    from mergekit_snrf.profiling.domains import count_domains, load_config
    from mergekit_snrf.profiling.memory import parse_size
    from mergekit_snrf.profiling.settings import ProfileConfig

    if mask is None and not dry_run:
        raise click.UsageError("Missing argument 'MASK.safetensors'.")
    if mask is not None and os.path.isfile(mask) and not (dry_run or resume or overwrite):
        raise SnrfError(mask, "is finished", "give --overwrite to measure again, or another name")
    # Only the first of several processes reports, unless something is wrong in another one.
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        logging.getLogger("mergekit_snrf").setLevel(logging.ERROR)
    progress, folder = first and not is_quiet(), Path(profile).parent
    silence_progress(quiet=not progress)
    with naming({field: option(field) for field in ("resume", "memory_budget")}):
        given: dict[str, Any] = {"resume": resume, "journal_seconds": journal_every, "progress": progress}
        budget = None if memory_budget is None else parse_size(memory_budget)
        config = load_config(profile).override(**overrides)
        if mask is None or dry_run:
            click.echo(runs.dry_run(config, folder=folder))
            return
        if not isinstance(config, ProfileConfig):
            counts = count_domains(config, mask, folder=folder, **given)
            if counts is not None:
                click.echo(f"{mask}: {len(counts.names)} domains, {size(Path(mask).stat().st_size)}")
            return
        result = runs.run(config, mask, folder=folder, memory_budget=budget, **given)
    if result is None:
        return
    for side, path in result.profiles.items():
        seconds = result.seconds[side]
        took = f"in {seconds:.0f} s" if seconds else "finished before"
        click.echo(f"{side}: {result.probes[side]} probes {took}, {path}")
    rows = [(name, *row) for name, _, *row in count_rows(result.neurons.by_projection())[:-1]]
    click.echo(table(("projection", "shared", "neurons", "share"), rows))
    click.echo(f"{result.mask}: {result.neurons.count()} shared neurons")


if __name__ == "__main__":
    main()
