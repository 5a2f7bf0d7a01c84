"""The rules of a recipe: on their own, in a merge that is refused, and as mergekit itself resolves parameters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import TensorGroup
from mergekit.scripts.run_yaml import main as mergekit_yaml
from pair import MODULES, Pair, merge, one, plan
from torch import Tensor

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge import method
from mergekit_snrf.merge.recipe import Recipe, read_recipe


def problems(**changes: Any) -> list[str]:
    recipe = {
        "merge_method": "snrf",
        "base_model": "vlm",
        "models": [{"model": "llm", "parameters": {"beta": 0.25}}],
        "parameters": {"masks": "mask.safetensors"},
        **changes,
    }
    found: list[str] = []
    read_recipe(MergeConfiguration.model_validate({k: v for k, v in recipe.items() if v is not None}), found)
    return found


def recipe(source: dict[str, Any], top: dict[str, Any]) -> Recipe:
    content = {
        "merge_method": "snrf",
        "base_model": "vlm",
        "models": [{"model": "llm", "parameters": source}],
        "parameters": {"masks": "m", **top},
    }
    found: list[str] = []
    read = read_recipe(MergeConfiguration.model_validate(content), found)
    assert read is not None
    assert found == []
    return read


def test_models_of_a_recipe() -> None:
    found = recipe({"beta": 0.25}, {"rank": 3})
    assert (str(found.target), str(found.source)) == ("vlm", "llm")
    assert found.value("masks") == "m"
    assert found.value("order") == "svd-then-mask"
    assert found.value("masks_sha256") == ""
    assert found.value("allow_noop") is False


def test_recipe_without_target_or_source_is_no_recipe() -> None:
    for changes in ({"base_model": None}, {"models": [{"model": "a"}, {"model": "b"}]}):
        content = {"merge_method": "snrf", "base_model": "vlm", "models": [{"model": "llm"}], **changes}
        config = MergeConfiguration.model_validate({k: v for k, v in content.items() if v is not None})
        assert read_recipe(config, []) is None


def test_recipe_of_the_documentation_has_no_problem() -> None:
    """Every parameter, as number, text, gradient and filter."""
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
    assert problems(parameters=top, models=[{"model": "llm"}, {"model": "vlm"}], dtype="bfloat16") == []
    assert problems(models=[{"model": "llm", "parameters": {"beta": filters, "rank": "0"}}]) == []


def test_every_problem_is_listed_in_the_order_of_the_recipe() -> None:
    found = problems(
        base_model=None,
        parameters={"rank": -1, "beta": [0.5, 3], "normalize": True},
        models=[{"model": "a", "parameters": {"masks": "m", "bata": 1}}, {"model": "b", "parameters": {"rank": 0.5}}],
        tokenizer_source="base",
    )
    starts = [
        "'tokenizer_source' is not supported",
        "base_model is missing",
        "'models' must list exactly one source besides the base_model, got a, b",
        "parameter 'rank' in parameters: rank: must be at",
        "parameter 'beta' in parameters: beta: must be in [0, 1]",
        "unknown parameter 'normalize' in parameters; snrf knows masks",
        "parameter 'masks' is written under the model a, where mergekit ignores it",
        "unknown parameter 'bata' in the parameters of a; did you mean 'beta'?",
        "parameter 'rank' in the parameters of b: rank must be a whole number, got 0.5",
    ]
    assert [problem[: len(start)] for problem, start in zip(found, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("t", "expected"), [(0.0, Fusion(0.0, 2)), (0.25, Fusion(0.25, 4)), (0.5, Fusion(0.5, 6)), (1.0, Fusion(1.0, 10))]
)
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
    with pytest.raises(SnrfError, match=r"^layers\.0\.k: Input should be a valid number"):
        bad.fusion("layers.0.k", 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_plan_resolves_parameters_as_mergekit_does(
    seed: int, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random gradients and filters at both places: what the plan says is what mergekit hands to the kernel."""
    generator = np.random.default_rng(seed)
    names = ["attn", "k_proj", "layers.1.", "mlp", "up_proj", "*"]

    def number(kind: str) -> Any:
        return int(generator.integers(0, 9)) if kind == "rank" else round(0.999 * float(generator.random()), 3)

    def setting(kind: str) -> Any:
        shape = generator.integers(3)
        if shape == 0:
            return number(kind)
        if shape == 1:
            return [number(kind) for _ in range(generator.integers(1, 5))]
        chosen = generator.choice(names, size=2, replace=False)
        return [{"filter": str(name), "value": number(kind)} for name in chosen] + [{"value": number(kind)}]

    kinds = ("beta", "rank")
    placed = {place: {k: setting(k) if generator.random() < 0.7 else None for k in kinds} for place in "st"}
    recipe = pair.recipe(source=placed["s"], parameters=placed["t"])
    handed: dict[str, Fusion] = {}
    inner = method.merge_group

    def recorded(group: TensorGroup, **parameters: Any) -> Tensor:
        if group.non_base:
            (source,) = group.non_base
            handed[group.metadata.name or ""] = Fusion(**{kind: parameters[kind][source.id] for kind in kinds})
        return inner(group, **parameters)

    monkeypatch.setattr(method, "merge_group", recorded)
    planned = plan(recipe)
    assert planned.problems == []
    merge(recipe, tmp_path / "out")
    assert handed == {edit.target_name: edit.fusion for edit in planned.edits}
    assert handed


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "empty base_model": ({"base_model": ""}, "base_model is missing; set it to the vision-language model"),
    "source without a name": ({"models": [{"model": ""}]}, "a model under 'models' has no name; write a folder or a"),
    "mask without a name": ({"parameters": {"masks": ""}}, "the path of a file is empty; give a path, or hf://"),
    "no base_model": ({"base_model": None}, "base_model is missing; set it to the vision-language model"),
    "two sources": (
        {"models": [{"model": "a/one"}, {"model": "a/two"}]},
        "'models' must list exactly one source besides the base_model, got a/one, a/two",
    ),
    "slices": (
        {"models": None, "slices": [{"sources": [{"model": "a/one", "layer_range": [0, 3]}]}]},
        "'slices' is not supported by snrf; list the source under 'models'",
    ),
    "modules": (
        {"models": None, "modules": {"text_decoder": {"models": [{"model": "a/one"}]}}},
        "'modules' is not supported by snrf; list the source under 'models'",
    ),
    "tokenizer_source": ({"tokenizer_source": "base"}, "'tokenizer_source' is not supported by snrf: embeddings"),
    "tokenizer_source union": ({"tokenizer_source": "union"}, "'tokenizer_source' is not supported by snrf"),
    "tokenizer": ({"tokenizer": {"source": "base"}}, "'tokenizer' is not supported by snrf: embeddings"),
    "chat_template": ({"chat_template": "nonsense"}, "chat_template: 'nonsense' is neither Jinja text nor the name"),
    "dtype": ({"dtype": "bf16"}, "dtype: 'bf16' is not one of float16, bfloat16, float32, float64"),
    "dtype int64": ({"dtype": "int64"}, "dtype: 'int64' is not one of float16"),
    "out_dtype": ({"out_dtype": "int8"}, "out_dtype: 'int8' is not one of float16"),
    "no masks": ({"parameters": {"masks": None}}, "parameter 'masks' is missing; write the path of a mask file"),
    "masks not text": ({"parameters": {"masks": 5}}, "parameter 'masks' in parameters: 5 is not valid"),
    "masks by layer": (
        {"parameters": {"masks": ["a.safetensors", "b.safetensors"]}},
        "parameter 'masks' in parameters must be one plain value, not a gradient or a list of filters",
    ),
    "masks by filter": (
        {"parameters": {"masks": [{"filter": "mlp", "value": "a.safetensors"}, {"value": "b.safetensors"}]}},
        "parameter 'masks' in parameters must be one plain value",
    ),
    "order by layer": (
        {"parameters": {"order": ["svd-then-mask"]}},
        "parameter 'order' in parameters must be one plain",
    ),
    "masks missing": (
        {"parameters": {"masks": "no/such.safetensors"}},
        "no/such.safetensors: no such file, looked for ",
    ),
    "masks_sha256 not text": (
        {"parameters": {"masks_sha256": 1234}},
        "parameter 'masks_sha256' in parameters: 1234 is not valid",
    ),
    "unknown parameter": (
        {"parameters": {"betta": 0.5}},
        "unknown parameter 'betta' in parameters; did you mean 'beta'?",
    ),
    "unknown parameter of the source": (
        {"source": {"weight": 1.0}},
        "/source; snrf knows masks, masks_sha256, order, update, drop_rate, seed, rescale, biases, source_base, ",
    ),
    "order under models": (
        {"source": {"order": "mask-then-svd"}},
        "parameter 'order' is written under the model",
    ),
    "order": ({"parameters": {"order": "svd"}}, "order: must be one of svd-then-mask, mask-then-svd, got 'svd'"),
    "allow_noop": ({"parameters": {"allow_noop": "perhaps"}}, "parameter 'allow_noop' in parameters: 'perhaps' is not"),
    "beta 1.5": ({"source": {"beta": 1.5}}, "beta: must be in [0, 1], got 1.5"),
    "beta -0.1": ({"source": {"beta": -0.1}}, "beta: must be in [0, 1], got -0.1"),
    "beta nan": ({"source": {"beta": float("nan")}}, "beta: must be in [0, 1], got nan"),
    "beta true": ({"source": {"beta": True}}, "parameter 'beta' in the parameters of"),
    "beta text": ({"source": {"beta": "half"}}, "'half' is not valid"),
    "beta without a value": ({"source": {"beta": []}}, "is an empty list; give a value, or remove it"),
    "beta in a gradient": ({"source": {"beta": [0.5, 2]}}, "beta: must be in [0, 1], got 2"),
    "beta in a filter": (
        {"source": {"beta": [{"filter": "attn", "value": [0.5, 3.0]}, {"value": 0.5}]}},
        "beta: must be in [0, 1], got 3.0",
    ),
    "beta at the top level": (
        {"source": {"beta": None}, "parameters": {"beta": 7}},
        "'beta' in parameters: beta: must be",
    ),
    "rank 2.5": ({"source": {"rank": 2.5}}, "rank must be a whole number, got 2.5"),
    "rank -1": ({"source": {"rank": -1}}, "rank: must be at least 0, got -1"),
    "rank inf": ({"source": {"rank": float("inf")}}, "rank must be a whole number, got inf"),
    "rank nan": ({"source": {"rank": [1, float("nan")]}}, "rank must be a whole number, got nan"),
    "rank true": ({"source": {"rank": True}}, "parameter 'rank' in the parameters of"),
    "rank of the smaller side": (
        {"source": {"rank": 33}},
        "0.self_attn.k_proj.weight: rank: 33 exceeds the smaller side of shape [32, 64]; use at most 32",
    ),
    "beta 0 everywhere": (
        {"source": {"beta": 0}},
        "parameter 'beta' is 0 for every masked tensor, so the merge would change nothing; give a beta above 0",
    ),
    "base_model of nowhere": (
        {"base_model": "/no/such/folder"},
        "/no/such/folder: no such folder; give the folder of a checkpoint, or a hub id",
    ),
    "source of nowhere": ({"models": [{"model": "./none"}]}, "./none: no such folder; give the folder of a checkpoint"),
    "source not on the hub": (
        {"models": [{"model": "owner/none"}]},
        "owner/none: neither a local folder nor a model that the hub gives",
    ),
}


@pytest.mark.parametrize("mistake", RECIPES)
def test_mistake_in_the_recipe(mistake: str, pair: Pair, tmp_path: Path) -> None:
    changes, message = RECIPES[mistake]
    assert message in one(pair.recipe(**changes), tmp_path / "out")


def test_base_model_is_no_source(pair: Pair, tmp_path: Path) -> None:
    message = one(pair.recipe(models=[{"model": str(pair.target)}]), tmp_path / "out")
    assert message.startswith("'models' must list exactly one source besides the base_model, got only the base_model")
    message = one(pair.recipe(models=[{"model": f"{pair.target}/"}]), tmp_path / "out")
    assert f"the source is the base_model {pair.target} itself" in message
    entries = [{"model": str(pair.source)}, {"model": str(pair.target), "parameters": {"weight": 1}}]
    assert "(weight) have no effect; move them to the source" in one(pair.recipe(models=entries), tmp_path / "out")
    del entries[1]["parameters"]
    merge(pair.recipe(models=entries), tmp_path / "out")


def test_masks_under_models(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(parameters={"masks": None}, source={"masks": str(pair.mask)})
    assert one(recipe, tmp_path / "out") == (
        f"parameter 'masks' is written under the model {pair.source}, where mergekit ignores it; "
        "move it to the recipe's top-level parameters"
    )


def test_exchanged_models_are_a_warning(pair: Pair) -> None:
    exchanged = pair.recipe(base_model=str(pair.source), models=[{"model": str(pair.target)}])
    (warning,) = plan(exchanged).warnings
    assert warning.startswith(f"{pair.source}: the base_model, which gains and gives the output its shape, is a text")
    assert f"the source {pair.target} is the one that reads images; exchange them unless" in warning
    assert plan(pair.recipe()).warnings == []


def test_configuration_without_model_type(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    config = json.loads((target / "config.json").read_text())
    del config["model_type"]
    (target / "config.json").write_text(json.dumps(config))
    message = one(pair.recipe(base_model=str(target)), tmp_path / "out")
    assert message.startswith(f"{target}: its config.json has no model_type; get the file again")


def test_filter_without_effect_is_a_warning(pair: Pair) -> None:
    beta = [{"filter": "qproj", "value": 1.0}, {"filter": "up_proj", "value": 1.0}, {"filter": "*", "value": 0.5}]
    planned = plan(pair.recipe(source={"beta": beta}))
    assert planned.problems == []
    assert planned.warnings == ["filter 'qproj' matches no tensor with masked neurons, so its value is never used"]


STRAYS = {
    "beta: 0": "'beta' stands at the top of the recipe, where mergekit ignores it; move it under 'parameters:'",
    "masks_sha256: dead": "'masks_sha256' stands at the top of the recipe, where mergekit ignores it",
    "out_dytpe: float32": "unknown key 'out_dytpe' at the top of the recipe; did you mean 'out_dtype'?",
}


@pytest.mark.parametrize("line", STRAYS)
def test_keys_outside_the_parameters_are_errors(line: str, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "stray.yml"
    path.write_text(f"{yaml.safe_dump(pair.recipe())}\n{line}\n")
    for command in ([mergekit_yaml, str(path), str(tmp_path / "out")], [snrf, "plan", str(path)]):
        result = CliRunner().invoke(command[0], command[1:])
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
