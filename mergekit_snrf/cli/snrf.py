"""``snrf``: what surrounds a merge."""

from __future__ import annotations

import click

from mergekit_snrf import __version__
from mergekit_snrf.cli.ablate import ablate
from mergekit_snrf.cli.amplify import amplify
from mergekit_snrf.cli.compare import compare
from mergekit_snrf.cli.domains import domains
from mergekit_snrf.cli.frank import frank
from mergekit_snrf.cli.init import init
from mergekit_snrf.cli.lens import lens
from mergekit_snrf.cli.lora import lora
from mergekit_snrf.cli.mask import mask
from mergekit_snrf.cli.moments import moments
from mergekit_snrf.cli.overlap import overlap
from mergekit_snrf.cli.patch import patch
from mergekit_snrf.cli.plan import plan
from mergekit_snrf.cli.report import report
from mergekit_snrf.cli.sweep import sweep


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-snrf")
def main() -> None:
    """Plan merges with the method snrf, work with neuron masks, and see whether a merge helps."""


_EVIDENCE = (overlap, report, ablate, domains, compare, sweep, amplify, lens)

for command in (init, plan, patch, lora, frank, mask, moments, *_EVIDENCE):
    main.add_command(command)
