"""From the rows of a dataset to batches that a model takes: rendered prompts, and the answers behind them.

    rows = load_rows(side, config)
    model, processor = load_model(model_ref(side, device="cpu"), images=False)
    for batch in probe_batches(rows, model, processor, side, config, device="cpu"):
        model(**batch.inputs)

Which rows, which probes share a batch, and the order of the batches depend on the dataset, the processor and the
configuration only, not on how many processes share the work or on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.loading import find_device, load_model, load_processor
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.profiling.probes.answers import (
    Answer,
    accepted,
    append_answers,
    generate_answers,
    placeholder_ids,
    with_positions,
)
from mergekit_snrf.profiling.probes.render import Renderer, RenderError, tokenizer_of
from mergekit_snrf.profiling.probes.rows import BadRow, Row, Rows, load_rows, report_bad
from mergekit_snrf.profiling.settings import ProfileConfig, SideConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BadRow",
    "Probe",
    "ProbeBatch",
    "Probes",
    "Row",
    "Rows",
    "find_device",
    "load_model",
    "load_processor",
    "load_rows",
    "prepare",
    "probe_batches",
    "probes_sha256",
    "render",
]

# Within a generated batch, probes of less than this share of the longest one's tokens go into a batch of their own.
_EVEN = 0.85


@dataclass(frozen=True)
class Probe:
    """One rendered row.

    Attributes:
        row: where it comes from.
        prompt: up to where the answer begins; every image is one placeholder.
        tokens: of the prompt, images expanded.
        answer: of the dataset, or None where the model generates it.
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
    """All probes of one side, by row number, and how they share batches.

    Attributes:
        bad: every row that cannot be used, those of ``rows`` included.
        groups: positions in ``probes``, batch_size at most in a group, of similar length, the longest group first.
            A group is the unit of work to share, to skip and to resume.
    """

    rows: Rows
    probes: tuple[Probe, ...]
    bad: tuple[BadRow, ...]
    groups: tuple[tuple[int, ...], ...]
    renderer: Renderer = field(repr=False)

    def __len__(self) -> int:
        return len(self.probes)


@dataclass(frozen=True)
class ProbeBatch:
    """Probes with their answers, as the model takes them.

    Attributes:
        group: index in ``Probes.groups``; a group can come in several batches.
        numbers: row numbers.
        inputs: arguments of the model's forward: prompts, then answers, padded on the right.
        attention_mask: 1 on the tokens of prompt and answer.
        answer_mask: True on the answer's tokens; a generated end token is one of them.
        answers: as text, without special tokens.
        ended: False where generation stopped at max_new_tokens.
    """

    group: int
    numbers: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    attention_mask: Int[Tensor, "batch tokens"]
    answer_mask: Bool[Tensor, "batch tokens"]
    answers: tuple[str, ...]
    ended: tuple[bool, ...]


def render(row: Row, processor: Any, side: SideConfig) -> str:
    """Return the prompt of one row, up to where the answer begins.

    Raises:
        SnrfError: the row cannot be rendered, or there is neither a chat template nor a template.
    """
    try:
        return Renderer(processor, side).render(row)
    except RenderError as error:
        raise SnrfError(f"{side.probes.dataset}: row {row.number}: {error}") from None


def check_rendering(side: SideConfig, model: ModelRef) -> None:
    """Check, without loading weights, that a side's model can be given prompts.

    Raises:
        SnrfError: its tokenizer or processor cannot be loaded, there is neither a chat template nor a template, or
            nothing is known to stand for an image.
    """
    Renderer(load_processor(model, images=side.probes.images is not None), side)


def prepare(
    rows: Rows, processor: Any, side: SideConfig, config: ProfileConfig, model: PreTrainedModel | None = None
) -> Probes:
    """Render all rows, count their tokens and group them by length.

    A row whose prompt and answer (with ``by: model`` its longest possible answer) take more tokens than
    ``token_limit`` or than the model has positions is bad: nothing is ever cut.

    Args:
        rows: of ``load_rows``.
        processor: of ``load_model`` or ``load_processor``.
        side: the model's side of profile.yml.
        config: for answer, token_limit and batch_size.
        model: for the number of positions and the tokens that only images may use; None checks neither.

    Raises:
        SnrfError: more than 5 % of the rows are bad, or there is neither a chat template nor a template.
    """
    renderer = Renderer(processor, side)
    limit, what = _limit(config, model)
    reserved = set(placeholder_ids(model)) if model is not None else set()
    probes: list[Probe] = []
    bad: list[BadRow] = []
    for row in rows.rows:
        try:
            probes.append(_probe(row, rows, renderer, config, limit, what, reserved))
        except RenderError as error:
            bad.append(BadRow(row.number, str(error)))
    report_bad(rows.name, bad, len(rows) + len(rows.bad), before=rows.bad)
    order = sorted(range(len(probes)), key=lambda index: (-probes[index].length, index))
    groups = [tuple(order[start : start + config.batch_size]) for start in range(0, len(order), config.batch_size)]
    everything = tuple(sorted((*rows.bad, *bad), key=lambda entry: entry.number))
    return Probes(rows, tuple(probes), everything, tuple(groups), renderer)


def probe_batches(
    rows: Rows | Probes,
    model: PreTrainedModel,
    processor: Any,
    side: SideConfig,
    config: ProfileConfig,
    *,
    device: str | torch.device,
    groups: Collection[int] | None = None,
) -> Iterator[ProbeBatch]:
    """Iterate over the batches of one side, with the model's own greedy answers or those of the dataset.

    Args:
        rows: of ``load_rows``, or already prepared.
        model: in eval mode, on ``device``.
        processor: of the model.
        side: the model's side of profile.yml.
        config: for answer, token_limit and batch_size.
        device: where the inputs shall lie.
        groups: indices of the groups of ``Probes.groups`` to make batches of; None: all.

    Raises:
        SnrfError: as ``prepare``, or the model cannot generate.
    """
    probes = rows if isinstance(rows, Probes) else prepare(rows, processor, side, config, model)
    for group, positions in enumerate(probes.groups):
        if groups is not None and group not in groups:
            continue
        members = [probes.probes[position] for position in positions]
        answers = [member.answer for member in members if member.answer is not None]
        inputs: dict[str, Tensor] = {}
        if len(answers) < len(members):
            inputs = encode(probes, members, model, device)
            answers = generate_answers(model, processor, inputs, config.answer.max_new_tokens)
        for part in _even_parts([m.tokens + len(a.ids) for m, a in zip(members, answers, strict=True)]):
            chosen = [members[index] for index in part]
            whole = bool(inputs) and part == list(range(len(members)))
            encoded = inputs if whole else encode(probes, chosen, model, device)
            yield _batch(group, chosen, [answers[index] for index in part], encoded, model, processor)


def probes_sha256(probes: Probes) -> str:
    """Return the sha256 of all prompts, image files and dataset answers, with their row numbers."""
    digest = hashlib.sha256()
    for probe in probes.probes:
        row = probe.row
        content = [row.number, probe.prompt, list(row.images), row.answer]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _limit(config: ProfileConfig, model: PreTrainedModel | None) -> tuple[int | None, str]:
    positions = None
    if model is not None:
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if config.token_limit is not None and (positions is None or config.token_limit <= positions):
        return config.token_limit, f"the token_limit of {config.token_limit}"
    return positions, f"the model's {positions} positions"


def _probe(
    row: Row,
    rows: Rows,
    renderer: Renderer,
    config: ProfileConfig,
    limit: int | None,
    what: str,
    reserved: set[int],
) -> Probe:
    prompt = renderer.render(row)
    try:
        encoded = _tokenize(renderer, [prompt], [rows.images(row)])
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError) as error:
        raise RenderError(f"the processor refuses it ({str(error).strip().splitlines()[0]})") from None
    ids = encoded["input_ids"][0]
    if not row.images and reserved.intersection(ids.tolist()):
        raise RenderError("the prompt holds a token that stands for an image, but the row has none")
    answer = None
    if row.answer is not None:
        tokenizer = tokenizer_of(renderer.processor)
        answer = Answer(
            tuple(tokenizer(row.answer, add_special_tokens=False, truncation=False, verbose=False).input_ids)
        )
        if reserved.intersection(answer.ids):
            raise RenderError("the answer holds a token that stands for an image")
    longest = config.answer.max_new_tokens if answer is None else len(answer.ids)
    if limit is not None and len(ids) + longest > limit:
        most = "up to " if answer is None else ""
        raise RenderError(
            f"{len(ids)} tokens and an answer of {most}{longest} exceed {what}"
            + ("; lower answer.max_new_tokens" if answer is None and len(ids) < limit else "")
        )
    return Probe(row, prompt, len(ids), answer)


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


def _batch(
    group: int,
    members: Sequence[Probe],
    answers: Sequence[Answer],
    inputs: Mapping[str, Tensor],
    model: PreTrainedModel,
    processor: Any,
) -> ProbeBatch:
    tokenizer = tokenizer_of(processor)
    extended, answer_mask = append_answers(inputs, answers, tokenizer.pad_token_id)
    extended = with_positions(model, extended)
    return ProbeBatch(
        group=group,
        numbers=tuple(member.row.number for member in members),
        inputs=extended,
        attention_mask=extended["attention_mask"],
        answer_mask=answer_mask,
        answers=tuple(tokenizer.decode(list(answer.ids), skip_special_tokens=True) for answer in answers),
        ended=tuple(answer.ended for answer in answers),
    )


def _even_parts(lengths: Sequence[int]) -> list[list[int]]:
    """Split positions into parts whose shortest is at least 85 % of the longest, the longest part first."""
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if parts and lengths[index] >= _EVEN * lengths[parts[-1][0]]:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [sorted(part) for part in parts]
