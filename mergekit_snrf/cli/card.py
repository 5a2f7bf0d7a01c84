"""``snrf card``: what a comparison measured, in a merged model's README, and what the folder lacks to be shared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_snrf.cli.common import command_options
from mergekit_snrf.errors import naming, option

if TYPE_CHECKING:
    from mergekit_snrf.evidence.results import Study


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(file_okay=False))
@click.option(
    "--result",
    "results",
    multiple=True,
    type=click.Path(dir_okay=False),
    metavar="JSON",
    help="What snrf compare wrote with --json; repeat for several evaluations.",
)
@click.option("--license", metavar="ID", help="State this license, such as apache-2.0, in the card.")
@click.option(
    "--with-mask",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Copy the recipe, its mask FILE and the profile.yml beside it into OUT/snrf; of moments, all but FILE.",
)
@command_options
def card(out: str, results: tuple[str, ...], license: str | None, with_mask: str | None) -> None:
    """Complete the card of a merge or adapter, or check OUT.

    With options, the card OUT/README.md is completed; without, OUT is checked before it is shared. Comparisons replace
    what was in its evaluation; one of other models, another mask or another strength is refused. The check looks for
    missing weights, license, hub ids and evaluation, and for paths of this machine. Exit code 1 if something is
    missing.
    """
    from mergekit_snrf.evidence.card import check_card, with_evaluation
    from mergekit_snrf.files import writing
    from mergekit_snrf.files.reading import read_text
    from mergekit_snrf.merge.sharing import add_kit, problems, with_license

    path = os.path.join(out, "README.md")
    text = filled = read_text(path)
    check_card(text, path)
    if not (results or license or with_mask):
        found = list(problems(out))
        for what, problem in found:
            click.echo(f"{what}: ok" if problem is None else f"{what}: {problem}")
        if any(problem for _, problem in found):
            raise click.exceptions.Exit(1)
        return
    studies = _studies(results)
    if studies:
        filled = with_evaluation(filled, studies, path)
    with naming(option):
        filled = with_license(filled, license) if license else filled
    done = [f"evaluation of {study.evaluation}" for study in studies] + ([f"license {license}"] if license else [])
    if with_mask:
        done += [f"snrf/{name}" for name in add_kit(Path(out), text, Path(with_mask))]
    if filled != text:
        writing.write_text(path, filled)
    click.echo(f"{path}: {', '.join(done)}")


def _studies(results: tuple[str, ...]) -> list[Study]:
    from mergekit_snrf.errors import SnrfError
    from mergekit_snrf.evidence.results import Study, read_result

    studies = []
    for name in results:
        result = read_result(name)
        if not isinstance(result, Study):
            raise SnrfError(name, "is not a comparison", "give a file that snrf compare wrote with --json")
        studies.append(result)
    return studies
