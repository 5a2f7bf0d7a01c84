"""``snrf frank``: how much of the source each layer takes by FRANK, as a table and as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import check_outputs, command_options, is_quiet, path_from, table
from mergekit_snrf.errors import SnrfError, naming, option

if TYPE_CHECKING:
    from mergekit_snrf.fusion.frank import Prior


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("target", metavar="TARGET")
@click.argument("source", metavar="SOURCE")
@click.option("--lens", metavar="FILE", help="Of snrf lens on TARGET and probes with images: adds the prior (Eq. 15).")
@click.option(
    "--mask", "masks", default="all", show_default=True, metavar="MASK", help="Neurons of the recipe; all: every one."
)
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="RECIPE.yml", help="Write a recipe.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that a checkpoint brings along.")
@command_options
def frank(
    base: str, target: str, source: str, lens: str | None, masks: str, out: str | None, trust_remote_code: bool
) -> None:
    """Compute FRANK's strength of the source in each layer.

    It follows from how far TARGET and SOURCE moved from BASE, which is printed, too. BASE is the language model that
    both were trained from. The checkpoints are read tensor by tensor. The recipe moves the five projections of snrf by
    lambda_R of their layer.
    """
    from tqdm import tqdm

    from mergekit_snrf.fusion.frank import prior_of, source_strengths
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder, pairing_problems
    from mergekit_snrf.models.weights import squared_changes

    check_outputs(out)
    opened = [open_checkpoint(name, trust_remote_code=trust_remote_code) for name in (base, target, source)]
    for other in (opened[0], opened[2]):
        if problems := pairing_problems(opened[1], other):
            raise SnrfError(other.name, f"does not fit the target: {problems[0].what}", "use models of one family")
    prior = None
    if lens is not None:
        with naming({}, where=lens):
            prior = prior_of(_attention(lens))
    layers = find_decoder(opened[1]).shape.layers
    read = squared_changes(opened[0], opened[1:])
    norms = [(v, r) for v, r in tqdm(read, total=layers, unit="layer", disable=is_quiet())]
    with naming({"base": "BASE"}, where=lens):
        strengths = source_strengths(norms, prior)
    click.echo(_text(norms, strengths, prior))
    if out is not None:
        from mergekit_snrf.files.writing import write_text

        write_text(out, _recipe(out, target, source, masks, strengths))
        click.echo(f"\n{out}")


def _attention(path: str) -> list[float]:
    from mergekit_snrf.evidence.results import Lens, read_result

    found = read_result(path)
    if not isinstance(found, Lens) or found.image_attention is None:
        what = "is not a lens" if not isinstance(found, Lens) else "has no attention to images"
        raise SnrfError(path, what, "run snrf lens TARGET on probes with images", field=option("lens"))
    return found.image_attention


def _text(norms: list[tuple[float, float]], strengths: list[float], prior: Prior | None) -> str:
    header = ["layer", "n_V", "n_R", *(["w_V"] if prior else []), "lambda_R"]
    rows: list[list[object]] = []
    for layer, ((of_target, of_source), strength) in enumerate(zip(norms, strengths, strict=True)):
        weight = [f"{prior.weights[layer]:.4f}"] if prior else []
        rows.append([layer, f"{of_target:.4g}", f"{of_source:.4g}", *weight, f"{strength:.4f}"])
    notes = [
        "n_V, n_R: squared distance of target and source from the base, over all parameters of the layer.",
        "lambda_R: the strength of the source, n_R / (n_V + n_R)" + (", weighed by w_V and 1 - w_V." if prior else "."),
    ]
    if prior is not None:
        notes.append(f"alpha {prior.alpha:.4g}: the attention to images falls as exp(-alpha l).")
        if min(strengths) > 0.9:
            notes.append("w_V sums to one over the layers, so in a deep model nearly all of the source is taken.")
    return "\n".join([table(header, rows), "", *notes])


def _recipe(out: str, target: str, source: str, masks: str, strengths: list[float]) -> str:
    import yaml

    folder = Path(out).resolve().parent
    parameters: dict[str, Any] = {"beta": strengths, "rank": 0}
    content = {
        "merge_method": "snrf",
        "base_model": path_from(folder, target),
        "models": [{"model": path_from(folder, source), "parameters": parameters}],
        "parameters": {"masks": masks if masks == "all" else path_from(folder, masks)},
    }
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
