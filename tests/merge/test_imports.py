"""Our commands load what they use, and mergekit works as ever in the same process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkpoints import read
from pair import Pair, assert_same, merge, write_recipe

SCRIPT = """
import sys
from click.testing import CliRunner
from mergekit_snrf.cli.snrf import main

recipe, folder = sys.argv[1:]
for arguments in (["plan", recipe], ["patch", recipe, f"{folder}/patched", "--quiet"]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
heavy = {"peft", "scipy", "networkx", "transformers.modeling_utils", "mergekit.architecture"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

from mergekit_snrf.merge import install

install()
from mergekit.common import ModelReference, get_auto_cls
from mergekit.scripts.run_yaml import main as mergekit_yaml

result = CliRunner().invoke(mergekit_yaml, [recipe, f"{folder}/merged", "--quiet"])
assert result.exit_code == 0, (result.output, result.exception)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
assert get_auto_cls("LlamaForCausalLM") is AutoModelForCausalLM
assert get_auto_cls("LlavaForConditionalGeneration") is AutoModelForImageTextToText
assert isinstance(ModelReference.parse(f"{folder}/merged").config(), PretrainedConfig)
"""


def test_a_plan_and_a_patch_load_no_modelling_code(pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", pair.recipe())
    subprocess.run([sys.executable, "-c", SCRIPT, str(recipe), str(tmp_path)], check=True)
    expected = merge(recipe, tmp_path / "expected")
    for name in ("patched", "merged"):
        assert_same(read(tmp_path / name), expected)
