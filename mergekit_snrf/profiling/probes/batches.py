"""From the rows of a data set to batches that a model takes: rendered prompts, and the answers behind them.

Which rows, which probes share a batch, and the order of the batches depend on the data set, the processor and the
settings only, not on the number of processes that share the work or on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.profiling.probes.answers import (
    Answer,
    accepted,
    append_answers,
    generate_answers,
    placeholder_ids,
    with_positions,
)
from mergekit_snrf.profiling.probes.render import Renderer
from mergekit_snrf.profiling.probes.rows import Row, Rows, report_bad
from mergekit_snrf.profiling.probes.source import AnswerRule, RowError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Within a generated batch, probes of less than this share of the longest one's tokens go into a batch of their own.
_EVEN = 0.85


@dataclass(frozen=True)
class Probe:
    """One rendered row: its prompt, with one placeholder an image, and its tokens, with the images expanded.

    ``answer`` is that of the dataset, None where the model generates it.
    """

    row: Row
    prompt: str
    tokens: int
    answer: Answer | None = None

    @property
    def length(self) -> int:
        """Tokens that are known before the model runs."""
        return self.tokens + (len(self.answer.ids) if self.answer is not None else 0)


@dataclass(frozen=True)
class Probes:
    """All probes of one side, by row number, and every row that cannot be used.

    ``groups`` are the units of work to share, to skip and to resume: positions in ``probes``, batch_size at most, of
    similar length, the longest group first.
    """

    rows: Rows
    probes: tuple[Probe, ...]
    bad: Mapping[int, RowError]
    groups: tuple[tuple[int, ...], ...]
    renderer: Renderer = field(repr=False)

    def __len__(self) -> int:
        return len(self.probes)


@dataclass(frozen=True)
class ProbeBatch:
    """Probes with their answers, as the model takes them.

    Attributes:
        numbers: row numbers.
        inputs: arguments of the model's forward: prompts, then answers, padded on the right.
        attention_mask: nonzero on the tokens of prompt and answer.
        answer_mask: True on the answer's tokens; a generated end token is one of them.
        answers: as text, without special tokens.
        ended: False where generation stopped at max_new_tokens.
        group: index in ``Probes.groups``; a group can come in several batches.
    """

    numbers: tuple[int, ...]
    inputs: Mapping[str, Any]
    attention_mask: Shaped[Tensor, "batch tokens"]
    answer_mask: Bool[Tensor, "batch tokens"]
    answers: tuple[str, ...] = ()
    ended: tuple[bool, ...] = ()
    group: int = 0


def prepare(
    rows: Rows,
    processor: Any,
    *,
    rule: AnswerRule,
    batch_size: int,
    token_limit: int | None = None,
    config: PretrainedConfig | None = None,
    model: str | None = None,
) -> Probes:
    """Return the rows as rendered prompts, with their number of tokens, grouped by length.

    A row is bad if its prompt and answer (a generated one: the longest possible) take more tokens than ``token_limit``
    or than the model has positions: nothing is ever cut. ``SnrfError``: more than 5 % of the rows are bad, or the model
    has no usable chat template.

    Args:
        processor: of the model, or its tokenizer.
        batch_size: probes in a group, at most.
        config: of the model, for its number of positions and the tokens that stand for images; None checks neither.
        model: name of the model, for messages.
    """
    renderer = Renderer(processor, rows.source, model=model)
    reserved = set() if config is None else set(placeholder_ids(config))
    limit = _limit(token_limit, config)
    probes: list[Probe] = []
    bad: dict[int, RowError] = {}
    for row in rows.rows:
        try:
            probe = _probe(rows, row, renderer, reserved)
            if rule.by == "none":
                probe = replace(probe, answer=Answer(()))
            _check_length(probe, rule, *limit)
            probes.append(probe)
        except RowError as error:
            bad[row.number] = error
    report_bad(rows.source.dataset, bad, len(rows) + len(rows.bad), before=rows.bad)
    order = sorted(range(len(probes)), key=lambda index: (-probes[index].length, index))
    groups = [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    return Probes(rows, tuple(probes), dict(sorted({**rows.bad, **bad}.items())), tuple(groups), renderer)


def probe_batches(
    probes: Probes,
    model: PreTrainedModel,
    processor: Any,
    *,
    rule: AnswerRule,
    device: str | torch.device,
    groups: Collection[int] | None = None,
) -> Iterator[ProbeBatch]:
    """Iterate over the batches of some groups (None: all), with the model's own greedy answers or the data set's."""
    tokenizer = tokenizer_of(processor)
    for group, positions in enumerate(probes.groups):
        if groups is not None and group not in groups:
            continue
        members = [probes.probes[position] for position in positions]
        answers = [member.answer for member in members if member.answer is not None]
        inputs: dict[str, Tensor] = {}
        if len(answers) < len(members):
            inputs = encode(probes, members, model, device)
            answers = generate_answers(model, processor, inputs, rule.max_new_tokens)
        for part in _even_parts([m.tokens + len(a.ids) for m, a in zip(members, answers, strict=True)]):
            chosen = [members[index] for index in part]
            whole = bool(inputs) and part == list(range(len(members)))
            encoded = inputs if whole else encode(probes, chosen, model, device)
            theirs = [answers[index] for index in part]
            extended, answer_mask = append_answers(encoded, theirs, tokenizer.pad_token_id)
            extended = with_positions(model, extended)
            yield ProbeBatch(
                numbers=tuple(member.row.number for member in chosen),
                inputs=extended,
                attention_mask=extended["attention_mask"],
                answer_mask=answer_mask,
                answers=tuple(tokenizer.decode(list(answer.ids), skip_special_tokens=True) for answer in theirs),
                ended=tuple(answer.ended for answer in theirs),
                group=group,
            )


def probes_sha256(probes: Probes) -> str:
    """Return the sha256 of all prompts, image files and dataset answers, with their row numbers."""
    digest = hashlib.sha256()
    for probe in probes.probes:
        row = probe.row
        content = [row.number, probe.prompt, list(row.images), row.answer]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _limit(token_limit: int | None, config: PretrainedConfig | None) -> tuple[int | None, str, str | None]:
    """Return how many tokens a probe may have, what says so, and the setting at fault."""
    text = None if config is None else config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if token_limit is not None and (positions is None or token_limit <= positions):
        return token_limit, f"the token_limit of {token_limit}", "token_limit"
    return positions, f"the model's {positions} positions", None


def _probe(rows: Rows, row: Row, renderer: Renderer, reserved: set[int]) -> Probe:
    prompt = renderer.render(row)
    try:
        encoded = _tokenize(renderer, [prompt], [rows.images(row)])
    except SnrfError:
        raise
    except Exception as error:  # Processors raise all kinds of errors, also where a setting of theirs is missing.
        reason = f"the processor fails with {type(error).__name__}: {first_line(error)}"
        raise RowError(renderer.model, reason, "check its processor files") from None
    ids = encoded["input_ids"][0]
    if not row.images and reserved.intersection(ids.tolist()):
        raise RowError(None, "the prompt contains a token that stands for an image, but the row has no image")
    answer = None
    if row.answer is not None:
        tokenizer = tokenizer_of(renderer.processor)
        answer = tokenizer(row.answer, add_special_tokens=False, truncation=False, verbose=False).input_ids
        if reserved.intersection(answer):
            raise RowError(None, "the answer contains a token that stands for an image")
    return Probe(row, prompt, len(ids), None if answer is None else Answer(tuple(answer)))


def _check_length(probe: Probe, rule: AnswerRule, limit: int | None, reason: str, field: str | None) -> None:
    answer, tokens = probe.answer, probe.tokens
    longest = rule.max_new_tokens if answer is None else len(answer.ids)
    if limit is not None and tokens + longest > limit:
        lower = answer is None and tokens < limit
        what = f"{tokens} tokens and an answer of {'up to ' if answer is None else ''}{longest} exceed {reason}"
        remedy, field = ("lower it", "max_new_tokens") if lower else ("use shorter prompts", field)
        raise RowError(None, what, remedy, field=field)


def _tokenize(renderer: Renderer, prompts: Sequence[str], images: Sequence[list[Any]]) -> dict[str, Tensor]:
    """Run the tokenizer or the processor over prompts, padding on the left and cutting nothing."""
    options: dict[str, Any] = {
        "padding": True,
        "padding_side": "left",
        "truncation": False,
        "add_special_tokens": renderer.adds_special_tokens,
        "return_tensors": "pt",
        "verbose": False,
    }
    if any(images):
        options["images"] = list(images)
    return {**renderer.processor(text=list(prompts), **options)}


def encode(
    probes: Probes, members: Sequence[Probe], model: PreTrainedModel, device: str | torch.device
) -> dict[str, Tensor]:
    """Return what the model takes for the prompts and images of some probes, padded on the left."""
    images = [probes.rows.images(member.row) for member in members]
    encoded = _tokenize(probes.renderer, [member.prompt for member in members], images)
    moved = {}
    for name, tensor in encoded.items():
        dtype = model.dtype if torch.is_floating_point(tensor) else tensor.dtype
        moved[name] = tensor.to(device=device, dtype=dtype)
    return accepted(model, moved)


def _even_parts(lengths: Sequence[int]) -> list[list[int]]:
    """Split positions into parts whose shortest is at least 85 % of the longest, the longest part first."""
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if parts and lengths[index] >= _EVEN * lengths[parts[-1][0]]:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [sorted(part) for part in parts]
