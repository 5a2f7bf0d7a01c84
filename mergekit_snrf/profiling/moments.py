"""Second moments of a target's inputs, for ``update: regmean``: on the probes to gain and on kinds of probes to keep.

All come from the target, with its own answers, in forward passes only. Every kind of probes to keep counts alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.models.live import LiveDecoder, find_live_decoder
from mergekit_snrf.models.loading import find_device, load_config, load_model, load_processor
from mergekit_snrf.models.moments import (
    InputSite,
    Moments,
    MomentsProvenance,
    check_moments_replaceable,
    read_moments,
    write_moments,
)
from mergekit_snrf.neurons.maskfile import ModelProvenance
from mergekit_snrf.profiling.distributed import joined_ranks
from mergekit_snrf.profiling.groups import Groups, RunOptions
from mergekit_snrf.profiling.journal import Journals, Progress, Tally
from mergekit_snrf.profiling.measure.inputs import NormMedians, input_sizes, run_watched, watched_inputs
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.probes.batches import ProbeBatch, prepare
from mergekit_snrf.profiling.probes.rows import load_rows
from mergekit_snrf.profiling.rendering import side_probes, side_rows
from mergekit_snrf.profiling.request import (
    ModelInfo,
    check_model,
    check_output,
    model_path,
    moments_request,
    source_provenance,
    stem_of,
    versions,
)
from mergekit_snrf.profiling.result.moments import CLIP, MomentSums
from mergekit_snrf.profiling.result.profilefile import ProfileProvenance
from mergekit_snrf.profiling.result.statistics import Statistics
from mergekit_snrf.profiling.settings import ProfileConfig, keep_keys, model_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_DENSE, FEW_SKETCH = 5, 2
"""Fewer tokens than this for each input (dense) or eigenvector (sketch) get a warning."""

_GAIN = "gain."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeepProbes:
    """The kinds of probes to keep, rendered, before any weight is loaded."""

    config: ProfileConfig
    options: RunOptions
    groups: tuple[Groups, ...]

    def clips(self, model: PreTrainedModel, decoder: LiveDecoder) -> dict[InputSite, float]:
        """Return the norms to clip at, from the first group of every kind."""
        return clips_of(self.groups, model, decoder)

    def sums(self, model: PreTrainedModel, decoder: LiveDecoder) -> tuple[MomentSums | None, list[Tally]]:
        """Return the mean moments of all kinds on rank 0 (None elsewhere), and the tally of each kind."""
        clips = self.clips(model, decoder)
        total: MomentSums | None = None
        tallies = []
        for groups in self.groups:
            done = groups.measure(model, lambda: empty_sums(self.config, decoder, clips), adder(model, decoder))
            tallies.append(done.tally)
            if not self.options.ranks.first:
                continue
            # A run that is interrupted in a later kind starts there again.
            groups.journals.write(0, done)
            done.statistics.normalise()
            if total is None:
                total = done.statistics
            else:
                total.merge(done.statistics)
        return total, tallies

    def finish(
        self, model: PreTrainedModel, gain: Progress, info: ModelInfo, profile: ProfileProvenance
    ) -> Statistics | None:
        """Take the moments of the probes to keep and write the file of a profiling run; return its statistics."""
        decoder = find_live_decoder(model, info.shape, name=self.config.target.model)
        kept, tallies = self.sums(model, decoder)
        if kept is None:
            return None
        both: GainAndStatistics = gain.statistics
        origin = (profile.model and profile.model.probes) or {}
        self.write(moments_path(self.options.mask), model, info, (both.gain, origin), (kept, tallies))
        return both.statistics

    def write(
        self,
        out: Path,
        model: PreTrainedModel,
        info: ModelInfo,
        gain: tuple[MomentSums, dict[str, Any]],
        keep: tuple[MomentSums, list[Tally]],
    ) -> None:
        """Write a moments file, and warn where tokens are few.

        Args:
            gain: sums and provenance of the probes to gain.
            keep: sums of all kinds to keep, and the tally of each.
        """
        config, folder = self.config, self.options.folder
        kinds = [
            {"name": one.name, **source_provenance(one.probes.rows.source, one.rule, folder, one.probes, tally)}
            for one, tally in zip(self.groups, keep[1], strict=True)
        ]
        facts = {"gain": gain[0].facts(), "keep": keep[0].facts()}
        for which, sums in (("gain", gain[0]), ("keep", keep[0])):
            _warn_of_few_tokens(sums, which)
        provenance = MomentsProvenance(
            model=ModelProvenance(
                path=model_path(config, "target", folder),
                revision=config.target.revision or getattr(model.config, "_commit_hash", None),
                model_type=info.model_type,
                config_sha256=info.config_sha256,
            ),
            gain=gain[1],
            keep=kinds,
            inputs={key: {which: facts[which][key] for which in facts} for key in facts["gain"]},
            sketch=config.sketch,
            seed=config.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            versions=versions(),
        )
        write_moments(out, {**gain[0].tensors("gain"), **keep[0].tensors("keep")}, provenance)


@dataclass
class GainAndStatistics:
    """The statistics of a profile and the moments of the same probes, in the same passes."""

    statistics: Statistics
    gain: MomentSums

    @staticmethod
    def of(
        groups: Groups, model: PreTrainedModel, meter: Meter, config: ProfileConfig
    ) -> tuple[Callable[[], GainAndStatistics], Callable[[GainAndStatistics, ProbeBatch], None]]:
        """Return what ``Groups.measure`` needs: a function that returns empty sums, and one that adds a batch."""
        decoder = meter.decoder
        clips = clips_of((groups,), model, decoder)

        def empty() -> GainAndStatistics:
            return GainAndStatistics(Statistics(meter.neurons), empty_sums(config, decoder, clips))

        def visit(both: GainAndStatistics, batch: ProbeBatch) -> None:
            with watching(both.gain, decoder, batch):
                impacts = meter.impacts(batch)
            both.statistics.update(impacts)

        return empty, visit

    @property
    def probes(self) -> int:
        """Number of probes."""
        return self.statistics.probes

    def merge(self, other: GainAndStatistics) -> None:
        """Add what another process has measured."""
        self.statistics.merge(other.statistics)
        self.gain.merge(other.gain)

    def reduce(self, reduce: Callable[[Tensor, str], None]) -> None:
        """Combine with other processes."""
        self.statistics.reduce(reduce)
        self.gain.reduce(reduce)

    def state(self) -> dict[str, Tensor]:
        """Return everything except ``probes``."""
        return {**self.statistics.state(), **{f"{_GAIN}{key}": one for key, one in self.gain.state().items()}}

    def restore(self, tensors: Mapping[str, Tensor], probes: int) -> None:
        """Take over a state."""
        gain = {key.removeprefix(_GAIN): one for key, one in tensors.items() if key.startswith(_GAIN)}
        self.statistics.restore({key: one for key, one in tensors.items() if not key.startswith(_GAIN)}, probes)
        self.gain.restore(gain, probes)


def prepare_keep(config: ProfileConfig, info: ModelInfo, options: RunOptions) -> KeepProbes:
    """Return all kinds of probes to keep with their rows, images and prompts checked; no weights are loaded.

    Raises:
        SnrfError: there is no kind, or rows cannot be read or rendered.
    """
    if not config.keep:
        raise SnrfError(None, "key 'keep' is missing", "add a list of probes that the merge keeps")
    ref = config.model_of("target")
    with naming(model_keys("target")):
        model_config = load_config(ref)
    groups = []
    for index in range(len(config.keep)):
        source, rule = config.keep_source(index), config.keep_rule(index)
        with naming(keep_keys(index)):
            rows = load_rows(source, answers=rule.by == "column", folder=options.folder)
            processor = load_processor(ref, images=source.images is not None)
            probes = prepare(
                rows,
                processor,
                rule=rule,
                batch_size=config.batch_size,
                token_limit=config.token_limit,
                config=model_config,
                model=ref.model,
            )
        request = moments_request(config, source, rule, info, rows, options.folder)
        journals = Journals(keep_stem(options.mask, index), request)
        groups.append(Groups(config.keep_name(index), probes, rule, journals, options))
    return KeepProbes(config, options, tuple(groups))


def keep_stem(out: Path, index: int) -> Path:
    """Return the path that the journals of one kind of probes to keep begin with."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.keep-{index}")


def clips_of(groups: tuple[Groups, ...], model: PreTrainedModel, decoder: LiveDecoder) -> dict[InputSite, float]:
    """Return three medians of the norm of every input over the first group of each kind; equal on all ranks."""
    norms = NormMedians()
    for one in groups:
        for batch in one.batches(model, 0):
            with watched_inputs(decoder, batch.attention_mask != 0, norms.visit):
                run_watched(model, batch.inputs)
    medians = groups[0].options.ranks.from_first(norms.medians())
    return {site: CLIP * median for site, median in medians.items()}


def empty_sums(config: ProfileConfig, decoder: LiveDecoder, clips: Mapping[InputSite, float]) -> MomentSums:
    """Return sums of no tokens for the inputs of a decoder."""
    return MomentSums(input_sizes(decoder), clips, config.sketch, config.seed)


def adder(model: PreTrainedModel, decoder: LiveDecoder) -> Callable[[MomentSums, ProbeBatch], None]:
    """Return a function that runs a batch through the model and adds its inputs to sums."""

    def add(sums: MomentSums, batch: ProbeBatch) -> None:
        with watching(sums, decoder, batch):
            run_watched(model, batch.inputs)

    return add


def watching(sums: MomentSums, decoder: LiveDecoder, batch: ProbeBatch) -> Any:
    """Return a context in which the inputs of a batch are added to sums while others run it through the model."""
    sums.probes += len(batch.numbers)
    return watched_inputs(decoder, batch.attention_mask != 0, lambda site, rows: sums.sums[site].add(rows))


def moments_path(mask: str | os.PathLike[str]) -> Path:
    """Return where the moments of a profiling run lie, ``folder/mask.moments.safetensors``."""
    path = Path(mask)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.moments.safetensors")


def _warn_of_few_tokens(sums: MomentSums, which: str) -> None:
    lowest: tuple[float, str] | None = None
    for site, one in sums.sums.items():
        kept = sums.eigenvectors(len(one.total))
        needed = FEW_DENSE * len(one.total) if kept is None else FEW_SKETCH * kept
        share = one.tokens / needed
        if share < 1 and (lowest is None or share < lowest[0]):
            lowest = share, f"{site} has {one.tokens} tokens to {which}, at least {needed} are advised"
    if lowest is not None:
        logger.warning("%s; use more or longer probes", lowest[1])


def take_moments(
    config: ProfileConfig,
    out: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    journal_seconds: float = 30.0,
    progress: bool = True,
) -> Moments | None:
    """Take the moments of the target alone, without source model and mask, and write them.

    Args:
        config: a checked profile.yml; its source is not used.
        out: the moments file to write.
        folder: that of profile.yml, against which its relative paths are read.
        resume: continue from the journals of an unfinished run.
        journal_seconds: how often the journal is written.
        progress: show progress bars on stderr.

    Returns:
        The file, read again; None on ranks other than the first.

    Raises:
        SnrfError: a problem that the user can fix: the settings, the model, the probes, the memory.
    """
    with joined_ranks() as ranks:
        path = Path(out)
        options = RunOptions(
            path, None if folder is None else Path(folder), resume, None, journal_seconds, progress, ranks
        )
        if ranks.first:
            check_output(out, resume=resume, replaceable=check_moments_replaceable)
        config = config.model_copy(update={"device": ranks.device(config.device)})
        find_device(config.device)
        info = check_model(config, "target")
        rows = side_rows(config, "target", options.folder)
        source, rule = config.probes_of("target"), config.answer
        request = moments_request(config, source, rule, info, rows, options.folder)
        journals = Journals(stem_of(path, "target"), request)
        gain = Groups("gain", side_probes(config, "target", rows), rule, journals, options)
        keep = prepare_keep(config, info, options)
        images = any(groups.probes.rows.source.images is not None for groups in (gain, *keep.groups))
        with naming(model_keys("target")):
            model, _ = load_model(config.model_of("target"), images=images)
        decoder = find_live_decoder(model, info.shape, name=config.target.model)
        clips = clips_of((gain,), model, decoder)
        done = gain.measure(model, lambda: empty_sums(config, decoder, clips), adder(model, decoder))
        kept, tallies = keep.sums(model, decoder)
        if kept is None:
            return None
        origin = source_provenance(source, rule, options.folder, gain.probes, done.tally)
        keep.write(path, model, info, (done.statistics, origin), (kept, tallies))
        for groups in (gain, *keep.groups):
            groups.journals.delete()
        return read_moments(path)
