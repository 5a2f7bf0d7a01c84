"""Where probes come from, and where their answers come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mergekit_snrf.files.settings import Settings
from mergekit_snrf.profiling.probes.template import template_fields

DATA_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Local data files and the ``datasets`` builder that reads them."""


def _valid_template(template: str) -> str:
    template_fields(template)
    return template


Name = Annotated[str, Field(min_length=1)]
Template = Annotated[Name, AfterValidator(_valid_template)]
Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class ProbeColumns(Settings):
    """A data set and the columns that are read."""

    dataset: Name = Field(
        description="A hub id, a local .jsonl, .json, .parquet or .csv file, or a folder that datasets can read."
    )
    config: Name | None = Field(default=None, description="Configuration of the data set, such as main.")
    split: Name | None = Field(default=None, description="Such as train or train[:500]; optional if there is only one.")
    revision: Name | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    question: Name | None = Field(default=None, description="Column of the question; optional with a template.")
    images: Name | None = Field(default=None, description="Column of the images, one or several in a row.")
    answer: Name | None = Field(default=None, description="Column of the answer.")


class PromptColumns(ProbeColumns):
    """A data set, its columns, and how a row becomes a prompt."""

    template: Template | None = Field(
        default=None,
        description="Format string over the columns that replaces the model's chat template; <image> marks an image.",
    )

    @model_validator(mode="after")
    def _prompts_differ(self) -> PromptColumns:
        check_prompt(self.question, self.template)
        return self


class ProbeSource(PromptColumns):
    """Which rows of a data set become probes, and how they are rendered.

    >>> ProbeSource(dataset="openai/gsm8k", config="main", question="question", limit=100).seed
    0
    """

    limit: Count | None = Field(default=None, description="Number of rows to draw; default: all.")
    seed: Seed = Field(default=0, description="Seed of the draw.")


def check_prompt(question: str | None, template: str | None) -> None:
    """Raise ``ValueError`` if there is neither a column of the question nor a template that names one."""
    if question is None and template is None:
        raise ValueError("question is missing; name its column, or write a template such as '{question}'")
    if question is None and not template_fields(template or ""):
        raise ValueError(
            f"template {template!r} names no column, so all prompts would be equal; add a column such as {{question}}"
        )


class AnswerRule(Settings):
    """Where the answer that follows a question comes from."""

    by: Literal["model", "column", "none"] = Field(
        default="model",
        description="model: generated greedily by the model itself; column: read from the data set; none: no answer.",
    )
    max_new_tokens: Count = Field(default=512, description="Limit of a generated answer, in tokens.")
    column: Name | None = Field(default=None, description="Column of the answer where the source names none.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> AnswerRule:
        for key, by in (("column", "column"), ("max_new_tokens", "model")):
            if self.by != by and key in self.model_fields_set and getattr(self, key) is not None:
                raise ValueError(f"{key} goes with by: {by}, not with by: {self.by}; remove one of them")
        return self
