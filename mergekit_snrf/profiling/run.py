"""A profiling run: probes through two models, a profile of each, and the mask of the neurons that they share.

A run can be split, over processes or by an interruption, between groups of probes that share a batch, so every float is
computed in the same batch. Statistics do not depend on the order of the probes. So the mask is byte-identical for any
split, and so are the profiles, except sometimes the last digit of a mean.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_snrf.files import references
from mergekit_snrf.neurons.maskfile import Provenance, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.profiling.distributed import joined_ranks
from mergekit_snrf.profiling.groups import RunOptions, checked_device, probes_of, rows_of
from mergekit_snrf.profiling.request import check_model, check_models, check_output, profile_path
from mergekit_snrf.profiling.result.profilefile import Profile
from mergekit_snrf.profiling.result.selection import select
from mergekit_snrf.profiling.settings import SIDES, ProfileConfig, RunConfig, SideName
from mergekit_snrf.profiling.side import prepare_side

JOURNAL_SECONDS = 30.0
"""A killed run loses at most about this much work, unless one group of probes takes longer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run wrote; ``seconds`` with model loading, 0 for a side that an earlier run has finished."""

    mask: Path
    neurons: NeuronSet
    profiles: dict[SideName, Path]
    probes: dict[SideName, int]
    seconds: dict[SideName, float]


def run(
    config: ProfileConfig,
    mask: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    memory_budget: int | None = None,
    journal_seconds: float = JOURNAL_SECONDS,
    progress: bool = True,
) -> Result | None:
    """Profile both models and write the mask of their shared neurons, with the two profiles beside it.

    Equal settings, models, probes, packages and thread counts give equal bytes, for any number of processes, and
    however often the run was interrupted and resumed.

    Args:
        config: a checked profile.yml.
        mask: the mask file to write.
        folder: that of profile.yml, against which its relative paths are read.
        resume: continue from the journals of an unfinished run, if there are any.
        memory_budget: bytes that set the size of the blocks; None: the default of the device.
        journal_seconds: how often the journal is written.
        progress: show progress bars on stderr.

    Returns:
        What was written; None on ranks other than the first, which write nothing.

    Raises:
        SnrfError: a problem that the user can fix: the settings, the models, the probes, the memory.
    """
    with joined_ranks() as ranks:
        place = None if folder is None else Path(folder)
        options = RunOptions(Path(mask), place, resume, memory_budget, journal_seconds, progress, ranks)
        # Other ranks must not mistake the first one's journals for those of an earlier run.
        if ranks.first:
            check_output(mask, resume=resume)
        config = config.model_copy(update={"device": checked_device(config, ranks)})
        models = ranks.from_first(check_models(config) if ranks.first else {})
        # Measuring the first side can take days: every fault of the second is found before.
        sides = [prepare_side(config, name, models[name], options) for name in SIDES]
        profiles: dict[SideName, Profile] = {}
        seconds: dict[SideName, float] = {}
        for side in sides:
            start = time.monotonic()
            profile = side.profile()
            seconds[side.name] = 0.0 if side.groups is None else time.monotonic() - start
            if profile is not None:
                profiles[side.name] = profile
            gc.collect()  # Release the model before the next is loaded.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return _finish(config, Path(mask), profiles, seconds) if ranks.first else None


def dry_run(config: RunConfig, *, folder: str | os.PathLike[str] | None = None, shown: int = 3) -> str:
    """Return the first probes of each kind as their models would read them, without loading weights."""
    kinds, lines = config.kinds(), []
    if isinstance(config, ProfileConfig):
        check_models(config)
    else:
        check_model(kinds[0])
    for kind in kinds:
        probes = probes_of(config, kind, rows_of(kind, None if folder is None else Path(folder)))
        lines.append(f"{kind.name}: {len(probes)} probes of {kind.source.dataset} through {kind.model.model}")
        for probe in probes.probes[:shown]:
            images = f", {len(probe.row.images)} image(s)" if probe.row.images else ""
            answer = probe.row.answer
            if answer is None:
                up_to = f"generated by the model, up to {config.answer.max_new_tokens} tokens"
                answer = f"({'none' if config.answer.by == 'none' else up_to})"
            lines += [f"--- row {probe.row.number}: {probe.tokens} tokens{images}", probe.prompt]
            lines.append(f"--- answer: {answer}")
    return "\n".join(lines)


def _finish(
    config: ProfileConfig, mask: Path, profiles: dict[SideName, Profile], seconds: dict[SideName, float]
) -> Result:
    neurons = select(list(profiles.values()), config.select)
    if not neurons.count():
        logger.warning("no neuron is shared; choose a larger top_ratio, a smaller sigma, or at_least")
    write_mask(mask, neurons, _mask_provenance(config, profiles, mask))
    return Result(
        mask,
        neurons,
        {name: profile_path(mask, name) for name in SIDES},
        {name: profile.count for name, profile in profiles.items()},
        seconds,
    )


def _mask_provenance(config: ProfileConfig, profiles: dict[SideName, Profile], mask: Path) -> Provenance:
    target, source = (profiles[name].provenance for name in SIDES)
    dtypes = {target.dtype, source.dtype}
    return Provenance(
        target=target.model,
        source=source.model,
        selection={**config.select.rule, "measure": target.measure},
        operation="profile",
        inputs=[{"file": f"{name} profile", "sha256": references.sha256(profile_path(mask, name))} for name in SIDES],
        seed=config.seed,
        dtype=target.dtype if len(dtypes) == 1 else f"{target.dtype} (target), {source.dtype} (source)",
        versions=target.versions,
    )
