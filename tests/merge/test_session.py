"""Merges as sessions: from Python, in the stages of mergekit-multi, and judged by what they did."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import read, write
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import main as mergekit_multi
from pair import Pair, assert_same, merge, one, run, source_name, target_name, write_recipe

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.merge import install, method
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.neurons.sites import Site


def test_the_callers_configuration_stays_as_it_is(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MergeConfiguration.model_validate(pair.recipe())
    before = config.model_copy(deep=True)
    for name in ("first", "second"):
        run_merge(config, str(tmp_path / name), MergeOptions(quiet=True))
        assert config == before
    assert_same(read(tmp_path / "first"), read(tmp_path / "second"))
    assert method.SESSIONS == {}
    # What it wrote beside the weights is a recipe, without the folders of this machine.
    assert str(pair.folder) not in (tmp_path / "first" / "mergekit_config.yml").read_text()
    monkeypatch.chdir(pair.folder)
    again = merge(tmp_path / "first" / "mergekit_config.yml", tmp_path / "again")
    assert_same(again, read(tmp_path / "first"))
    assert_same(again, merge(pair.recipe(), tmp_path / "command"))


def test_another_method_is_left_to_mergekit(pair: Pair, tmp_path: Path) -> None:
    config = MergeConfiguration.model_validate(
        {"merge_method": "passthrough", "models": [{"model": str(pair.source)}], "dtype": "bfloat16"}
    )
    run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert_same(read(tmp_path / "out"), read(pair.source))


def run_stages(recipe: Path, folder: Path) -> Result:
    install()
    arguments = [recipe, "--intermediate-dir", folder / "stages", "--out-path", folder / "out", "--quiet"]
    return CliRunner().invoke(mergekit_multi, [*map(str, arguments)])


def test_stages_of_mergekit_multi(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage merges into the output of another; masks lie beside the recipe."""
    shutil.copy(pair.mask, tmp_path / "mask.safetensors")
    stages = [
        {**pair.recipe(parameters={"masks": "mask.safetensors"}), "name": "first"},
        {**pair.recipe(base_model="first", source={"beta": 0.25}, parameters={"masks": "mask.safetensors"})},
    ]
    recipe = tmp_path / "multi.yml"
    recipe.write_text("---\n".join(yaml.safe_dump(stage) for stage in stages))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = run_stages(recipe, tmp_path)
    assert done.exit_code == 0, done.output
    first = merge(pair.recipe(), tmp_path / "expected")
    assert_same(read(tmp_path / "stages" / "first"), first)
    second = pair.recipe(base_model=str(tmp_path / "expected"), source={"beta": 0.25})
    assert_same(read(tmp_path / "out"), merge(second, tmp_path / "second"))
    assert yaml.safe_load((tmp_path / "stages" / "first" / "mergekit_config.yml").read_text())["merge_method"] == "snrf"


def test_a_mistake_in_a_stage_is_a_sentence(pair: Pair, tmp_path: Path) -> None:
    stages = [{**pair.recipe(source={"beta": 2}), "name": "first"}, pair.recipe(base_model="first")]
    recipe = tmp_path / "multi.yml"
    recipe.write_text("---\n".join(yaml.safe_dump(stage) for stage in stages))
    done = run_stages(recipe, tmp_path)
    assert isinstance(done.exception, SystemExit)
    assert "beta: must be in [0, 1], got 2" in done.stderr
    assert not (tmp_path / "stages" / "first").exists()


def test_names_and_anchors_of_a_recipe_are_allowed(pair: Pair, tmp_path: Path) -> None:
    text = f"name: mine\nx-strength: &beta 0.5\n{yaml.safe_dump(pair.recipe(source={'beta': None}))}"
    recipe = tmp_path / "snrf.yml"
    recipe.write_text(text.replace("rank: 4", "rank: 4\n    beta: *beta"))
    assert_same(merge(recipe, tmp_path / "out"), merge(pair.recipe(), tmp_path / "expected"))
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == portable(recipe.read_text())


@pytest.fixture
def equal(pair: Pair, tmp_path: Path) -> Pair:
    """A source whose decoder is the target's."""
    folder = tmp_path / "equal"
    shutil.copytree(pair.source, folder)
    target, source = read(pair.target), read(folder)
    for site in pair.neurons:
        source[source_name(site)] = target[target_name(site)]
    write(folder, source)
    return Pair(pair.folder, pair.target, folder, pair.mask, pair.neurons)


@pytest.mark.parametrize("how", ["merge", "patch", "lora", "plan"])
def test_an_update_of_zero_is_an_error(how: str, equal: Pair, tmp_path: Path) -> None:
    said = f"the update of all {len(equal.neurons)} edited tensors is zero"
    if how == "merge":
        assert one(equal.recipe(), tmp_path / "out", "--out-shard-size", "20000").startswith(said)
        return
    recipe = write_recipe(tmp_path / "snrf.yml", equal.recipe())
    out = [str(tmp_path / "out")] if how != "plan" else ["--certify"]
    result = CliRunner().invoke(snrf, [how, str(recipe), *out, "--quiet"])
    assert result.exit_code == 1
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_an_update_of_zero_on_purpose(equal: Pair, tmp_path: Path) -> None:
    assert_same(merge(equal.recipe(parameters={"allow_noop": True}), tmp_path / "out"), read(equal.target))


def test_some_updates_of_zero_are_a_warning(
    equal: Pair, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, other = read(equal.source), read(pair.source)
    name = source_name(Site(0, "fwd.up"))
    write(equal.source, {**source, name: other[name]})
    with caplog.at_level(logging.WARNING):
        merge(equal.recipe(), tmp_path / "out")
    count = len(equal.neurons)
    said = f"{count - 1} of {count} edited tensors have an update of zero"
    assert next(record.message for record in caplog.records if "update of zero" in record.message).startswith(said)
    recipe = write_recipe(tmp_path / "snrf.yml", equal.recipe())
    result = CliRunner().invoke(snrf, ["plan", str(recipe), "--certify", "--quiet"])
    assert result.exit_code == 0
    assert f"warning: {said}" in result.output


COPIED, EDITED = "vision_tower.vision_model.post_layernorm.weight", target_name(Site(0, "fwd.up"))


@pytest.mark.parametrize(
    ("role", "name", "stored", "value", "key"),
    [
        ("target", COPIED, torch.float32, 1e5, "out_dtype"),
        ("target", EDITED, torch.bfloat16, 1e20, "dtype"),
        ("source", source_name(Site(0, "fwd.up")), torch.bfloat16, 1e20, "dtype"),
    ],
)
def test_a_cast_that_makes_weights_infinite(
    role: str, name: str, stored: torch.dtype, value: float, key: str, pair: Pair, tmp_path: Path
) -> None:
    folder = tmp_path / role
    shutil.copytree(getattr(pair, role), folder)
    tensors = read(folder)
    tensors[name] = tensors[name].to(stored)
    tensors[name].view(-1)[-1] = value
    write(folder, tensors)
    changes: dict[str, Any] = {"base_model": str(folder)} if role == "target" else {"models": [{"model": str(folder)}]}
    message = one(pair.recipe(**changes, **{key: "float16"}), tmp_path / "out")
    assert re.fullmatch(
        rf"{re.escape(name)}: holds weights up to [\d.e+]+, which are infinite in float16; merge in a wider dtype .*",
        message,
    )
    if name != COPIED:
        recipe = write_recipe(tmp_path / "snrf.yml", pair.recipe(**changes, **{key: "float16"}))
        result = CliRunner().invoke(snrf, ["plan", str(recipe), "--certify", "--quiet"])
        assert (result.exit_code, name in result.output) == (1, True)


@pytest.mark.parametrize(("key", "value"), [("dtype", "float32"), ("out_dtype", "float16")])
def test_only_the_dtype_of_the_configuration_changes(key: str, value: str, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"]["torch_dtype"] = "bfloat16"
    config["rope_scaling"] = {"type": "mrope", "kept": [1, 2]}
    text = json.dumps(config, indent=1)
    (target / "config.json").write_text(text)
    merge(pair.recipe(base_model=str(target), **{key: value}), tmp_path / "out")
    written = (tmp_path / "out" / "config.json").read_text()
    assert written == text.replace('"bfloat16"', f'"{value}"')
    assert json.loads(written)["text_config"]["torch_dtype"] == value


def test_side_files_in_folders_are_copied(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    merge(pair.recipe(base_model=str(target)), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"


def test_an_error_of_the_python_api_has_its_parts(pair: Pair, tmp_path: Path) -> None:
    config = MergeConfiguration.model_validate(pair.recipe(source={"rank": 99}))
    with pytest.raises(SnrfError, match="exceeds the smaller side") as raised:
        run_merge(config, str(tmp_path / "out"), MergeOptions())
    assert raised.value.field == "rank"
    assert not (tmp_path / "out").exists()


def test_a_failed_merge_leaves_no_session(pair: Pair, tmp_path: Path) -> None:
    run(pair.recipe(source={"beta": 2}), tmp_path / "out")
    assert method.SESSIONS == {}
    with pytest.raises(SnrfError, match="is running"):
        method.find_session("mask.safetensors")
