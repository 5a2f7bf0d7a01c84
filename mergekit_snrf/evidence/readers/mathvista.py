"""Whether an extracted answer to MathVista is right, as VLMEvalKit's ``MathVista_acc`` decides."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

_MARKS = re.compile(r"[.()\[\],:;!*#{}]")
_LAST = 4


def is_right(row: Mapping[str, Any]) -> bool:
    """Return whether ``res`` is the answer: the same choice, the same number of the answer's type, or the same text.

    Raises:
        ValueError: the choices are not a list.
    """
    response, answer = row["res"], row.get("answer")
    if row["question_type"] == "multi_choice":
        return _choice(str(response), _choices(row["choices"])) == row["answer_option"]
    number = {"integer": int, "float": float}.get(str(row["answer_type"]))
    try:
        return str(response) == str(answer) if number is None else number(response) == number(answer)
    except (TypeError, ValueError, OverflowError):
        return False


def _choices(text: Any) -> dict[str, str]:
    try:
        choices = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        choices = None
    if not isinstance(choices, list) or len(choices) > 26:
        raise ValueError("its choices are not a list")
    return {chr(ord("A") + place): str(choice) for place, choice in enumerate(choices)}


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
