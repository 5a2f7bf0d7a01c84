"""The board task: arithmetic on a 3x3 board that a VLM sees as a picture and an LLM reads as nine tokens.

A board holds two to four digits joined by ``+``, ``-`` and ``x``, spread in reading order over nine cells;
the other cells are blank. The value of an expression is worked out from left to right, modulo ten. Four
things are asked:

===========  ==============================================  ================================
prompt       question                                        answer on the board ``3 + 4 x 7``
===========  ==============================================  ================================
``read :``   all glyphs in reading order                     ``3 + 4 x 7``
``find 2 :`` the second glyph                                ``+``
``color :``  the color of the glyphs (pictures only)         ``green``
``calc :``   the value, with its chain of thought            ``3 + 4 = 7 ; 7 x 7 = 9 ; # 9``
===========  ==============================================  ================================

A prompt is the nine cells (text) or ``<image>`` (picture), followed by what is asked:
``. 3 + . 4 x . 7 . calc :`` or ``<image> calc :``. Expressions are split by a hash into train, valid and
test, so that no expression that a model is scored on was ever trained on, whatever the seed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt8

GRID, CELL = 3, 8
CELLS = GRID * GRID
SIZE = GRID * CELL
DIGITS = tuple("0123456789")
OPERATORS = ("+", "-", "x")
BLANK = "."
GLYPHS = (*DIGITS, *OPERATORS)
OPERANDS = (2, 3, 4)
IMAGE_TOKEN = "<image>"

# Red, green, blue on a scale of 0 to 255.
COLORS = {"red": (235, 70, 60), "green": (70, 210, 90), "blue": (80, 120, 245), "yellow": (235, 215, 70)}

SPLITS = ("train", "valid", "test")
ASKS = ("read", "find", "color", "calc")

# Seven rows of five pixels, from top to bottom.
_FONT = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "10010 10010 10010 11111 00010 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "01110 10000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00001 01110",
    "+": "00000 00100 00100 11111 00100 00100 00000",
    "-": "00000 00000 00000 11111 00000 00000 00000",
    "x": "00000 10001 01010 00100 01010 10001 00000",
}
_BITMAPS = {
    glyph: np.array([[int(pixel) for pixel in row] for row in rows.split()], dtype=bool)
    for glyph, rows in _FONT.items()
}
_FINAL = re.compile(r"[^#]*# (\d)")


def apply(left: int, operator: str, right: int) -> int:
    """Return ``left operator right`` modulo ten."""
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    if operator == "x":
        return (left * right) % 10
    raise ValueError(f"operator must be one of {OPERATORS}, got {operator!r}")


def solve(glyphs: Sequence[str]) -> tuple[str, int]:
    """Return the chain of thought and the value of an expression, from left to right modulo ten.

    ``solve("3 + 4 x 7".split())`` is ``("3 + 4 = 7 ; 7 x 7 = 9 ; # 9", 9)``.
    """
    if len(glyphs) % 2 == 0:
        raise ValueError(f"an expression alternates digits and operators, got {' '.join(glyphs)!r}")
    value = int(glyphs[0])
    steps = []
    for operator, digit in zip(glyphs[1::2], glyphs[2::2], strict=True):
        result = apply(value, operator, int(digit))
        steps.append(f"{value} {operator} {digit} = {result} ;")
        value = result
    return " ".join([*steps, f"# {value}"]), value


def final_answer(text: str) -> int | None:
    """Return the digit that ends a ``calc`` answer as ``# digit``, or None if the answer is malformed."""
    match = _FINAL.fullmatch(text.strip())
    return int(match.group(1)) if match else None


def split_of(glyphs: Sequence[str]) -> str:
    """Return the split of an expression, by a hash of its glyphs: 80 % train, 10 % valid, 10 % test."""
    digest = hashlib.sha256(" ".join(glyphs).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.8 else "valid" if share < 0.9 else "test"


@dataclass(frozen=True)
class Board:
    """Nine cells in reading order, the color of their glyphs, and the seed of the picture's jitter and noise."""

    cells: tuple[str, ...]
    color: str
    noise: int

    def __post_init__(self) -> None:
        if len(self.cells) != CELLS or not set(self.cells) <= {*GLYPHS, BLANK}:
            raise ValueError(f"a board has {CELLS} cells of {GLYPHS} or {BLANK!r}, got {self.cells}")
        if self.color not in COLORS:
            raise ValueError(f"color must be one of {tuple(COLORS)}, got {self.color!r}")

    @cached_property
    def glyphs(self) -> tuple[str, ...]:
        """The expression: the cells that are not blank, in reading order."""
        return tuple(cell for cell in self.cells if cell != BLANK)


@dataclass(frozen=True)
class Problem:
    """One thing asked about one board; ``position`` counts glyphs from one and only matters to ``find``."""

    ask: str
    board: Board
    position: int = 1

    def __post_init__(self) -> None:
        if self.ask not in ASKS:
            raise ValueError(f"ask must be one of {ASKS}, got {self.ask!r}")
        if not 1 <= self.position <= len(self.board.glyphs):
            raise ValueError(f"position must be in 1..{len(self.board.glyphs)}, got {self.position}")

    def prompt(self, image: bool) -> str:
        """Return the prompt for a model that sees the picture (``image``) or reads the cells."""
        shown = IMAGE_TOKEN if image else " ".join(self.board.cells)
        return f"{shown} find {self.position} :" if self.ask == "find" else f"{shown} {self.ask} :"

    @property
    def answer(self) -> str:
        """The one right answer; for ``calc`` with its chain of thought."""
        if self.ask == "read":
            return " ".join(self.board.glyphs)
        if self.ask == "find":
            return self.board.glyphs[self.position - 1]
        if self.ask == "color":
            return self.board.color
        return solve(self.board.glyphs)[0]

    def accepts(self, text: str) -> bool:
        """Tell whether a model's answer is right: for ``calc`` the final digit alone, else every token."""
        if self.ask == "calc":
            return final_answer(text) == solve(self.board.glyphs)[1]
        return text.split() == self.answer.split()


def sample_board(rng: np.random.Generator, operands: Sequence[int], split: str) -> Board:
    """Draw a board with a number of operands from ``operands`` and an expression of ``split``."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not operands or not set(operands) <= set(OPERANDS):
        raise ValueError(f"operands must be drawn from {OPERANDS}, got {tuple(operands)}")
    count = operands[int(rng.integers(len(operands)))]
    while True:
        glyphs = [DIGITS[i] for i in rng.integers(len(DIGITS), size=count)]
        for slot, i in enumerate(rng.integers(len(OPERATORS), size=count - 1)):
            glyphs.insert(2 * slot + 1, OPERATORS[i])
        if split_of(glyphs) == split:
            break
    cells = [BLANK] * CELLS
    places = np.sort(rng.choice(CELLS, size=len(glyphs), replace=False))
    for place, glyph in zip(places, glyphs, strict=True):
        cells[place] = glyph
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    return Board(tuple(cells), color, int(rng.integers(2**32)))


def sample_problem(rng: np.random.Generator, ask: str, split: str, operands: Sequence[int] = OPERANDS) -> Problem:
    """Draw a board of ``split`` and, for ``find``, a position on it."""
    board = sample_board(rng, operands, split)
    return Problem(ask, board, int(rng.integers(len(board.glyphs))) + 1)


def distinct_problems(
    rng: np.random.Generator, ask: str, split: str, n: int, operands: Sequence[int] = OPERANDS
) -> list[Problem]:
    """Draw ``n`` problems on boards that all differ in their cells."""
    found: dict[tuple[str, ...], Problem] = {}
    while len(found) < n:
        problem = sample_problem(rng, ask, split, operands)
        found.setdefault(problem.board.cells, problem)
    return list(found.values())


def render(board: Board) -> UInt8[np.ndarray, "24 24 3"]:
    """Draw a board as an RGB picture: 8x8 pixels a cell, glyphs of 5x7 at a jittered place, noise all over.

    The same board gives the same bytes: jitter, brightness and noise come from ``board.noise``.
    """
    rng = np.random.default_rng(board.noise)
    canvas = np.full((SIZE, SIZE, 3), rng.uniform(15.0, 55.0))
    for index, glyph in enumerate(board.cells):
        if glyph == BLANK:
            continue
        bitmap = _BITMAPS[glyph]
        height, width = bitmap.shape
        top = CELL * (index // GRID) + rng.integers(CELL - height + 1)
        left = CELL * (index % GRID) + rng.integers(CELL - width + 1)
        ink = rng.uniform(0.75, 1.0) * np.array(COLORS[board.color])
        canvas[top : top + height, left : left + width][bitmap] = ink
    canvas += rng.normal(0.0, 12.0, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
