"""Damaged files for every reader, and kills of every command that writes folders.

    python benchmarks/campaign.py                     # 10,000 files and 50 kills a command
    python benchmarks/campaign.py --files 500 --kills 5 --seed 1

The files are read in one process with a limit of 20 s each; what a reader raises must be an error in one sentence. The
kills fork from a process that has imported everything; after each, the same command runs again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from campaign_files import Reader, readers
from campaign_kills import kills
from campaign_mutations import damage, replaced

from mergekit_snrf.errors import SnrfError

TESTS = Path(__file__).parents[1] / "tests"
SECONDS = 20.0
SLOW = 2.0
MEMORY = 8 * 2**30
LONGEST = 1500


class _Hang(BaseException):
    """A reader did not end in time."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Stop the block after SECONDS; end the process with its stack if Python cannot stop it."""

    def stop(*_: object) -> None:
        raise _Hang

    signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


class Findings:
    """What came of the files: counts by reader, and one example of every kind of failure."""

    def __init__(self, keep: Path) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.examples: dict[str, str] = {}
        self.slowest = (0.0, "")
        self._keep = keep

    def read(self, reader: Reader, folder: Path, file: Path, how: str) -> None:
        """Let a reader read its damaged file, and note what happens."""
        start, kind, sentence = time.monotonic(), "accepted", ""
        try:
            with limited():
                reader.read(folder, file)
        except (SnrfError, click.ClickException) as error:
            kind, sentence = "refused", str(error)
        except _Hang:
            kind, sentence = "hang", f"{reader.name}: {how}"
        except BaseException as error:
            frame = next(
                (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "mergekit_snrf" in f.filename), None
            )
            place = f"{Path(frame.filename).name}:{frame.lineno}" if frame else "?"
            kind, sentence = "traceback", f"{reader.name}: {type(error).__name__} at {place}: {str(error)[:200]!r}"
        took = time.monotonic() - start
        self.counts[reader.name][kind] += 1
        self.slowest = max(self.slowest, (took, f"{reader.name}: {how}"))
        if kind == "refused" and (
            len(sentence) > LONGEST or any(not c.isprintable() for c in sentence.replace("\n", ""))
        ):
            kind, sentence = "unfit message", f"{reader.name}: {sentence!r:.300}"
            self.counts[reader.name][kind] += 1
        if took > SLOW and kind != "hang":
            self.counts[reader.name]["slow"] += 1
            self._example(f"slow {reader.name}: {how} ({took:.1f} s)", file)
        if kind not in ("accepted", "refused"):
            self._example(f"{kind} {sentence}", file)

    def _example(self, key: str, file: Path) -> None:
        name = key.split(": ", 2)
        if ": ".join(name[:2]) in self.examples:
            return
        self.examples[": ".join(name[:2])] = key
        if file.is_file() and not file.is_symlink() and file.stat().st_size < 2**24:
            shutil.copy(file, self._keep / f"{len(self.examples)}-{file.name}")

    def total(self, kind: str) -> int:
        """Return how often something happened."""
        return sum(counts[kind] for counts in self.counts.values())

    def show(self) -> int:
        """Print everything and return the number of failures."""
        for name, counts in self.counts.items():
            click.echo(f"{name:16} {json.dumps(dict(sorted(counts.items())))}")
        for example in self.examples.values():
            click.echo(f"  {example}")
        accepted, refused, tracebacks, hangs, unfit, slow = map(
            self.total, ("accepted", "refused", "traceback", "hang", "unfit message", "slow")
        )
        click.echo(
            f"{accepted + refused + tracebacks + hangs} files: {accepted} accepted, {refused} refused, {tracebacks} "
            f"tracebacks, {hangs} hangs over {SECONDS:g} s, {unfit} unfit messages, {slow} over {SLOW:g} s; slowest "
            f"{self.slowest[0]:.1f} s ({self.slowest[1]})"
        )
        return tracebacks + hangs + unfit


def run_files(folder: Path, number: int, seed: int, keep: Path) -> Findings:
    """Send damaged files through every reader in turn."""
    findings = Findings(keep)
    generator = np.random.default_rng(seed)
    everyone = list(readers(folder / "inputs"))
    for reader in everyone:
        with limited():
            reader.read(
                reader.folder, reader.folder / reader.files[0]
            )  # What is whole is accepted, or the damage would say nothing.
    shares = np.array([reader.share for reader in everyone])
    for index in range(number):
        reader = everyone[int(generator.choice(len(everyone), p=shares / shares.sum()))]
        file = reader.folder / reader.files[int(generator.integers(len(reader.files)))]
        whole = file.read_bytes()
        if generator.random() < 0.02:
            how = replaced(file, generator)
        else:
            how, content = damage(whole, file.suffix, generator, reader.tokens)
            file.write_bytes(content)
        findings.read(reader, reader.folder, file, f"file {index}, {how}")
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(whole)
    for reader in everyone:
        reader.read(reader.folder, reader.folder / reader.files[0])
    return findings


@click.command()
@click.option("--files", default=10_000, show_default=True)
@click.option("--kills", "number", default=50, show_default=True, help="Of each command.")
@click.option("--seed", default=0, show_default=True)
@click.option("--keep", type=click.Path(file_okay=False), help="Where files that failed are kept.")
def main(files: int, number: int, seed: int, keep: str | None) -> None:
    """Print what a campaign brings out; exit code 1 if anything fails."""
    failed = 0
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    sys.path[:0] = [str(TESTS), *(str(TESTS / room) for room in ("merge", "profiling", "evidence"))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = Path(keep or folder / "kept")
        kept.mkdir(exist_ok=True)
        if files:
            start, limits = time.process_time(), resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
            failed += run_files(folder, files, seed, kept).show()
            resource.setrlimit(resource.RLIMIT_AS, limits)
            click.echo(f"{time.process_time() - start:.0f} s of CPU")
        if number:
            failed += kills(folder / "kills", number, seed)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
