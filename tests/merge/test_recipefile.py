from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge.recipefile import load_recipe

PARAMETER = "': must be a value, a list of values, or a mapping with value and filter"


def recipe(folder: Path, content: str | bytes) -> str:
    path = folder / "snrf.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a recipe; begin it with merge_method: snrf"),
        ("[]", "is not a recipe; begin it with merge_method: snrf"),
        ("models: []", "key 'merge_method' is missing; add it"),
        ("target: {model: a}\nlimit: 3", "is a profile.yml, not a recipe; give a file that begins with merge_method"),
        ("metrics: {math: {}}", "is an evaluation, not a recipe; give a file that begins with merge_method: snrf"),
        ("merge_method: snrf", "Exactly one of 'models', 'slices', or 'modules' must be present"),
        ("merge_method: snrf\nmodels: 3", "key 'models': must be a list, got 3"),
        ("merge_method: snrf\nmodels: [{model: a+b+c}]", "Can't parse a+b+c"),
        ("merge_method: snrf\ndtype: [1]\nmodels: [{model: a}]", "key 'dtype': must be text, got a list"),
        (
            "merge_method: snrf\nmodels: [a]",
            "key 'models.0': must be a mapping that begins with 'model: NAME', got 'a'",
        ),
        (
            "merge_method: snrf\nbase_model: 3\nmodels: [{model: a}]",
            "key 'base_model': must be the name of a model, a ",
        ),
        *(
            (
                f"merge_method: snrf\nmodels: [{{model: a}}]\nparameters: {{{written}}}",
                f"key 'parameters.{key}{PARAMETER}, got {given}",
            )
            for written, key, given in (
                ("rank: ", "rank", "nothing; write a value or remove the key"),
                ("strength: ", "strength", "nothing; write a value or remove the key"),
                ("beta: [1, null]", "beta.1", "nothing; write a value or remove the key"),
                ("beta: [{value: }]", "beta.0.value", "nothing; write a value or remove the key"),
            )
        ),
        (
            "merge_method: snrf\nmodels: [{model: a}]\nparameters: {rank: {x: 1}}",
            "key 'parameters.rank.value' is missing",
        ),
    ],
)
def test_what_is_not_a_recipe(tmp_path: Path, content: str, message: str) -> None:
    path = recipe(tmp_path, content)
    with pytest.raises(SnrfError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"a: [1", b"a: *missing", b"\xff\xfe\x00\xd8", b"#" * 1_000_001, b"a: 1\na: 2"])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "snrf.yml").write_bytes(content)
    with pytest.raises(SnrfError) as caught:
        load_recipe(tmp_path / "snrf.yml")
    assert caught.value.where == str(tmp_path / "snrf.yml")
