"""``snrf merge`` and ``mergekit-snrf``: mergekit's own merge command with the plugin installed by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", metavar="RECIPE.yml OUT", nargs=-1, type=click.UNPROCESSED)
def merge(arguments: tuple[str, ...]) -> None:
    """Merge RECIPE into OUT with mergekit-yaml and its options."""
    _run(arguments, "snrf merge")


def main() -> None:
    """Run ``mergekit-yaml`` where torch's autoload is switched off (TORCH_DEVICE_BACKEND_AUTOLOAD=0)."""
    _run(sys.argv[1:], "mergekit-snrf")


def _run(arguments: Sequence[str], name: str) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from mergekit_snrf.merge import install

    install()
    mergekit_yaml(list(arguments), prog_name=name)


if __name__ == "__main__":
    main()
