"""What a model is asked while its neurons are amplified, and how it answers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from mergekit_snrf.errors import SnrfError, invalid
from mergekit_snrf.evidence.options import Loading
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.profiling.probes.source import AnswerRule, Count, Name, ProbeSource, Seed, Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_snrf.profiling.probes.batches import Probes
    from mergekit_snrf.profiling.probes.rows import Rows

NEW_TOKENS = 128
"""Default limit of an answer, in tokens."""
BATCH_SIZE = 8


class AskedOptions(Loading):
    """What replaces the settings of a profile.yml, or describes a data file; and how the model is loaded."""

    question: Name | None = Field(default=None, description="Column of the data file; default: question.")
    images: Name | None = Field(default=None, description="Column of the data file, one or several images in a row.")
    template: Template | None = Field(
        default=None, description="Format string such as '{question} calc :' in place of the chat template."
    )
    limit: Count | None = Field(default=None, description="Number of probes, drawn by --seed; default: all.")
    seed: Seed | None = Field(
        default=None, description="Seed of --limit and --pick; default: that of profile.yml, or 0."
    )
    max_new_tokens: Count | None = Field(
        default=None, description=f"Limit of an answer, in tokens; default: that of profile.yml, or {NEW_TOKENS}."
    )
    batch_size: Count | None = Field(
        default=None, description=f"Answers generated together; default: that of profile.yml, or {BATCH_SIZE}."
    )


@dataclass(frozen=True)
class Asked:
    """What a model is asked, and how it answers; ``token_limit`` is that of a probe with its answer."""

    model: ModelRef
    source: ProbeSource
    rule: AnswerRule
    batch_size: int = BATCH_SIZE
    token_limit: int | None = None

    def probes(self, rows: Rows, model: PreTrainedModel, processor: Any) -> Probes:
        """Return the rows as probes of a loaded model; raises as ``prepare``."""
        from mergekit_snrf.profiling.probes.batches import prepare

        how: dict[str, Any] = {"rule": self.rule, "batch_size": self.batch_size, "token_limit": self.token_limit}
        return prepare(rows, processor, **how, config=model.config, model=self.model.model)


def load_asked(path: str | os.PathLike[str], model: ModelRef, options: AskedOptions | None = None) -> Asked:
    """Return how a data file, or one side of a profile.yml, becomes probes of a model that answers by itself.

    Of a profile.yml the side with this model is taken, or else the target; ``options`` replace its settings.
    """
    path = Path(path)
    given = (options or AskedOptions()).model_dump(exclude_none=True, exclude=set(Loading.model_fields))
    tokens, size = given.pop("max_new_tokens", None), given.pop("batch_size", None)
    try:
        if path.suffix not in (".yml", ".yaml"):
            question = None if "template" in given else "question"
            source = ProbeSource(**{"dataset": str(path), "question": question, **given})
            return Asked(model, source, AnswerRule(max_new_tokens=tokens or NEW_TOKENS), size or BATCH_SIZE)
        return _of_profile(path, model, given, tokens, size)
    except ValidationError as error:
        raise invalid(None, error.errors()) from None


def _of_profile(path: Path, model: ModelRef, given: dict[str, Any], tokens: int | None, size: int | None) -> Asked:
    from mergekit_snrf.profiling.settings import load_profile_config

    column = next((name for name in ("question", "images") if name in given), None)
    if column is not None:
        raise SnrfError(path, "names its columns itself", "leave the option out", field=column)
    config = load_profile_config(path)
    target, source = config.kind("target"), config.kind("source")
    is_source = _same(source.model.model, model.model) and not _same(target.model.model, model.model)
    own = source if is_source else target
    if _same(own.model.model, model.model):
        model = model.model_copy(update={"revision": own.model.revision, "gguf_file": own.model.gguf_file})
    if tokens is None and "max_new_tokens" in config.answer.model_fields_set:
        tokens = config.answer.max_new_tokens
    written = own.source.model_dump()
    if "template" in given:
        # It replaces the chat template, and with it what that is given.
        written |= {"system": None, "chat_template_kwargs": None}
    asked = ProbeSource(**{**written, **given})
    rule = AnswerRule(max_new_tokens=tokens or NEW_TOKENS)
    return Asked(model, asked, rule, size or config.batch_size, config.token_limit)


def _same(one: str, other: str) -> bool:
    return Path(one).absolute() == Path(other).absolute()
