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
from mergekit_snrf.neurons.maskfile import ModelProvenance
from mergekit_snrf.profiling import memory
from mergekit_snrf.profiling.groups import Groups, RunOptions
from mergekit_snrf.profiling.journal import Journals, Progress, Tally
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.moments import GainAndStatistics, KeepProbes, prepare_keep
from mergekit_snrf.profiling.probes.batches import Probes
from mergekit_snrf.profiling.rendering import side_probes, side_rows
from mergekit_snrf.profiling.request import (
    ModelInfo,
    changes,
    fingerprint,
    model_path,
    probes_provenance,
    profile_path,
    request_of,
    stem_of,
    versions,
)
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance, read_profile, write_profile
from mergekit_snrf.profiling.result.statistics import Statistics
from mergekit_snrf.profiling.settings import ProfileConfig, SideName, model_keys, probe_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One side, ready to be measured.

    Attributes:
        probes: None if an earlier run has finished the side.
        finished: the profile of that run, on rank 0.
        keep: the probes to keep, whose moments are taken with the target's profile; None: there are none.
    """

    name: SideName
    config: ProfileConfig
    options: RunOptions
    info: ModelInfo
    request: Mapping[str, Any]
    probes: Probes | None
    finished: Profile | None
    keep: KeepProbes | None = None

    @property
    def journals(self) -> Journals:
        """What an unfinished run has left."""
        return Journals(stem_of(self.options.mask, self.name), self.request)

    def profile(self) -> Profile | None:
        """Measure the side and write its profile; return it on rank 0, and None on other ranks.

        Raises:
            SnrfError: the model cannot be loaded or measured, or the memory is too small.
        """
        ranks = self.options.ranks
        if self.probes is None:
            if ranks.first:
                self._delete_journals()
                logger.info("%s: finished by an earlier run", self.name)
            return self.finished
        with naming(model_keys(self.name)):
            model, _ = load_model(self.config.model_of(self.name), images=self.probes.rows.source.images is not None)
        with self._memory_explained(), naming(probe_keys(self.name)):
            done = self._measure(self.probes, model)
            statistics, provenance = done.statistics, self._provenance(self.probes, model, done.tally)
            if self.keep is not None:
                statistics = self.keep.finish(model, done, self.info, provenance)
        if not ranks.first:
            return None
        profile: Profile = statistics.profile(provenance)
        write_profile(profile_path(self.options.mask, self.name), profile)
        self._delete_journals()
        return profile

    def _delete_journals(self) -> None:
        self.journals.delete()
        for groups in () if self.keep is None else self.keep.groups:
            groups.journals.delete()

    def _measure(self, probes: Probes, model: PreTrainedModel) -> Progress:
        """Return on rank 0 what all ranks have measured."""
        meter = Meter(
            model,
            self.config.measure,
            shape=self.info.shape,
            name=self.config.side(self.name).model,
            block_bytes=self.request["block_bytes"],
            backend=self.config.backend,
        )
        groups = Groups(self.name, probes, self.config.answer, self.journals, self.options)
        if self.keep is not None:
            done = groups.measure(model, *GainAndStatistics.of(groups, model, meter, self.config))
        else:
            done = groups.measure(
                model,
                lambda: Statistics(meter.neurons),
                lambda statistics, batch: statistics.update(meter.impacts(batch)),
            )
        logger.info("%s: peak memory of the process %s", self.name, memory.peak(model.device))
        return done

    def _provenance(self, probes: Probes, model: PreTrainedModel, tally: Tally) -> ProfileProvenance:
        if tally.cut:
            logger.warning(
                "%s: %d of %d answers reached max_new_tokens = %d before they ended; raise it to measure whole answers",
                self.name, tally.cut, len(probes), self.config.answer.max_new_tokens,
            )  # fmt: skip
        config, folder = self.config, self.options.folder
        return ProfileProvenance(
            side=self.name,
            model=ModelProvenance(
                path=model_path(config, self.name, folder),
                revision=config.side(self.name).revision or getattr(model.config, "_commit_hash", None),
                model_type=self.info.model_type,
                config_sha256=self.info.config_sha256,
                probes=probes_provenance(config, self.name, folder, probes, tally),
            ),
            measure=dict(config.measure.provenance()),
            seed=config.seed,
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

    Raises:
        SnrfError: the rows cannot be read or rendered, or an earlier run has finished with other settings.
    """
    rows = side_rows(config, name, options.folder)
    kind = find_device(config.device)
    block = memory.block_bytes(kind, options.memory_budget)
    request = request_of(config, name, info, rows, options.folder, device=kind.type, block=block)
    finished = _finished(options, name, request) if options.ranks.first else None
    probes = None if options.ranks.from_first(finished is not None) else side_probes(config, name, rows)
    keep = prepare_keep(config, info, options) if config.keep and name == "target" else None
    return Side(name, config, options, info, request, probes, finished, keep)


def _finished(options: RunOptions, name: SideName, request: Mapping[str, Any]) -> Profile | None:
    path = profile_path(options.mask, name)
    if not options.resume or not path.is_file():
        return None
    profile = read_profile(path)
    if profile.provenance.fingerprint != fingerprint(request):
        different = ", ".join(changes(profile.provenance, request)) or (
            "another batch_size, token_limit, backend, device or memory budget, or the data or model have changed"
        )
        raise SnrfError(
            path,
            f"this finished profile was made with other settings: {different}",
            "use the same settings, or replace it by a run without resume",
            field="resume",
        )
    return profile
