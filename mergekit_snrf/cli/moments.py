"""``snrf moments``: second moments of a model's inputs, for ``update: regmean``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import command_options, is_quiet, silence_progress, size, table
from mergekit_snrf.cli.options import run_options
from mergekit_snrf.cli.tune import tune
from mergekit_snrf.errors import naming, option

if TYPE_CHECKING:
    from mergekit_snrf.models.moments import InputSite, Moments


class _Group(click.Group):
    """A group that takes ``snrf moments PROFILE.yml OUT`` for ``snrf moments take PROFILE.yml OUT``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; a first word that is none of them is the argument of ``take``."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["take", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Group)
def moments() -> None:
    """Take, show and tune moments, for update: regmean.

    They are second moments of a target's inputs on probes to gain and to keep.

    snrf moments PROFILE.yml OUT.safetensors is short for snrf moments take.
    """


@moments.command()
@click.argument("profile", metavar="PROFILE.yml", type=click.Path())
@click.argument("out", metavar="OUT.safetensors", type=click.Path())
@run_options
@command_options
def take(profile: str, out: str, resume: bool, overrides: dict[str, Any]) -> None:
    """Write the moments of a target's inputs on its probes.

    The target's probes, and those under keep:, are sent through the target.

    snrf-profile writes the same file beside the mask. Start it under torchrun to split the probes over processes.
    """
    from mergekit_snrf.profiling.moments import take_moments
    from mergekit_snrf.profiling.settings import load_profile_config

    silence_progress()
    with naming({"resume": option("resume")}):
        config = load_profile_config(profile).override(**overrides)
        written = take_moments(config, out, folder=Path(profile).parent, resume=resume, progress=not is_quiet())
    if written is not None:
        click.echo(f"{out}: {written.layers} layers, {size(Path(out).stat().st_size)}")


@moments.command()
@click.argument("file", metavar="MOMENTS")
@click.option("--layers", is_flag=True, help="Print a line for every input of every layer.")
@command_options
def show(file: str, layers: bool) -> None:
    """Print what MOMENTS holds.

    Probes, tokens for each dimension, clipped tokens, and the share of the sketches.

    MOMENTS is a file, or hf://owner/repo@revision/path.
    """
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.models.moments import INPUTS, SETS, read_moments

    path = local_path(file)
    found = read_moments(path)
    origin = found.provenance
    rows = []
    for name in INPUTS:
        sites = [site for site in found.sizes if site.input == name]
        for group in [[site] for site in sites] if layers else [sites]:
            label = group[0].key if layers else name
            rows += [(label, which, *_group_cells(found, group, which)) for which in SETS]
    header = ("input", "set", "size", "tokens / size", "longest / median", "clipped", "trace in sketch")
    click.echo(table(header, rows))
    facts_of = [("gain", origin.gain), *((f"keep {one.get('name', '')}", one) for one in origin.keep or [])]
    for label, one in facts_of:
        if one:
            click.echo(
                f"{label}: {one.get('count', '?')} probes of {one.get('dataset', '?')}, {one.get('tokens', '?')} tokens"
            )
    click.echo(f"{path}: {size(path.stat().st_size)}")


def _group_cells(found: Moments, group: list[InputSite], which: str) -> tuple[object, ...]:
    facts = [(found.provenance.inputs or {}).get(site.key, {}).get(which, {}) for site in group]
    tokens = [one["tokens"] for one in facts if "tokens" in one]
    clipped = [one["clipped"] for one in facts if "clipped" in one]
    longest = [one["largest"] / one["median"] for one in facts if one.get("median")]
    count = found.sizes[group[0]]
    return (
        count,
        f"{min(tokens) / count:.1f}" if tokens else "-",
        f"{max(longest):.1f}" if longest else "-",
        f"{max(clipped):.0f}" if clipped else "-",
        _sketch(found, group, which),
    )


def _sketch(found: Moments, group: list[InputSite], which: str) -> str:
    """Return the smallest share of the trace that the sketches of some inputs hold."""
    from mergekit_snrf.fusion.regmean import SketchMoment

    moments = [found.moment(site, which) for site in group] if group[0] in found.sketches else []
    rests = [moment.rest for moment in moments if isinstance(moment, SketchMoment)]
    return f"{100 * (1 - max(rests)):.1f} %" if rests else "dense"


moments.add_command(tune)
