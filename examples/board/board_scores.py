"""Reasoning and perception of a model on held-out boards, with 95 % confidence intervals.

Reasoning R is the mean accuracy of ``calc`` with three and with four operands, final answer only; perception P
is the mean accuracy of ``read``, ``find`` and, for models that see pictures, ``color``. All are percentages.

Every model is asked the same problems, so models are compared problem by problem. Intervals of R, P and their
differences are percentile bootstraps over the problems, each task resampled on its own; intervals of single
accuracies are Wilson's. A bootstrap cannot see beyond its sample: where every answer is right it has no width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from board_models import has_vision
from board_task import Problem, distinct_problems, final_answer, render
from jaxtyping import Bool, Float
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

REASONING = ("calc3", "calc4")
PERCEPTION = ("read", "find", "color")
# What each task asks, and how many operands its boards have.
_ASKED: dict[str, tuple[str, tuple[int, ...]]] = {
    "read": ("read", (2, 3, 4)),
    "find": ("find", (2, 3, 4)),
    "color": ("color", (2, 3, 4)),
    "calc3": ("calc", (3,)),
    "calc4": ("calc", (4,)),
}
TASKS = tuple(_ASKED)

RESAMPLES = 10_000
LEVEL = 0.95
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
# Room for the longest right answer (21 tokens, four operands) and little more: a longer one is wrong anyway.
_MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval, all in percent (or percentage points, for a difference)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def to_json(self) -> dict[str, float]:
        """Return the three numbers, rounded to hundredths of a percent."""
        return {"value": round(self.value, 2), "low": round(self.low, 2), "high": round(self.high, 2)}


@dataclass(frozen=True)
class Result:
    """What one model got right: ``correct[task][i]`` for problem i, of ``n`` a task drawn with ``seed``."""

    correct: dict[str, Bool[np.ndarray, " n"]]
    malformed: float
    n: int
    seed: int
    split: str

    def mean(self, tasks: Sequence[str]) -> float:
        """Return the mean accuracy over those of ``tasks`` that were asked, in percent."""
        return float(np.mean([100.0 * self.correct[task].mean() for task in tasks if task in self.correct]))

    @property
    def reasoning(self) -> float:
        """R in percent."""
        return self.mean(REASONING)

    @property
    def perception(self) -> float:
        """P in percent."""
        return self.mean(PERCEPTION)

    def estimate(self, tasks: Sequence[str]) -> Estimate:
        """Return the mean accuracy over ``tasks`` with its bootstrap interval."""
        asked = {task: self.correct[task].astype(float) for task in tasks if task in self.correct}
        return _bootstrap(asked, self.seed)

    def accuracy(self, task: str) -> Estimate:
        """Return the accuracy of one task with its Wilson interval."""
        return wilson(int(self.correct[task].sum()), self.n)

    def to_json(self) -> dict[str, Any]:
        """Return every figure of the result as JSON values, in percent."""
        return {
            "reasoning": self.estimate(REASONING).to_json(),
            "perception": self.estimate(PERCEPTION).to_json(),
            "accuracy": {task: self.accuracy(task).to_json() for task in self.correct},
            "malformed_calc": round(self.malformed, 2),
        }


def wilson(successes: int, n: int) -> Estimate:
    """Return ``successes / n`` in percent with its 95 % Wilson score interval."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes must be in 0..n with n > 0, got {successes} of {n}")
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Estimate(100 * share, 100 * max(0.0, centre - half), 100 * min(1.0, centre + half))


def _bootstrap(values: dict[str, Float[np.ndarray, " n"]], seed: int) -> Estimate:
    """Return the mean over tasks of the mean over problems, in percent, with its percentile interval."""
    draws = np.zeros(RESAMPLES)
    for task, scores in values.items():
        # The generator depends on the task alone, so that a task is resampled alike for every model.
        rng = np.random.default_rng([seed, TASKS.index(task)])
        n = len(scores)
        draws += 100.0 * rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES) @ scores / n
    draws /= len(values)
    tail = 100.0 * (1.0 - LEVEL) / 2.0
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    value = float(np.mean([100.0 * scores.mean() for scores in values.values()]))
    return Estimate(value, float(low), float(high))


def difference(first: Result, other: Result, tasks: Sequence[str]) -> Estimate | None:
    """Return the mean accuracy of ``other`` minus that of ``first`` over ``tasks``, paired by problem.

    None if the two were not asked the same tasks, as a text-only model is never asked for a color.

    Raises:
        ValueError: the results come from different problems.
    """
    if (first.n, first.seed, first.split) != (other.n, other.seed, other.split):
        raise ValueError(
            f"results of different problems cannot be paired: n, seed, split are "
            f"{first.n}, {first.seed}, {first.split} and {other.n}, {other.seed}, {other.split}"
        )
    asked = [task for task in tasks if task in first.correct]
    if asked != [task for task in tasks if task in other.correct]:
        return None
    pairs = {task: other.correct[task].astype(float) - first.correct[task].astype(float) for task in asked}
    return _bootstrap(pairs, first.seed)


def problems(task: str, n: int, seed: int = 0, split: str = "test") -> list[Problem]:
    """Return the ``n`` problems of one of ``TASKS``: the same for every model, and all boards different."""
    ask, operands = _ASKED[task]
    return distinct_problems(np.random.default_rng([seed, TASKS.index(task)]), ask, split, n, operands)


@torch.inference_mode()
def answers(model: PreTrainedModel, processor: Any, asked: Sequence[Problem]) -> list[str]:
    """Return the model's greedy answers to problems in one batch, decoded up to ``</s>``.

    ``processor`` is a processor (the boards are shown as pictures) or a tokenizer (as cells).
    """
    image = has_vision(processor)
    tokenizer = processor.tokenizer if image else processor
    prompts = [problem.prompt(image) for problem in asked]
    if image:
        pictures = [Image.fromarray(render(problem.board)) for problem in asked]
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    else:
        inputs = processor(prompts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    if image:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    generated = model.generate(
        **inputs,
        do_sample=False,
        use_cache=True,
        max_new_tokens=_MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = []
    for row in generated[:, inputs["input_ids"].shape[1] :]:
        # Text after the end token would be hidden by skip_special_tokens, and so would a missing end token.
        text = tokenizer.decode(row, skip_special_tokens=False)
        answer, end, _ = text.partition(tokenizer.eos_token)
        found.append(answer.strip() if end else f"{answer.strip()} ...")
    return found


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    n: int = 200,
    seed: int = 0,
    *,
    split: str = "test",
    tasks: Sequence[str] = TASKS,
    batch_size: int = 100,
    progress: bool = False,
) -> Result:
    """Ask a model ``n`` held-out problems a task and return what it got right.

    Args:
        model: VLM or LLM that shares the board pair's tokenizer; it is left in evaluation mode.
        processor: the VLM's processor or the LLM's tokenizer; ``color`` is skipped for a tokenizer.
        n: problems a task.
        seed: of the problems and of the bootstrap.
        split: "test", or "valid" for decisions made while training.
        tasks: any of ``TASKS``.
        batch_size: problems a call of ``generate``.
        progress: show a progress bar on stderr.
    """
    model.eval()
    chosen = [task for task in tasks if task != "color" or has_vision(processor)]
    correct: dict[str, Bool[np.ndarray, " n"]] = {}
    malformed: list[bool] = []
    with tqdm(total=n * len(chosen), unit="problem", leave=False, disable=not progress) as bar:
        for task in chosen:
            asked = problems(task, n, seed, split)
            texts: list[str] = []
            for start in range(0, n, batch_size):
                texts += answers(model, processor, asked[start : start + batch_size])
                bar.update(len(texts) - start)
            correct[task] = np.array([p.accepts(text) for p, text in zip(asked, texts, strict=True)])
            if task in REASONING:
                malformed += [final_answer(text) is None for text in texts]
    rate = 100.0 * float(np.mean(malformed)) if malformed else 0.0
    return Result(correct, rate, n, seed, split)
