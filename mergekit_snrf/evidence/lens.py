"""The logit lens: what a model would predict if it stopped after each of its layers (MMNeuron, arXiv 2406.11193).

The residual stream before the first layer (0) and after each layer (1 to L) goes through the model's own final norm and
head. Positions are of three kinds: ``image`` (its tokens), ``answer`` (those that predict a token of the answer, from
the last token of the prompt on) and ``prompt`` (the others). Everything is a sum over positions, so memory does not
grow with the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.asked import Asked
from mergekit_snrf.evidence.results import KINDS, Lens, LensAnswer, LensKind
from mergekit_snrf.evidence.tokens import token_text
from mergekit_snrf.models.live import LiveDecoder, LiveHead, find_live_decoder, find_live_head
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.profiling.impact.layer import attention_output
from mergekit_snrf.profiling.measure.capture import CapturedLayer, run_layers
from mergekit_snrf.profiling.measure.inputs import run_once
from mergekit_snrf.profiling.measure.meter import check_attention
from mergekit_snrf.profiling.probes.answers import image_ids
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes, probe_batches, probes_sha256
from mergekit_snrf.profiling.probes.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COST = 0.3
"""The head's work on all layers, as a share of a forward pass: how many positions are read unless a number is given."""
FEWEST = 4
"""Positions of each kind that are read in a probe in any case."""
TOP = 10
"""Most frequent tokens in a result."""
# Logits that are computed at a time.
_BLOCK = 2**23
# Text tokens whose attention is read, for each position of a kind.
_TEXT = 4
IMAGE, PROMPT, ANSWER = range(len(KINDS))


@dataclass(frozen=True)
class Reading:
    """What the lens shows at some positions after one layer; natural logarithms.

    Attributes:
        layer: 0 before the first layer.
        kl: KL(last layer || this layer).
        top: the most probable token, and its ``probability``.
        agrees: whether the last layer has the same.
        rank: of the answer's tokens, 1 for the most probable; ``chance`` is their probability.
    """

    layer: int
    entropy: Float[Tensor, " positions"]
    kl: Float[Tensor, " positions"]
    top: Int[Tensor, " positions"]
    probability: Float[Tensor, " positions"]
    agrees: Bool[Tensor, " positions"]
    rank: Int[Tensor, " answers"]
    chance: Float[Tensor, " answers"]


@torch.no_grad()
def readings(
    logits: Callable[[Tensor], Tensor],
    streams: list[Float[Tensor, "positions hidden"]],
    answer: Int[Tensor, " positions"],
) -> Iterator[Reading]:
    """Yield what the lens shows after every layer, the last one first: the others are compared with it.

    Args:
        logits: of a stream, [positions, vocabulary].
        streams: before the first layer and after each.
        answer: the token of the answer behind each position, -1 where there is none.
    """
    chances = best = cross = torch.empty(0)
    device = streams[-1].device
    asked = (answer >= 0).to(device)
    token = answer.to(device)[asked, None]
    for layer in reversed(range(len(streams))):
        # The vocabulary is long, so passes over it are few and in place.
        scores = logits(streams[layer].to(device))
        most, top = scores.max(-1, keepdim=True)
        powers = scores.sub_(most).exp()
        total = powers.sum(-1, keepdim=True)
        norm = total.log().squeeze(-1)
        target = scores[asked].gather(1, token)
        rank = 1 + torch.count_nonzero(scores[asked] > target, dim=-1)
        chance = (target - norm[asked, None]).exp().squeeze(-1)
        first = layer == len(streams) - 1
        if first:
            chances, best = powers / total, top
        entropy = norm - powers.mul_(scores).sum(-1) / total.squeeze(-1)
        here = norm - scores.mul_(chances).sum(-1)
        cross = here if first else cross
        agrees, probability = (top == best).squeeze(-1), 1 / total.squeeze(-1)
        yield Reading(layer, entropy, (here - cross).clamp(min=0), top.squeeze(-1), probability, agrees, rank, chance)


class LensSums:
    """Sums over positions by layer and kind, float64 and exact counts."""

    def __init__(self, layers: int, vocabulary: int) -> None:
        shape = (layers + 1, len(KINDS))
        self.entropy, self.kl = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        self.agrees, self.tokens = torch.zeros(shape, dtype=torch.long), torch.zeros(len(KINDS), dtype=torch.long)
        self.tops = torch.zeros((*shape, vocabulary), dtype=torch.long)
        self.answer = torch.zeros((layers + 1, 3), dtype=torch.float64)
        self.attention, self.probes, self.with_images = torch.zeros(layers, dtype=torch.float64), 0, 0

    def add(self, reading: Reading, kind: Int[Tensor, " positions"]) -> None:
        """Add the readings of one layer."""
        layer, ones = reading.layer, torch.ones_like(kind)
        self.entropy[layer].index_add_(0, kind, reading.entropy.cpu().double())
        self.kl[layer].index_add_(0, kind, reading.kl.cpu().double())
        self.agrees[layer].index_add_(0, kind, reading.agrees.cpu().long())
        vocabulary = self.tops.shape[-1]
        self.tops[layer].view(-1).index_add_(0, kind * vocabulary + reading.top.cpu(), ones)
        rank, chance = reading.rank.cpu(), reading.chance.cpu().double()
        self.answer[layer] += torch.stack([rank.double().sum(), chance.sum(), (rank == 1).double().sum()])


@dataclass(frozen=True)
class Lensed:
    """A loaded model under the lens.

    Attributes:
        images: tokens in whose places the model sees.
        positions: of each kind that are read in a probe, at most; 0: all; None: what costs ``COST``.
    """

    model: PreTrainedModel
    decoder: LiveDecoder
    head: LiveHead
    images: tuple[int, ...]
    positions: int | None

    @staticmethod
    def of(model: PreTrainedModel, positions: int | None, name: str) -> Lensed:
        """Find decoder and head; raise ``SnrfError`` where there is none."""
        decoder = find_live_decoder(model, name=name)
        return Lensed(model, decoder, find_live_head(model, decoder), image_ids(model.config), positions)

    def limit(self, tokens: int) -> int:
        """Return how many positions of each kind are read in a probe of so many tokens."""
        if self.positions is not None:
            return self.positions or tokens
        layers = self.decoder.layers
        ratio = (
            (len(layers) + 1) * self.head.weights / sum(one.numel() for layer in layers for one in layer.parameters())
        )
        return max(FEWEST, int(COST * tokens / ratio / len(KINDS)))

    def run(
        self, batch: ProbeBatch, attention: Callable[[int, Float[Tensor, " probes"]], None] | None, *, check: bool
    ) -> tuple[Positions, list[Tensor]]:
        """Run a batch once; return the positions and the streams there, before the first layer and after each.

        Args:
            attention: takes each layer and the share of the text tokens' attention that goes to images, of probes that
                have some.
            check: whether the captured tensors of every layer must give the attention that the model computed.

        Raises:
            SnrfError: the model is not supported, or computes NaN or infinite values.
        """
        positions = Positions.of(batch, self.images, self.limit)
        sees = bool(positions.image.any())
        if not sees and any(name.startswith("pixel_") for name in batch.inputs):
            what = "has images in its inputs, but no token of an image that its configuration names"
            raise SnrfError(self.decoder.model, what, "the model is not supported")
        streams: list[Tensor] = []
        ends: list[Tensor] = []

        def at(stream: Tensor) -> Tensor:
            return stream[positions.probe.to(stream.device), positions.place.to(stream.device)]

        def visit(layer: CapturedLayer) -> None:
            streams.append(at(layer.stream))
            ends[:] = [layer.stream[:, -1]]
            if attention is not None and sees:
                if check:
                    check_attention(self.decoder, layer, batch.attention_mask)
                attention(layer.index, _share(layer, positions))

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            streams.append(at(args[0].detach()))

        outputs: list[Any] = []
        with self.decoder.layers[0].register_forward_pre_hook(enter):
            run_layers(
                self.decoder, lambda: outputs.append(run_once(self.model, batch.inputs)), batch.attention_mask, visit
            )
        real = (batch.attention_mask[:, -1] != 0).to(ends[0].device)
        logits: Tensor = outputs[0].logits[:, -1]
        self.head.check(ends[0][real], logits[real.to(logits.device)])
        return positions, streams

    def read(self, positions: Positions, streams: list[Tensor]) -> Iterator[tuple[slice, Reading]]:
        """Yield the readings of every layer, block by block of positions."""
        step = max(1, _BLOCK // self.head.vocabulary)
        answer = positions.next.where(positions.kind == ANSWER, -1)
        for start in range(0, len(positions.kind), step):
            block = slice(start, start + step)
            for reading in readings(self.head.logits, [stream[block] for stream in streams], answer[block]):
                yield block, reading


def _share(layer: CapturedLayer, positions: Positions) -> Float[Tensor, " probes"]:
    """Return the share of attention that goes to images, a mean over text tokens and heads, of probes with images."""
    has = positions.image.any(1)
    query = layer.attention.query
    # What a head reads of values that are 1 at images and 0 elsewhere is its attention to images.
    seen = positions.image.to(query)[..., None].expand(-1, -1, layer.attention.kv_heads)
    share = attention_output(replace(layer.attention, value=seen), positions.text.to(query)).mean(-1).double().cpu()
    return (share * positions.text).sum(1)[has] / positions.text.sum(1)[has]


def lens(
    rows: Rows,
    model: PreTrainedModel,
    processor: Any,
    asked: Asked,
    *,
    positions: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Lens:
    """Read a model in eval mode layer by layer on rows that it answers itself, in one pass over them.

    ``positions`` are as in ``Lensed``, ``settings`` are kept in the result. ``SnrfError``: as ``prepare`` and
    ``probe_batches``, or the model is not supported.
    """
    lensed = Lensed.of(model, positions, asked.model.model)
    probes = asked.probes(rows, model, processor)
    sums = LensSums(len(lensed.decoder.layers), lensed.head.vocabulary)
    with tqdm(total=len(probes), unit="probe", disable=not progress) as bar:
        for batch in probe_batches(probes, model, processor, rule=asked.rule, device=model.device):
            add_batch(sums, lensed, batch)
            bar.update(len(batch.numbers))
    how = {"seed": asked.source.seed, "positions": positions, "max_new_tokens": asked.rule.max_new_tokens}
    return _result(sums, probes, processor, asked, {**how, "batch_size": asked.batch_size, **(settings or {})})


def add_batch(sums: LensSums, lensed: Lensed, batch: ProbeBatch) -> None:
    """Run a batch through a model under the lens and add what it shows; raises as ``Lensed.run``."""
    counted: list[int] = []

    def attention(layer: int, shares: Tensor) -> None:
        sums.attention[layer] += shares.sum()
        counted[:] = [len(shares)]

    positions, streams = lensed.run(batch, attention, check=not sums.with_images)
    sums.tokens += torch.bincount(positions.kind, minlength=len(KINDS))
    sums.probes += len(batch.numbers)
    sums.with_images += sum(counted)
    for block, reading in lensed.read(positions, streams):
        sums.add(reading, positions.kind[block])


def _result(sums: LensSums, probes: Probes, processor: Any, asked: Asked, settings: Mapping[str, Any]) -> Lens:
    tokenizer = tokenizer_of(processor)
    kinds = []
    for kind, name in enumerate(KINDS):
        tokens = int(sums.tokens[kind])
        if not tokens:
            continue
        top = []
        for counts in sums.tops[:, kind]:
            order = sorted(counts.nonzero().flatten().tolist(), key=lambda token: (-int(counts[token]), token))[:TOP]
            top.append([(token_text(tokenizer, token), int(counts[token])) for token in order])
        means = {
            which: (getattr(sums, which)[:, kind].double() / tokens).tolist() for which in ("entropy", "kl", "agrees")
        }
        kinds.append(LensKind(kind=name, tokens=tokens, top=top, **means))
    answers = int(sums.tokens[ANSWER])
    rank, probability, hits = (sums.answer / max(1, answers)).T.tolist()
    return Lens(
        model=asked.model.model,
        probes=asked.source.dataset,
        count=sums.probes,
        layers=len(sums.attention),
        kinds=kinds,
        answer=LensAnswer(rank=rank, probability=probability, hits=hits) if answers else None,
        image_attention=(sums.attention / sums.with_images).tolist() if sums.with_images else None,
        settings={"probes_sha256": probes_sha256(probes), "with_images": sums.with_images, **settings},
    )


@dataclass(frozen=True)
class Positions:
    """Positions of a batch that are read.

    Attributes:
        probe: index in the batch.
        place: of the token in its probe.
        kind: index in ``KINDS``.
        next: the token that follows, 0 behind the last one.
        image: all tokens of images in the batch.
        text: other tokens, evenly spaced, whose attention to images is read.
    """

    probe: Int[Tensor, " positions"]
    place: Int[Tensor, " positions"]
    kind: Int[Tensor, " positions"]
    next: Int[Tensor, " positions"]
    image: Bool[Tensor, "batch tokens"]
    text: Bool[Tensor, "batch tokens"]

    @staticmethod
    def of(batch: ProbeBatch, images: tuple[int, ...], limit: Callable[[int], int]) -> Positions:
        """Return evenly spaced positions, of each kind at most ``limit`` of the number of tokens in every probe."""
        ids, real, answer = (
            one.cpu() for one in (batch.inputs["input_ids"], batch.attention_mask != 0, batch.answer_mask)
        )
        image = real & torch.isin(ids, torch.tensor(images, dtype=ids.dtype))
        predicts = torch.zeros_like(answer)
        predicts[:, :-1] = answer[:, 1:]
        kinds = torch.where(image, IMAGE, torch.where(predicts, ANSWER, PROMPT)).where(real, -1)
        # The answer's own last token predicts nothing that is known.
        kinds[answer & ~predicts] = -1
        found, text = [], torch.zeros_like(image)
        for number, row in enumerate(kinds):
            most = limit(int(real[number].sum()))
            for index in range(len(KINDS)):
                places = _spaced((row == index).nonzero().flatten(), most)
                found += [(number, at, index) for at in places.tolist()]
            others = (real & ~image)[number].nonzero().flatten()
            text[number, _spaced(others, _TEXT * most)] = True
        probe, place, kind = torch.tensor(found, dtype=torch.long).view(-1, 3).unbind(1)
        following = torch.nn.functional.pad(ids, (0, 1))[probe, place + 1]
        return Positions(probe, place, kind, following, image, text)


def _spaced(places: Int[Tensor, " places"], most: int) -> Int[Tensor, " chosen"]:
    """Return at most so many of some places, evenly spaced."""
    if len(places) <= most:
        return places
    return places[(torch.arange(most) * 2 + 1) * len(places) // (2 * most)]
