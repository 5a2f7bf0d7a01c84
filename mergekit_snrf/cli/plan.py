"""``snrf plan``: what a merge will do, without reading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import command_options, is_quiet, share, size, table
from mergekit_snrf.cli.options import merge_options, recipe_options

if TYPE_CHECKING:
    from mergekit_snrf.fusion.fuse import Fused
    from mergekit_snrf.fusion.lowrank import Certificate
    from mergekit_snrf.merge.draft import PlanDraft
    from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
    from mergekit_snrf.merge.tally import Tally

    _Certified = Sequence[tuple[PlannedEdit, Fused]]

_ROLES = ("target", "source", "source_base")
_NOTES = {
    "exact": "exact: M_S(Delta) itself; the rank is 0, or not below the smaller side of what would be truncated",
    "dare": "dare: M_S(Delta) with elements dropped at random; nothing is truncated, so there is nothing to certify",
    "regmean": "regmean: M_S(D F) itself; the rank is 0, so nothing is truncated",
    "bias": "bias: the whole difference of the masked elements, a vector has no rank",
}


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option("--certify", is_flag=True, help="Read the edited tensors and say how well each is fused; write nothing.")
@click.option("--out", "out_path", type=click.Path(), help="Also check this output folder.")
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command_options
def plan(
    recipe: str,
    certify: bool,
    out_path: str | None,
    reading: dict[str, Any],
    as_json: bool,
) -> None:
    """Show what merging RECIPE will change and read, and every problem at once.

    Only configurations and headers are read, no weights, unless --certify is given. Exit code 1 if the merge cannot
    run.
    """
    from mergekit_snrf.merge.draft import draft_merge
    from mergekit_snrf.merge.recipefile import load_recipe
    from mergekit_snrf.merge.tensors import certify as certified_edits

    options = merge_options(reading, quiet=is_quiet())
    config = load_recipe(recipe)
    draft = draft_merge(
        config,
        options,
        out_path=out_path,
        recipe_folder=str(Path(recipe).resolve().parent),
        merge_adapter=certify,
    )
    plan = None if draft.problems else draft.finish()
    certified = list(certified_edits(plan, options)) if certify and plan is not None else []
    if certified and plan is not None:
        _judge(draft, plan, certified)
    click.echo(json.dumps(_as_json(draft, plan, certified), indent=2) if as_json else _as_text(draft, plan, certified))
    if draft.problems:
        raise click.exceptions.Exit(1)


def _judge(draft: PlanDraft, plan: MergePlan, certified: _Certified) -> None:
    """Add what the merge itself would find: updates of zero."""
    tally = _tally(certified)
    problem = tally.problem()
    if problem is not None and not plan.recipe.value("allow_noop"):
        draft.problems.append(problem)
    if warning := tally.zeros():
        draft.warnings.append(warning)


def _tally(certified: _Certified) -> Tally:
    from mergekit_snrf.merge.tally import Tally

    tally = Tally(len(certified), allow_noop=True)
    for edit, fused in certified:
        tally.add(edit.target_name, fused)
    return tally


def _as_json(draft: PlanDraft, plan: MergePlan | None, certified: _Certified) -> dict[str, Any]:
    known = {
        edit.target_name: {
            "method": _method(edit, fused.certificate),
            "certificate": fused.certificate and asdict(fused.certificate),
            "rounding": asdict(fused.rounding),
        }
        for edit, fused in certified
    }
    return {
        **{role: _model_as_json(draft, role) for role in _ROLES},
        "mask": str(draft.mask_path) if draft.mask_path else None,
        "moments": draft.moments.path if draft.moments else None,
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
                for edit in draft.edits
            ],
            "unmatched": plan.unmatched if plan else [],
            "copied": len(plan.copied) if plan else 0,
        },
        "parameters_touched": plan.parameters_touched if plan else 0,
        "bytes_touched": plan.bytes_touched if plan else 0,
        "source_bytes_read": plan.source_bytes if plan else 0,
        "warnings": draft.warnings,
        "problems": list(map(str, draft.problems)),
    }


def _model_as_json(draft: PlanDraft, role: str) -> dict[str, Any] | None:
    checkpoint, model = draft.checkpoints.get(role), draft.models.get(role)
    if checkpoint is None:
        return None
    return {
        "name": checkpoint.name,
        "model_type": checkpoint.model_type,
        "bytes": checkpoint.bytes,
        "decoder": model.decoder.prefix if model else None,
        "family": model.decoder.family if model else None,
    }


def _as_text(draft: PlanDraft, plan: MergePlan | None, certified: _Certified) -> str:
    lines = []
    for role, model in draft.models.items():
        checkpoint, decoder = model.checkpoint, model.decoder
        lines.append(
            f"{role}  {checkpoint.name} ({checkpoint.model_type}, {size(checkpoint.bytes)}; text decoder "
            f"{decoder.family}, {decoder.shape.layers} layers at {decoder.prefix}*)"
        )
    if draft.mask is not None:
        lines.append(f"mask    {draft.mask_path or draft.mask.path} ({draft.mask.neurons.count()} neurons)")
    if draft.moments is not None:
        sketched = len(draft.moments.sketches)
        form = f"{sketched} of {len(draft.moments.sizes)} inputs as sketches" if sketched else "dense"
        lines.append(f"moments {draft.moments.path} ({size(Path(draft.moments.path).stat().st_size)}, {form})")
    if plan is not None and plan.edits:
        lines += ["", _edits_as_text(plan)]
    elif plan is not None:
        lines += ["", "nothing would change: no masked neuron has an update (beta 0, or an empty mask)"]
    if certified:
        lines += ["", _certified_as_text(certified)]
    lines += [f"warning: {warning}" for warning in draft.warnings]
    if draft.problems:
        lines += ["", "This merge cannot run:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(draft.problems, 1)]
    return "\n".join(lines).strip()


def _edits_as_text(plan: MergePlan) -> str:
    rows: list[tuple[object, ...]] = [
        (name, tensors, neurons, total, share(neurons, total))
        for name, (tensors, neurons, total) in plan.counts().items()
    ]
    sums = [sum(int(str(row[column])) for row in rows) for column in (1, 2, 3)]
    rows.append(("all", *sums, share(sums[1], sums[2])))
    donors = [(role, one) for role, one in plan.checkpoints.items() if role != "target"]
    held = " and ".join(f"the {role}'s {size(checkpoint.bytes)}" for role, checkpoint in donors)
    parameters = sum(tensor.parameters for tensor in plan.target.checkpoint.tensors.values())
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
    from mergekit_snrf.merge.tally import kept

    header = ("tensor", "method", "rank", "passes", "captured", "error", "deficit", "gap", "rounding keeps")
    rows: list[tuple[object, ...]] = []
    tally = _tally(certified)
    for edit, (_, certificate, rounding) in certified:
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
    return "bias" if edit.is_bias else "exact" if edit.fusion.update == "low-rank" else edit.fusion.update
