"""``snrf mask select``: a mask from profiles, without loading a model."""

from __future__ import annotations

from typing import Any

import click

from mergekit_snrf.cli.common import command_options


class PerProjection(click.ParamType):
    """A number, or numbers by group or projection: ``0.1`` or ``attn=0.3,fwd=0.1``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        if not isinstance(value, str):
            return value
        try:
            if "=" not in value:
                return float(value)
            pairs = [part.split("=") for part in value.split(",")]
            return {name.strip(): float(number) for name, number in pairs}
        except ValueError:
            self.fail(f"{value!r} is neither a number nor of the form attn=0.3,fwd=0.1", param, ctx)


class ShareOrCount(click.ParamType):
    """A share of the probes such as ``0.9``, or a number of probes such as ``90``."""

    name = "share or count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        if not isinstance(value, str):
            return value
        try:
            return int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a share of the probes nor a number of probes", param, ctx)


@click.command()
@click.argument("profiles", nargs=-1, required=True, metavar="PROFILE...")
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--top-ratio", type=PerProjection(), help="Keep the strongest share, such as 0.1 or attn=0.3,fwd=0.1.")
@click.option("--sigma", type=PerProjection(), help="Keep impacts of at least this, as --top-ratio.")
@click.option("--at-least", type=ShareOrCount(), help="Active on this share or number of probes, not on all of them.")
@command_options
def select(profiles: tuple[str, ...], out: str, top_ratio: Any, sigma: Any, at_least: float | None) -> None:
    """Write to OUT the neurons that every PROFILE finds active (Eq. 5 and 6); give --top-ratio or --sigma.

    One profile gives the neurons of one model, the profiles of target and source the shared ones.
    """
    from mergekit_snrf.files import references
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.neurons.maskfile import Provenance, write_mask
    from mergekit_snrf.profiling.result.profilefile import read_profile
    from mergekit_snrf.profiling.result.profilefile import select as select_neurons

    if (top_ratio is None) == (sigma is None):
        raise click.UsageError("give either --top-ratio or --sigma")
    if _is_profile(out):
        raise click.UsageError(f"OUT, {out}, is a profile, which the mask would replace; name the mask's file last")
    paths = [local_path(reference) for reference in profiles]
    contents = [read_profile(path) for path in paths]
    neurons = select_neurons(contents, top_ratio=top_ratio, sigma=sigma, at_least=at_least)
    sides = {content.provenance.side: content.provenance.model for content in contents}
    rule = {"top_ratio": top_ratio, "sigma": sigma, "at_least": at_least}
    provenance = Provenance(
        target=sides.get("target"),
        source=sides.get("source"),
        selection={name: value for name, value in rule.items() if value is not None},
        operation="select",
        inputs=[{"file": path.name, "sha256": references.sha256(path)} for path in paths],
        seed=contents[0].provenance.seed,
    )
    write_mask(out, neurons, provenance)
    click.echo(f"{out}: {neurons.count()} neurons")


def _is_profile(path: str) -> bool:
    from mergekit_snrf.errors import SnrfError
    from mergekit_snrf.profiling.result.profilefile import read_profile

    try:
        read_profile(path)
    except SnrfError:
        return False
    return True
