"""Our commands load what they use, and mergekit works as ever in the same process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkpoints import SOURCE_OF, make_source, read
from pair import Pair, assert_same, merge, write_recipe

SCRIPT = """
import sys
from click.testing import CliRunner
from mergekit_snrf.cli.snrf import main

recipe, folder, mask, text_recipe = sys.argv[1:]
result = CliRunner().invoke(main, ["mask", "show", mask])
assert result.exit_code == 0, result.output
assert "torch" not in sys.modules
commands = [["plan", recipe], ["patch", recipe, f"{folder}/patched", "--quiet"]]
for arguments in [*commands, ["lora", text_recipe, f"{folder}/adapter", "--quiet"]]:
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
    for name, seed in (("one", 1), ("other", 2)):
        make_source(tmp_path / name, SOURCE_OF["llava"], seed=seed)
    models = [{"model": str(tmp_path / "one"), "parameters": {"rank": 4}}]
    texts = write_recipe(tmp_path / "text.yml", pair.recipe(base_model=str(tmp_path / "other"), models=models))
    subprocess.run([sys.executable, "-c", SCRIPT, recipe, tmp_path, pair.mask, texts], check=True)
    expected = merge(recipe, tmp_path / "expected")
    for name in ("patched", "merged"):
        assert_same(read(tmp_path / name), expected)
