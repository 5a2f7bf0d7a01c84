"""The first steps of ``snrf patch`` and ``snrf lora``: plan the merge, and check it and the output folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge.draft import PlanDraft, draft_merge
from mergekit_snrf.merge.folders import Kind, output_problem
from mergekit_snrf.merge.plan import MergePlan

LOG = logging.getLogger(__name__)


def plan_output(
    config: MergeConfiguration,
    options: MergeOptions,
    out_path: str,
    kind: Kind,
    *,
    recipe_folder: str | None,
    overwrite: bool,
    problems: Callable[[PlanDraft], Iterable[SnrfError]],
) -> MergePlan:
    """Return the plan of a merge that can be written to ``out_path``, and log its warnings.

    Args:
        kind: of what is written.
        recipe_folder: where relative paths of the recipe are looked for after the working folder.
        overwrite: the folder may hold an earlier output of this kind.
        problems: what else makes this plan unfit for this kind of output.

    Raises:
        SnrfError: it cannot be written, with every problem.
    """
    draft = draft_merge(config, options, recipe_folder=recipe_folder)
    of_folder = output_problem(draft, out_path, kind, overwrite=overwrite)
    draft.problems += [problem for problem in (*problems(draft), of_folder) if problem is not None]
    plan = draft.finish()
    for warning in plan.warnings:
        LOG.warning(warning)
    return plan
