"""``snrf plan``: what a merge will do, without reading weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli.common import check_outputs, command_options, is_quiet, share, size, table, write_json
from mergekit_snrf.cli.options import json_option, recipe_argument, recipe_options

if TYPE_CHECKING:
    from mergekit_snrf.fusion.fuse import Fused
    from mergekit_snrf.fusion.lowrank import Certificate
    from mergekit_snrf.merge.plan import MergePlan, PlanDraft, PlannedEdit
    from mergekit_snrf.merge.tally import Tally

    _Certified = Sequence[tuple[PlannedEdit, Fused]]

_NOTES = {
    "exact": "exact: M_S(Delta) itself; the rank is 0, or not below the smaller side of what would be truncated",
    "dare": "dare: M_S(Delta) with elements dropped at random; nothing is truncated, so there is nothing to certify",
    "regmean": "regmean: M_S(D F) itself; the rank is 0, so nothing is truncated",
    "bias": "bias: the whole difference of the masked elements, a vector has no rank",
}
_CERTIFIED = ("tensor", "method", "rank", "passes", "captured", "error", "deficit", "gap", "rounding keeps")


@click.command()
@recipe_argument
@click.option("--certify", is_flag=True, help="Read the edited tensors and say how well each is fused; write nothing.")
@click.option("--out", "out_path", type=click.Path(), help="Also check this output folder.")
@recipe_options
@json_option
@command_options
def plan(recipe: str, certify: bool, out_path: str | None, reading: dict[str, Any], json_file: str | None) -> None:
    """Show what merging RECIPE will change, and every problem.

    Only configurations and headers are read, no weights, unless --certify is given. Exit code 1 if the merge cannot
    run.
    """
    from mergekit_snrf.merge.imports import import_recipe_types

    import_recipe_types()
    from mergekit_snrf.merge.draft import draft_merge
    from mergekit_snrf.merge.recipefile import MergeOptions, load_recipe
    from mergekit_snrf.merge.tensors import certify as certified_edits

    check_outputs(json_file)
    options, folder = MergeOptions(**reading, quiet=is_quiet()), os.path.dirname(os.path.realpath(recipe))
    draft = draft_merge(load_recipe(recipe), options, out_path=out_path, recipe_folder=folder, merge_adapter=certify)
    plan = None if draft.problems else draft.finish()
    certified = list(certified_edits(plan, options)) if certify and plan is not None else []
    tally = _tally(certified)
    if certified and plan is not None:
        # The merge itself finds updates of zero, too.
        if (problem := tally.problem()) is not None and not plan.recipe.value("allow_noop"):
            draft.problems.append(problem)
        draft.warnings += filter(None, [tally.zeros()])
    if json_file != "-":
        click.echo(_as_text(draft, plan, certified, tally))
    write_json(json_file, _as_json(draft, plan, certified))
    if draft.problems:
        raise click.exceptions.Exit(1)


def _tally(certified: _Certified) -> Tally:
    from mergekit_snrf.merge.tally import Tally

    tally = Tally(len(certified), allow_noop=True)
    for edit, fused in certified:
        tally.add(edit.target_name, fused)
    return tally


def _as_json(draft: PlanDraft, plan: MergePlan | None, certified: _Certified) -> dict[str, Any]:
    found = {edit.target_name: fused for edit, fused in certified}
    return {
        **{role: _model_as_json(draft, role) for role in ("target", "source", "source_base")},
        "mask": str(draft.mask_path) if draft.mask_path else None,
        "moments": draft.moments.path if draft.moments else None,
        "tensors": {
            "edited": [_edit_as_json(edit, found.get(edit.target_name)) for edit in draft.edits],
            "unmatched": plan.unmatched if plan else [],
            "copied": len(plan.copied) if plan else 0,
        },
        "parameters_touched": plan.parameters_touched if plan else 0,
        "bytes_touched": plan.bytes_touched if plan else 0,
        "source_bytes_read": plan.source_bytes if plan else 0,
        "warnings": draft.warnings,
        "problems": list(map(str, draft.problems)),
    }


def _edit_as_json(edit: PlannedEdit, fused: Fused | None) -> dict[str, Any]:
    content = {
        **{role: edit.names.get(role) for role in ("target", "source", "source_base")},
        **{"shape": list(edit.shape), "dtype": edit.dtype, "axis": "columns" if edit.site.axis else "rows"},
        **{"neurons": edit.neurons, **asdict(edit.fusion)},
    }
    if fused is not None:
        content |= {"method": _method(edit, fused.certificate), "rounding": asdict(fused.rounding)}
        content["certificate"] = fused.certificate and asdict(fused.certificate)
    return content


def _model_as_json(draft: PlanDraft, role: str) -> dict[str, Any] | None:
    checkpoint, model = draft.checkpoints.get(role), draft.models.get(role)
    if checkpoint is None:
        return None
    decoder = model and model.decoder
    return {
        **{field: getattr(checkpoint, field) for field in ("name", "model_type", "bytes")},
        **{"decoder": decoder and decoder.prefix, "family": decoder and decoder.family},
    }


def _as_text(draft: PlanDraft, plan: MergePlan | None, certified: _Certified, tally: Tally) -> str:
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
        lines += ["", _certified_as_text(certified, tally)]
    lines += [f"warning: {warning}" for warning in draft.warnings]
    if draft.problems:
        lines += ["", "This merge cannot run:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(draft.problems, 1)]
    return "\n".join(lines).strip()


def _edits_as_text(plan: MergePlan) -> str:
    from mergekit_snrf.neurons.sets import count_rows

    donors = [(role, one) for role, one in plan.checkpoints.items() if role != "target"]
    held = " and ".join(f"the {role}'s {size(checkpoint.bytes)}" for role, checkpoint in donors)
    weights = sum(tensor.parameters for tensor in plan.target.checkpoint.tensors.values())
    touched = plan.parameters_touched
    return (
        f"{table(('projection', 'tensors', 'neurons', 'of', 'share'), count_rows(plan.counts()))}\n\n"
        f"update    {plan.update}\n"
        f"tensors   {len(plan.edits)} edited, {len(plan.copied)} copied; of the decoder's projections "
        f"{len(plan.unmatched)} have nothing to change\n"
        f"touched   {touched} parameters ({share(touched, weights)}), {size(plan.bytes_touched)}\n"
        f"read      {size(plan.source_bytes)} of {held}"
    )


def _certified_as_text(certified: _Certified, tally: Tally) -> str:
    rows = [_certified_row(edit, fused) for edit, fused in certified]
    # A column that says nothing of any tensor is left out.
    filled = [column for column in range(len(_CERTIFIED)) if any(row[column] != "-" for row in rows)]
    shown = table([_CERTIFIED[column] for column in filled], [[row[column] for column in filled] for row in rows])
    notes = [text for method, text in _NOTES.items() if any(row[1] == method for row in rows)]
    return "\n".join([shown, *notes, "", tally.summary(), tally.sentence()])


def _certified_row(edit: PlannedEdit, fused: Fused) -> tuple[object, ...]:
    from mergekit_snrf.merge.tally import kept

    certificate, method = fused.certificate, _method(edit, fused.certificate)
    facts: tuple[object, ...] = ("full", "-", "100.00 %", "0", "0", "-") if method == "exact" else ("-",) * 6
    if certificate is not None:
        error = "not unique" if certificate.degenerate else f"{certificate.est:.1e}"
        deficit = "-" if certificate.deficit is None else f"{certificate.deficit:.1e}"
        gap = "-" if certificate.gap is None else f"{certificate.gap:.2g}"
        captured = f"{100 * certificate.captured:.2f} %"
        facts = (certificate.rank, certificate.passes, captured, error, deficit, gap)
    return (edit.target_name, method, *facts, f"{100 * kept(fused.rounding):.1f} %")


def _method(edit: PlannedEdit, certificate: Certificate | None) -> str:
    if certificate is not None:
        return certificate.method
    return "bias" if edit.is_bias else "exact" if edit.fusion.update == "low-rank" else edit.fusion.update
