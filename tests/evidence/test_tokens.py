"""Log-odds against numpy, token texts of real tokenizers, and what counts as a math token."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from processors import TARGET_CHATS, TARGET_CORPUS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergekit_snrf.evidence.results import TokenOdds
from mergekit_snrf.evidence.tokens import is_math, math_share, rank_tokens, token_text


def test_log_odds_are_those_of_the_two_by_two_table_of_token_against_rest() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    amplified, plain = (Counter(rng.choice(words, size=n, p=rng.dirichlet(np.ones(40)))) for n in (700, 300))
    ranked = rank_tokens(amplified, plain)
    assert {entry.token for entry in ranked} == set(amplified)
    for entry in ranked:
        a, p = amplified[entry.token], plain[entry.token]
        cells = np.array([[a, 700 - a], [p, 300 - p]]) + 0.5
        expected = np.log(cells[0, 0] * cells[1, 1] / (cells[0, 1] * cells[1, 0]))
        assert entry.log_odds == pytest.approx(expected, rel=1e-12)
        assert (entry.amplified, entry.plain) == (a, p)
    odds = [entry.log_odds for entry in ranked]
    assert odds == sorted(odds, reverse=True)


def test_rare_tokens_are_left_out_and_ties_go_to_the_larger_count() -> None:
    amplified = {"b": 3, "a": 3, "rare": 1, "often": 30}
    ranked = rank_tokens(amplified, {"b": 1, "a": 1, "rare": 0, "often": 29, "gone": 50}, min_count=2)
    assert [entry.token for entry in ranked] == ["often", "a", "b"]
    counts = {"a": 2, "b": 2, "z": 7}
    assert [entry.token for entry in rank_tokens(counts, counts)] == ["z", "a", "b"]


def test_byte_level_tokens_keep_their_space_and_lose_their_markers() -> None:
    tokenizer = make_tokenizer(TARGET_CHATS["llava"], TARGET_CORPUS, size=320)
    ids = tokenizer(" triangle is", add_special_tokens=False).input_ids
    assert "".join(token_text(tokenizer, token) for token in ids) == " triangle is"
    # One byte of a character of several has no text of its own, and must stay apart from other such bytes.
    parts = tokenizer("∑", add_special_tokens=False).input_ids
    assert len(parts) == len({token_text(tokenizer, token) for token in parts}) == 3


def test_sentencepiece_tokens_keep_their_space() -> None:
    core = Tokenizer(models.WordLevel({"▁the": 0, "the": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert [token_text(tokenizer, token) for token in (0, 1)] == [" the", "the"]


MATH = (
    "7", " 42", "3.14", "1,000", "½", "3rd", "2x", "x2", "+", " =", "=\n", "≤", "∑", "√", "-", "−", "%", "^", "$$",
    "\\[", "\\frac", "frac", "\\in", "\\cdot", "sqrt", "\\pi", "π", "Σ", "𝑥", "ℝ", "x", "Ġtriangle", "▁Triangles",
    "TRIANGLE", "(sin", "square,", " sum", "metre", "pythagorean", "Hypotenuse", "circles", "therefore", "twelve",
    "(5", "=>",
)  # fmt: skip
NOT_MATH = (
    "", " ", "\n\n", "the", " in", "to", "text", "left", "end", "begin", ",", ".", "(", ")", "{", "|", "~", ":", ";",
    "blue", "cat", "a", "b", "y", "<b>", "</div>", "user", "met", "angl", "as", "is", "his", "'", "–", "日", "я",
    "\\", "_", "\"",
)  # fmt: skip


@pytest.mark.parametrize("token", MATH)
def test_numbers_signs_commands_and_words_are_math_tokens(token: str) -> None:
    assert is_math(token)


@pytest.mark.parametrize("token", NOT_MATH)
def test_ordinary_words_punctuation_and_fragments_are_not(token: str) -> None:
    assert not is_math(token)


def odds(*tokens: tuple[str, float]) -> list[TokenOdds]:
    return [TokenOdds(token=token, log_odds=value, amplified=1, plain=1) for token, value in tokens]


def test_math_share_counts_the_leading_tokens_above_zero_only() -> None:
    ranked = odds(("4", 3.0), ("cat", 2.0), ("+", 1.0), ("sum", 0.5), ("the", 0.0), ("blue", -1.0))
    assert math_share(ranked, top=10) == 3 / 4
    assert math_share(ranked, top=2) == 1 / 2
    assert math_share(odds(("4", 0.0), ("5", -1.0))) is None
