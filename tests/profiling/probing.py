"""Probes of a test: data files, and where they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mergekit_snrf.models.loading import load_model, load_processor
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes, prepare, probe_batches
from mergekit_snrf.profiling.probes.render import Renderer
from mergekit_snrf.profiling.probes.rows import Row, Rows, load_rows
from mergekit_snrf.profiling.probes.source import AnswerRule, ProbeSource

QUESTIONS = (
    "What is the area?",
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether in the two months?",
    "Find x.",
    "What is the length of AB if the angle ABC is a right angle?",
    "Hi!",
    "The base of a triangle is 3 and its height 4. What is the area?",
)
SIZES = ((24, 16), (16, 24), (40, 20), (20, 20), (34, 34), (16, 16))


def write_data(folder: Path) -> Path:
    """Write texts.jsonl of questions and answers, and images.jsonl with one or two images a row."""
    pixels = np.random.RandomState(0)
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(pixels.randint(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    rows = [{"q": question, "a": f"x = {index * 17}"} for index, question in enumerate(QUESTIONS)]
    lines(folder / "texts.jsonl", rows)
    for index, row in enumerate(rows):
        row["images"] = [f"{index}.png"] if index != 3 else ["3.png", "0.png"]
    lines(folder / "images.jsonl", rows)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@dataclass(frozen=True)
class Options:
    """What the probes of a test are made of."""

    ref: ModelRef
    source: ProbeSource
    rule: AnswerRule
    batch_size: int
    token_limit: int | None

    def of_column(self) -> Options:
        rule = AnswerRule(by="column", column="a")
        return replace(self, rule=rule, source=self.source.model_copy(update={"answer": "a"}))

    def rows(self) -> Rows:
        return load_rows(self.source, answers=self.rule.by == "column")

    def processor(self) -> Any:
        return load_processor(self.ref, images=self.source.images is not None)

    def prepare(self, processor: Any, model: Any = None) -> Probes:
        return prepare(
            self.rows(),
            processor,
            rule=self.rule,
            batch_size=self.batch_size,
            token_limit=self.token_limit,
            config=None if model is None else model.config,
        )

    def batches(self, model: Any, processor: Any) -> list[ProbeBatch]:
        probes = self.prepare(processor, model)
        return list(probe_batches(probes, model, processor, rule=self.rule, device="cpu"))

    def render(self, row: Row, processor: Any) -> str:
        return Renderer(processor, self.source).render(row)

    def load(self, dtype: str = "float64") -> tuple[Any, Any]:
        ref = self.ref.model_copy(update={"device": "cpu", "dtype": dtype})
        return load_model(ref, images=self.source.images is not None)


def options(
    model: Path | str,
    dataset: Path | str,
    *,
    answer: dict[str, Any] | None = None,
    batch_size: int = 8,
    token_limit: int | None = None,
    gguf_file: str | None = None,
    **source: Any,
) -> Options:
    rule = AnswerRule(**(answer or {}))
    source = {"question": "q", "answer": rule.column, "dataset": str(dataset), **source}
    ref = ModelRef(model=str(model), gguf_file=gguf_file)
    return Options(ref, ProbeSource(**source), rule, batch_size, token_limit)
