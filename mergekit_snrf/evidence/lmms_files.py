"""Files of samples that lmms-eval writes with ``--log_samples``, read with limits."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, first_line, printable
from mergekit_snrf.files.reading import open_regular

_FILE = re.compile(r"(?P<run>.*?)_samples_(?P<task>.+)\.jsonl")
_TIME = re.compile(r"\d{8}_\d{6}")
_MAX_FILE_BYTES = 2_000_000_000
_MAX_LINE_BYTES = 20_000_000
_MAX_SAMPLES = 100_000
_MAX_METRICS = 100
_MAX_FILES = 10_000
_MAX_NAME = 200
_AGAIN = "run lmms-eval again with --log_samples"
# What a sample holds besides its metrics.
_OTHER_FIELDS = {
    "doc_id", "doc", "doc_hash", "target", "target_hash", "prompt_hash", "input", "arguments", "resps",
    "filtered_resps", "filter", "metrics", "submission", "token_counts", "success",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One line of a file: ``key`` pairs it, ``evidence`` (hash and target) must be equal where both are known."""

    key: str
    evidence: tuple[str | None, str | None]
    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The samples of one model by task, from the newest file of each; a note for every task with several runs."""

    name: str
    files: Mapping[str, Path]
    tasks: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def read_run(folder: Path, name: str, tasks: Sequence[str]) -> Run:
    """Read the newest samples of every task (or of ``tasks`` only) in lmms-eval's output folder, or a model's in it.

    Raises:
        SnrfError: a file is missing, too large or not of lmms-eval.
    """
    if not os.path.isdir(folder):
        raise SnrfError(folder, "is not a folder", "give the --output_path of lmms-eval, or a model's folder in it")
    files: dict[str, list[Path]] = defaultdict(list)
    for file in _sample_files(folder):
        match = _FILE.fullmatch(file.name)
        if match is None or match["run"] == "checkpoint" or (tasks and match["task"] not in tasks):
            continue
        of_task = files[printable(match["task"])]
        if of_task and of_task[0].parent != file.parent:
            places = f"{of_task[0].parent.name} and {file.parent.name}"
            what = f"holds samples of {match['task']} in several folders ({places})"
            raise SnrfError(folder, what, "give one of them")
        of_task.append(file)
    if not files:
        wanted = f"*_samples_{'TASK' if len(tasks) != 1 else tasks[0]}.jsonl"
        raise SnrfError(folder, f"has no file {wanted}", "run lmms-eval with --log_samples")
    # By the time in the name, then by the name.
    newest = {
        task: max(of_task, key=lambda file: (_TIME.findall(file.name)[:1], file.name))
        for task, of_task in sorted(files.items())
    }
    notes = [
        f"{name} has {len(files[task])} runs of {task}; the newest by its name counts, {printable(file.name)}."
        for task, file in newest.items()
        if len(files[task]) > 1
    ]
    return Run(name, newest, {task: list(_read_samples(file)) for task, file in newest.items()}, notes)


def _sample_files(folder: Path) -> list[Path]:
    files = []
    for place, _, names in os.walk(folder):
        files += [Path(place, name) for name in names if name.endswith(".jsonl")]
        if len(files) > _MAX_FILES:
            raise SnrfError(folder, f"has more than {_MAX_FILES} .jsonl files", "give a model's folder")
    return sorted(files)


def _read_samples(path: Path) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    with open_regular(path, remedy=_AGAIN) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_BYTES:
            raise SnrfError(path, f"has {size} bytes, more than the limit of {_MAX_FILE_BYTES}", "give fewer samples")
        for number in range(1, _MAX_SAMPLES + 2):
            line = file.readline(_MAX_LINE_BYTES + 1)
            if not line:
                break
            place = f"{path}, line {number}"
            if len(line) > _MAX_LINE_BYTES:
                raise SnrfError(place, f"has more than {_MAX_LINE_BYTES} bytes", _AGAIN)
            if number > _MAX_SAMPLES:
                raise SnrfError(place, f"the file has more than {_MAX_SAMPLES} samples", "give fewer samples")
            if not line.strip():
                continue
            sample = _sample(line, number, place)
            if sample.key in seen:
                what = f"doc_id {sample.key} is also that of line {seen[sample.key]}"
                raise SnrfError(place, what, "give a file of one run, which has every sample once")
            seen[sample.key] = number
            yield sample
    if not seen:
        raise SnrfError(path, "has no samples", _AGAIN)


def _sample(line: bytes, number: int, place: str) -> Sample:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SnrfError(place, f"not JSON ({first_line(error)})", _AGAIN) from None
    if not isinstance(content, dict) or type(content.get("doc_id")) not in (int, str):
        raise SnrfError(place, "is not a sample of lmms-eval, which has a doc_id", "give files of --log_samples")
    key = printable(json.dumps(content["doc_id"]))
    if len(key) > _MAX_NAME:
        raise SnrfError(place, f"the doc_id has {len(key)} characters", "give files of --log_samples")
    values = {name: value for name, value in content.items() if name not in _OTHER_FIELDS}
    if len(values) > _MAX_METRICS:
        raise SnrfError(place, f"has {len(values)} metrics, more than the limit of {_MAX_METRICS}", _AGAIN)
    for name in values:
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise SnrfError(place, f"{name[:40]!r} is not a name of a metric", "give files of --log_samples")
    document, target = (value if isinstance(value, str) else None for value in map(content.get, ("doc_hash", "target")))
    return Sample(key, (document, target), number, values)
