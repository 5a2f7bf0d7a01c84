"""``snrf compare``: a merge against its controls, or what an evaluation tool measured of several models."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mergekit_snrf.cli import common, options
from mergekit_snrf.errors import SnrfError, did_you_mean, naming, option

if TYPE_CHECKING:
    from mergekit_snrf.evidence.recipes import OpenedRecipe
    from mergekit_snrf.evidence.results import Study
    from mergekit_snrf.merge.recipefile import MergeOptions
    from mergekit_snrf.models.moments import Moments
    from mergekit_snrf.models.weights import Weights
    from mergekit_snrf.neurons.sets import NeuronSet

logger = logging.getLogger(__name__)

_ROWS = ("random", "equal-norm", "least", "linear", "regmean", "dare", "frank", "base")
_MOST_KEEP = 1e6
_OF_SAMPLES = ("tasks", "metrics", "keep")
_OF_BOTH = ("places", "from_samples", "seed", "json_file", "figures", "verbosity", "quiet")


@click.command()
@click.argument("places", metavar="RECIPE.yml | DIR...", nargs=-1, required=True, type=click.Path())
@click.option("--eval", "reference", metavar="EVAL", help=options.eval_help)
@click.option(
    "--rows",
    metavar="ROWS",
    default=",".join(_ROWS),
    show_default=True,
    help="The controls, separated by commas. least needs --profile, frank and base need --base, "
    "regmean needs --moments.",
)
@options.draws_option
@options.seed_option
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="PROFILE",
    help="Of the target, to find its least important neurons; repeat for several.",
)
@click.option("--base", metavar="MODEL", help="The model that target and source were both trained from.")
@click.option(
    "--rival",
    "rivals",
    multiple=True,
    type=click.Path(dir_okay=False),
    metavar="RECIPE.yml",
    help="Another recipe of the same target, as one more row; repeat for several.",
)
@options.linear_betas_option
@click.option(
    "--moments",
    metavar="MOMENTS",
    help="Of the target, for RegMean; default: those of a recipe with update: regmean.",
)
@click.option(
    "--keeps",
    default="0.5,1,2,3,5,10,30",
    show_default=True,
    metavar="KEEPS",
    help="Strengths of RegMean.",
)
@click.option(
    "--drop-rate",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of the elements that DARE drops.",
)
@options.loading_options
@options.cache_options
@click.option(
    "--from", "from_samples", is_flag=True, help="Compare DIRs of lmms-eval, lm-evaluation-harness or VLMEvalKit."
)
@click.option("--task", "tasks", multiple=True, help="With --from: only this task; repeat for several.")
@click.option("--metric", "metrics", multiple=True, help="With --from: only this metric, or task/metric.")
@click.option("--keep", multiple=True, metavar="METRIC", help="With --from: a metric, or task, to keep, not to gain.")
@options.json_option
@options.figures_option
@common.command_options
def compare(
    places: tuple[str, ...], from_samples: bool, json_file: str | None, figures: str | None, **given: Any
) -> None:
    """Compare the merge of RECIPE with its controls on the items of EVAL, all in one table.

    The target is edited in memory and put back for every row; no model is written. An evaluation named in Python runs
    with your rights; read it first.

    With --from, compare the samples that an evaluation tool wrote of several models to two or more DIRs: the first is
    the reference (the target), the second the claim (its merge), any others are controls. lmms-eval and
    lm-evaluation-harness write samples with --log_samples.
    """
    _check_options(from_samples)
    common.check_outputs(json_file, figures)
    study, notes = (_from_samples if from_samples else _from_recipe)(places, **given)
    common.say("\n".join([common.study_text(study), *notes]))
    common.write_outputs(study, json_file, figures, common.study_drawings(study))


def _check_chosen(row: str, needed: str) -> None:
    """Refuse a row that was asked for by name and cannot be made; of the rows by default it is left out."""
    context = click.get_current_context()
    if context.get_parameter_source("rows") == click.core.ParameterSource.COMMANDLINE:
        raise SnrfError(None, f"the row {row} needs {needed}", "give it, or leave out the row", field="--rows")


def _check_options(from_samples: bool) -> None:
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in _OF_BOTH and (name in _OF_SAMPLES) != from_samples:
            where = "with a recipe only" if from_samples else "with --from only"
            raise SnrfError(None, f"has an effect {where}", "leave it out", field=parameter.opts[0])


def _from_samples(
    places: tuple[str, ...],
    *,
    seed: int,
    tasks: tuple[str, ...],
    metrics: tuple[str, ...],
    keep: tuple[str, ...],
    **_: Any,
) -> tuple[Study, list[str]]:
    from mergekit_snrf.evidence.compare_samples import compare_runs

    with naming(option):
        return compare_runs(places, tasks=tasks, metrics=metrics, keep=keep, seed=seed)


def _from_recipe(
    places: tuple[str, ...], *, reference: str | None, loading: dict[str, Any], caches: dict[str, Any], **given: Any
) -> tuple[Study, list[str]]:
    if len(places) != 1:
        raise SnrfError(None, f"expected one recipe, got {len(places)}", "compare folders with --from")
    if reference is None:
        raise SnrfError(None, "is missing", "name what the models are asked, see --help", field="--eval")
    keys, betas = _keys(given["rows"]), common.numbers(given["linear_betas"], "--linear-betas", 1)
    strengths = common.numbers(given["keeps"], "--keeps", _MOST_KEEP)
    from mergekit_snrf.evidence.compare import Controls, comparison_rows
    from mergekit_snrf.evidence.evaluation import load_evaluation
    from mergekit_snrf.evidence.recipes import open_rivals
    from mergekit_snrf.evidence.study import Setup, run_study
    from mergekit_snrf.files.references import sha256
    from mergekit_snrf.models.reference import ModelRef
    from mergekit_snrf.neurons.maskfile import read_mask

    opened, merging = common.opened_recipe(places[0], loading, caches)
    for warning in opened.warnings:
        logger.warning(warning)
    settings: dict[str, Any] = {"recipe": places[0], **opened.settings}
    notes: list[str] = []
    least = _least(keys, opened, given["profiles"], settings, notes)
    shared, franks = _of_base(keys, opened, given["base"], merging, settings, notes)
    found = _moments(keys, opened, given["moments"], settings, notes)
    with naming(option):
        rivals = open_rivals(given["rivals"], opened, merging)
    common.silence_progress()
    evaluation = load_evaluation(reference)
    ref = options.construct(ModelRef, {"model": str(opened.target_folder), **loading})
    model, processor = common.loaded(ref, settings)
    controls = Controls(keys, given["draws"], given["seed"], least, shared, betas, given["drop_rate"])
    controls = replace(controls, moments=found, keeps=strengths, frank=franks, rivals=rivals)
    setup = Setup("comparison", opened.target.name, evaluation.name, opened.mask, seed=given["seed"], settings=settings)
    if opened.mask is not None:
        neurons = read_mask(opened.mask).neurons.sha256()
        setup = replace(setup, mask_sha256=sha256(opened.mask), neurons_sha256=neurons)
    chosen = comparison_rows(opened.merge, model, controls)
    with naming({"dtype": "--dtype"}):
        study = run_study(setup, chosen, model, processor, evaluation, progress=not common.is_quiet())
    if "linear" in keys and "keep" not in study.roles.values():
        notes.append("Left out: linear at equal perception, which needs a metric of the role keep in the evaluation.")
    return study, notes


def _least(
    keys: Collection[str], opened: OpenedRecipe, profiles: Sequence[str], settings: dict[str, Any], notes: list[str]
) -> NeuronSet | None:
    """Return the least important neurons; add to the settings, and to the notes on rows left out."""
    from mergekit_snrf.evidence.least import least_important, read_profile_of
    from mergekit_snrf.files.references import sha256

    if opened.mask is None:
        notes.append("Left out: random and least important neurons, because the recipe moves all neurons.")
    if "least" in keys and profiles:
        read = [read_profile_of(opened.target, profile) for profile in profiles]
        settings["profiles"] = {profile.path: sha256(profile.path) for profile in read}
        return least_important(read, opened.merge.neurons)
    if "least" in keys:
        _check_chosen("least", "--profile, a profile of the target")
        notes.append("Left out: the least important neurons, which need --profile, a profile of the target.")
    return None


def _of_base(
    keys: Collection[str],
    opened: OpenedRecipe,
    name: str | None,
    merging: MergeOptions,
    settings: dict[str, Any],
    notes: list[str],
) -> tuple[Weights | None, list[float] | None]:
    """Return the common base and FRANK's strengths; add to the settings, and to the notes on rows left out."""
    from mergekit_snrf.evidence.recipes import open_base
    from mergekit_snrf.fusion.frank import source_strengths
    from mergekit_snrf.models.changes import squared_changes
    from mergekit_snrf.models.checkpoint import open_checkpoint

    rows = {"base": "the common base as source", "frank": "FRANK"}
    wanted = [key for key in rows if key in keys]
    if name is None:
        for key in wanted:
            _check_chosen(key, "--base, the model that both were trained from")
        if wanted:
            named, needs = " and ".join(rows[key] for key in wanted), "need" if len(wanted) > 1 else "needs"
            notes.append(f"Left out: {named}, which {needs} --base, the model that both were trained from.")
        return None, None
    if not wanted:
        return None, None
    settings["base"] = name
    with naming(option):
        shared = open_base(name, opened, merging)
        if "frank" not in wanted:
            return shared, None
        cache = merging.transformers_cache
        base = open_checkpoint(name, cache_dir=cache, trust_remote_code=merging.trust_remote_code)
        norms = [(v, r) for v, r in squared_changes(base, (opened.target, opened.source), cache)]
        return shared, source_strengths(norms)


def _moments(
    keys: Collection[str], opened: OpenedRecipe, reference: str | None, settings: dict[str, Any], notes: list[str]
) -> Moments | None:
    """Return the moments of ``--moments`` or else of the recipe; add to the settings and notes."""
    from mergekit_snrf.files.references import local_path, sha256
    from mergekit_snrf.models.filters import check_moments, compare_moments
    from mergekit_snrf.models.moments import read_moments

    found = opened.merge.moments
    if reference is not None:
        found = read_moments(local_path(reference))
        check_moments(found, opened.merge.shape, opened.target.name)
        for warning in compare_moments(found, opened.target):
            logger.warning(warning)
    if found is not None:
        settings |= {"moments": found.path, "moments_sha256": sha256(found.path)}
    elif "regmean" in keys:
        _check_chosen("regmean", "--moments, taken on the target")
        notes.append("Left out: RegMean, which needs --moments, taken on the target by snrf moments.")
    return found


def _keys(rows: str) -> list[str]:
    keys = [key.strip() for key in rows.split(",") if key.strip()]
    unknown = [key for key in keys if key not in _ROWS]
    if unknown:
        what = f"{unknown[0]!r} is not a row"
        raise SnrfError(None, what, did_you_mean(unknown[0], _ROWS, "rows are"), field="--rows")
    return keys
