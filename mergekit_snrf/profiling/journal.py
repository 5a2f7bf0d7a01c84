"""The journal of an unfinished run: what was measured so far, to resume from there.

Every process keeps one file beside the mask, ``<mask>.<side>.journal-<rank>.safetensors``, which is replaced
atomically: the state of its statistics, the numbers of the groups of probes in them, and the run's settings.
A run can be resumed with any number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.files.container import Format
from mergekit_snrf.profiling.probes.batches import ProbeBatch
from mergekit_snrf.profiling.result.statistics import Sums

_FORMAT = Format("snrf-journal", 2, "delete it to start again", "delete it to start again")

# A journal of a large model takes seconds to write; this share of the time is enough.
_SHARE = 0.05


@dataclass
class Tally:
    """Counts of the probes that were measured; sums, so that their order does not matter.

    ``cut`` answers reached max_new_tokens without an end. ``digest`` is the sum modulo 2^256 of the sha256 of every
    probe's number and token ids.
    """

    tokens: int = 0
    answer_tokens: int = 0
    cut: int = 0
    digest: int = 0

    def add(self, batch: ProbeBatch) -> None:
        """Count the probes of a batch."""
        real = batch.attention_mask != 0
        self.tokens += int(real.sum())
        self.answer_tokens += int(batch.answer_mask.sum())
        self.cut += sum(not end for end in batch.ended)
        for number, ids, mask in zip(batch.numbers, batch.inputs["input_ids"], real, strict=True):
            content = json.dumps([number, ids[mask].tolist()], separators=(",", ":"))
            self._add_digest(int(hashlib.sha256(content.encode()).hexdigest(), 16))

    def merge(self, other: Tally) -> None:
        """Count the probes of another tally."""
        self.tokens += other.tokens
        self.answer_tokens += other.answer_tokens
        self.cut += other.cut
        self._add_digest(other.digest)

    def _add_digest(self, digest: int) -> None:
        self.digest = (self.digest + digest) % 2**256


@dataclass
class Progress:
    """What one process has measured: its ``Sums``, and the groups of probes that are in them."""

    statistics: Any
    tally: Tally = field(default_factory=Tally)
    done: set[int] = field(default_factory=set)

    def merge(self, other: Progress) -> None:
        """Add the groups of another process."""
        self.statistics.merge(other.statistics)
        self.tally.merge(other.tally)
        self.done |= other.done


class Journals:
    """The journals of one side of a run; a journal of another ``request`` is an error.

    ``stem`` is the path of the mask without suffix, with the side: ``folder/mask.target``. A process writes its own
    every few ``seconds`` (0: after every group), less often where that takes long.
    """

    def __init__(self, stem: Path, request: Mapping[str, Any], seconds: float = 0.0) -> None:
        self._stem = stem
        self._pattern = f"{glob.escape(stem.name)}.journal-*.safetensors"
        self._request = json.loads(json.dumps(request))
        self._seconds, self._due = seconds, time.monotonic() + seconds

    def path(self, rank: int) -> Path:
        """Return the journal of one process."""
        return self._stem.with_name(f"{self._stem.name}.journal-{rank}.safetensors")

    def files(self) -> list[Path]:
        """Return the journals that exist."""
        return sorted(self._stem.parent.glob(self._pattern))

    def write(self, rank: int, progress: Progress) -> None:
        """Replace the journal of one process."""
        tally = progress.tally
        content = {
            "request": self._request,
            "probes": progress.statistics.probes,
            "done": f"{sum(1 << group for group in progress.done):x}",
            "tally": {**vars(tally), "digest": f"{tally.digest:064x}"},
        }
        _FORMAT.write(self.path(rank), progress.statistics.state(), content)

    def write_if_due(self, rank: int, progress: Progress) -> None:
        """Replace the journal of one process if it is time to."""
        start = time.monotonic()
        if start >= self._due:
            self.write(rank, progress)
            now = time.monotonic()
            self._due = now + (max(self._seconds, (now - start) / _SHARE) if self._seconds else 0.0)

    def read(self, empty: Callable[[], Sums]) -> Progress:
        """Return what all journals hold together; ``SnrfError``: one is damaged, of another run, or overlaps."""
        whole = Progress(empty())
        parts = sorted(
            ((path, self._read(path, empty())) for path in self.files()), key=lambda part: -len(part[1].done)
        )
        for path, part in parts:
            # A resumed run writes all that it found to one journal before it deletes the others.
            if part.done <= whole.done:
                continue
            if part.done & whole.done:
                raise SnrfError(path, "overlaps with another journal of the run", "delete them to start again")
            whole.merge(part)
        return whole

    def delete(self, keep: int | None = None) -> None:
        """Delete all journals except that of rank ``keep``, and the partial files of killed processes."""
        abandoned = self._stem.parent.glob(f".{self._pattern}.*.partial")
        for path in [*self.files(), *abandoned]:
            if keep is None or path != self.path(keep):
                path.unlink(missing_ok=True)

    def _read(self, path: Path, statistics: Sums) -> Progress:
        tensors, content = _FORMAT.read(path)
        try:
            request = content["request"]
            different = differences(request, self._request)
            if different:
                what = f"is the journal of another run: {', '.join(different)}"
                raise SnrfError(path, what, "use the same settings, or delete the journal to start again")
            done, tally = int(content["done"], 16), dict(content["tally"])
            tally["digest"] = int(tally["digest"], 16)
            if any(type(count) is not int for count in tally.values()):
                raise ValueError("a count is not a whole number")
            groups = {group for group in range(done.bit_length()) if done >> group & 1}
            statistics.restore(tensors, int(content["probes"]))
            return Progress(statistics, Tally(**tally), groups)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, SnrfError) and error.where:
                raise
            reason = error if isinstance(error, SnrfError) else repr(error)
            raise SnrfError(path, f"is damaged ({reason})", _FORMAT.again) from None


def differences(was: Any, now: Any, key: str = "") -> list[str]:
    """Return the differences of two JSON values, such as ``seed was 0 and is 1``."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted({*was, *now})
        return [
            found
            for name in names
            for found in differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if was == now else [f"{key or 'request'} was {was!r} and is {now!r}"]
