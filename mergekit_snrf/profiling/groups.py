"""Groups of probes of one kind: prepared, and sent through a loaded model by processes, with journals."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.files.container import Format
from mergekit_snrf.models.loading import find_device, load_config, load_model, load_processor
from mergekit_snrf.neurons.maskfile import MASK, ModelProvenance, RunProvenance
from mergekit_snrf.profiling.distributed import Ranks, joined_ranks
from mergekit_snrf.profiling.journal import Journals, Progress, Tally
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes, prepare, probe_batches, probes_sha256
from mergekit_snrf.profiling.probes.rows import Rows, load_rows
from mergekit_snrf.profiling.request import ModelInfo, check_output, stem_of, versions
from mergekit_snrf.profiling.settings import Kind, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Config = TypeVar("_Config", bound=RunConfig)
_Provenance = TypeVar("_Provenance", bound=RunProvenance)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here but ``memory_budget`` changes a result.

    Attributes:
        out: the file to write.
        folder: that of the settings' file, against which its relative paths are read.
        resume: continue from the journals of an unfinished run, if there are any.
        memory_budget: bytes that set the size of the blocks; None: the default of the device.
        journal_seconds: how often the journal is written. A killed run loses about this much work, or one group.
        progress: show progress bars on stderr.
    """

    out: Path
    ranks: Ranks
    folder: Path | None = None
    resume: bool = False
    memory_budget: int | None = None
    journal_seconds: float = 30.0
    progress: bool = True


@contextmanager
def started(
    config: _Config, out: str | os.PathLike[str], kind: Format = MASK, **how: Any
) -> Iterator[tuple[_Config, RunOptions]]:
    """Begin a run: join its processes, check its output, and give its settings the device of this process.

    ``kind`` is that of the file to write, ``how`` the further fields of ``RunOptions``.
    """
    with joined_ranks() as ranks:
        options = RunOptions(Path(out), ranks, **how)
        # Other ranks must not mistake the first one's journals for those of an earlier run.
        if ranks.first:
            check_output(out, resume=options.resume, kind=kind)
        if config.device_map is not None and ranks.world > 1:
            what = f"auto spreads one model over all devices, which {ranks.world} processes cannot share"
            raise SnrfError(None, what, "start one process", field="device_map")
        device = ranks.device(config.device)
        find_device(device)
        yield config.model_copy(update={"device": device}), options


@dataclass(frozen=True)
class Prompts:
    """The probes of one kind, read and rendered without loading weights; errors name the keys of profile.yml."""

    config: RunConfig
    kind: Kind
    folder: Path | None

    @cached_property
    def rows(self) -> Rows:
        """Their rows."""
        with naming(self.kind.keys):
            return load_rows(self.kind.source, answers=self.kind.rule.by == "column", folder=self.folder)

    @cached_property
    def probes(self) -> Probes:
        """The rows as prompts."""
        kind, config = self.kind, self.config
        with naming(kind.model_keys):
            model = load_config(kind.model)
            processor = load_processor(kind.model, images=kind.source.images is not None)
        limits: dict[str, Any] = {"batch_size": config.batch_size, "token_limit": config.token_limit}
        with naming(kind.keys):
            return prepare(self.rows, processor, rule=kind.rule, config=model, model=kind.model.model, **limits)


@dataclass(frozen=True)
class Groups:
    """Probes of one kind on their way through a model.

    Attributes:
        part: what follows the name of the output in those of the journals.
        more: what the result depends on beside the settings that all kinds have.
        aside: what only the journals depend on.
    """

    prompts: Prompts
    info: ModelInfo
    options: RunOptions
    part: str
    more: Mapping[str, Any]
    aside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """The kind of the probes."""
        return self.prompts.kind

    @cached_property
    def request(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values.

        Paths are as the user wrote them: those found beside profile.yml are relative to it.
        """
        kind, config = self.kind, self.prompts.config
        return {
            "model": {
                "path": self._written(kind.model.model),
                "revision": kind.model.revision,
                "gguf_file": kind.model.gguf_file,
                "config_sha256": self.info.config_sha256,
                "content_sha256": self.info.content_sha256,
            },
            "probes": {**self._columns, "rows_sha256": _rows_sha256(self.prompts.rows)},
            "template": kind.source.template,
            **self._chat,
            "answer": kind.rule.model_dump(exclude_none=True),
            "limit": kind.source.limit,
            **{key: getattr(config, key) for key in ("seed", "batch_size", "token_limit", "dtype")},
            "versions": versions(),
            **self.more,
        }

    @cached_property
    def journals(self) -> Journals:
        """What an unfinished run has measured."""
        stem = stem_of(self.options.out, self.part)
        return Journals(stem, {**self.request, **self.aside}, self.options.journal_seconds)

    def ready(self) -> Groups:
        """Render the probes, whose faults are to be found before any model is loaded."""
        logger.info("%s: %d probes", self.kind.name, len(self.prompts.probes))
        return self

    def provenance(
        self, of: type[_Provenance], model: PreTrainedModel, wanted: str, with_model: Any = None, **own: Any
    ) -> _Provenance:
        """Return where a file comes from: ``wanted`` is its fingerprint, ``own`` what its type has of its own."""
        named = ModelProvenance(
            path=self._written(self.kind.model.model),
            revision=self.kind.model.revision or getattr(model.config, "_commit_hash", None),
            model_type=self.info.model_type,
            config_sha256=self.info.config_sha256,
            probes=with_model,
        )
        dtype, seed = str(model.dtype).removeprefix("torch."), self.prompts.config.seed
        return of(model=named, seed=seed, dtype=dtype, versions=versions(), fingerprint=wanted, **own)

    def origin(self, tally: Tally) -> dict[str, Any]:
        """Return where the probes come from, and how many there are."""
        source, probes = self.kind.source, self.prompts.probes
        more = {"limit": source.limit, "template": source.template, **self._chat}
        answer = self.kind.rule.model_dump(exclude_none=True)
        return {
            **self._columns,
            **{key: value for key, value in more.items() if value is not None},
            "answer": {**answer, "cut": tally.cut} if answer["by"] == "model" else answer,
            "count": len(probes),
            "left_out": len(probes.bad),
            "tokens": tally.tokens,
            "answer_tokens": tally.answer_tokens,
            "sha256": probes_sha256(probes),
            "tokens_sha256_sum": f"{tally.digest:064x}",
        }

    @property
    def _chat(self) -> dict[str, Any]:
        """What the chat template is given beside the question, where that is set."""
        written = {key: getattr(self.kind.source, key) for key in ("system", "chat_template_kwargs")}
        return {key: value for key, value in written.items() if value is not None}

    @property
    def _columns(self) -> dict[str, Any]:
        columns = self.kind.columns
        return {**columns.model_dump(mode="json", exclude_none=True), "dataset": self._written(columns.dataset)}

    def _written(self, value: str) -> str:
        folder = self.options.folder
        if folder is None or folder == Path():
            return value
        try:
            return Path(value).relative_to(folder).as_posix()
        except ValueError:
            return value

    def measure(
        self,
        model: PreTrainedModel,
        empty: Callable[[], Any],
        visit: Callable[[Any, ProbeBatch], None],
        *,
        hold: bool = False,
    ) -> Progress:
        """Measure the groups that no journal has; return on rank 0 what all ranks have measured.

        ``empty`` returns sums of no probes, ``visit`` runs a batch through the model and adds it to them. With ``hold``
        a journal has everything at the end, for a run that is interrupted in a later kind.
        """
        ranks, groups, journals = self.options.ranks, self.prompts.probes.groups, self.journals
        before = self._recover(empty)
        done = ranks.from_first(before.done)
        todo = ranks.share([group for group in range(len(groups)) if group not in done])
        mine = before if ranks.first else Progress(empty())
        with tqdm(
            total=sum(len(groups[group]) for group in [*todo, *mine.done]),
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
                journals.write_if_due(ranks.rank, mine)
        if ranks.world > 1:
            # A rank that is killed while it waits for the others must not have to measure again.
            journals.write(ranks.rank, mine)
        mine.statistics.reduce(ranks.reduce)
        whole = Tally()
        for tally in ranks.all(mine.tally):
            whole.merge(tally)
        found = Progress(mine.statistics, whole, set(range(len(groups))))
        if hold and ranks.first:
            journals.write(0, found)
        return found

    def batches(self, model: PreTrainedModel, group: int) -> Any:
        """Iterate over the batches of one group, with their answers."""
        probes, rule = self.prompts.probes, self.kind.rule
        return probe_batches(probes, model, probes.renderer.processor, rule=rule, device=model.device, groups={group})

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


def _rows_sha256(rows: Rows) -> str:
    digest = hashlib.sha256()
    for row in rows.rows:
        content = [row.number, dict(row.fields), row.question, list(row.images), row.answer, *row.turns]
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def loaded(groups: Sequence[Groups]) -> PreTrainedModel:
    """Return the model that all of these go through, with its images if any kind has some."""
    kind = groups[0].kind
    with naming(kind.model_keys):
        return load_model(kind.model, images=any(one.kind.source.images is not None for one in groups))[0]
