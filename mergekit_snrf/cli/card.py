"""``snrf card``: what a comparison measured, in a merged model's README."""

from __future__ import annotations

import os

import click

from mergekit_snrf.cli.common import command_options


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(file_okay=False))
@click.option(
    "--result",
    "results",
    multiple=True,
    required=True,
    type=click.Path(dir_okay=False),
    metavar="JSON",
    help="What snrf compare wrote with --json; repeat for several evaluations.",
)
@command_options
def card(out: str, results: tuple[str, ...]) -> None:
    """Fill the evaluation section of OUT/README.md, the card of a merge or adapter, from comparisons of its recipe.

    What was in the section is replaced. A comparison of other models, another mask or another strength is refused.
    """
    from mergekit_snrf.errors import SnrfError
    from mergekit_snrf.evidence.card import with_evaluation
    from mergekit_snrf.evidence.results import Study, read_result
    from mergekit_snrf.files import writing
    from mergekit_snrf.files.reading import read_text

    path = os.path.join(out, "README.md")
    text = read_text(path)
    studies = []
    for name in results:
        result = read_result(name)
        if not isinstance(result, Study):
            raise SnrfError(name, "is not a comparison", "give a file that snrf compare wrote with --json")
        studies.append(result)
    writing.write_text(path, with_evaluation(text, studies, path))
    click.echo(f"{path}: evaluation of {', '.join(study.evaluation for study in studies)}")
