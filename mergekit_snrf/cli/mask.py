"""``snrf mask``: show, combine, draw and convert masks."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import check_outputs, command_options, table, write_json
from mergekit_snrf.cli.options import SEEDS, json_option, selection_options
from mergekit_snrf.errors import SnrfError, naming, option

if TYPE_CHECKING:
    from mergekit_snrf.models.decoder import DecoderShape
    from mergekit_snrf.neurons.lists import KvIndices
    from mergekit_snrf.neurons.maskfile import ModelProvenance, Provenance
    from mergekit_snrf.neurons.sets import NeuronSet


@click.group()
def mask() -> None:
    """Show, combine, draw and convert masks of neurons.

    A mask is a file, or hf://owner/repo@revision/path.
    """


def _shape(model: str) -> tuple[DecoderShape, ModelProvenance]:
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder
    from mergekit_snrf.neurons.maskfile import ModelProvenance

    checkpoint = open_checkpoint(model)
    provenance = ModelProvenance(path=model, model_type=checkpoint.model_type, config_sha256=checkpoint.config_sha256)
    return find_decoder(checkpoint).shape, provenance


def _write(out: str, neurons: NeuronSet, provenance: Provenance) -> None:
    from mergekit_snrf.neurons.maskfile import write_mask

    write_mask(out, neurons, provenance)
    click.echo(f"{out}: {neurons.count()} neurons")


@mask.command()
@click.argument("mask_file", metavar="MASK")
@click.option("--layers", is_flag=True, help="Also print the counts of every layer.")
@json_option
@command_options
def show(mask_file: str, layers: bool, json_file: str | None) -> None:
    """Print counts by projection, and where MASK comes from."""
    from mergekit_snrf.files.references import local_path, sha256
    from mergekit_snrf.neurons.maskcard import provenance_rows
    from mergekit_snrf.neurons.maskfile import read_mask
    from mergekit_snrf.neurons.sets import count_rows
    from mergekit_snrf.neurons.sites import Site

    check_outputs(json_file)
    path = local_path(mask_file)
    content, digest = read_mask(path, towers=True, framework="np"), sha256(path)
    counts = content.neurons.by_projection()
    if json_file is not None:
        provenance = content.provenance.model_dump(mode="json", exclude_none=True)
        by_layer = {site.key: content.neurons.count(site) for site in content.neurons}
        summary = {name: dict(zip(("tensors", "neurons", "of"), row, strict=True)) for name, row in counts.items()}
        shown = {"sha256": digest, "counts": summary, "layers": by_layer, "provenance": provenance}
        write_json(json_file, shown)
    if json_file == "-":
        return
    click.echo(table(("projection", "layers", "neurons", "of", "share"), count_rows(counts)))
    if layers:
        numbers = sorted({site.layer for site in content.neurons.nonempty()})
        rows = [(layer, *(content.neurons.count(Site(layer, name)) for name in counts)) for layer in numbers]
        click.echo("\n" + table(("layer", *counts), rows))
    facts = [("sha256", digest), *provenance_rows(content)]
    click.echo("\n" + "\n".join(f"{name:<16}  {' '.join(text.split())}" for name, text in facts))


def _combination(name: str, operation: Callable[[NeuronSet, NeuronSet], NeuronSet], text: str) -> click.Command:
    @click.argument("masks", nargs=-1, required=True, metavar="MASK...")
    @click.argument("out", type=click.Path(dir_okay=False))
    @command_options
    def command(masks: tuple[str, ...], out: str) -> None:
        from mergekit_snrf.neurons.maskfile import load_mask, provenance_of_operation

        if len(masks) < 2:
            raise click.UsageError("give at least two masks and the output file")
        inputs = [load_mask(reference) for reference in masks]
        result = reduce(operation, (content.neurons for content in inputs))
        _write(out, result, provenance_of_operation(name, inputs))

    return mask.command(name, help=text)(command)


_combination("intersect", operator.and_, "Write to OUT the neurons that are in every MASK.")
_combination("union", operator.or_, "Write to OUT the neurons that are in any MASK.")
_combination("subtract", operator.sub, "Write to OUT the neurons that only the first MASK has.")


@mask.command()
@click.argument("files", nargs=-1, required=True, metavar="[MASK] OUT")
@click.option("--seed", type=SEEDS, default=0, show_default=True)
@click.option("--model", help="Draw for this model instead of after a MASK; needs --ratio.")
@click.option(
    "--ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of each layer's projection, with --model."
)
@click.option("--disjoint", is_flag=True, help="Draw among the neurons that are not in MASK.")
@command_options
def random(files: tuple[str, ...], seed: int, model: str | None, ratio: float | None, disjoint: bool) -> None:
    """Draw as many random neurons as MASK has.

    In each layer and projection, the control of the paper's Table 3.

    The draw may contain neurons of MASK, unless --disjoint is given. With --model and --ratio, draw the same share of
    every layer and projection of a model.
    """
    import torch

    from mergekit_snrf.neurons.maskfile import Provenance, load_mask, provenance_of_operation
    from mergekit_snrf.neurons.sets import NeuronSet

    if len(files) != (2 if model is None else 1) or (model is None) != (ratio is None):
        raise click.UsageError("give either MASK and OUT, or OUT with --model and --ratio")
    if ratio is not None and math.isnan(ratio):
        raise click.BadParameter("nan is not a share", param_hint="'--ratio'")
    if disjoint and model is not None:
        raise click.UsageError("--disjoint needs a MASK to keep away from")
    out = files[-1]
    if model is None:
        content = load_mask(files[0])
        neurons = content.neurons.random(seed, disjoint=disjoint)
        provenance = provenance_of_operation("random disjoint" if disjoint else "random", [content], seed=seed)
    else:
        assert ratio is not None
        shape, target = _shape(model)
        sizes = {site: shape.neurons(site.projection) for site in shape.sites()}
        first = NeuronSet({site: torch.arange(n) < round(ratio * n) for site, n in sizes.items()})
        neurons = first.random(seed)
        provenance = Provenance(target=target, operation="random", selection={"ratio": ratio}, seed=seed)
    _write(out, neurons, provenance)


@mask.command("import")
@click.argument("file", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--model", required=True, help="The model that the neurons were found in; its config and headers are read."
)
@click.option("--set", "chosen", metavar="NUMBER|NAME", help="Which set, where FILE has several, such as domains.")
@click.option(
    "--kv-indices",
    type=click.Choice(["repeated", "rows"]),
    default="repeated",
    show_default=True,
    help="Whether attn_k and attn_v count heads repeated for grouped-query attention, as the released code does.",
)
@command_options
def import_(file: str, out: str, model: str, chosen: str | None, kv_indices: KvIndices) -> None:
    """Convert a list of neurons to a mask.

    FILE is the JSON of SNRF's released code, with the correct rows for grouped-query attention; a .pth file of LAPE or
    MMNeuron, or the same lists as JSON; or names such as fwd.up.L14.N12953, as a JSON list or one a line.
    """
    from mergekit_snrf.files.references import sha256
    from mergekit_snrf.neurons.lists import read_neurons
    from mergekit_snrf.neurons.maskfile import Provenance

    shape, target = _shape(model)
    with naming({"set": "--set"}):
        neurons = read_neurons(file, shape, chosen=chosen, kv_indices=kv_indices)
    source = {"file": Path(file).name, "sha256": sha256(file), **({} if chosen is None else {"set": chosen})}
    _write(out, neurons, Provenance(target=target, operation="import", inputs=[source]))


@mask.command()
@click.argument("mask_file", metavar="MASK")
@click.argument("json_file", metavar="JSON", type=click.Path(dir_okay=False))
@click.option("--model", required=True, help="The model that the mask belongs to; its config and headers are read.")
@command_options
def export(mask_file: str, json_file: str, model: str) -> None:
    """Convert a mask to the released code's JSON."""
    from mergekit_snrf.files.writing import write_text
    from mergekit_snrf.neurons.lists import released_json
    from mergekit_snrf.neurons.maskfile import load_mask

    with naming({}, where=mask_file):
        content = released_json(load_mask(mask_file).neurons, _shape(model)[0])
    write_text(json_file, json.dumps(content))
    click.echo(f"{json_file}: {sum(len(i) for layers in content.values() for i in layers.values())} indices")


@mask.command()
@click.argument("mask_file", metavar="MASK")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write it to this file instead of printing it.")
@command_options
def card(mask_file: str, out: str | None) -> None:
    """Print a model card for MASK.

    It says what MASK holds, where it comes from, its sha256, and has a recipe that uses it.

    Everything is read from the file.
    """
    from mergekit_snrf.files import references, writing
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.fusion.fuse import Fusion
    from mergekit_snrf.neurons.maskcard import mask_card
    from mergekit_snrf.neurons.maskfile import read_mask

    path = local_path(mask_file)
    fusion = {"beta": Fusion().beta, "rank": Fusion().rank}
    text = mask_card(read_mask(path), sha256=references.sha256(path), fusion=fusion)
    if out is None:
        click.echo(text, nl=False)
        return
    with writing.replacing(out) as file:
        file.write(text.encode(errors="replace"))
    click.echo(out)


@mask.command()
@click.argument("profiles", nargs=-1, required=True, metavar="PROFILE...")
@click.argument("out", type=click.Path(dir_okay=False))
@selection_options
@command_options
def select(profiles: tuple[str, ...], out: str, rule: dict[str, Any]) -> None:
    """Write to OUT the neurons that every PROFILE finds active.

    Give --top-ratio or --sigma (Eq. 5 and 6).

    One profile gives the neurons of one model, the profiles of target and source the shared ones.
    """
    from mergekit_snrf.files import references
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.neurons.maskfile import Provenance
    from mergekit_snrf.profiling.result.profilefile import read_profile
    from mergekit_snrf.profiling.result.selection import Selection
    from mergekit_snrf.profiling.result.selection import select as select_neurons

    if (rule["top_ratio"] is None) == (rule["sigma"] is None):
        raise click.UsageError("give either --top-ratio or --sigma")
    with suppress(SnrfError):
        read_profile(out)
        raise click.UsageError(f"OUT, {out}, is a profile, which the mask would replace; name the mask's file last")
    paths = [local_path(reference) for reference in profiles]
    contents = [read_profile(path) for path in paths]
    with naming(option):
        selection = Selection.of(**rule)
        neurons = select_neurons(contents, selection)
    sides = {content.provenance.side: content.provenance.model for content in contents}
    provenance = Provenance(
        target=sides.get("target"),
        source=sides.get("source"),
        selection=selection.rule,
        operation="select",
        inputs=[{"file": path.name, "sha256": references.sha256(path)} for path in paths],
        seed=contents[0].provenance.seed,
    )
    _write(out, neurons, provenance)
