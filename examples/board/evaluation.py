"""The board task as an evaluation of ``snrf ablate`` and ``snrf compare``: --eval examples/board/evaluation.py:board.

R is the mean accuracy of ``calc`` with three and with four operands, final answer only, P that of ``read``, ``find``
and ``color``, both as shares. For fewer or more held-out problems a task than 200, or others:
--eval "examples/board/evaluation.py:board?n=50&seed=1".
"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

# This file is loaded by its path, where siblings are not found by themselves.
sys.path.append(str(Path(__file__).resolve().parent))

from board_models import has_vision
from board_scores import PERCEPTION, REASONING, answers, problems
from board_task import final_answer

from mergekit_snrf.evidence.items import Items


def board(
    model: PreTrainedModel, processor: Any, *, n: int = 200, seed: int = 0, batch_size: int = 100
) -> dict[str, Items]:
    """Return R and P of a VLM, or of an LLM, which reads the cells and is not asked for colors.

    Args:
        model: shares the board pair's tokenizer.
        processor: the VLM's processor or the LLM's tokenizer.
        n: problems a task.
        seed: of the problems.
        batch_size: problems a call of ``generate``.
    """
    perception = PERCEPTION if has_vision(processor) else tuple(task for task in PERCEPTION if task != "color")
    asked = {"R": REASONING, "P": perception}
    return {metric: _ask(model, processor, tasks, n, seed, batch_size) for metric, tasks in asked.items()}


board.roles = {"R": "gain", "P": "keep"}


def _ask(model: PreTrainedModel, processor: Any, tasks: tuple[str, ...], n: int, seed: int, batch_size: int) -> Items:
    asked = [problems(task, n, seed) for task in tasks]
    parts = [every[start : start + batch_size] for every in asked for start in range(0, n, batch_size)]
    texts = [text for part in parts for text in answers(model, processor, part)]
    return Items(
        scores=tuple(float(problem.accepts(text)) for problem, text in zip(chain(*asked), texts, strict=True)),
        malformed=tuple(final_answer(text) is None for text in texts) if tasks == REASONING else None,
        ids=tuple(f"{task}/{seed}/{number}" for task in tasks for number in range(n)),
        groups=tuple(task for task in tasks for _ in range(n)),
    )
