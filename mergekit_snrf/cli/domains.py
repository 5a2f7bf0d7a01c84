"""``snrf domains``: neurons that are specific to domains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli import common
from mergekit_snrf.cli.common import check_outputs, command_options, table
from mergekit_snrf.cli.options import construct, eval_option, figures_option, json_option, settings_options
from mergekit_snrf.errors import SnrfError, naming, option
from mergekit_snrf.evidence.options import AblationOptions
from mergekit_snrf.profiling.result.choice import Choice

if TYPE_CHECKING:
    from mergekit_snrf.models.reference import ModelRef
    from mergekit_snrf.profiling.result.domains import Chosen, Domains

_BINS = 10
_MODULES = ("decoder", "vision", "projector", "all")

choice_options = settings_options("choice", Choice)
_modules_option = click.option(
    "--module",
    "modules",
    type=click.Choice(_MODULES),
    multiple=True,
    help="Only these; may be given several times. Default: every one that was counted, and all together.",
)


@click.group()
def domains() -> None:
    """Find neurons that are specific to domains.

    And see what a model loses without them.

    FILE holds the counts that snrf-profile takes with domains: in place of target and source.
    """


@domains.command()
@click.argument("file", metavar="FILE")
@choice_options
@figures_option
@command_options
def show(file: str, choice: Choice, figures: str | None) -> None:
    """Print how many neurons are specific, and where they are.

    Beside the tokens that were counted, and what domains share.
    """
    check_outputs(None, figures)
    found, chosen = _chosen(file, choice)
    click.echo(_tokens_text(found))
    for one in chosen:
        click.echo(f"\n{_module_text(found, one)}")
    _draw(chosen, figures)


@domains.command()
@click.argument("file", metavar="FILE")
@click.argument("outdir", metavar="OUTDIR", type=click.Path(file_okay=False))
@choice_options
@figures_option
@command_options
def select(file: str, outdir: str, choice: Choice, figures: str | None) -> None:
    """Write one mask for every domain into OUTDIR.

    It has the domain's neurons of the text decoder (fwd.up and fwd.down).

    The vision tower's and the projector's neurons are in DOMAIN.vision.safetensors and DOMAIN.projector.safetensors;
    they can be deactivated, and nothing else.
    """
    from mergekit_snrf.files.references import local_path, sha256
    from mergekit_snrf.neurons.maskfile import MASK, Provenance, write_mask

    check_outputs(None, figures)
    found, chosen = _chosen(file, choice)
    source = {"file": Path(found.path).name, "sha256": sha256(local_path(file))}
    check_outputs(None, outdir)
    paths = {
        (one.module, name): Path(outdir) / f"{name}{'' if one.module == 'decoder' else f'.{one.module}'}.safetensors"
        for one in chosen
        for name in one.sets
    }
    for path in paths.values():
        MASK.check_replaceable(path)
    rows = []
    for one in chosen:
        for (name, neurons), count in zip(one.sets.items(), one.counts.sum(1).tolist(), strict=True):
            rule = {"domain": name, "module": one.module, **choice.model_dump(), "bar": one.bar}
            origin = Provenance(
                target=found.provenance.model, selection=rule, operation="domains select", inputs=[source]
            )
            write_mask(paths[one.module, name], neurons, origin)
            rows.append((str(paths[one.module, name]), count))
    click.echo(table(("mask", "neurons"), rows))
    _draw(chosen, figures)


@domains.command()
@click.argument("model", metavar="MODEL")
@click.argument("file", metavar="FILE")
@eval_option
@choice_options
@_modules_option
@settings_options("given", AblationOptions, "draws", "seed", "device", "dtype", "trust_remote_code")
@json_option
@figures_option
@command_options
def ablate(model: str, file: str, reference: str, choice: Choice, modules: tuple[str, ...], **options: Any) -> None:
    """Deactivate each domain's neurons in MODEL.

    And as many random ones; every metric of EVAL is measured.

    A metric with the name of a domain has its items. Weights are zeroed in memory. An evaluation named in Python runs
    with your rights; read it first.
    """
    from mergekit_snrf.evidence.analysis import loaded
    from mergekit_snrf.evidence.domains import ablate_domains, domain_sets, matrix_tables
    from mergekit_snrf.evidence.evaluation import load_evaluation
    from mergekit_snrf.evidence.study import Setup
    from mergekit_snrf.files.references import local_path, sha256

    check_outputs(options["json_file"], options["figures"])
    how: AblationOptions = construct(AblationOptions, options["given"])
    with naming(option):
        ref = how.ref(model)
    found, chosen = _chosen(file, choice)
    _check_model(found, ref)
    sets = domain_sets(chosen)
    unknown = [name for name in modules if name not in sets]
    if unknown:
        raise SnrfError(found.path, f"has no counts of the {unknown[0]}", f"it has {', '.join(sets)}", field="--module")
    sets = {module: one for module, one in sets.items() if not modules or module in modules}
    common.silence_progress()
    evaluation = load_evaluation(reference)
    settings: dict[str, Any] = {"counts": found.path, "counts_sha256": sha256(local_path(file)), **choice.model_dump()}
    more: dict[str, Any] = {"draws": how.draws, "progress": not common.is_quiet()}
    with naming(option):
        subject, processor = loaded(ref, settings)
        setup = Setup("ablation", model, evaluation.name, seed=how.seed, settings=settings)
        result = ablate_domains(setup, sets, subject, processor, evaluation, **more)
    for part in matrix_tables(result):
        common.say(f"{part.caption}\n{table(part.header, part.rows)}\n")
    common.say("\n".join([*result.verdict, "Intervals are of 95 % and paired, and not corrected for their number."]))
    for path in common.write_outputs(result, options["json_file"], options["figures"]):
        common.say(path)


def _chosen(file: str, choice: Choice) -> tuple[Domains, list[Chosen]]:
    """Return the counts and the neurons of every module that was counted."""
    from mergekit_snrf.files.references import local_path
    from mergekit_snrf.profiling.result.domains import choose, read_domains

    found = read_domains(local_path(file))
    counted = [module for module, tokens in found.tokens.items() if module == "decoder" or bool(tokens.any())]
    with naming(option):
        return found, [choose(found, module, choice) for module in counted]


def _check_model(found: Domains, ref: ModelRef) -> None:
    from mergekit_snrf.models.checkpoint import open_checkpoint

    known = found.provenance.model.config_sha256 if found.provenance.model is not None else None
    has = open_checkpoint(ref.model, ref.revision, trust_remote_code=ref.trust_remote_code).config_sha256
    if known is not None and known != has:
        what = f"was counted with a model of another config.json than {ref.model}"
        raise SnrfError(found.path, what, "give the model that was counted")


def _tokens_text(found: Domains) -> str:
    from mergekit_snrf.profiling.result.domains import KINDS

    probes = [one.get("count", "-") for one in found.provenance.probes or []] or ["-"] * len(found.names)
    towers = [module for module in found.tokens if module != "decoder"]
    rows = [
        (name, probes[index], *found.tokens["decoder"][index].tolist(), *(int(found.tokens[m][index]) for m in towers))
        for index, name in enumerate(found.names)
    ]
    return table(("tokens of", "probes", *KINDS, *towers), rows)


def _module_text(found: Domains, one: Chosen) -> str:
    from mergekit_snrf.evidence.domains import PLACES

    names, counts = found.names, one.counts
    rows: list[tuple[object, ...]] = [("all", *counts.sum(1).tolist())]
    rows += [(layer, *column) for layer, column in enumerate(counts.T.tolist()) if any(column)]
    members = one.members.double()
    shared = (members @ members.T).long().tolist()
    uniform = math.log(len(names))
    bins = (one.entropy / uniform * _BINS).clamp(0, _BINS - 1).long().bincount(minlength=_BINS).tolist()
    edges = [f"{share / _BINS:.1f}" for share in range(_BINS)]
    specific = int(one.members.any(0).sum())
    lowest = min(one.entropy.tolist(), default=math.nan)
    parts = [
        f"{PLACES[one.module]}: {specific} of {sum(one.layers)} neurons are specific; active on more than "
        f"{100 * one.bar:.1f} % of the tokens of some domain are {len(one.entropy)}, with H from {lowest:.3f} nats "
        f"(ln {len(names)} = {uniform:.3f})",
        table(("layer", *names), rows),
        table((f"H / ln {len(names)} from", *edges), [("neurons", *bins)]),
        table(("in both", *names), [(name, *row) for name, row in zip(names, shared, strict=True)]),
    ]
    if one.unspecific:
        parts.append(f"Warning: nothing in {PLACES[one.module]} is specific: every H is close to ln {len(names)}.")
    return "\n\n".join(parts)


def _draw(chosen: list[Chosen], folder: str | None) -> None:
    if folder is not None:
        from mergekit_snrf.evidence.domains import counts_drawing

        for path in common.write_outputs(None, None, folder, [("domains", counts_drawing(chosen))]):
            click.echo(path)
