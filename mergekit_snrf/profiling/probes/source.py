"""Where probes come from: data sets and columns, templates (format strings that only name columns), and answers."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationInfo, model_validator

from mergekit_snrf.errors import SnrfError, did_you_mean
from mergekit_snrf.files.settings import Settings

DATA_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Local data files and the ``datasets`` builder that reads them."""


IMAGE = "<image>"
"""Marks an image in a template and in a data set's questions, whatever the model's own token is."""


_RESERVED = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "padding"),
    *("processor_kwargs", "return_dict", "return_tensors", "tokenize", "truncation"),
}
"""Arguments of ``apply_chat_template`` that are not variables of the template."""


def found_beside(value: str, info: ValidationInfo) -> str:
    """Return ``value`` if it is in the working folder or a hub id, else its path in the folder that is the context.

    ``SnrfError``: it is a path, and there is no such file or folder. Without context nothing is looked up.
    """
    places = [Path(os.path.expanduser(value))]
    if info.context is None:
        return value
    if not places[0].is_absolute():
        places.append(info.context / value)
    for place in places:
        if os.path.exists(place):
            return str(place)
    looks_local = value.startswith(("/", ".", "~")) or value.count("/") > 1 or Path(value).suffix in DATA_SUFFIXES
    if looks_local or (info.field_name == "model" and value.count("/") != 1):
        looked = " and ".join(str(place.absolute()) for place in places)
        remedy = f"correct the path, or use a hub id such as owner/{info.field_name}"
        raise SnrfError(None, f"{value!r} does not exist, looked for {looked}", remedy)
    return value


class RowError(SnrfError):
    """Why a row cannot be used; place, remedy and field count where all rows have the same fault."""


def _valid_template(template: str) -> str:
    template_fields(template)
    return template


Name = Annotated[str, Field(min_length=1)]
Template = Annotated[Name, AfterValidator(_valid_template)]
Images = Name | Annotated[tuple[Name, ...], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class ProbeColumns(Settings):
    """A data set and the columns that are read."""

    dataset: Annotated[Name, AfterValidator(found_beside)] = Field(
        description="A hub id, a local .jsonl, .json, .parquet or .csv file, or a folder that datasets can read."
    )
    config: Name | None = Field(default=None, description="Configuration of the data set, such as main.")
    split: Name | None = Field(default=None, description="Such as train or train[:500]; optional if there is only one.")
    revision: Name | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    question: Name | None = Field(
        default=None, description="Column of the question, or of a conversation; optional with a template."
    )
    images: Images | None = Field(
        default=None, description="Column of the images, one or several in a row; or a list of columns."
    )
    answer: Name | None = Field(default=None, description="Column of the answer.")

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns of the images; none for text."""
        return (self.images,) if isinstance(self.images, str) else self.images or ()


class Prompting(Settings):
    """How a question becomes a prompt: by the model's chat template, or by a format string."""

    template: Template | None = Field(
        default=None,
        description="Format string over the columns that replaces the model's chat template; <image> marks an image.",
    )
    system: Name | None = Field(default=None, description="System prompt of the chat template.")
    chat_template_kwargs: dict[Name, JsonValue] | None = Field(
        default=None, description="Variables of the chat template, such as {enable_thinking: false}."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Prompting:
        of_chat = [name for name in ("system", "chat_template_kwargs") if getattr(self, name) is not None]
        if self.template is not None and of_chat:
            raise ValueError(f"{of_chat[0]} goes with the chat template, which template replaces; remove one of them")
        reserved = sorted(_RESERVED & (self.chat_template_kwargs or {}).keys())
        if reserved:
            raise ValueError(f"{reserved[0]} cannot be set in chat_template_kwargs; remove it")
        return self


class PromptColumns(ProbeColumns, Prompting):
    """A data set, its columns, and how a row becomes a prompt."""

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


def template_fields(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, in order of appearance.

    Attributes, indices, conversions and format specifications are errors, so that a template cannot run code.
    """
    return tuple(dict.fromkeys(name for _, name in _parse(template) if name is not None))


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Replace every ``{column}`` by the row's text; ``{{`` and ``}}`` are braces."""
    parts = []
    for literal, name in _parse(template):
        parts.append(literal)
        if name is not None:
            if name not in fields:
                raise SnrfError(None, f"there is no column {name!r}", did_you_mean(name, fields), field="template")
            parts.append(fields[name])
    return "".join(parts)


def _parse(template: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        what = f"template {template!r} is not a format string ({error})"
        raise SnrfError(None, what, "write a column as {question} and a brace as {{ or }}") from None
    for _, name, specification, conversion in parsed:
        if name is None:
            continue
        if specification or conversion or not name.strip() or any(sign in name for sign in ".[]{}"):
            what = f"{{{name}}} in template {template!r} is not the plain name of a column"
            raise SnrfError(None, what, "remove attributes, indices, conversions and format specifications")
    return [(literal, name) for literal, name, _, _ in parsed]
