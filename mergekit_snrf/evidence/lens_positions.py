"""Where the logit lens looks: positions of images, of the prompt, and those that predict the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mergekit_snrf.evidence.results import KINDS
from mergekit_snrf.profiling.probes.batches import ProbeBatch

IMAGE, PROMPT, ANSWER = range(len(KINDS))

# Text tokens whose attention is read, for each position of a kind.
_TEXT = 4


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
