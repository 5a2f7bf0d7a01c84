"""Second moments of a target's inputs, for ``update: regmean``: on the probes to gain and on kinds of probes to keep.

All come from the target, with its own answers, in forward passes only. Every kind of probes to keep counts alike.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.live import LiveDecoder, find_live_decoder
from mergekit_snrf.models.moments import (
    MOMENTS,
    InputSite,
    Moments,
    MomentsProvenance,
    input_sizes,
    read_moments,
    write_moments,
)
from mergekit_snrf.profiling.groups import Groups, Prompts, RunOptions, loaded, started
from mergekit_snrf.profiling.journal import Progress, Tally
from mergekit_snrf.profiling.measure.inputs import run_once, watched_inputs
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.probes.batches import ProbeBatch
from mergekit_snrf.profiling.request import ModelInfo, fingerprint, opened, stem_of
from mergekit_snrf.profiling.result.moments import CLIP, MomentSums
from mergekit_snrf.profiling.result.statistics import Statistics, Sums
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
        norms: dict[InputSite, list[Tensor]] = {}

        def keep(site: InputSite, rows: Tensor) -> None:
            norms.setdefault(site, []).append(rows.norm(dim=1).double().cpu())

        for one in groups:
            for batch in one.batches(model, 0):
                with watched_inputs(decoder, batch.attention_mask != 0, keep), torch.no_grad():
                    run_once(model, batch.inputs)
        return Watch(config, model, decoder, groups[0].options.ranks.from_first(_clips(norms)))

    def empty(self) -> MomentSums:
        """Return sums of no tokens."""
        return MomentSums(input_sizes(self.decoder.shape), self.clips, self.config.sketch, self.config.seed)

    def visit(self, sums: MomentSums, batch: ProbeBatch) -> None:
        """Run a batch through the model and add its inputs to sums."""
        with self.watching(sums, batch), torch.no_grad():
            run_once(self.model, batch.inputs)

    def watching(self, sums: MomentSums, batch: ProbeBatch) -> Any:
        """Return a context in which the inputs of a batch are added to sums while others run it through the model."""
        sums.count(len(batch.numbers))
        return watched_inputs(self.decoder, batch.attention_mask != 0, lambda site, rows: sums.sums[site].add(rows))


def _clips(norms: dict[InputSite, list[Tensor]]) -> dict[InputSite, float]:
    return {site: CLIP * float(torch.cat(parts).median()) for site, parts in norms.items()}


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


@dataclass(frozen=True)
class MomentsRun:
    """The probes to gain and then the kinds of probes to keep, ready to go through the target."""

    config: ProfileConfig
    out: Path
    groups: tuple[Groups, ...]
    fingerprint: str

    def with_impacts(self, groups: Groups, model: PreTrainedModel, meter: Meter) -> Progress:
        """Return on rank 0 the ``ImpactsAndMoments`` of the probes of a profile, which are those to gain."""
        watch = Watch.of(self.config, (groups,), model, meter.decoder)

        def visit(both: ImpactsAndMoments, batch: ProbeBatch) -> None:
            with watch.watching(both.gain, batch):
                impacts = meter.impacts(batch)
            both.statistics.update(impacts)

        return groups.measure(model, lambda: ImpactsAndMoments(Statistics(meter.neurons), watch.empty()), visit)

    def take(self, model: PreTrainedModel, measured: tuple[MomentSums, Tally] | None = None) -> None:
        """Take the moments, unless those to gain are ``measured``, and write the file on rank 0."""
        gain, *keep = self.groups
        first = gain.options.ranks.first
        decoder = find_live_decoder(model, gain.info.shape, name=gain.kind.model.model)
        if measured is None:
            watch = Watch.of(self.config, (gain,), model, decoder)
            done = gain.measure(model, watch.empty, watch.visit, hold=True)
            measured = done.statistics, done.tally
            del done
        # What the file holds is a tenth of the sums, which are given up before those of the probes to keep begin.
        tallies, tensors, facts = [measured[1]], dict[str, Tensor](), dict[str, dict[str, Any]]()
        if first:
            _give_up(measured[0], "gain", tensors, facts)
        del measured
        watch = Watch.of(self.config, tuple(keep), model, decoder)
        total: MomentSums | None = None
        for groups in keep:
            done = groups.measure(model, watch.empty, watch.visit, hold=True)
            tallies.append(done.tally)
            if not first:
                continue
            done.statistics.normalise()
            if total is None:
                total = done.statistics
            else:
                total.merge(done.statistics)
            del done
        if total is None:
            return
        _give_up(total, "keep", tensors, facts)
        origins = [groups.origin(tally) for groups, tally in zip(self.groups, tallies, strict=True)]
        names = [{"name": groups.kind.name, "seed": self.config.seed} for groups in keep]
        own: dict[str, Any] = {"gain": origins[0], "inputs": facts, "sketch": self.config.sketch}
        own["keep"] = [{**name, **origin} for name, origin in zip(names, origins[1:], strict=True)]
        write_moments(self.out, tensors, gain.provenance(MomentsProvenance, model, self.fingerprint, **own))

    def delete_journals(self) -> None:
        """Delete what an unfinished run would need."""
        for groups in self.groups:
            groups.journals.delete()


def _give_up(
    sums: MomentSums, which: str, tensors: dict[str, Tensor], facts: dict[str, dict[str, dict[str, float]]]
) -> None:
    """Turn the sums of ``gain`` or ``keep`` into what the file holds of them."""
    _warn_of_few_tokens(sums, which)
    for key, one in sums.facts().items():
        facts.setdefault(key, {})[which] = one
    tensors |= sums.tensors(which)


def prepare_moments(
    gain: Prompts, info: ModelInfo, options: RunOptions, out: Path, *, again: bool = True
) -> MomentsRun | None:
    """Return all probes with their rows, images and prompts checked; no weights are loaded.

    ``SnrfError``: there is no kind of probes to keep, rows cannot be read or rendered, or another kind of file is at
    ``out``.

    Args:
        gain: the probes to gain.
        again: False: return None if an earlier run has written the file with the same settings.
    """
    config = gain.config
    assert isinstance(config, ProfileConfig)
    if not config.keep:
        raise SnrfError(None, "key 'keep' is missing", "add a list of probes that the merge keeps")
    more = {"sketch": config.sketch, "device": config.device}
    parts = {"gain": gain} | {f"keep-{n}": Prompts(config, one, gain.folder) for n, one in enumerate(config.kept())}
    groups = tuple(Groups(prompts, info, options, part, more) for part, prompts in parts.items())
    wanted = fingerprint([one.request for one in groups])
    if options.ranks.first:
        MOMENTS.check_replaceable(out)
        again = again or not out.is_file() or read_moments(out).provenance.fingerprint != wanted
    if not options.ranks.from_first(again):
        return None
    return MomentsRun(config, out, tuple(one.ready() for one in groups), wanted)


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

    ``SnrfError``: a problem that the user can fix: the settings, the model, the probes, the memory.

    Args:
        config: a checked profile.yml; its source is not used.
        out: the moments file to write.
        how: further fields of ``groups.RunOptions``.

    Returns:
        The file, read again; None on ranks other than the first.
    """
    with started(config, out, MOMENTS, **how) as (config, options):
        gain = Prompts(config, config.kind("target"), options.folder)
        run = prepare_moments(gain, opened(gain.kind)[0], options, options.out)
        assert run is not None
        run.take(loaded(run.groups))
        if not options.ranks.first:
            return None
        run.delete_journals()
        return read_moments(options.out)
