"""The package's one exception: its parts, and its printable text."""

from __future__ import annotations

import pytest

from mergekit_snrf.errors import SnrfError, naming, option


def test_an_error_has_a_place_a_problem_and_a_remedy() -> None:
    error = SnrfError("a.yml", "must be 1\x1b\u202e\nor 2", "write 1", field="seed")
    assert (error.where, error.field, error.remedy) == ("a.yml", "seed", "write 1")
    assert str(error) == "a.yml: seed: must be 1\\x1b\\u202e\nor 2; write 1"
    assert str(error.at("b.yml")).startswith("b.yml: seed: ")
    assert len(str(SnrfError(None, "x" * 10_000))) < 600
    with pytest.raises(TypeError):
        SnrfError("one sentence")  # type: ignore[call-arg]


def test_fields_are_named_as_the_user_typed_them() -> None:
    with pytest.raises(SnrfError) as caught, naming(option, where="profile.yml"):
        raise SnrfError(None, "must be 1", field="max_new_tokens")
    assert str(caught.value) == "profile.yml: --max-new-tokens: must be 1"


def test_several_problems_are_a_list() -> None:
    problems = [SnrfError("a", "is wrong"), SnrfError("b", "is missing")]
    assert SnrfError.several("the recipe", problems[:1]) is problems[0]
    error = SnrfError.several("the recipe", problems)
    assert error.problems == tuple(problems)
    assert str(error) == "the recipe, there are 2 problems:\n  1. a: is wrong\n  2. b: is missing"
    assert str(error.at("r.yml")).count("\n") == 2
