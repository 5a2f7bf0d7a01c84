"""One side of a profiling run: its probes, prepared before any model is loaded, and the profile of its model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mergekit_snrf.errors import SnrfError, first_line, naming
from mergekit_snrf.models.loading import find_device, load_model
from mergekit_snrf.profiling import memory
from mergekit_snrf.profiling.groups import Groups, RunOptions, probes_of, rows_of
from mergekit_snrf.profiling.journal import Journals, Tally
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.moments import MomentsRun, load_target, moments_path, prepare_moments
from mergekit_snrf.profiling.request import (
    ModelInfo,
    changes,
    fingerprint,
    model_provenance,
    probes_provenance,
    profile_path,
    request_of,
    stem_of,
    versions,
)
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance, read_profile, write_profile
from mergekit_snrf.profiling.result.statistics import Statistics
from mergekit_snrf.profiling.settings import Kind, ProfileConfig, SideName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One side, ready to be measured.

    Attributes:
        groups: the probes; None if an earlier run has finished the side.
        finished: the profile of that run, on rank 0.
        moments: taken with the target's profile; None: not wanted, or taken by an earlier run.
    """

    name: SideName
    kind: Kind
    config: ProfileConfig
    options: RunOptions
    info: ModelInfo
    request: Mapping[str, Any]
    journals: Journals
    groups: Groups | None
    finished: Profile | None
    moments: MomentsRun | None

    def profile(self) -> Profile | None:
        """Measure the side and write its profile; return it on rank 0, and None on other ranks."""
        profile = self.finished
        if self.groups is not None:
            with naming(self.kind.model_keys):
                images = self.kind.source.images is not None
                model = load_target(self.moments) if self.moments else load_model(self.kind.model, images=images)[0]
            with self._memory_explained(), naming(self.kind.keys):
                profile = self._measured(self.groups, model)
        elif self.moments is not None:
            with self._memory_explained(), naming(self.kind.keys):
                self.moments.take(load_target(self.moments))
        if self.options.ranks.first:
            if self.groups is None:
                logger.info("%s: finished by an earlier run", self.name)
            elif profile is not None:
                write_profile(profile_path(self.options.out, self.name), profile)
            self.journals.delete()
            if self.moments is not None:
                self.moments.delete_journals()
        return profile

    def _measured(self, groups: Groups, model: PreTrainedModel) -> Profile | None:
        """Measure the impacts, and the moments if there are any; return the profile on rank 0."""
        meter = Meter(
            model,
            self.config.measure,
            shape=self.info.shape,
            name=self.kind.model.model,
            block_bytes=self.request["block_bytes"],
            backend=self.config.backend,
        )
        if self.moments is not None:
            done = self.moments.with_impacts(groups, model, meter)
        else:
            empty = lambda: Statistics(meter.neurons)  # noqa: E731
            done = groups.measure(model, empty, lambda sums, batch: sums.update(meter.impacts(batch)))
        logger.info("%s: peak memory of the process %s", self.name, memory.peak(model.device))
        statistics = done.statistics
        if self.moments is not None:
            self.moments.take(model, (statistics.gain, done.tally))
            statistics = statistics.statistics
        provenance = self._provenance(groups, model, done.tally)
        return statistics.profile(provenance) if self.options.ranks.first else None

    def _provenance(self, groups: Groups, model: PreTrainedModel, tally: Tally) -> ProfileProvenance:
        if tally.cut:
            logger.warning(
                "%s: %d of %d answers reached max_new_tokens = %d before they ended; raise it to measure whole answers",
                self.name, tally.cut, len(groups.probes), self.kind.rule.max_new_tokens,
            )  # fmt: skip
        folder = self.options.folder
        probes = probes_provenance(self.kind, folder, groups.probes, tally)
        return ProfileProvenance(
            side=self.name,
            model=model_provenance(self.kind, self.info, model, folder, probes=probes),
            measure=self.config.measure.model_dump(),
            seed=self.config.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            versions=versions(),
            fingerprint=fingerprint(self.request),
        )

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
    kind = config.kind(name)
    rows = rows_of(kind, options.folder)
    device = find_device(config.device)
    measured = {
        "measure": config.measure.model_dump(),
        "device": device.type,
        "block_bytes": memory.block_bytes(device, options.memory_budget),
        **({} if config.backend == "auto" else {"backend": config.backend}),
    }
    request = request_of(config, kind, info, rows, options.folder, **measured)
    keeps = bool(config.keep) and name == "target"
    # The moments are in the journal, but the profile does not depend on them.
    journals = Journals(stem_of(options.out, name), {**request, "sketch": config.sketch} if keeps else request)
    finished = _finished(options, name, request) if options.ranks.first else None
    groups, moments = None, None
    if not options.ranks.from_first(finished is not None):
        groups = Groups(kind, probes_of(config, kind, rows), journals, options)
    if keeps:
        gain, again = (rows, False) if groups is None else (groups.probes, True)
        moments = prepare_moments(config, info, options, moments_path(options.out), gain, again=again)
    return Side(name, kind, config, options, info, request, journals, groups, finished, moments)


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
