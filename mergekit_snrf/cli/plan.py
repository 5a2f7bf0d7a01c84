"""``snrf plan``: what a merge will do, without reading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import cache_options, command_options, is_quiet, share, size, table

if TYPE_CHECKING:
    from mergekit_snrf.fusion.fuse import Rounding
    from mergekit_snrf.fusion.lowrank import Certificate
    from mergekit_snrf.merge.plan import MergePlan, PlannedEdit

    _Certified = Sequence[tuple[PlannedEdit, Certificate | None, Rounding]]

_NOTES = {
    "exact": "exact: M_S(Delta) itself; the rank is 0, or not below the smaller side of what would be truncated",
    "dare": "dare: M_S(Delta) with elements dropped at random; nothing is truncated, so there is nothing to certify",
    "bias": "bias: the whole difference of the masked elements, a vector has no rank",
}


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option("--certify", is_flag=True, help="Read the edited tensors and say how well each is fused; write nothing.")
@click.option("--out", "out_path", type=click.Path(), help="Also check this output folder.")
@cache_options
@click.option("--trust-remote-code", is_flag=True, help="Plan for a merge that runs code from the checkpoints.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command_options
def plan(
    recipe: str,
    certify: bool,
    out_path: str | None,
    transformers_cache: str | None,
    lora_merge_cache: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show what merging RECIPE will change and read, and every problem at once.

    Only configurations and headers are read, no weights, unless --certify is given. Exit code 1 if the merge cannot
    run.
    """
    from mergekit.options import MergeOptions

    from mergekit_snrf.merge.plan import plan_merge
    from mergekit_snrf.merge.tensors import certify as certified_edits

    options = MergeOptions(
        quiet=is_quiet(),
        transformers_cache=transformers_cache,
        lora_merge_cache=lora_merge_cache,
        trust_remote_code=trust_remote_code,
    )
    from mergekit_snrf.merge.recipefile import load_recipe

    config = load_recipe(recipe)
    result = plan_merge(
        config,
        options,
        out_path=out_path,
        recipe_folder=str(Path(recipe).resolve().parent),
        merge_adapter=certify,
    )
    certified = list(certified_edits(result, config, options)) if certify and not result.problems else []
    click.echo(json.dumps(_as_json(result, certified), indent=2) if as_json else _as_text(result, certified))
    if result.problems:
        raise click.exceptions.Exit(1)


def _as_json(plan: MergePlan, certified: _Certified) -> dict[str, Any]:
    known = {
        edit.target_name: {
            "method": _method(edit, certificate),
            "certificate": certificate and asdict(certificate),
            "rounding": asdict(rounding),
        }
        for edit, certificate, rounding in certified
    }
    return {
        "target": _model_as_json(plan.target, plan.target_decoder),
        "source": _model_as_json(plan.source, plan.source_decoder),
        "source_base": _model_as_json(plan.source_base, plan.source_base_decoder),
        "mask": str(plan.mask_path) if plan.mask_path else None,
        "tensors": {
            "edited": [
                {
                    "target": edit.target_name,
                    "source": edit.source_name,
                    "source_base": edit.source_base_name,
                    "shape": list(edit.shape),
                    "dtype": edit.dtype,
                    "axis": "columns" if edit.site.axis else "rows",
                    "neurons": edit.neurons,
                    **asdict(edit.fusion),
                    **known.get(edit.target_name, {}),
                }
                for edit in plan.edits
            ],
            "unmatched": plan.unmatched,
            "copied": len(plan.copied),
        },
        "parameters_touched": plan.parameters_touched,
        "bytes_touched": plan.bytes_touched,
        "source_bytes_read": plan.source_bytes,
        "warnings": plan.warnings,
        "problems": plan.problems,
    }


def _model_as_json(checkpoint: Any, decoder: Any) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    return {
        "name": checkpoint.name,
        "model_type": checkpoint.model_type,
        "bytes": checkpoint.bytes,
        "decoder": decoder.prefix if decoder else None,
        "family": decoder.family if decoder else None,
    }


def _as_text(plan: MergePlan, certified: _Certified) -> str:
    lines = []
    for role, checkpoint, decoder in (
        ("target", plan.target, plan.target_decoder),
        ("source", plan.source, plan.source_decoder),
        ("source_base", plan.source_base, plan.source_base_decoder),
    ):
        if checkpoint is not None and decoder is not None:
            lines.append(
                f"{role}  {checkpoint.name} ({checkpoint.model_type}, {size(checkpoint.bytes)}; text decoder "
                f"{decoder.family}, {decoder.shape.layers} layers at {decoder.prefix}*)"
            )
    if plan.mask is not None:
        lines.append(f"mask    {plan.mask_path} ({plan.mask.neurons.count()} neurons)")
    if plan.edits:
        lines += ["", _edits_as_text(plan)]
    elif not plan.problems:
        lines += ["", "nothing would change: no masked neuron has an update (beta 0, or an empty mask)"]
    if certified:
        lines += ["", _certified_as_text(certified)]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    if plan.problems:
        lines += ["", "This merge cannot run:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(plan.problems, 1)]
    return "\n".join(lines).strip()


def _edits_as_text(plan: MergePlan) -> str:
    assert plan.target is not None
    rows: list[tuple[object, ...]] = [
        (name, tensors, neurons, total, share(neurons, total))
        for name, (tensors, neurons, total) in plan.counts().items()
    ]
    sums = [sum(int(str(row[column])) for row in rows) for column in (1, 2, 3)]
    rows.append(("all", *sums, share(sums[1], sums[2])))
    donors = [("source", plan.source), ("source_base", plan.source_base)]
    held = " and ".join(f"the {role}'s {size(c.bytes)}" for role, c in donors if c is not None)
    parameters = sum(tensor.parameters for tensor in plan.target.tensors.values())
    return "\n".join(
        [
            table(("projection", "tensors", "neurons", "of", "share"), rows),
            "",
            f"update    {plan.update}",
            f"tensors   {len(plan.edits)} edited, {len(plan.copied)} copied; of the decoder's projections "
            f"{len(plan.unmatched)} have nothing to change",
            f"touched   {plan.parameters_touched} parameters ({share(plan.parameters_touched, parameters)}), "
            f"{size(plan.bytes_touched)}",
            f"read      {size(plan.source_bytes)} of {held}",
        ]
    )


def _certified_as_text(certified: _Certified) -> str:
    from mergekit_snrf.merge.tally import Tally, kept

    header = ("tensor", "method", "rank", "passes", "captured", "error", "deficit", "gap", "rounding keeps")
    rows: list[tuple[object, ...]] = []
    tally = Tally(-1)
    for edit, certificate, rounding in certified:
        tally.add(edit.target_name, certificate, rounding)
        method = _method(edit, certificate)
        known: tuple[object, ...] = ("-",) * 6
        if certificate is not None:
            known = (
                certificate.rank,
                certificate.passes,
                f"{100 * certificate.captured:.2f} %",
                "not unique" if certificate.degenerate else f"{certificate.est:.1e}",
                "-" if certificate.deficit is None else f"{certificate.deficit:.1e}",
                "-" if certificate.gap is None else f"{certificate.gap:.2g}",
            )
        elif method == "exact":
            known = ("full", "-", "100.00 %", "0", "0", "-")
        rows.append((edit.target_name, method, *known, f"{100 * kept(rounding):.1f} %"))
    # A column that says nothing of any tensor is left out.
    told = [column for column in range(len(header)) if any(row[column] != "-" for row in rows)]
    notes = [text for method, text in _NOTES.items() if any(row[1] == method for row in rows)]
    return "\n".join(
        [
            table([header[column] for column in told], [[row[column] for column in told] for row in rows]),
            *notes,
            "",
            tally.summary(),
            tally.sentence(),
        ]
    )


def _method(edit: PlannedEdit, certificate: Certificate | None) -> str:
    """Say how an update was found: the method of its truncation, or what it is where nothing is truncated."""
    if certificate is not None:
        return certificate.method
    return "bias" if edit.is_bias else "dare" if edit.fusion.update == "dare" else "exact"
