"""``snrf``: what surrounds a merge."""

from __future__ import annotations

import click

from mergekit_snrf import __version__
from mergekit_snrf.cli.ablate import ablate
from mergekit_snrf.cli.amplify import amplify
from mergekit_snrf.cli.card import card
from mergekit_snrf.cli.compare import compare
from mergekit_snrf.cli.domains import domains
from mergekit_snrf.cli.examples import add_examples
from mergekit_snrf.cli.frank import frank
from mergekit_snrf.cli.init import init
from mergekit_snrf.cli.lens import lens
from mergekit_snrf.cli.lora import lora
from mergekit_snrf.cli.mask import mask
from mergekit_snrf.cli.merge import merge
from mergekit_snrf.cli.moments import moments
from mergekit_snrf.cli.overlap import overlap
from mergekit_snrf.cli.patch import patch
from mergekit_snrf.cli.plan import plan
from mergekit_snrf.cli.profile import main as profile
from mergekit_snrf.cli.report import report
from mergekit_snrf.cli.sweep import sweep
from mergekit_snrf.errors import did_you_mean

_SECTIONS = {
    "Make a merge, in this order": (init, profile, moments, plan, merge),
    "Other outputs": (patch, lora, frank),
    "See whether it helps": (compare, sweep, card, report),
    "Look at neurons": (mask, overlap, ablate, domains, amplify, lens),
}


class _Ordered(click.Group):
    """A group whose help lists the commands in the order of the work."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each step."""
        names = {command: name for name, command in self.commands.items()}
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(names[command], command.get_short_help_str(200)) for command in commands])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the closest one."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}; {did_you_mean(args[0], self.commands, 'commands are')}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Ordered,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="mergekit-yaml RECIPE.yml OUT/ is the same as snrf merge, and snrf-profile the same as snrf profile.",
)
@click.version_option(__version__, prog_name="mergekit-snrf")
def main() -> None:
    """Move what one model can do into another: profile neurons, merge with the method snrf, see whether it helps."""


for section in _SECTIONS.values():
    for command in section:
        main.add_command(command, "profile" if command is profile else None)
add_examples(main)
