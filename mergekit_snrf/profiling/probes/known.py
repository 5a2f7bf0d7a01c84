"""Data sets by name, as ``snrf init`` writes them into a profile.yml: the paper's, and what a merge should keep."""

from __future__ import annotations

from typing import Any

from mergekit_snrf.errors import SnrfError, did_you_mean
from mergekit_snrf.profiling.probes.rows import column_names
from mergekit_snrf.profiling.probes.source import DATA_SUFFIXES

KNOWN: dict[str, dict[str, Any]] = {
    "geometry3k": {"dataset": "hiyouga/geometry3k", "split": "train", "question": "problem", "images": "images"},
    "gsm8k": {"dataset": "openai/gsm8k", "config": "main", "split": "train", "question": "question"},
    "vqa": {"dataset": "lmms-lab/VQAv2", "split": "validation", "question": "question", "images": "image"},
    "ocr": {"dataset": "lmms-lab/textvqa", "split": "train", "question": "question", "images": "image"},
    "count": {"dataset": "vikhyatk/CountBenchQA", "split": "test", "question": "question", "images": "image"},
    "objects": {"dataset": "lmms-lab/POPE", "split": "test", "question": "question", "images": "image"},
    "instructions": {"dataset": "databricks/databricks-dolly-15k", "split": "train", "question": "instruction"},
    "code": {"dataset": "openai/openai_humaneval", "split": "test", "question": "prompt"},
}
"""The keys of ``profile.yml`` for each name."""

_QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "messages", "conversations")
_IMAGES = ("images", "image", "decoded_image")


def find_probes(name: str, *, images: bool) -> dict[str, Any]:
    """Return the keys of a known data set, or of a local file whose columns have usual names.

    ``SnrfError``: the name is unknown, or the file has no column with a usual name for the question.

    Args:
        images: the model reads images, so a column of them is used if there is one.
    """
    if name in KNOWN:
        found = dict(KNOWN[name])
        if "images" in found and not images:
            raise SnrfError(name, "asks about pictures, which a text-only model cannot see", "choose other probes")
        return found
    if not name.endswith(tuple(DATA_SUFFIXES)):
        raise SnrfError(name, "is neither a known data set nor a data file", did_you_mean(name, KNOWN))
    columns = column_names(name)
    question = next((column for column in _QUESTIONS if column in columns), None)
    if question is None:
        what = f"has no column called {', '.join(_QUESTIONS)}; its columns are {', '.join(columns)}"
        raise SnrfError(name, what, "rename the column of the questions, or write profile.yml yourself")
    picture = next((column for column in _IMAGES if column in columns), None) if images else None
    return {"dataset": name, "question": question, **({"images": picture} if picture else {})}
