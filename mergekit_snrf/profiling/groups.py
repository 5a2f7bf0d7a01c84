"""Groups of probes through a loaded model: shared between processes, journalled, and resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mergekit_snrf.profiling.distributed import Ranks
from mergekit_snrf.profiling.journal import Journals, JournalWriter, Progress, Sums, Tally
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes, probe_batches
from mergekit_snrf.profiling.probes.source import AnswerRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here but ``memory_budget`` changes a result.

    Attributes:
        mask: the file to write; the files of an unfinished run are beside it.
        folder: that of profile.yml, against which its relative paths are read.
        resume: continue from the journals of an unfinished run.
        memory_budget: bytes that set the size of the blocks; None: the default of the device.
        journal_seconds: how often the journal is written.
        progress: show progress bars on stderr.
        ranks: the processes that share the run.
    """

    mask: Path
    folder: Path | None
    resume: bool
    memory_budget: int | None
    journal_seconds: float
    progress: bool
    ranks: Ranks


@dataclass(frozen=True)
class Groups:
    """Probes of one kind, ready to go through a model.

    Attributes:
        name: for the progress bar and messages.
        rule: where the answers come from.
    """

    name: str
    probes: Probes
    rule: AnswerRule
    journals: Journals
    options: RunOptions

    def measure(
        self, model: PreTrainedModel, empty: Callable[[], Any], visit: Callable[[Any, ProbeBatch], None]
    ) -> Progress:
        """Measure the groups that no journal has; return on rank 0 what all ranks have measured.

        Args:
            empty: returns sums of no probes.
            visit: runs a batch through the model and adds it to the sums.
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
            desc=self.name if ranks.world == 1 else f"{self.name} (rank 0 of {ranks.world})",
            unit="probe",
            disable=not (self.options.progress and ranks.first),
        ) as bar:
            for group in todo:
                for batch in self.batches(model, group):
                    visit(mine.statistics, batch)
                    mine.tally.add(batch, batch.ended)
                    bar.update(len(batch.numbers))
                mine.done.add(group)
                journal.write(mine)
        if ranks.world > 1:
            # A rank that is killed while it waits for the others must not have to measure again.
            journal.write(mine, now=True)
        sums: Sums = mine.statistics
        sums.reduce(ranks.reduce)
        whole = Tally()
        for tally in ranks.all(mine.tally):
            whole.merge(tally)
        return Progress(sums, whole, set(range(len(self.probes.groups))))

    def batches(self, model: PreTrainedModel, group: int) -> Any:
        """Iterate over the batches of one group, with their answers."""
        processor = self.probes.renderer.processor
        return probe_batches(self.probes, model, processor, rule=self.rule, device=model.device, groups={group})

    def _recover(self, empty: Callable[[], Any]) -> Progress:
        """Return on rank 0 what an unfinished run has measured, moved to the journal of rank 0."""
        if not (self.options.ranks.first and self.options.resume):
            return Progress(empty())
        before = self.journals.read(empty)
        if before.done:
            self.journals.write(0, before)
            self.journals.delete(keep=0)
            logger.info("%s: resumed with %d probes", self.name, before.statistics.probes)
        return before
