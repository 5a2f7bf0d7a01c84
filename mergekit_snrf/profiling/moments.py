"""Second moments of a target's inputs, for ``update: regmean``: on the probes to gain and on kinds of probes to keep.

All come from the target, with its own answers, in forward passes only. Every kind of probes to keep counts alike.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.models.live import LiveDecoder, find_live_decoder
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.models.moments import (
    MOMENTS,
    InputSite,
    Moments,
    MomentsProvenance,
    read_moments,
    write_moments,
)
from mergekit_snrf.profiling.groups import Groups, RunOptions, probes_of, rows_of, started
from mergekit_snrf.profiling.journal import Journals, Progress, Tally
from mergekit_snrf.profiling.measure.inputs import NormMedians, input_sizes, run_once, watched_inputs
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes
from mergekit_snrf.profiling.probes.rows import Rows
from mergekit_snrf.profiling.request import (
    ModelInfo,
    check_model,
    fingerprint,
    model_provenance,
    probes_provenance,
    request_of,
    stem_of,
    versions,
)
from mergekit_snrf.profiling.result.moments import CLIP, MomentSums
from mergekit_snrf.profiling.result.statistics import Statistics
from mergekit_snrf.profiling.result.sums import Sums
from mergekit_snrf.profiling.settings import ProfileConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_DENSE, FEW_SKETCH = 5, 2
"""Fewer tokens than this for each input (dense) or eigenvector (sketch) get a warning."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """Moments of the inputs of a model: empty sums, and how a batch is added to them."""

    config: ProfileConfig
    model: PreTrainedModel
    decoder: LiveDecoder
    clips: dict[InputSite, float]

    @staticmethod
    def of(config: ProfileConfig, groups: tuple[Groups, ...], model: PreTrainedModel, decoder: LiveDecoder) -> Watch:
        """Clip at three medians of the norm of every input over the first group of each kind; equal on all ranks."""
        norms = NormMedians()
        for one in groups:
            for batch in one.batches(model, 0):
                with watched_inputs(decoder, batch.attention_mask != 0, norms.visit), torch.no_grad():
                    run_once(model, batch.inputs)
        medians = groups[0].options.ranks.from_first(norms.medians())
        return Watch(config, model, decoder, {site: CLIP * median for site, median in medians.items()})

    def empty(self) -> MomentSums:
        """Return sums of no tokens."""
        return MomentSums(input_sizes(self.decoder), self.clips, self.config.sketch, self.config.seed)

    def visit(self, sums: MomentSums, batch: ProbeBatch) -> None:
        """Run a batch through the model and add its inputs to sums."""
        with self.watching(sums, batch), torch.no_grad():
            run_once(self.model, batch.inputs)

    def watching(self, sums: MomentSums, batch: ProbeBatch) -> Any:
        """Return a context in which the inputs of a batch are added to sums while others run it through the model."""
        sums.count(len(batch.numbers))
        return watched_inputs(self.decoder, batch.attention_mask != 0, lambda site, rows: sums.sums[site].add(rows))


class ImpactsAndMoments(Sums):
    """The statistics of a profile and the moments of the same probes, in the same passes."""

    def __init__(self, statistics: Statistics, gain: MomentSums) -> None:
        self.statistics, self.gain = statistics, gain

    @property
    def probes(self) -> int:
        """Number of probes."""
        return self.statistics.probes

    @probes.setter
    def probes(self, probes: int) -> None:
        self.statistics.probes = self.gain.probes = probes

    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return the tensors of both."""
        return {**self.statistics.parts(), **{f"gain.{key}": part for key, part in self.gain.parts().items()}}


class _Part(NamedTuple):
    """What the file holds of one set, ``gain`` or ``keep``."""

    which: str
    facts: dict[str, dict[str, float]]
    tensors: dict[str, Tensor]

    @staticmethod
    def of(which: str, sums: MomentSums) -> _Part:
        """Take the moments of sums, which are given up on the way."""
        _warn_of_few_tokens(sums, which)
        return _Part(which, sums.facts(), sums.tensors(which))


@dataclass(frozen=True)
class MomentsRun:
    """The probes to gain and the kinds of probes to keep, ready to go through the target."""

    config: ProfileConfig
    info: ModelInfo
    out: Path
    gain: Groups
    keep: tuple[Groups, ...]
    fingerprint: str

    def with_impacts(self, groups: Groups, model: PreTrainedModel, meter: Meter) -> Progress:
        """Return on rank 0 the ``ImpactsAndMoments`` of the probes of a profile, which are those to gain."""
        watch = Watch.of(self.config, (groups,), model, meter.decoder)

        def visit(both: ImpactsAndMoments, batch: ProbeBatch) -> None:
            with watch.watching(both.gain, batch):
                impacts = meter.impacts(batch)
            both.statistics.update(impacts)

        return groups.measure(model, lambda: ImpactsAndMoments(Statistics(meter.neurons), watch.empty()), visit)

    def take(self, model: PreTrainedModel, gain: tuple[MomentSums, Tally] | None = None) -> None:
        """Take the moments that are not there yet, and write the file on rank 0."""
        first = self.gain.options.ranks.first
        decoder = find_live_decoder(model, self.info.shape, name=self.config.target.model)
        if gain is None:
            watch = Watch.of(self.config, (self.gain,), model, decoder)
            done = self.gain.measure(model, watch.empty, watch.visit)
            if first:
                self.gain.journals.write(0, done)
            gain = done.statistics, done.tally
            del done
        # What the file holds is a tenth of the sums, which are given up before those of the probes to keep begin.
        parts = [_Part.of("gain", gain[0])] if first else []
        tallies = [gain[1]]
        del gain
        watch = Watch.of(self.config, self.keep, model, decoder)
        total: MomentSums | None = None
        for groups in self.keep:
            done = groups.measure(model, watch.empty, watch.visit)
            tallies.append(done.tally)
            if not first:
                continue
            # A run that is interrupted in a later kind starts there again.
            groups.journals.write(0, done)
            done.statistics.normalise()
            if total is None:
                total = done.statistics
            else:
                total.merge(done.statistics)
            del done
        if total is not None:
            parts.append(_Part.of("keep", total))
            self._write(model, parts, tallies)

    def _write(self, model: PreTrainedModel, parts: list[_Part], tallies: list[Tally]) -> None:
        """Write the moments of both sets, with the tallies of the probes to gain and of every kind to keep."""
        folder = self.gain.options.folder
        origins = [
            probes_provenance(groups.kind, folder, groups.probes, tally)
            for groups, tally in zip((self.gain, *self.keep), tallies, strict=True)
        ]
        provenance = MomentsProvenance(
            model=model_provenance(self.gain.kind, self.info, model, folder),
            gain=origins[0],
            keep=[
                {"name": groups.kind.name, "seed": self.config.seed, **origin}
                for groups, origin in zip(self.keep, origins[1:], strict=True)
            ],
            inputs={key: {part.which: part.facts[key] for part in parts} for key in parts[0].facts},
            sketch=self.config.sketch,
            seed=self.config.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            versions=versions(),
            fingerprint=self.fingerprint,
        )
        write_moments(self.out, {key: tensor for part in parts for key, tensor in part.tensors.items()}, provenance)

    def delete_journals(self) -> None:
        """Delete what an unfinished run would need."""
        for groups in (self.gain, *self.keep):
            groups.journals.delete()


def prepare_moments(
    config: ProfileConfig, info: ModelInfo, options: RunOptions, out: Path, gain: Rows | Probes, *, again: bool = True
) -> MomentsRun | None:
    """Return all probes with their rows, images and prompts checked; no weights are loaded.

    Args:
        gain: the probes to gain, or their rows.
        again: False: return None if an earlier run has written the file with the same settings.

    Raises:
        SnrfError: there is no kind of probes to keep, rows cannot be read or rendered, or another kind of file is at
            ``out``.
    """
    if not config.keep:
        raise SnrfError(None, "key 'keep' is missing", "add a list of probes that the merge keeps")
    kinds = config.kind("target"), *config.kept()
    read = [gain if isinstance(gain, Rows) else gain.rows, *(rows_of(kind, options.folder) for kind in kinds[1:])]
    requests = [
        request_of(config, kind, info, rows, options.folder, sketch=config.sketch, device=config.device)
        for kind, rows in zip(kinds, read, strict=True)
    ]
    wanted = fingerprint(requests)
    if options.ranks.first:
        MOMENTS.check_replaceable(out)
        again = again or not out.is_file() or read_moments(out).provenance.fingerprint != wanted
    if not options.ranks.from_first(again):
        return None
    groups = []
    for index, (kind, rows, request) in enumerate(zip(kinds, read, requests, strict=True)):
        journals = Journals(stem_of(options.out, f"keep-{index - 1}" if index else "gain"), request)
        probes = gain if isinstance(gain, Probes) and not index else probes_of(config, kind, rows)
        groups.append(Groups(kind, probes, journals, options))
    return MomentsRun(config, info, out, groups[0], tuple(groups[1:]), wanted)


def moments_path(mask: str | os.PathLike[str]) -> Path:
    """Return where the moments of a profiling run lie, ``folder/mask.moments.safetensors``."""
    return stem_of(mask, "moments.safetensors")


def _warn_of_few_tokens(sums: MomentSums, which: str) -> None:
    lowest: tuple[float, str] | None = None
    for site, one in sums.sums.items():
        kept = sums.eigenvectors(one.size)
        needed = FEW_DENSE * one.size if kept is None else FEW_SKETCH * kept
        share = one.tokens / needed
        if share < 1 and (lowest is None or share < lowest[0]):
            lowest = share, f"{site} has {one.tokens} tokens to {which}, at least {needed} are advised"
    if lowest is not None:
        logger.warning("%s; use more or longer probes", lowest[1])


def take_moments(config: ProfileConfig, out: str | os.PathLike[str], **how: Any) -> Moments | None:
    """Take the moments of the target alone, without source model and mask, and write them.

    Args:
        config: a checked profile.yml; its source is not used.
        out: the moments file to write.
        how: as of ``groups.started``.

    Returns:
        The file, read again; None on ranks other than the first.

    Raises:
        SnrfError: a problem that the user can fix: the settings, the model, the probes, the memory.
    """
    with started(config, out, MOMENTS, **how) as (config, options):
        kind = config.kind("target")
        run = prepare_moments(config, check_model(kind), options, options.out, rows_of(kind, options.folder))
        assert run is not None
        run.take(load_target(run))
        if not options.ranks.first:
            return None
        run.delete_journals()
        return read_moments(options.out)


def load_target(run: MomentsRun) -> PreTrainedModel:
    """Return the target, with its images if any kind of probes has some."""
    kind = run.gain.kind
    images = any(groups.probes.rows.source.images is not None for groups in (run.gain, *run.keep))
    with naming(kind.model_keys):
        return load_model(kind.model, images=images)[0]
