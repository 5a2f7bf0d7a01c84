"""Groups of probes of one kind: prepared, and sent through a loaded model by processes, with journals."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.files.container import Format
from mergekit_snrf.models.loading import find_device, load_config, load_processor
from mergekit_snrf.neurons.maskfile import MASK
from mergekit_snrf.profiling.distributed import Ranks, joined_ranks
from mergekit_snrf.profiling.journal import Journals, JournalWriter, Progress, Tally
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes, prepare, probe_batches
from mergekit_snrf.profiling.probes.rows import Rows, load_rows
from mergekit_snrf.profiling.request import check_output
from mergekit_snrf.profiling.settings import Kind, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Config = TypeVar("_Config", bound=RunConfig)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out, as ``started``; nothing here but ``memory_budget`` changes a result."""

    out: Path
    folder: Path | None
    resume: bool
    memory_budget: int | None
    journal_seconds: float
    progress: bool
    ranks: Ranks


@contextmanager
def started(
    config: _Config,
    out: str | os.PathLike[str],
    kind: Format = MASK,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    memory_budget: int | None = None,
    journal_seconds: float = 30.0,
    progress: bool = True,
) -> Iterator[tuple[_Config, RunOptions]]:
    """Begin a run: join its processes, check its output, and give its settings the device of this process.

    Args:
        config: checked settings.
        out: the file to write.
        kind: of that file.
        folder: that of the settings' file, against which its relative paths are read.
        resume: continue from the journals of an unfinished run, if there are any.
        memory_budget: bytes that set the size of the blocks; None: the default of the device.
        journal_seconds: how often the journal is written. A killed run loses about this much work, or one group.
        progress: show progress bars on stderr.
    """
    with joined_ranks() as ranks:
        # Other ranks must not mistake the first one's journals for those of an earlier run.
        if ranks.first:
            check_output(out, resume=resume, kind=kind)
        if config.device_map is not None and ranks.world > 1:
            what = f"auto spreads one model over all devices, which {ranks.world} processes cannot share"
            raise SnrfError(None, what, "start one process", field="device_map")
        device = ranks.device(config.device)
        find_device(device)
        place = None if folder is None else Path(folder)
        options = RunOptions(Path(out), place, resume, memory_budget, journal_seconds, progress, ranks)
        yield config.model_copy(update={"device": device}), options


def rows_of(kind: Kind, folder: Path | None) -> Rows:
    """Return the rows of one kind of probes; errors name the keys of profile.yml."""
    with naming(kind.keys):
        return load_rows(kind.source, answers=kind.rule.by == "column", folder=folder)


def probes_of(config: RunConfig, kind: Kind, rows: Rows) -> Probes:
    """Return rows as prompts, without loading weights; errors name the keys of profile.yml."""
    with naming(kind.model_keys):
        model_config = load_config(kind.model)
        processor = load_processor(kind.model, images=rows.source.images is not None)
    limits: dict[str, Any] = {"batch_size": config.batch_size, "token_limit": config.token_limit}
    with naming(kind.keys):
        return prepare(rows, processor, rule=kind.rule, config=model_config, model=kind.model.model, **limits)


@dataclass(frozen=True)
class Groups:
    """Probes of one kind, ready to go through a model."""

    kind: Kind
    probes: Probes
    journals: Journals
    options: RunOptions

    def measure(
        self, model: PreTrainedModel, empty: Callable[[], Any], visit: Callable[[Any, ProbeBatch], None]
    ) -> Progress:
        """Measure the groups that no journal has; return on rank 0 what all ranks have measured.

        ``empty`` returns sums of no probes, ``visit`` runs a batch through the model and adds it to them.
        """
        ranks = self.options.ranks
        before = self._recover(empty)
        done = ranks.from_first(before.done)
        todo = ranks.share([group for group in range(len(self.probes.groups)) if group not in done])
        mine = before if ranks.first else Progress(empty())
        journal = JournalWriter(self.journals, ranks.rank, self.options.journal_seconds)
        with tqdm(
            total=sum(len(self.probes.groups[group]) for group in [*todo, *mine.done]),
            initial=mine.statistics.probes,
            desc=self.kind.name if ranks.world == 1 else f"{self.kind.name} (rank 0 of {ranks.world})",
            unit="probe",
            disable=not (self.options.progress and ranks.first),
        ) as bar:
            for group in todo:
                for batch in self.batches(model, group):
                    visit(mine.statistics, batch)
                    mine.tally.add(batch)
                    bar.update(len(batch.numbers))
                mine.done.add(group)
                journal.write(mine)
        if ranks.world > 1:
            # A rank that is killed while it waits for the others must not have to measure again.
            journal.write(mine, now=True)
        mine.statistics.reduce(ranks.reduce)
        whole = Tally()
        for tally in ranks.all(mine.tally):
            whole.merge(tally)
        return Progress(mine.statistics, whole, set(range(len(self.probes.groups))))

    def batches(self, model: PreTrainedModel, group: int) -> Any:
        """Iterate over the batches of one group, with their answers."""
        processor = self.probes.renderer.processor
        return probe_batches(self.probes, model, processor, rule=self.kind.rule, device=model.device, groups={group})

    def _recover(self, empty: Callable[[], Any]) -> Progress:
        """Return on rank 0 what an unfinished run has measured, moved to the journal of rank 0."""
        if not (self.options.ranks.first and self.options.resume):
            return Progress(empty())
        before = self.journals.read(empty)
        if before.done:
            self.journals.write(0, before)
            self.journals.delete(keep=0)
            logger.info("%s: resumed with %d probes", self.kind.name, before.statistics.probes)
        return before
