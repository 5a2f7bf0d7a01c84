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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_snrf.errors import SnrfError, first_line, naming
from mergekit_snrf.files import references
from mergekit_snrf.models.loading import find_device
from mergekit_snrf.neurons.maskfile import Provenance, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.profiling import memory
from mergekit_snrf.profiling.groups import Groups, Prompts, RunOptions, loaded, started
from mergekit_snrf.profiling.journal import Tally
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.moments import MomentsRun, moments_path, prepare_moments
from mergekit_snrf.profiling.request import ModelInfo, changes, check_models, fingerprint, opened, profile_path
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance, read_profile, write_profile
from mergekit_snrf.profiling.result.selection import select
from mergekit_snrf.profiling.result.statistics import Statistics
from mergekit_snrf.profiling.settings import SIDES, ProfileConfig, RunConfig, SideName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One side, ready to be measured.

    Attributes:
        is_finished: an earlier run has measured the side.
        finished: the profile of that run, on rank 0.
        moments: taken with the target's profile; None: not wanted, or taken by an earlier run.
    """

    name: SideName
    config: ProfileConfig
    groups: Groups
    is_finished: bool
    finished: Profile | None
    moments: MomentsRun | None

    def profile(self) -> Profile | None:
        """Measure the side and write its profile; return it on rank 0, and None on other ranks."""
        profile, groups, options = self.finished, self.groups, self.groups.options
        keys = groups.kind.keys
        if not self.is_finished or self.moments is not None:
            with self._memory_explained():
                model = loaded([groups] if self.moments is None else self.moments.groups)
                with naming(keys):
                    if not self.is_finished:
                        profile = self._measured(model)
                    elif self.moments is not None:
                        self.moments.take(model)
        if options.ranks.first:
            if self.is_finished:
                logger.info("%s: finished by an earlier run", self.name)
            elif profile is not None:
                write_profile(profile_path(options.out, self.name), profile)
            groups.journals.delete()
            if self.moments is not None:
                self.moments.delete_journals()
        return profile

    def _measured(self, model: PreTrainedModel) -> Profile | None:
        """Measure the impacts, and the moments if there are any; return the profile on rank 0."""
        groups, moments = self.groups, self.moments
        meter = Meter(
            model,
            self.config.measure,
            shape=groups.info.shape,
            name=groups.kind.model.model,
            block_bytes=groups.request["block_bytes"],
            backend=self.config.backend,
        )
        if moments is not None:
            done = moments.with_impacts(groups, model, meter)
        else:
            empty = lambda: Statistics(meter.neurons)  # noqa: E731
            done = groups.measure(model, empty, lambda sums, batch: sums.update(meter.impacts(batch)))
        logger.info("%s: peak memory of the process %s", self.name, memory.peak(model.device))
        statistics = done.statistics
        if moments is not None:
            moments.take(model, (statistics.gain, done.tally))
            statistics = statistics.statistics
        return statistics.profile(self._provenance(model, done.tally)) if groups.options.ranks.first else None

    def _provenance(self, model: PreTrainedModel, tally: Tally) -> ProfileProvenance:
        groups = self.groups
        if tally.cut:
            logger.warning(
                "%s: %d of %d answers reached max_new_tokens = %d before they ended; raise it to measure whole answers",
                self.name, tally.cut, len(groups.prompts.probes), groups.kind.rule.max_new_tokens,
            )  # fmt: skip
        own = {"side": self.name, "measure": self.config.measure.model_dump()}
        return groups.provenance(ProfileProvenance, model, fingerprint(groups.request), groups.origin(tally), **own)

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        """Turn running out of memory into an ``SnrfError``."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            out = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not out and "can't allocate memory" not in str(error):
                raise
            raise SnrfError(
                self.name,
                f"out of memory ({first_line(error)})",
                f"lower batch_size (now {self.config.batch_size}), max_new_tokens or token_limit, or use a smaller "
                f"dtype or device_map",
            ) from None


def prepare_side(config: ProfileConfig, name: SideName, info: ModelInfo, options: RunOptions) -> Side:
    """Return one side with its rows, images and prompts checked; no weights are loaded.

    ``SnrfError``: they cannot be read or rendered, or an earlier run has finished with other settings.
    """
    device, ranks = find_device(config.device), options.ranks
    measured = {
        "measure": config.measure.model_dump(),
        "device": device.type,
        "block_bytes": memory.block_bytes(device, options.memory_budget),
        **({} if config.backend == "auto" else {"backend": config.backend}),
    }
    keeps = bool(config.keep) and name == "target"
    prompts = Prompts(config, config.kind(name), options.folder)
    # The moments are in the journal, but the profile does not depend on them.
    groups = Groups(prompts, info, options, name, measured, {"sketch": config.sketch} if keeps else {})
    request = groups.request  # On every rank, so that each finds the same faults.
    finished = _finished(options, name, request) if ranks.first else None
    is_finished = ranks.from_first(finished is not None)
    if not is_finished:
        groups.ready()
    path = moments_path(options.out)
    moments = prepare_moments(prompts, info, options, path, again=not is_finished) if keeps else None
    return Side(name, config, groups, is_finished, finished, moments)


def _finished(options: RunOptions, name: SideName, request: Mapping[str, Any]) -> Profile | None:
    path = profile_path(options.out, name)
    if not options.resume or not path.is_file():
        return None
    profile = read_profile(path)
    if profile.provenance.fingerprint != fingerprint(request):
        different = ", ".join(changes(profile.provenance, request)) or (
            "another batch_size, token_limit, backend, device or memory budget, or the data or model have changed"
        )
        what = f"this finished profile was made with other settings: {different}"
        raise SnrfError(path, what, "use the same settings, or replace it by a run without resume", field="resume")
    return profile


@dataclass(frozen=True)
class Result:
    """What a run wrote; ``seconds`` with model loading, 0 for a side that an earlier run has finished."""

    mask: Path
    neurons: NeuronSet
    profiles: dict[SideName, Path]
    probes: dict[SideName, int]
    seconds: dict[SideName, float]


def run(config: ProfileConfig, mask: str | os.PathLike[str], **how: Any) -> Result | None:
    """Profile both models and write the mask of their shared neurons, with the two profiles beside it.

    Equal settings, models, probes, packages and thread counts give equal bytes, for any number of processes, and
    however often the run was interrupted and resumed.

    Args:
        config: a checked profile.yml.
        mask: the mask file to write.
        how: further fields of ``groups.RunOptions``.

    Returns:
        What was written; None on ranks other than the first, which write nothing.

    Raises:
        SnrfError: a problem that the user can fix: the settings, the models, the probes, the memory.
    """
    with started(config, mask, **how) as (config, options):
        ranks = options.ranks
        models = ranks.from_first(check_models(config) if ranks.first else {})
        # Measuring the first side can take days: every fault of the second is found before.
        sides = [prepare_side(config, name, models[name], options) for name in SIDES]
        profiles: dict[SideName, Profile] = {}
        seconds: dict[SideName, float] = {}
        for side in sides:
            start = time.monotonic()
            profile = side.profile()
            seconds[side.name] = 0.0 if side.is_finished else time.monotonic() - start
            if profile is not None:
                profiles[side.name] = profile
            gc.collect()  # Release the model before the next is loaded.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return _finish(config, Path(mask), profiles, seconds) if ranks.first else None


def dry_run(config: RunConfig, *, folder: Path | None = None) -> str:
    """Return the first three probes of each kind as their models would read them, without loading weights."""
    kinds, lines = config.kinds(), []
    if isinstance(config, ProfileConfig):
        check_models(config)
    else:
        opened(kinds[0])
    for kind in kinds:
        probes = Prompts(config, kind, folder).probes
        lines.append(f"{kind.name}: {len(probes)} probes of {kind.source.dataset} through {kind.model.model}")
        for probe in probes.probes[:3]:
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
    paths = {name: profile_path(mask, name) for name in SIDES}
    target, source = (profiles[name].provenance for name in SIDES)
    dtype = target.dtype
    if source.dtype != dtype:
        dtype = f"{dtype} (target), {source.dtype} (source)"
    provenance = Provenance(
        target=target.model,
        source=source.model,
        selection={**config.select.rule, "measure": target.measure},
        operation="profile",
        inputs=[{"file": f"{name} profile", "sha256": references.sha256(path)} for name, path in paths.items()],
        seed=config.seed,
        dtype=dtype,
        versions=target.versions,
    )
    write_mask(mask, neurons, provenance)
    return Result(mask, neurons, paths, {name: profile.count for name, profile in profiles.items()}, seconds)
