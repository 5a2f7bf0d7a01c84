"""Tokens as text: their log-odds in amplified against plain generations, and which of them are math tokens."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from mergekit_snrf.evidence.results import TokenOdds

WORDS = "words"
"""The name of the classifier: the word list ``math_words.txt`` beside this module."""

# What tokenizers write for a space or a line break, and what they put before or behind fragments of words.
_MARKERS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"})
_FRAGMENTS = ("##", "</w>", "@@")
# Unicode calls these mathematical; in text they are table bars and the like.
_NOT_MATH = "|~"
_LETTERS = ("GREEK SMALL", "GREEK CAPITAL", "MATHEMATICAL", "DOUBLE-STRUCK")
_MARKS = re.compile(r"^[\W_]+|[\W_]+$")
_NUMBER = re.compile(r"\d[\d.,:]*(st|nd|rd|th|[a-z])?|[a-z]\d+")


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as text with its leading space; a part of a character stays as the tokenizer writes it."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if piece is None or not text or "\ufffd" in text:
        return piece or f"<{token}>"
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def rank_tokens(amplified: Mapping[str, int], plain: Mapping[str, int], *, min_count: int = 1) -> list[TokenOdds]:
    """Rank tokens by the log of their odds ratio, amplified (F_lambda of Eq. 8) over plain, the strongest first.

    With a of A amplified and p of P plain tokens, log((a + 0.5) / (A - a + 0.5)) - log((p + 0.5) / (P - p + 0.5)). Ties
    go to the larger count, then by text. Tokens that were amplified fewer than ``min_count`` times are left out.
    """
    totals = sum(amplified.values()), sum(plain.values())
    ranked = []
    for token, count in amplified.items():
        if count >= min_count:
            before = plain.get(token, 0)
            odds = _log_odds(count, totals[0]) - _log_odds(before, totals[1])
            ranked.append(TokenOdds(token=token, log_odds=odds, amplified=count, plain=before))
    return sorted(ranked, key=lambda entry: (-entry.log_odds, -entry.amplified, entry.token))


def _log_odds(count: int, total: int) -> float:
    return math.log((count + 0.5) / (total - count + 0.5))


def math_share(ranked: Sequence[TokenOdds], top: int = 10) -> float | None:
    """Return the share of math tokens among the first ``top`` (K of Fig. 12) with log-odds above zero, if any."""
    leading = [entry.token for entry in ranked[:top] if entry.log_odds > 0]
    return sum(map(is_math, leading)) / len(leading) if leading else None


def words_sha256() -> str:
    """Return the sha256 of the list of math words."""
    return hashlib.sha256(_word_list().encode()).hexdigest()


def is_math(token: str) -> bool:
    """Tell whether a token is a number, a mathematical sign or letter, a LaTeX command or a word of the list.

    A token with letters is looked up as a whole, without case and the marks around it; one without letters is a math
    token if it holds a digit or a sign that Unicode calls mathematical. Fragments of words are not recognised, so a
    share of math tokens is rather too low.
    """
    text = token.translate(_MARKERS)
    for fragment in _FRAGMENTS:
        text = text.removeprefix(fragment).removesuffix(fragment)
    text = text.strip().casefold()
    words = _words()
    if text in words:
        return True
    if not any(character.isalpha() for character in text):
        return any(_is_sign(character) for character in text)
    bare = _MARKS.sub("", text)
    if len(bare) == 1:
        return bare in words or unicodedata.name(bare, "").startswith(_LETTERS)
    return bool(_NUMBER.fullmatch(bare)) or bare in words or (len(bare) > 4 and bare.removesuffix("s") in words)


def _is_sign(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("N") or (category == "Sm" and character not in _NOT_MATH)


@cache
def _word_list() -> str:
    return files("mergekit_snrf.evidence").joinpath("math_words.txt").read_text(encoding="utf-8")


@cache
def _words() -> frozenset[str]:
    lines = (line for line in _word_list().splitlines() if not line.startswith("# "))
    return frozenset(word.casefold() for line in lines for word in line.split())
