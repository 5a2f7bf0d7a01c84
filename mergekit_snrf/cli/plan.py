"""``snrf plan``: what a merge will do, without reading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import command_options, load_recipe, share, size, table

if TYPE_CHECKING:
    from mergekit_snrf.plugin.plan import MergePlan


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option("--out", "out_path", type=click.Path(), help="Also check this output folder.")
@click.option("--transformers-cache", type=click.Path(), help="Storage path for downloaded models.")
@click.option("--lora-merge-cache", type=click.Path(), help="Path to store merged LoRA models.")
@click.option("--trust-remote-code", is_flag=True, help="Plan for a merge that runs code from the checkpoints.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command_options
def plan(
    recipe: str,
    out_path: str | None,
    transformers_cache: str | None,
    lora_merge_cache: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show what merging RECIPE will change and read, and every problem at once.

    Only configurations and headers are read, no weights. Exit code 1 if the merge cannot run.
    """
    from mergekit.options import MergeOptions

    from mergekit_snrf.plugin.plan import plan_merge

    options = MergeOptions(
        transformers_cache=transformers_cache,
        lora_merge_cache=lora_merge_cache,
        trust_remote_code=trust_remote_code,
    )
    result = plan_merge(
        load_recipe(recipe), options, out_path=out_path, recipe_folder=str(Path(recipe).resolve().parent)
    )
    click.echo(json.dumps(_as_json(result), indent=2) if as_json else _as_text(result))
    if result.problems:
        raise click.exceptions.Exit(1)


def _as_json(plan: MergePlan) -> dict[str, Any]:
    return {
        "target": _model_as_json(plan.target, plan.target_decoder),
        "source": _model_as_json(plan.source, plan.source_decoder),
        "mask": str(plan.mask_path) if plan.mask_path else None,
        "tensors": {
            "edited": [
                {
                    "target": edit.target_name,
                    "source": edit.source_name,
                    "shape": list(edit.shape),
                    "dtype": edit.dtype,
                    "axis": "columns" if edit.site.axis else "rows",
                    "neurons": edit.neurons,
                    "beta": edit.fusion.beta,
                    "rank": edit.fusion.rank,
                    "order": edit.fusion.order,
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


def _as_text(plan: MergePlan) -> str:
    lines = []
    for role, checkpoint, decoder in (
        ("target", plan.target, plan.target_decoder),
        ("source", plan.source, plan.source_decoder),
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
    lines += [f"warning: {warning}" for warning in plan.warnings]
    if plan.problems:
        lines += ["", "This merge cannot run:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(plan.problems, 1)]
    return "\n".join(lines).strip()


def _edits_as_text(plan: MergePlan) -> str:
    assert plan.target is not None
    assert plan.source is not None
    rows: list[tuple[object, ...]] = [
        (name, tensors, neurons, total, share(neurons, total))
        for name, (tensors, neurons, total) in plan.counts().items()
    ]
    sums = [sum(int(str(row[column])) for row in rows) for column in (1, 2, 3)]
    rows.append(("all", *sums, share(sums[1], sums[2])))
    betas = sorted({edit.fusion.beta for edit in plan.edits})
    ranks = sorted({edit.fusion.rank for edit in plan.edits})
    order = plan.edits[0].fusion.order
    parameters = sum(tensor.parameters for tensor in plan.target.tensors.values())
    return "\n".join(
        [
            table(("projection", "tensors", "neurons", "of", "share"), rows),
            "",
            f"update    beta {_span(betas)}, rank {_span(ranks)}{' (0: full rank)' if 0 in ranks else ''}, {order}",
            f"tensors   {len(plan.edits)} edited, {len(plan.copied)} copied; of the decoder's projections "
            f"{len(plan.unmatched)} have nothing to change",
            f"touched   {plan.parameters_touched} parameters ({share(plan.parameters_touched, parameters)}), "
            f"{size(plan.bytes_touched)}",
            f"read      {size(plan.source_bytes)} of the source's {size(plan.source.bytes)}",
        ]
    )


def _span(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
