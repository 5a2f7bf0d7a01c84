"""What a folder has before it is shared: hub ids, a license, no paths of this machine; and what ``snrf card`` finds."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import make_source, make_target, read
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from made_moments import sizes_of, write_random_moments
from outputs import done, hashes
from pair import assert_same, merge
from transformers import AutoModelForCausalLM

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.merge.cards import Origin, common_license
from mergekit_snrf.neurons.maskfile import ModelProvenance, Provenance, write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

TARGET, SOURCE = "5" * 40, "7" * 40


def place(cache: Path, name: str, commit: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def card(*words: str | Path) -> Result:
    return CliRunner().invoke(snrf, ["card", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models in a cache of the hub, a mask and profile.yml made here, and the recipe with whole paths."""
    folder = tmp_path_factory.mktemp("sharing")
    target, source = place(folder, "owner/vlm", TARGET), place(folder, "owner/llm", SOURCE)
    make_target(target, "llava", "hub")
    make_source(source, "llama")
    (target / "README.md").write_text("---\nlicense: mit\n---\n# Target\n")
    (source / "README.md").write_text("---\nlicense:\n- Apache-2.0\n---\n# Source\n")
    neurons = NeuronSet({Site(1, "attn.q"): torch.arange(64) < 7, Site(2, "fwd.down"): torch.arange(96) < 5})
    (folder / "made").mkdir()
    provenance = Provenance(target=ModelProvenance(path=str(target)), source=ModelProvenance(path="owner/llm"))
    write_mask(folder / "made/mask.safetensors", neurons, provenance)
    (folder / "data.jsonl").write_text("{}\n")
    probes = {"dataset": str(folder / "data.jsonl"), "question": "question"}
    profile = {"target": {"model": str(target), "probes": probes}, "source": {"model": "owner/llm", "probes": probes}}
    (folder / "made/profile.yml").write_text(yaml.safe_dump(profile))
    (folder / "snrf.yml").write_text(
        f"merge_method: snrf\nbase_model: {target}\nmodels:\n  - model: {source}\n"
        f"    parameters: {{beta: 0.5, rank: 3}}\nparameters: {{masks: {folder}/made/mask.safetensors}}\n"
    )
    return folder


@pytest.fixture
def merged(folder: Path, tmp_path: Path) -> Path:
    return done("patch", folder / "snrf.yml", tmp_path / "merged")


@pytest.fixture
def evaluated(merged: Path) -> Path:
    """With an evaluation; what fills one is tested with the comparisons."""
    page = merged / "README.md"
    page.write_text(page.read_text().replace("## To make it again", "## Evaluation\n\nGood.\n\n## To make it again"))
    return merged


def parsed(path: Path) -> ModelCard:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelCard.load(path)


def test_card_has_what_the_hub_reads(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("merged", "lora"):
        if name == "merged":
            merge(folder / "snrf.yml", tmp_path / name)
        else:
            done("lora", folder / "snrf.yml", tmp_path / name)
        read = parsed(tmp_path / name / "README.md")
        data = read.data.to_dict()
        assert data["license"] == "apache-2.0"
        assert data["base_model"] == ["owner/vlm", "owner/llm"]
        assert data["base_model_relation"] == ("merge" if name == "merged" else "adapter")
        assert not caplog.records
        text = (tmp_path / name / "README.md").read_text()
        assert f"\n- owner/vlm  # revision {TARGET}\n- owner/llm  # revision {SOURCE}\n" in text
        assert "\n# vlm with an update from llm" in text
        headings = re.findall("^## (.*)$", text, re.MULTILINE)
        used = ["Intended use", "What was changed", "Neurons", "Limitations", "License", "To make it again"]
        assert headings == used
        recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert recipe["base_model"] == f"owner/vlm@{TARGET}"
        assert recipe["models"][0]["model"] == f"owner/llm@{SOURCE}"
        assert recipe["parameters"]["masks"] == "mask.safetensors"
        for file in (tmp_path / name).iterdir():
            assert str(folder).encode() not in file.read_bytes(), file
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/vlm", TARGET)


def test_recipe_beside_its_mask_makes_the_merge_again(folder: Path, merged: Path, tmp_path: Path) -> None:
    """From the hub's cache, by the commands of the page that lies beside them."""
    result = card(merged, "--with-mask", folder / "made/mask.safetensors")
    assert result.exit_code == 0, result.output
    assert sorted(hashes(merged / "snrf")) == ["README.md", "mask.safetensors", "profile.yml", "snrf.yml"]
    assert (merged / "snrf/README.md").read_text() == (
        "    snrf-profile profile.yml mask.safetensors    # makes the mask again\n"
        "    mergekit-yaml snrf.yml merged/    # makes this model again\n"
    )
    profile = yaml.safe_load((merged / "snrf/profile.yml").read_text())
    assert profile["target"]["model"] == f"owner/vlm@{TARGET}"
    assert profile["target"]["probes"]["dataset"] == "data.jsonl"
    done("patch", merged / "snrf/snrf.yml", tmp_path / "again", "--transformers-cache", str(folder))
    assert_same(read(tmp_path / "again"), read(merged))
    # The mask says for itself where it was made; and a merge with its files is still one that may be replaced.
    problem = card(merged)
    assert f"local paths: snrf/mask.safetensors holds {folder}" in problem.output
    assert problem.exit_code == 1
    done("patch", folder / "snrf.yml", merged, "--overwrite")
    assert not (merged / "snrf").exists()


def test_moments_are_not_copied(folder: Path, tmp_path: Path) -> None:
    moments = folder / "made/mask.moments.safetensors"
    write_random_moments(moments, sizes_of(3, 64, 96))
    text = (folder / "snrf.yml").read_text().replace("beta: 0.5, rank: 3", "beta: 1")
    (tmp_path / "regmean.yml").write_text(re.sub("masks: .*}", f"update: regmean, moments: {moments}}}", text))
    merged = done("patch", tmp_path / "regmean.yml", tmp_path / "merged")
    assert "Only what the probes to keep show is protected." in (merged / "README.md").read_text()
    assert card(merged, "--with-mask", moments).exit_code == 0
    assert sorted(hashes(merged / "snrf")) == ["README.md", "profile.yml", "snrf.yml"]
    page = (merged / "snrf/README.md").read_text()
    assert page.startswith("    snrf-profile profile.yml mask.safetensors    # makes the moments again\n")


def test_another_mask_is_not_copied(folder: Path, merged: Path, tmp_path: Path) -> None:
    write_mask(tmp_path / "other.safetensors", NeuronSet({}))
    result = card(merged, "--with-mask", tmp_path / "other.safetensors")
    assert result.exit_code == 1
    assert "other.safetensors: is not the file whose sha256 the card has" in result.output
    assert not (merged / "snrf").exists()


def test_complete_folder_is_ready(evaluated: Path) -> None:
    result = card(evaluated)
    assert result.output == "weights and configuration: ok\ncard: ok\nlocal paths: ok\n"
    assert result.exit_code == 0


def faults(folder: Path) -> Iterator[tuple[str, str]]:
    """Break a folder in one way after another; yield the line that says so."""
    page, config = folder / "README.md", folder / "config.json"
    whole, written = page.read_text(), config.read_text()
    for old, new, line in (
        ("license: apache-2.0\n", "", "card: no license"),
        ("license: apache-2.0\n", "license: other\n", "card: license: other needs license_name"),
        (r"base_model:\n- owner/vlm.*\n- owner/llm.*\n", "", "card: no hub ids under base_model"),
        ("- owner/llm  ", "- llm  ", "card: no hub ids under base_model"),
        ("## Evaluation", "### Evaluation", "card: no evaluation"),
        ("Good.", "Good, see ~/notes.txt.", "local paths: README.md holds ~/notes.txt: remove it"),
        ("Good.", r"See C:\\Users\\me.", r"local paths: README.md holds C:\Users: remove it"),
    ):
        page.write_text(re.sub(old, new, whole, count=1))
        yield "README.md", line
    page.write_text(whole)
    content = json.loads(written)
    for key, value, line in (
        ("_name_or_path", f"{Path(__file__).parents[1]}/gone", "local paths: config.json holds "),
        ("text_config", {**content["text_config"], "rope_parameters": 3}, "weights and configuration: "),
    ):
        config.write_text(json.dumps({**content, key: value}))
        yield "config.json", line
    config.write_text(written)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    yield "model.safetensors", "weights and configuration: "
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    yield "index", "the index names this shard, but the file is missing"


def test_faults_are_found(evaluated: Path) -> None:
    for where, line in faults(evaluated):
        result = card(evaluated)
        assert result.exit_code == 1, (where, line)
        (found,) = (one for one in result.output.splitlines() if not one.endswith(": ok"))
        assert line in found, (where, line)


def test_adapter_is_checked(folder: Path, tmp_path: Path) -> None:
    adapter = done("lora", folder / "snrf.yml", tmp_path / "adapter")
    assert card(adapter).output.startswith("weights and configuration: ok\ncard: no evaluation: ")
    config = adapter / "adapter_config.json"
    written = config.read_text()
    config.write_text(written.replace('"owner/vlm"', '"/home/me/vlm"'))
    assert "adapter_config.json holds /home/me/vlm: give snrf lora --base-model OWNER/REPO" in card(adapter).output
    config.write_text(written.replace('"LORA"', '"OTHER"'))
    assert "adapter_config.json: PEFT cannot read it" in card(adapter).output
    config.write_text(written)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors: cannot be read" in card(adapter).output


def test_license_is_stated_once(folder: Path, tmp_path: Path) -> None:
    """Missing for local models; what is typed takes the place of what was there."""
    for name in ("vlm", "llm"):
        origin = place(folder, f"owner/{name}", TARGET if name == "vlm" else SOURCE)
        shutil.copytree(origin, tmp_path / name, ignore=shutil.ignore_patterns("README.md"))
    config = json.loads((tmp_path / "vlm/config.json").read_text())
    (tmp_path / "vlm/config.json").write_text(json.dumps({**config, "_name_or_path": "owner/parent"}))
    recipe = re.sub(r"model: .*/models--.*\n", "model: MODEL\n", (folder / "snrf.yml").read_text())
    recipe = recipe.replace("MODEL", str(tmp_path / "vlm"), 1).replace("MODEL", str(tmp_path / "llm"))
    (tmp_path / "snrf.yml").write_text(recipe)
    merged = done("patch", tmp_path / "snrf.yml", tmp_path / "merged")
    page = merged / "README.md"
    assert parsed(page).data.license is None
    assert parsed(page).data.base_model == ["owner/parent"]
    assert "`vlm` with an update from `llm`" in page.read_text()
    assert "**This model: no license is stated.** State one with `snrf card FOLDER --license ID`." in page.read_text()
    for license in ("llama3.1", "apache-2.0"):
        before = page.read_text()
        result = card(merged, "--license", license)
        assert result.exit_code == 0, result.output
        assert parsed(page).data.license == license
        assert page.read_text().count("icense: ") == 1
        assert f"\nThis model: `{license}`.\n" in page.read_text()
        assert len(before.splitlines()) in (len(page.read_text().splitlines()), len(page.read_text().splitlines()) - 1)
    refused = card(merged, "--license", "Apache 2.0\nx: 1")
    assert "--license: 'Apache 2.0\\nx: 1' is not the id of a license" in refused.output
    assert page.read_text().count("icense: ") == 1


@pytest.mark.parametrize(
    ("licenses", "common"),
    [
        (["mit", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "bsd-3-clause", "cc0-1.0"], "apache-2.0"),
        (["apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["llama3.1", "llama3.1"], "llama3.1"),
        (["llama3.1", "gemma"], None),
        (["apache-2.0", None], None),
    ],
)
def test_stricter_license_holds(licenses: list[str | None], common: str | None) -> None:
    models = [Origin("model", license={"license": one} if one else {}) for one in licenses]
    assert common_license(models).get("license") == common


def test_code_of_the_cards_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is pasted in the folder: a pipeline that answers, and an adapter that loads its target."""
    make_source(tmp_path / "one", "llama", dtype=torch.float32)
    make_source(tmp_path / "two", "llama", seed=9, dtype=torch.float32)
    (tmp_path / "snrf.yml").write_text(
        f"merge_method: snrf\nbase_model: {tmp_path}/one\nmodels: [{{model: {tmp_path}/two}}]\n"
        f"parameters: {{masks: {folder}/made/mask.safetensors}}\n"
    )
    for command in ("patch", "lora"):
        monkeypatch.chdir(done(command, tmp_path / "snrf.yml", tmp_path / command))
        code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, object] = {}
        printed: list[object] = []
        exec(code, names | {"print": printed.append}, names)
        if command == "patch":
            (answer,) = printed
            assert answer[0]["generated_text"][-1]["role"] == "assistant"
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "patch", dtype=torch.float32)(**inputs).logits
        adapted = names["model"](**inputs).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)(**inputs).logits
    torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, whole, rtol=1e-3, atol=1e-3)
    assert os.getcwd().endswith("lora")
