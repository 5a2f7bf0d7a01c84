"""The logit lens on one probe: the most probable token after every layer at every position, as text and HTML.

Tokens come from a vocabulary that anyone can write: every one is shown in quotes, with control characters and marks of
text direction as escapes, and the HTML escapes markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import printable
from mergekit_snrf.evidence.asked import Asked
from mergekit_snrf.evidence.lens import Lensed
from mergekit_snrf.evidence.results import KINDS
from mergekit_snrf.evidence.tokens import token_text
from mergekit_snrf.evidence.wording import quoted, without_folders
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.profiling.probes.batches import probe_batches
from mergekit_snrf.profiling.probes.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Place:
    """One position of a probe; ``kind`` of ``KINDS``, ``token`` the one there and ``next`` the one that follows."""

    position: int
    kind: str
    token: str
    next: str


@dataclass(frozen=True)
class TokenGrid:
    """The most probable tokens, with their probabilities.

    Attributes:
        row: number of the probe.
        cells: by layer, from before the first one on, and place.
    """

    model: str
    row: int
    answer: str
    places: tuple[Place, ...]
    cells: tuple[tuple[tuple[str, float], ...], ...]


def lens_tokens(
    rows: Rows, model: PreTrainedModel, processor: Any, asked: Asked, *, positions: int | None = None
) -> TokenGrid:
    """Read the first of some rows; arguments and errors as ``lens``."""
    lensed = Lensed.of(model, positions, asked.model.model)
    probes = asked.probes(rows, model, processor)
    batch = next(iter(probe_batches(probes, model, processor, rule=asked.rule, device=model.device, groups={0})))
    found, streams = lensed.run(batch, None, check=False)
    order = found.place.argsort()
    tops: dict[int, list[tuple[int, float]]] = {layer: [] for layer in range(len(streams))}
    for _, reading in lensed.read(found, streams):
        tops[reading.layer] += zip(reading.top.tolist(), reading.probability.tolist(), strict=True)
    tokenizer = tokenizer_of(processor)

    def text(token: int) -> str:
        return token_text(tokenizer, token)

    ids = batch.inputs["input_ids"][0].tolist()
    places = tuple(
        Place(place, KINDS[kind], text(ids[place]), text(following))
        for place, kind, following in zip(
            *(one[order].tolist() for one in (found.place, found.kind, found.next)), strict=True
        )
    )
    cells = tuple(tuple((text(tops[at][i][0]), tops[at][i][1]) for i in order.tolist()) for at in range(len(streams)))
    return TokenGrid(asked.model.model, batch.numbers[0], batch.answers[0], places, cells)


def grid_text(grid: TokenGrid) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for every position; a column for every layer, in per cent behind the token."""
    header = ["position", "kind", "token", *(str(layer) for layer in range(len(grid.cells)))]
    rows = []
    for index, place in enumerate(grid.places):
        cells = [f"{shown(token)} {100 * chance:.0f}" for token, chance in (layer[index] for layer in grid.cells)]
        rows.append([str(place.position), place.kind, shown(place.token), *cells])
    return header, rows


def shown(token: str) -> str:
    """Return a token in quotes, shortened, without characters that are not for display."""
    return printable(quoted(token))


def grid_html(grid: TokenGrid) -> str:
    """Return the table as one HTML page without scripts that loads nothing, layers from the last one down."""
    from mergekit_snrf.evidence.report import environment

    content: Mapping[str, Any] = {
        "title": f"Logit lens of {without_folders(grid.model)}, probe {grid.row}",
        "answer": grid.answer,
        "places": grid.places,
        "layers": list(reversed(list(enumerate(grid.cells)))),
        "shown": shown,
    }
    return environment().get_template("lens.html.jinja").render(content)
