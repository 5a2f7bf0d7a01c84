"""Comparisons from beginning to end: of a recipe with its controls, or of samples that an evaluation tool wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import SnrfError, unexpected
from mergekit_snrf.evidence.analysis import digest, least_important, loaded, of_mask, read_profile_of, warn
from mergekit_snrf.evidence.compare import Controls, comparison_rows
from mergekit_snrf.evidence.compare_samples import compare_runs
from mergekit_snrf.evidence.evaluation import AnyEvaluation, load_evaluation
from mergekit_snrf.evidence.options import ComparisonOptions, SamplesOptions, takes
from mergekit_snrf.evidence.recipes import (
    OpenedRecipe,
    Recipe,
    load_recipe_at,
    merge_options,
    open_base,
    open_recipe,
    open_rivals,
)
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Setup, run_study
from mergekit_snrf.files.settings import construct
from mergekit_snrf.fusion.frank import source_strengths
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.moments import Moments, check_moments, compare_moments, moments_of
from mergekit_snrf.models.weights import squared_changes
from mergekit_snrf.neurons.maskfile import read_mask
from mergekit_snrf.neurons.sets import NeuronSet

if TYPE_CHECKING:
    from mergekit_snrf.merge.recipefile import MergeOptions
    from mergekit_snrf.models.weights import Weights


@takes(ComparisonOptions, SamplesOptions)
def compare(
    *places: Recipe,
    eval: AnyEvaluation | None = None,
    from_samples: bool = False,
    progress: bool = False,
    **options: Any,
) -> Study:
    """Compare the merge of a recipe with its controls on the items of an evaluation (Tables 1 and 2).

    The target is edited in memory and put back for every row; no model is written. Options are those of
    ``snrf compare``. Files, such as ``profile``, may also be what was read from them.

    Args:
        places: one recipe, as a path or its content; with ``from_samples`` two or more folders that an evaluation tool
            wrote, that of the target first.
        eval: a function of a model and its processor, or a reference to one.
        from_samples: compare the samples in folders; no model is loaded.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: an option, the recipe or a file is wrong, which is found before a model is loaded; or the evaluation
            fails.
    """
    own, other = (SamplesOptions, ComparisonOptions) if from_samples else (ComparisonOptions, SamplesOptions)
    of = "a recipe" if from_samples else "samples of evaluation tools"
    for name in [*options, *(["eval"] if from_samples and eval is not None else [])]:
        if name == "eval" or (name in other.model_fields and name not in own.model_fields):
            raise SnrfError(None, f"has an effect on {of} only", "leave it out", field=name)
    how: Any = construct(own, options)
    if from_samples:
        folders = []
        for place in places:
            if not isinstance(place, str | os.PathLike):
                raise unexpected("places", place, "the folder of a run")
            folders.append(place)
        study, notes = compare_runs(folders, tasks=how.task, metrics=how.metric, keep=how.keep, seed=how.seed)
        return study.model_copy(update={"notes": notes})
    if len(places) != 1:
        what = f"expected one recipe, got {len(places)}"
        raise SnrfError(None, what, "to compare folders of samples use --from, from_samples=True in Python")
    if eval is None:
        raise SnrfError(None, "is missing", "name what the models are asked, such as evaluation.py:name", field="eval")
    merging = merge_options(how, quiet=not progress)
    config, folder = load_recipe_at(places[0])
    opened = open_recipe(config, merging, folder)
    warn(opened.warnings)
    written = dict(places[0]) if isinstance(places[0], Mapping) else os.fspath(places[0])
    return _Comparison(opened, how, merging, {"recipe": written, **opened.settings}).run(eval, progress)


@dataclass
class _Comparison:
    """A comparison while it is made; ``settings`` and ``notes``, on rows left out, become part of its study."""

    opened_recipe: OpenedRecipe
    how: ComparisonOptions
    merging: MergeOptions
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def run(self, eval: AnyEvaluation, progress: bool) -> Study:
        """Open what the controls need, load the target, and evaluate every row."""
        how, opened = self.how, self.opened_recipe
        least = self.least()
        base, franks = self.of_base()
        more: dict[str, Any] = {"least": least, "base": base, "frank": franks, "moments": self.moments()}
        more["rivals"] = open_rivals(how.rival, opened, self.merging)
        evaluation = load_evaluation(eval)
        model, processor = loaded(opened.ref(how), self.settings)
        rows = comparison_rows(opened.merge, model, Controls(how, **more))
        mask = {} if opened.mask is None else of_mask(read_mask(opened.mask))
        setup: dict[str, Any] = {"seed": how.seed, "settings": self.settings, **mask}
        study = run_study(
            Setup("comparison", opened.target.name, evaluation.name, **setup),
            rows,
            model,
            processor,
            evaluation,
            progress=progress,
        )
        if "linear" in how.rows and "keep" not in study.roles.values():
            self.left_out("linear at equal perception", "a metric of the role keep in the evaluation")
        return study.model_copy(update={"notes": self.notes})

    def left_out(self, rows: str, needed: str, several: bool = False) -> None:
        """Note rows that cannot be made."""
        self.notes.append(f"Left out: {rows}, which {'need' if several else 'needs'} {needed}.")

    def wanted(self, row: str, needed: str) -> bool:
        """Tell whether a row is to be made; ``SnrfError``: it was asked for by name and lacks what it needs."""
        if row in self.how.rows and "rows" in self.how.model_fields_set:
            raise SnrfError(None, f"the row {row} needs {needed}", "give it, or leave out the row", field="rows")
        return row in self.how.rows

    def least(self) -> NeuronSet | None:
        """Return the least important neurons."""
        opened, needed = self.opened_recipe, "the option profile, a profile of the target"
        if opened.mask is None:
            self.notes.append("Left out: random and least important neurons, because the recipe moves all neurons.")
        if "least" in self.how.rows and self.how.profile:
            read = [read_profile_of(opened.target, profile) for profile in self.how.profile]
            self.settings["profiles"] = {profile.path: digest(profile.path) for profile in read}
            return least_important(read, opened.merge.neurons)
        if self.wanted("least", needed):
            self.left_out("the least important neurons", needed, several=True)
        return None

    def of_base(self) -> tuple[Weights | None, list[float] | None]:
        """Return the common base and FRANK's strengths."""
        rows, needed = {"base": "the common base as source", "frank": "FRANK"}, "the option base"
        name, opened = self.how.base, self.opened_recipe
        if name is None:
            wanted = [rows[row] for row in rows if self.wanted(row, f"{needed}, the model that both were trained from")]
            if wanted:
                whole = f"{needed}, the model that both were trained from"
                self.left_out(" and ".join(wanted), whole, several=len(wanted) > 1)
            return None, None
        if not set(rows) & set(self.how.rows):
            return None, None
        self.settings["base"] = name
        shared = open_base(name, opened, self.merging)
        if "frank" not in self.how.rows:
            return shared, None
        cache = self.merging.transformers_cache
        base = open_checkpoint(name, cache_dir=cache, trust_remote_code=self.merging.trust_remote_code)
        norms = [(v, r) for v, r in squared_changes(base, (opened.target, opened.source), cache)]
        return shared, source_strengths(norms)

    def moments(self) -> Moments | None:
        """Return the moments that were given, or else those of the recipe."""
        opened, found = self.opened_recipe, self.opened_recipe.merge.moments
        if self.how.moments is not None:
            found = moments_of(self.how.moments)
            check_moments(found, opened.merge.shape, opened.target.name)
            warn(compare_moments(found, opened.target))
        if found is not None:
            self.settings |= {"moments": found.path, "moments_sha256": digest(found.path)}
        elif self.wanted("regmean", "the option moments, taken on the target"):
            self.left_out("RegMean", "the option moments, taken on the target by snrf moments")
        return found
