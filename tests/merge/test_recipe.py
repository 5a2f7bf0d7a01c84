"""The rules of a recipe, tried on the draft of its plan, and a handful through mergekit's own command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from pair import MODULES, Pair, merge, one, plan, problem, run, write_recipe

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion, settings
from mergekit_snrf.merge.method import SPEC
from mergekit_snrf.merge.recipe import Recipe, read_recipe


def recipe_of(source: dict[str, Any], top: dict[str, Any], **changes: Any) -> tuple[Recipe | None, list[SnrfError]]:
    content = {
        "merge_method": "snrf",
        "base_model": "vlm",
        "models": [{"model": "llm", "parameters": source}],
        "parameters": {"masks": "m", **top},
        **changes,
    }
    found: list[SnrfError] = []
    config = MergeConfiguration.model_validate({key: value for key, value in content.items() if value is not None})
    return read_recipe(config, found), found


def recipe(source: dict[str, Any], top: dict[str, Any]) -> Recipe:
    read, problems = recipe_of(source, top)
    assert read is not None
    assert problems == []
    return read


def test_every_parameter_is_documented_with_its_range() -> None:
    assert all(parameter.description for parameter in SPEC.parameters)
    known = settings()
    assert known["beta"].range == "in [0, 1]"
    assert known["order"].range == "one of svd-then-mask, mask-then-svd"
    assert known["seed"].range == "in [0, 4294967296)"
    assert (known["rank"].range, known["rescale"].range) == ("at least 0", "")


def test_recipe_with_every_kind_of_value_has_no_problem() -> None:
    gradient = [0, 0.5, 1]
    filters = [{"filter": "mlp", "value": gradient}, {"filter": "*", "value": "0.25"}]
    top = {
        "masks": "hf://owner/repo@main/mask.safetensors",
        "masks_sha256": "ab" * 32,
        "order": "mask-then-svd",
        "allow_noop": True,
        "allow_family_mismatch": "false",
        "beta": filters,
        "rank": [1, 4.0],
    }
    assert recipe_of({}, top, models=[{"model": "llm"}, {"model": "vlm"}], dtype="bfloat16")[1] == []
    by_filter = [{"filter": "mlp", "value": 0}]
    for source, others in (
        ({"beta": filters, "rank": "0"}, {}),
        ({"rank": by_filter}, {"order": "mask-then-svd"}),
        ({"rank": 0}, {"order": "svd-then-mask"}),
        ({"rank": [0, 4]}, {"update": "low-rank"}),
        ({"drop_rate": [0.1, 0.9]}, {"update": "dare"}),
    ):
        assert recipe_of(source, others)[1] == []


def test_every_problem_is_listed_in_the_order_of_the_recipe() -> None:
    _, found = recipe_of(
        {},
        {},
        base_model=None,
        parameters={"rank": -1, "beta": [0.5, 3], "normalize": True},
        models=[{"model": "a", "parameters": {"masks": "m", "bata": 1}}, {"model": "b", "parameters": {"rank": 0.5}}],
        tokenizer_source="base",
    )
    assert [(error.where, error.field) for error in found] == [
        (None, "tokenizer_source"),
        (None, "base_model"),
        (None, "models"),
        ("parameters", "rank"),
        ("parameters", "beta"),
        ("parameters", None),
        ("parameters of a", "masks"),
        ("parameters of a", None),
        ("parameters of b", "rank"),
    ]
    assert found[7].remedy == "did you mean 'beta'?"


@pytest.mark.parametrize(("t", "expected"), [(0.25, Fusion(0.25, 4)), (1.0, Fusion(1.0, 10))])
def test_gradients(t: float, expected: Fusion) -> None:
    assert recipe({"beta": [0, 0.5, 1], "rank": [2, 10]}, {}).fusion("model.layers.0.mlp.up_proj.weight", t) == expected


def test_filters_defaults_and_precedence() -> None:
    found = recipe(
        {"beta": [{"filter": "q_proj", "value": 0.125}, {"filter": "attn", "value": [0.25, 0.75]}]},
        {"beta": [{"filter": "up_proj", "value": 1.0}], "rank": 7, "order": "mask-then-svd"},
    )
    betas = {name: found.fusion(f"layers.0.{module}.weight", 1.0).beta for name, (module, _, _) in MODULES.items()}
    assert betas == {"attn.q": 0.125, "attn.k": 0.75, "attn.v": 0.75, "fwd.up": 1.0, "fwd.down": 0.5}
    assert found.fusion("x", 0.0) == Fusion(0.5, 7, "mask-then-svd")
    assert found.filters() == ["up_proj", "q_proj", "attn"]


def test_fusion_names_the_tensor_of_a_bad_value() -> None:
    bad = replace(recipe({}, {}), source_parameters={"beta": "much"})
    with pytest.raises(SnrfError, match=r"^layers\.0\.k: must be a number, got 'much'"):
        bad.fusion("layers.0.k", 0.0)


NAN, INF = float("nan"), float("inf")
TOP, SOURCE = "parameters", "parameters of {source}"
ALL = [{"filter": "attn", "value": [0.5, 3.0]}, {"value": 0.5}]
MISTAKES: dict[str, tuple[dict[str, Any], str | None, str | None, str]] = {
    "merge_method": ({"merge_method": "linear"}, None, "merge_method", "must be snrf, got 'linear'"),
    "source without a name": ({"models": [{"model": ""}]}, None, "models", "a model has no name"),
    "two sources": ({"models": [{"model": "a/one"}, {"model": "a/two"}]}, None, "models", "got a/one, a/two"),
    "slices": (
        {"models": None, "slices": [{"sources": [{"model": "a/one", "layer_range": [0, 3]}]}]},
        None,
        "slices",
        "is not supported",
    ),
    "modules": (
        {"models": None, "modules": {"text_decoder": {"models": [{"model": "a/one"}]}}},
        None,
        "modules",
        "is not supported",
    ),
    "tokenizer_source": ({"tokenizer_source": "union"}, None, "tokenizer_source", "is not supported"),
    "tokenizer": ({"tokenizer": {"source": "base"}}, None, "tokenizer", "is not supported"),
    "chat_template": ({"chat_template": "nonsense"}, None, "chat_template", "'nonsense' is neither Jinja text nor"),
    "dtype": ({"dtype": "bf16"}, None, "dtype", "must be one of float16, bfloat16, float32, float64, got 'bf16'"),
    "no masks": ({"parameters": {"masks": None}}, TOP, "masks", "is missing"),
    "masks not text": ({"parameters": {"masks": 5}}, TOP, "masks", "must be text, got 5"),
    "masks by layer": ({"parameters": {"masks": ["a", "b"]}}, TOP, "masks", "must be one plain value"),
    "masks missing": ({"parameters": {"masks": "no/such"}}, "no/such", None, "no such file, looked for "),
    "masks_sha256 not text": ({"parameters": {"masks_sha256": 1234}}, TOP, "masks_sha256", "must be text"),
    "masks under models": ({"source": {"masks": "m"}}, SOURCE, "masks", "has no effect under a model"),
    "order under models": ({"source": {"order": "mask-then-svd"}}, SOURCE, "order", "has no effect under a model"),
    "order": ({"parameters": {"order": "svd"}}, TOP, "order", "must be one of svd-then-mask, mask-then-svd"),
    "allow_noop": ({"parameters": {"allow_noop": "perhaps"}}, TOP, "allow_noop", "must be true or false"),
    "unknown parameter": ({"parameters": {"betta": 0.5}}, TOP, None, "unknown parameter 'betta'"),
    "unknown parameter of the source": ({"source": {"weight": 1.0}}, SOURCE, None, "unknown parameter 'weight'"),
    "beta 1.5": ({"source": {"beta": 1.5}}, SOURCE, "beta", "must be in [0, 1], got 1.5"),
    "beta nan": ({"source": {"beta": NAN}}, SOURCE, "beta", "must be in [0, 1], got nan"),
    "beta without a value": ({"source": {"beta": []}}, SOURCE, "beta", "is an empty list"),
    "beta in a filter": ({"source": {"beta": ALL}}, SOURCE, "beta", "must be in [0, 1], got 3.0"),
    "beta at the top": ({"source": {"beta": None}, "parameters": {"beta": 7}}, TOP, "beta", "must be in [0, 1]"),
    "beta 0 everywhere": ({"source": {"beta": 0}}, TOP, "beta", "is 0 for every masked tensor"),
    "rank 2.5": ({"source": {"rank": 2.5}}, SOURCE, "rank", "must be a whole number, got 2.5"),
    "rank of the smaller side": ({"source": {"rank": 33}}, "{k}", "rank", "33 exceeds the smaller side of shape [32, "),
    "base_model of nowhere": ({"base_model": "/no/such/folder"}, "/no/such/folder", None, "no such folder"),
    "source of nowhere": ({"models": [{"model": "./none"}]}, "./none", None, "no such folder"),
    "source not on the hub": ({"models": [{"model": "owner/none"}]}, "owner/none", None, "neither a local folder nor"),
    "update": ({"parameters": {"update": "frank"}}, TOP, "update", "must be one of low-rank, dare"),
    "seed": ({"parameters": {"update": "dare", "seed": -3}, "source": {"rank": None}}, TOP, "seed", "must be in [0, 4"),
    "biases without any": ({"parameters": {"biases": True}}, TOP, "biases", "is true, but no masked neuron"),
    "drop_rate": ({"source": {"drop_rate": [0.5, 1.0]}}, SOURCE, "drop_rate", "must be in [0, 1), got 1.0"),
    "rank with dare": ({"parameters": {"update": "dare"}}, TOP, "rank", "has no effect with update: dare"),
    "drop_rate without dare": ({"source": {"drop_rate": 0.5}}, TOP, "drop_rate", "has no effect without update: dare"),
    "seed without dare": ({"parameters": {"seed": 0}}, TOP, "seed", "has no effect without update: dare"),
    "rescale without dare": ({"parameters": {"rescale": True}}, TOP, "rescale", "has no effect without update: dare"),
    "order of full rank": (
        {"parameters": {"order": "mask-then-svd"}, "source": {"rank": [0, 0.0]}},
        TOP,
        "order",
        "has no effect with rank: 0",
    ),
    "order with dare": (
        {"parameters": {"update": "dare", "order": "svd-then-mask"}, "source": {"rank": None}},
        TOP,
        "order",
        "has no effect with update: dare",
    ),
    "update under models": ({"source": {"update": "dare"}}, SOURCE, "update", "has no effect under a model"),
    "source_base under models": ({"source": {"source_base": "x"}}, SOURCE, "source_base", "has no effect under"),
    "source_base of nothing": ({"parameters": {"source_base": " "}}, TOP, "source_base", "' ' is not valid"),
    "source_base of nowhere": ({"parameters": {"source_base": "./none"}}, "./none", None, "no such folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_recipe(mistake: str, pair: Pair) -> None:
    changes, where, field, what = MISTAKES[mistake]
    found = problem(pair.recipe(**changes))
    places = {"source": pair.source, "k": "language_model.model.layers.0.self_attn.k_proj.weight"}
    assert (found.where, found.field) == (where and where.format(**places), field)
    assert what in found.what


def test_a_mistake_ends_the_command_with_one_sentence(pair: Pair, tmp_path: Path) -> None:
    said = one(pair.recipe(source={"beta": 1.5}), tmp_path / "out")
    assert said == f"parameters of {pair.source}: beta: must be in [0, 1], got 1.5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "\nx-a: &a [x, x, x, x]\n" + "".join(f"x-{i}: &{i} [{'*a, ' * 400}]\n" for i in range(200)),
            "more than 100000",
        ),
        ("\nx-a: 2020-13-45\n", "is not a valid timestamp"),
    ],
)
def test_yaml_that_mergekit_cannot_read_is_one_sentence(text: str, said: str, pair: Pair, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "snrf.yml", pair.recipe())
    path.write_text(path.read_text() + text)
    message = one(path, tmp_path / "out")
    assert message.startswith(f"{path}: not valid YAML at line ")
    assert said in message


def test_base_model_is_no_source(pair: Pair, tmp_path: Path) -> None:
    found = problem(pair.recipe(models=[{"model": str(pair.target)}]))
    assert (found.field, "only the base_model itself" in found.what) == ("models", True)
    found = problem(pair.recipe(models=[{"model": f"{pair.target}/"}]))
    assert f"the source is the base_model {pair.target} itself" in found.what
    entries = [{"model": str(pair.source)}, {"model": str(pair.target), "parameters": {"weight": 1}}]
    found = problem(pair.recipe(models=entries))
    assert (found.where, "(weight)" in found.what) == (str(pair.target), True)
    del entries[1]["parameters"]
    merge(pair.recipe(models=entries), tmp_path / "out")


def test_exchanged_models_are_an_error_unless_allowed(pair: Pair) -> None:
    exchanged = pair.recipe(base_model=str(pair.source), models=[{"model": str(pair.target)}])
    found = problem(exchanged)
    assert (found.where, found.field) == (str(pair.source), "base_model")
    assert f"the source {pair.target} reads images" in found.what
    assert "exchange them" in str(found)
    exchanged["parameters"]["allow_family_mismatch"] = True
    draft = plan(exchanged)
    assert draft.problems == []
    assert [f"the source {pair.target} reads images" in warning for warning in draft.warnings] == [True]
    assert plan(pair.recipe()).warnings == []


def test_configuration_without_model_type(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    config = json.loads((target / "config.json").read_text())
    del config["model_type"]
    (target / "config.json").write_text(json.dumps(config))
    found = problem(pair.recipe(base_model=str(target)))
    assert (found.where, found.what) == (str(target), "its config.json has no model_type")


def test_filter_without_effect_is_a_warning(pair: Pair) -> None:
    beta = [{"filter": "qproj", "value": 1.0}, {"filter": "up_proj", "value": 1.0}, {"filter": "*", "value": 0.5}]
    draft = plan(pair.recipe(source={"beta": beta}))
    assert draft.problems == []
    assert draft.warnings == ["filter 'qproj' matches no tensor with masked neurons, so its value is never used"]


STRAYS = {
    "beta: 0": "'beta' at the top of the recipe has no effect; move it under 'parameters:'",
    "masks_sha256: dead": "'masks_sha256' at the top of the recipe has no effect; move it",
    "out_dytpe: float32": "unknown key 'out_dytpe' at the top of the recipe; did you mean 'out_dtype'?",
}


@pytest.mark.parametrize("line", STRAYS)
def test_keys_outside_the_parameters_are_errors(line: str, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "stray.yml"
    path.write_text(f"{yaml.safe_dump(pair.recipe())}\n{line}\n")
    planned = CliRunner().invoke(snrf, ["plan", str(path)])
    for result in (run(path, tmp_path / "out"), planned):
        assert result.exit_code == 1
        assert STRAYS[line] in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_keys_beside_a_model_are_errors(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe()
    recipe["models"][0]["paramters"] = {"beta": 0}
    (tmp_path / "stray.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(snrf, ["plan", str(tmp_path / "stray.yml")])
    assert result.exit_code == 1
    assert "unknown key 'paramters' beside the model" in result.output
    assert "did you mean 'parameters'?" in result.output
