"""VLMEvalKit: tables ``{model}_{dataset}[_{judge}][_{kind}]`` (xlsx, tsv or json) in a folder of the model's name.

Newer versions write every run in a folder ``T{date}...`` in it, with a ``status.json`` that names the model. A table of
predictions has no scores; what the evaluation of the data set wrote beside it has one of these columns, by sample:

- ``hit``: multiple choice (``*_result``);
- ``score``: yes or no (``*_auxmatch``) and judges; MME's pairs of questions are summed up as MME does, and a question
  of POPE counts once for every category that it is in;
- ``eval_score``: short answers (``*_results``);
- ``verifier_score``: verifiers (``*_detailed_results``);
- ``res``: MathVista, where the extracted answer must equal the right one, as a number or as a choice.

A table with several splits has a metric for each. Pickles are never read.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, printable
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.readers.base import MAX_NAME, Found, Task, UnknownMetricError
from mergekit_snrf.evidence.readers.scores import Value, items_of, mme_items, score
from mergekit_snrf.evidence.readers.sheets import SUFFIXES, columns_of, read_rows
from mergekit_snrf.files.reading import load_json

_RUN = re.compile(r"T\d{8}([-_].*)?")
_STATUS = "status.json"
_AGAIN = "run VLMEvalKit with --mode all, which also evaluates"
_METRICS = {"hit": "accuracy", "eval_score": "eval_score", "verifier_score": "verifier_score", "score": "score"}
_MATHVISTA = {"res", "question_type", "answer_type", "answer_option", "choices"}
_REASONING = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}
_MARKS = re.compile(r"[.()\[\],:;!*#{}]")
_LAST = 4
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class VLMEvalKit:
    """Reads a model's folder, or one of its runs."""

    name: str = "VLMEvalKit"
    remedy: str = _AGAIN

    def find(self, files: Sequence[Path]) -> dict[str, Found]:
        """Return the scored tables of every data set in its newest run.

        A data set's name is that of its predictions, or what comes before the kind of a table without any.
        """
        # A model's folder has links to the tables of its newest run.
        files = sorted(files, key=lambda file: not file.is_symlink())
        named = {file.parent: _named(file) for file in files if file.name == _STATUS}
        models = {file: _model_of(file, named.get(file.parent)) for file in files if file.suffix in SUFFIXES}
        tables = {file.resolve(): (file, model) for file, model in models.items() if model is not None}
        of_folder: dict[Path, dict[Path, str]] = defaultdict(dict)
        for file, model in tables.values():
            of_folder[file.parent][file] = file.stem[len(model) + 1 :]
        runs: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
        for folder, stems in of_folder.items():
            for file, name in _sets(stems).items():
                runs[printable(name)][folder.name].append(file)
        several = sorted({model for _, model in tables.values()})
        if runs and len(several) > 1:
            raise SnrfError(None, f"a folder holds results of {several[0]} and {several[1]}", "give one's folder")
        found = {}
        for name, by_run in runs.items():
            newest = max(by_run, key=lambda run: (_RUN.fullmatch(run) is not None, run))
            note = f"{len(by_run)} runs of {name}; the newest by its name counts, {printable(newest)}"
            found[name] = Found(by_run[newest], note if len(by_run) > 1 else "")
        return found

    def wrote(self, file: Path) -> bool:
        """Return whether a file is a table of the model whose folder it is in, or says how far a run is."""
        return file.name == _STATUS or _model_of(file) is not None

    def read(self, task: str, paths: Sequence[Path]) -> Task:
        """Return the items of every scored table; those of several judges have the ends of their names in theirs."""
        items: dict[str, Items] = {}
        left_out: dict[str, str] = {}
        evidence: dict[str, tuple[str | None, ...]] = {}
        for path in paths:
            rows = read_rows(path)
            keys = [_key(path, number, row) for number, row in enumerate(rows)]
            if len(set(keys)) < len(keys):
                raise SnrfError(path, "has an index twice", _AGAIN)
            evidence |= {
                key: tuple(None if row.get(name) is None else str(row[name]) for name in ("question", "answer"))
                for key, row in zip(keys, rows, strict=True)
            }
            end = f",{printable(path.stem.partition(f'{task}_')[2])}" if len(paths) > 1 else ""
            for metric, scored in _metrics(task, path, keys, rows).items():
                try:
                    items[metric + end] = scored()
                except UnknownMetricError as reason:
                    left_out[metric + end] = str(reason)
        return Task(items, left_out, evidence)


def _model_of(file: Path, named: str | None = None) -> str | None:
    """Return the model that a file's name begins with: as the run's status names it, or as its folder is called."""
    folder = file.parent.parent if _RUN.fullmatch(file.parent.name) else file.parent
    return next((name for name in (named, folder.name) if name and file.name.startswith(f"{name}_")), None)


def _named(status: Path) -> str | None:
    try:
        content = load_json(status)
    except SnrfError:
        return None
    name = content.get("model_name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def _sets(stems: Mapping[Path, str]) -> dict[Path, str]:
    """Return the data set of every scored table of a folder, by what follows the model in the names of its tables."""
    scored = sorted(file for file in stems if _is_scored(file))
    asked = [stem for file, stem in stems.items() if file not in scored]
    found = {}
    for file in scored:
        own = [name for name in asked if stems[file].startswith(f"{name}_")]
        found[file] = max(own, key=len) if own else re.sub(r"(_[^_]+)?_[^_]+$", "", stems[file])
    return found


def _is_scored(file: Path) -> bool:
    try:
        columns = set(columns_of(file))
    except SnrfError:
        return True  # Reading it says why.
    return bool(_METRICS.keys() & columns) or columns >= _MATHVISTA


def _key(path: Path, number: int, row: _Row) -> str:
    key = row.get("index")
    # Of a spreadsheet or text, 7 and 7.0 are the same.
    key = int(key) if isinstance(key, float) and key.is_integer() else key
    if not isinstance(key, int | str) or not str(key) or len(str(key)) > MAX_NAME:
        raise SnrfError(path, f"row {number + 1} has no index", _AGAIN)
    return printable(str(key))


def _metrics(task: str, path: Path, keys: Sequence[str], rows: Sequence[_Row]) -> dict[str, Callable[[], Items]]:
    """Return what makes the items of every metric of a table."""
    place = printable(path.name)
    column = next((name for name in _METRICS if name in rows[0]), None)
    places = [f"{place}, row {number}" for number in range(1, 1 + len(rows))]
    if column is None:
        values = [Value(key, _mathvista(row, at), at) for key, row, at in zip(keys, rows, places, strict=True)]
        return {"accuracy": partial(items_of, "accuracy", values)}
    values = [Value(key, _number(row.get(column)), at) for key, row, at in zip(keys, rows, places, strict=True)]
    if task.startswith("MME") and column == "score" and {"category", "image_path"} <= rows[0].keys():
        return _mme(values, rows)
    if task.startswith("POPE") and column == "score":
        return {"accuracy": partial(_pope, values, rows)}
    splits: dict[str, list[Value]] = defaultdict(list)
    for value, row in zip(values, rows, strict=True):
        splits[str(row.get("split"))].append(value)
    if len(splits) < 2:
        return {_METRICS[column]: partial(items_of, column, values)}
    return {printable(f"{_METRICS[column]},{split}"): partial(items_of, column, part) for split, part in splits.items()}


def _number(value: Any) -> Any:
    """Return what a cell of text means as a number; anything else as it is."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return {"True": 1.0, "False": 0.0}[text] if text in ("True", "False") else float(text)
        except ValueError:
            pass
    return value


def _mme(values: Sequence[Value], rows: Sequence[_Row]) -> dict[str, Callable[[], Items]]:
    """Return MME's scores, perception and reasoning; a picture is known by its path."""
    halves: dict[str, list[tuple[str, str, Value]]] = defaultdict(list)
    for value, row in zip(values, rows, strict=True):
        half = "reasoning" if row["category"] in _REASONING else "perception"
        halves[half].append((str(row["category"]), str(row["image_path"]), value))
    return {half: partial(mme_items, answers) for half, answers in halves.items()}


def _pope(values: Sequence[Value], rows: Sequence[_Row]) -> Items:
    """Return POPE's accuracy, in which a question counts once a category, though it is asked once."""
    times = [len(str(row.get("category") or "").split(",")) for row in rows]
    scale = len(times) / sum(times)
    scores = tuple(score(v.value, v.place) * count * scale for v, count in zip(values, times, strict=True))
    return Items(scores, ids=tuple(v.sample for v in values))


def _mathvista(row: _Row, place: str) -> bool:
    """Return whether ``res`` is the answer, as ``MathVista_acc`` decides: the same choice, number or text."""
    response, answer = row["res"], row.get("answer")
    if row["question_type"] == "multi_choice":
        return _choice(str(response), _choices(row["choices"], place)) == row["answer_option"]
    number = {"integer": int, "float": float}.get(str(row["answer_type"]))
    try:
        return str(response) == str(answer) if number is None else number(response) == number(answer)
    except (TypeError, ValueError, OverflowError):
        return False


def _choices(text: Any, place: str) -> dict[str, str]:
    try:
        choices = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        choices = None
    if not isinstance(choices, list) or len(choices) > 26:
        raise SnrfError(place, "its choices are not a list", _AGAIN)
    return {chr(ord("A") + index): str(choice) for index, choice in enumerate(choices)}


def _choice(response: str, choices: Mapping[str, str]) -> str | None:
    """Return the only letter of a choice among the words, if it is one of the last; else the only choice quoted."""
    words = _MARKS.sub(" ", response).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST:
        return letters[0]
    if len(response) > 2 * sum(map(len, choices.values())):
        return None
    quoted = [letter for letter, choice in choices.items() if choice.lower() in response.lower()]
    return quoted[0] if len(quoted) == 1 else None
