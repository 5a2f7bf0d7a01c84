"""A profiling run: probes through two models, a profile of each, and the mask of the neurons that they share.

Where the run is split, over processes or by an interruption, the unit is a group of probes that share a batch, so
that every float is computed in the same company. With statistics that do not depend on the order of the probes, this
makes the files of any split the same, byte for byte.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files import references
from mergekit_snrf.neurons.maskfile import ModelProvenance, Provenance, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.profiling import memory
from mergekit_snrf.profiling.distributed import Ranks, joined_ranks
from mergekit_snrf.profiling.journal import Journals, Progress, Tally
from mergekit_snrf.profiling.measure.gradient import gradient_bytes
from mergekit_snrf.profiling.measure.meter import Batch, Measure, Meter
from mergekit_snrf.profiling.probes.batches import (
    Probes,
    check_rendering,
    find_device,
    load_model,
    load_processor,
    load_rows,
    prepare,
    probe_batches,
    probes_sha256,
)
from mergekit_snrf.profiling.request import (
    SIDES,
    ModelInfo,
    SideName,
    check_models,
    check_output,
    fingerprint,
    measure_of,
    model_path,
    probes_provenance,
    profile_path,
    request_of,
    side_of,
    stem_of,
    versions,
)
from mergekit_snrf.profiling.result.profilefile import Profile, ProfileProvenance, read_profile, select, write_profile
from mergekit_snrf.profiling.result.statistics import Statistics
from mergekit_snrf.profiling.settings import ProfileConfig, model_ref

if TYPE_CHECKING:
    from transformers import PreTrainedModel

JOURNAL_SECONDS = 30.0
"""A killed run loses at most about this much work, unless one group of probes takes longer."""

# A journal of a large model takes seconds to write; this share of the time is enough.
_JOURNAL_SHARE = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run wrote.

    Attributes:
        neurons: the shared neurons, as in the mask.
        profiles: the files of the two profiles.
        probes: how many probes each side has.
        seconds: how long each side took, model loading included; 0 for a side that was finished before.
    """

    mask: Path
    neurons: NeuronSet
    profiles: dict[SideName, Path]
    probes: dict[SideName, int]
    seconds: dict[SideName, float]


def profile_model(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    measure: Measure | None = None,
    progress: bool = False,
) -> Statistics:
    """Measure every neuron of a loaded model on batches of probes.

    >>> statistics = profile_model(model, batches)                        # doctest: +SKIP
    >>> select([statistics.profile()], top_ratio=0.1).count()             # doctest: +SKIP

    Args:
        model: any transformers model with a text decoder; it is left as it was.
        batches: of ``probe_batches``, or anything with ``numbers``, ``inputs``, ``attention_mask`` and ``answer_mask``.
        measure: what counts as the impact; None is Eq. 14 over all tokens.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: the model is not supported, or computes NaN or infinite values.
    """
    meter = Meter(model, measure or Measure())
    statistics = Statistics(meter.neurons)
    with tqdm(unit="probe", disable=not progress) as bar:
        for batch in batches:
            statistics.update(meter.impacts(batch))
            bar.update(len(batch.numbers))
    return statistics


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
    """Profile both models and write the mask of their shared neurons.

    The profiles are written beside it, ``<mask>.target.profile.safetensors`` and ``<mask>.source.profile.safetensors``.

    Equal configurations, models, probes, packages and thread counts give equal bytes, whatever the number of
    processes, and however often the run was interrupted and resumed.

    Args:
        config: a checked profile.yml.
        mask: the mask file to write.
        folder: that of profile.yml, against which its relative paths are read.
        resume: go on from the journals of an unfinished run, if there are any.
        memory_budget: bytes that the measurement may use beside the model; None is half of what is free.
        journal_seconds: how often the journal is written.
        progress: show progress bars on stderr.

    Returns:
        What was written; None on ranks other than the first, which write nothing.

    Raises:
        SnrfError: whatever the user can mend: the configuration, the models, the probes, the memory.
    """
    folder = None if folder is None else Path(folder)
    with joined_ranks() as ranks:
        # Later ranks must not take the first one's journals for those of an earlier run.
        if ranks.first:
            check_output(mask, resume=resume)
        device = _check_device(config, ranks)
        models = ranks.from_first(check_models(config) if ranks.first else {})
        for name in SIDES:
            # Loading the weights of the first side can take long before the second has its say.
            side = side_of(config, name)
            check_rendering(side, model_ref(side, trust_remote_code=config.trust_remote_code))
        job = _Job(config, Path(mask), folder, resume, memory_budget, journal_seconds, progress, device, ranks)
        profiles: dict[SideName, Profile] = {}
        seconds: dict[SideName, float] = {}
        for name in SIDES:
            start = time.monotonic()
            profile, done_before = job.profile(name, models[name])
            seconds[name] = 0.0 if done_before else time.monotonic() - start
            if profile is not None:
                profiles[name] = profile
            if name != SIDES[-1]:
                _free_memory()
        if not ranks.first:
            return None
        neurons = select(list(profiles.values()), **config.select.model_dump(exclude_none=True))
        if not neurons.count():
            logger.warning("no neuron is shared; choose a larger top_ratio, a smaller sigma, or at_least")
        write_mask(mask, neurons, _mask_provenance(config, profiles, mask))
        return Result(
            Path(mask),
            neurons,
            {name: profile_path(mask, name) for name in SIDES},
            {name: profile.count for name, profile in profiles.items()},
            seconds,
        )


def dry_run(config: ProfileConfig, *, folder: str | os.PathLike[str] | None = None, shown: int = 3) -> str:
    """Return the first probes of each side as their models would read them; no model is loaded.

    Raises:
        SnrfError: as ``run``, as far as it can be told without the models.
    """
    check_models(config)
    lines = []
    for name in SIDES:
        side = side_of(config, name)
        rows = load_rows(side, config, None if folder is None else Path(folder))
        model = model_ref(side, trust_remote_code=config.trust_remote_code)
        processor = load_processor(model, images=side.probes.images is not None)
        probes = prepare(rows, processor, side, config)
        lines.append(f"{name}: {len(probes)} probes of {side.probes.dataset} through {side.model}")
        for probe in probes.probes[:shown]:
            images = f", {len(probe.row.images)} image(s)" if probe.row.images else ""
            answer = probe.row.answer
            if answer is None:
                answer = f"(generated by the model, up to {config.answer.max_new_tokens} tokens)"
            lines += [
                f"--- row {probe.row.number}: {probe.tokens} tokens{images}",
                probe.prompt,
                f"--- answer: {answer}",
            ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    """One call of ``run``."""

    config: ProfileConfig
    mask: Path
    folder: Path | None
    resume: bool
    memory_budget: int | None
    journal_seconds: float
    progress: bool
    device: str | None
    ranks: Ranks

    def profile(self, name: SideName, info: ModelInfo) -> tuple[Profile | None, bool]:
        """Profile one side; return its profile on rank 0, and whether an earlier run had finished it."""
        side = side_of(self.config, name)
        rows = load_rows(side, self.config, self.folder)
        kind = find_device(self.device)
        block = memory.block_bytes(kind, self.memory_budget)
        request = request_of(self.config, name, info, rows, self.folder, device=kind.type, block=block)
        journals = Journals(stem_of(self.mask, name), request)
        finished = self._finished(name, fingerprint(request)) if self.ranks.first else None
        if self.ranks.from_first(finished is not None):
            if self.ranks.first:
                journals.delete()
                logger.info("%s: was finished before", name)
            return finished, True
        ref = model_ref(
            side,
            device=None if self.config.device_map is not None else self.device,
            dtype=self.config.dtype,
            device_map=self.config.device_map,
            trust_remote_code=self.config.trust_remote_code,
        )
        model, processor = load_model(ref, images=side.probes.images is not None)
        with _memory_explained(name, self.config):
            probes = prepare(rows, processor, side, self.config, model)
            meter = Meter(
                model,
                measure_of(self.config),
                shape=info.shape,
                name=side.model,
                block_bytes=block,
                backend=self.config.backend,
            )
            done = self._measure(name, model, processor, probes, meter, journals, block)
        dtype = str(model.dtype).removeprefix("torch.")
        commit = getattr(model.config, "_commit_hash", None)
        if not self.ranks.first:
            return None, False
        provenance = ProfileProvenance(
            side=name,
            model=ModelProvenance(
                path=model_path(self.config, name, self.folder),
                revision=side.revision or commit,
                model_type=info.model_type,
                config_sha256=info.config_sha256,
                probes=self._probes_provenance(name, probes, done.tally),
            ),
            measure=dict(meter.measure.provenance()),
            seed=self.config.seed,
            dtype=dtype,
            versions=versions(),
            fingerprint=fingerprint(request),
        )
        profile = done.statistics.profile(provenance)
        write_profile(profile_path(self.mask, name), profile)
        journals.delete()
        return profile, False

    def _measure(
        self,
        name: SideName,
        model: PreTrainedModel,
        processor: Any,
        probes: Probes,
        meter: Meter,
        journals: Journals,
        block: int,
    ) -> Progress:
        """Measure the groups that no journal holds; return on rank 0 what all ranks have measured."""
        side = side_of(self.config, name)
        before = self._recover(meter, journals)
        done = self.ranks.from_first(before.done)
        todo = [group for group in range(len(probes.groups)) if group not in done]
        mine = before if self.ranks.first else Progress(Statistics(meter.neurons))
        budget = self._budget(model)
        written = time.monotonic()
        interval = self.journal_seconds
        with tqdm(
            total=sum(len(probes.groups[group]) for group in [*self.ranks.share(todo), *mine.done]),
            initial=mine.statistics.probes,
            desc=name if self.ranks.world == 1 else f"{name} (rank 0 of {self.ranks.world})",
            unit="probe",
            disable=not (self.progress and self.ranks.first),
        ) as bar:
            for group in self.ranks.share(todo):
                for batch in probe_batches(
                    probes, model, processor, side, self.config, device=model.device, groups={group}
                ):
                    needed = self._check_memory(name, meter, batch, model.dtype, block, budget)
                    bar.set_postfix_str(f"{needed / 1e6:.0f} MB", refresh=False)
                    mine.statistics.update(meter.impacts(batch))
                    mine.tally.add(batch, batch.ended)
                    bar.update(len(batch.numbers))
                mine.done.add(group)
                if time.monotonic() - written >= interval:
                    start = time.monotonic()
                    journals.write(self.ranks.rank, mine)
                    written = time.monotonic()
                    interval = max(self.journal_seconds, (written - start) / _JOURNAL_SHARE if interval else 0.0)
        # A rank that is killed while it waits for the others must not have to measure again.
        if self.ranks.world > 1:
            journals.write(self.ranks.rank, mine)
        mine.statistics.reduce(self.ranks.reduce)
        whole = Tally()
        for tally in self.ranks.all(mine.tally):
            whole.merge(tally)
        logger.info("%s: peak memory of the process %s", name, _peak(model.device))
        return Progress(mine.statistics, whole, set(range(len(probes.groups))))

    def _recover(self, meter: Meter, journals: Journals) -> Progress:
        """Return on rank 0 what an unfinished run has left, moved to its own journal."""
        before = Progress(Statistics(meter.neurons))
        if self.ranks.first and self.resume:
            before = journals.read(Statistics(meter.neurons))
            if before.done:
                journals.write(0, before)
                journals.delete(keep=0)
                logger.info("resumed with %d probes", before.statistics.probes)
        return before

    def _finished(self, name: SideName, wanted: str) -> Profile | None:
        path = profile_path(self.mask, name)
        if not self.resume or not path.is_file():
            return None
        profile = read_profile(path)
        if profile.provenance.fingerprint != wanted:
            raise SnrfError(
                f"{path}: this finished profile was made with other settings, models or probes (such as limit, dtype, "
                f"seed or a package's version); repeat those, or leave out --resume to replace it"
            )
        return profile

    def _probes_provenance(self, name: SideName, probes: Probes, tally: Tally) -> dict[str, Any]:
        if tally.cut:
            logger.warning(
                "%s: %d of %d answers reached max_new_tokens = %d before they ended; raise it to measure whole answers",
                name, tally.cut, len(probes), self.config.answer.max_new_tokens,
            )  # fmt: skip
        answer = self.config.answer.model_dump(exclude_none=True)
        return {
            **probes_provenance(self.config, name, self.folder),
            "answer": {**answer, "cut": tally.cut} if answer["by"] == "model" else answer,
            "count": len(probes),
            "left_out": len(probes.bad),
            "tokens": tally.tokens,
            "answer_tokens": tally.answer_tokens,
            "sha256": probes_sha256(probes),
            "tokens_sha256_sum": f"{tally.digest:064x}",
        }

    def _budget(self, model: PreTrainedModel) -> int | None:
        if self.memory_budget is not None:
            return self.memory_budget
        free = memory.free_bytes(model.device)
        return None if free is None else int(free * memory.DEFAULT_SHARE)

    def _check_memory(
        self, name: SideName, meter: Meter, batch: Batch, dtype: torch.dtype, block: int, budget: int | None
    ) -> int:
        """Return how many bytes a batch needs at most beside the model, and refuse more than the budget."""
        probes, tokens = batch.attention_mask.shape
        needed = memory.working_bytes(
            meter.decoder.shape, probes, tokens, dtype=dtype, block=block, up=meter.measure.scoring == "released"
        )
        if meter.measure.weight == "gradient":
            needed += gradient_bytes(meter.decoder.shape, probes, tokens, dtype=dtype)
        logger.debug(
            "%s: %d probes of up to %d tokens use at most %d MB beside the model%s",
            name, probes, tokens, needed / 1e6, "" if budget is None else f", {budget / 1e6:.0f} MB are allowed",
        )  # fmt: skip
        if budget is not None and needed > budget:
            raise SnrfError(
                f"{name}: a batch of {probes} probes of up to {tokens} tokens needs {needed / 1e6:.0f} MB beside the "
                f"model and {budget / 1e6:.0f} MB are allowed; lower batch_size (now {self.config.batch_size}) or "
                f"token_limit, or raise --memory-budget"
            )
        return needed


def _check_device(config: ProfileConfig, ranks: Ranks) -> str | None:
    if config.device_map is not None and ranks.world > 1:
        raise SnrfError(
            f"device_map: auto spreads one model over all devices, which {ranks.world} processes cannot share; "
            f"start one process"
        )
    device = ranks.device(config.device)
    find_device(device)
    return device


def _mask_provenance(
    config: ProfileConfig, profiles: dict[SideName, Profile], mask: str | os.PathLike[str]
) -> Provenance:
    target, source = (profiles[name].provenance for name in SIDES)
    dtypes = {target.dtype, source.dtype}
    return Provenance(
        target=target.model,
        source=source.model,
        selection={**config.select.model_dump(exclude_none=True), "measure": target.measure},
        operation="profile",
        inputs=[{"file": f"{name} profile", "sha256": references.sha256(profile_path(mask, name))} for name in SIDES],
        seed=config.seed,
        dtype=target.dtype if len(dtypes) == 1 else f"{target.dtype} (target), {source.dtype} (source)",
        versions=target.versions,
    )


@contextmanager
def _memory_explained(name: SideName, config: ProfileConfig) -> Iterator[None]:
    """Turn running out of memory into a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        reason = text.strip().splitlines()[0] if text.strip() else "no memory left"
        raise SnrfError(
            f"{name}: out of memory ({reason}); lower batch_size (now {config.batch_size}), answer.max_new_tokens or "
            f"token_limit, use a smaller dtype, or device_map: auto"
        ) from None


def _free_memory() -> None:
    """Let go of the model of one side before that of the other is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB on {device}"
    try:
        import resource
    except ImportError:
        return "unknown"
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB"
