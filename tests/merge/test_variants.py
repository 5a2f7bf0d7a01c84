"""Every variant of the update as a recipe: `mergekit-yaml` against numpy, `snrf patch` and `snrf lora` against it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import example_inputs, load, make_source, make_target, read, write
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from pair import MODULES, assert_same, make_neurons, merge, one, problem, recorded_reads, same_bits, write_recipe
from peft import PeftModel
from torch import Tensor

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import Site

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Models:
    """A target with biases, its source, the source's base (another layout, so other names), and a mask."""

    folder: Path
    neurons: NeuronSet

    def recipe(self, *, source: dict[str, Any] | None = None, top: dict[str, Any] | None = None) -> dict[str, Any]:
        parameters = {"masks": str(self.folder / "mask.safetensors"), **(top or {})}
        if parameters.get("source_base") is True:
            parameters["source_base"] = str(self.folder / "base")
        return {
            "merge_method": "snrf",
            "base_model": str(self.folder / "target"),
            "models": [{"model": str(self.folder / "source"), "parameters": {"beta": 0.5, **(source or {})}}],
            "parameters": parameters,
        }


PREFIXES = {"target": "model.layers", "source": "model.layers", "base": "model.language_model.layers"}


def make_models(folder: Path, dtype: torch.dtype) -> Models:
    make_target(folder / "target", "qwen2_5_vl", "hub", dtype=dtype)
    make_source(folder / "source", "qwen2", dtype=dtype)
    make_target(folder / "base", "qwen2_5_vl", "nested", dtype=dtype, seed=9)
    neurons = make_neurons()
    write_mask(folder / "mask.safetensors", neurons)
    return Models(folder, neurons)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("float32"), torch.float32)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("bfloat16"), torch.bfloat16)


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dare": {"top": {"update": "dare", "seed": 7}, "source": {"drop_rate": 0.6}},
    "dare, not rescaled": {"top": {"update": "dare", "rescale": False}},
    "mask-then-svd": {"top": {"order": "mask-then-svd"}, "source": {"rank": 2}},
    "source_base": {"top": {"source_base": True}},
    "biases": {"top": {"biases": True}},
    "all": {
        "top": {"source_base": True, "biases": True, "order": "mask-then-svd"},
        "source": {"rank": 5},
    },
    "dare, all": {
        "top": {"source_base": True, "biases": True, "update": "dare", "seed": 4},
        "source": {"drop_rate": 0.3},
    },
}


def expected_step(delta: Array, member: Array, site: Site, top: dict[str, Any], source: dict[str, Any]) -> Array:
    """Return M_S(Delta_r) in the variant of a recipe, as a whole matrix with one neuron a row, in float64."""
    by_neuron = delta if site.projection != "fwd.down" else delta.T
    masked = by_neuron * member[:, None]
    if top.get("update") == "dare":
        place = ["attn.q", "attn.k", "attn.v", "fwd.up", "fwd.down"].index(site.projection)
        generator = np.random.RandomState([top.get("seed", 0), site.layer, place])
        rate = source.get("drop_rate", 0.5)
        step = np.zeros_like(masked)
        step[member] = masked[member] * (generator.random_sample(masked[member].shape) >= rate)
        step = step / (1 - rate) if top.get("rescale", True) else step
    else:
        what = masked if top.get("order") == "mask-then-svd" else by_neuron
        left, values, right = np.linalg.svd(what, full_matrices=False)
        rank = source.get("rank", 4)
        step = (left[:, :rank] * values[:rank]) @ right[:rank] * member[:, None]
    return step if site.projection != "fwd.down" else step.T


def expected(models: Models, variant: dict[str, dict[str, Any]]) -> dict[str, Array]:
    """Return every tensor that the recipe changes, in float64."""
    top, source = variant.get("top", {}), variant.get("source", {})
    weights = {role: read(models.folder / role) for role in ("target", "source", "base")}
    changed = {}

    def tensor(role: str, name: str) -> Array:
        return weights[role][f"{PREFIXES[role]}.{name}"].double().numpy()

    for site, member in models.neurons.items():
        name = f"{site.layer}.{MODULES[site.projection][0]}"
        minus = "base" if "source_base" in top else "target"
        delta = tensor("source", f"{name}.weight") - tensor(minus, f"{name}.weight")
        step = expected_step(delta, member.numpy(), site, top, source)
        changed[f"model.layers.{name}.weight"] = tensor("target", f"{name}.weight") + 0.5 * step
        if top.get("biases") and site.projection in ("attn.q", "attn.k", "attn.v"):
            moved = (tensor("source", f"{name}.bias") - tensor(minus, f"{name}.bias")) * member.numpy()
            changed[f"model.layers.{name}.bias"] = tensor("target", f"{name}.bias") + 0.5 * moved
    return changed


def neurons_that_stay(name: str, neurons: NeuronSet) -> Tensor:
    layer, module = name.removeprefix("model.layers.").split(".", 1)
    projection = next(p for p, (path, _, _) in MODULES.items() if module.startswith(path))
    return ~neurons[Site(int(layer), projection)]


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_equals_numpy(name: str, models: Models, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    after, before = merge(models.recipe(**variant), tmp_path / "out"), read(models.folder / "target")
    wanted = expected(models, variant)
    assert after.keys() == before.keys()
    assert {n for n, tensor in after.items() if not same_bits(tensor, before[n])} == wanted.keys()
    for tensor_name, exact in wanted.items():
        np.testing.assert_allclose(after[tensor_name].numpy(), exact, rtol=1e-5, atol=2e-5)
        stay = neurons_that_stay(tensor_name, models.neurons)
        down = tensor_name.endswith("down_proj.weight")
        mine, old = ((t[tensor_name].mT if down else t[tensor_name]) for t in (after, before))
        assert torch.equal(mine[stay], old[stay])


@pytest.mark.parametrize("name", ["all", "dare, all"])
def test_patch_is_the_merge_byte_for_byte(name: str, rounded: Models, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", rounded.recipe(**VARIANTS[name]))
    merged = merge(recipe, tmp_path / "mergekit" / "out")
    result = CliRunner().invoke(snrf, ["patch", str(recipe), str(tmp_path / "patch" / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert_same(read(tmp_path / "patch" / "out"), merged)
    for file in ("README.md", "mergekit_config.yml"):
        assert (tmp_path / "patch" / "out" / file).read_bytes() == (tmp_path / "mergekit" / "out" / file).read_bytes()


@pytest.mark.parametrize("name", ["dare", "mask-then-svd", "source_base"])
def test_adapter_equals_the_merge(name: str, models: Models, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", models.recipe(**VARIANTS[name]))
    merge(recipe, tmp_path / "merged")
    result = CliRunner().invoke(snrf, ["lora", str(recipe), str(tmp_path / "adapter"), "--quiet"])
    assert result.exit_code == 0, result.output
    inputs = example_inputs(models.folder / "target")
    with torch.no_grad():
        wanted = load(tmp_path / "merged")(**inputs).logits
        adapted = PeftModel.from_pretrained(load(models.folder / "target"), tmp_path / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(models.folder / "target")(**inputs).logits, wanted, rtol=1e-2, atol=1e-2)


def test_dare_depends_neither_on_shards_nor_on_workers(rounded: Models, tmp_path: Path) -> None:
    wanted = merge(rounded.recipe(**VARIANTS["dare"]), tmp_path / "merged")
    recipe = rounded.recipe(**VARIANTS["dare"])
    for role in ("target", "source"):
        shutil.copytree(rounded.folder / role, tmp_path / role)
        write(tmp_path / role, read(tmp_path / role), max_shard_size=20_000)
    recipe["base_model"], recipe["models"][0]["model"] = str(tmp_path / "target"), str(tmp_path / "source")
    assert_same(merge(recipe, tmp_path / "sharded"), wanted)
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    for workers in ("1", "4"):
        result = CliRunner().invoke(
            snrf, ["patch", str(path), str(tmp_path / workers), "--quiet", "--workers", workers]
        )
        assert result.exit_code == 0, result.output
        assert_same(read(tmp_path / workers), wanted)


def test_the_command_itself_and_its_log(models: Models, tmp_path: Path) -> None:
    """`mergekit-yaml -v` in a process of its own, started beside the recipe, whose paths are relative."""
    content = models.recipe(**VARIANTS["all"])
    content["base_model"], content["models"][0]["model"] = "./target", "./source"
    content["parameters"] |= {"masks": "mask.safetensors", "source_base": "./base"}
    recipe = write_recipe(models.folder / "all.yml", content)
    command = [Path(sys.executable).with_name("mergekit-yaml"), recipe, tmp_path / "out", "-v"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(read(tmp_path / "out"), merge(models.recipe(**VARIANTS["all"]), tmp_path / "here"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| base | as of the merge |" in card
    assert str(models.folder) not in card
    edited = len(expected(models, VARIANTS["all"]))
    assert f"{edited} tensors fused, " in done.stderr
    assert "model.layers.0.self_attn.q_proj.bias: not truncated, rounding keeps 100 %" in done.stderr
    assert done.stderr.count("model.layers.0.self_attn.q_proj.weight: gram, rank ") == 1


def test_only_what_is_needed_is_read_of_the_base(models: Models, tmp_path: Path) -> None:
    with recorded_reads() as reads:
        merge(models.recipe(**VARIANTS["source_base"]), tmp_path / "out")
    changed = expected(models, VARIANTS["source_base"])
    needed = sorted(name.replace("model.layers", PREFIXES["base"]) for name in changed)
    assert sorted(reads[models.folder / "base"]) == needed
    assert sorted(reads[models.folder / "source"]) == sorted(changed)


def test_damage_of_the_base_is_named(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models.folder / "base", tmp_path / "base")
    name = f"{PREFIXES['base']}.0.self_attn.k_proj.weight"
    tensors = read(tmp_path / "base")
    write(tmp_path / "base", {n: torch.full_like(t, float("nan")) if n == name else t for n, t in tensors.items()})
    message = one(models.recipe(top={"source_base": str(tmp_path / "base")}), tmp_path / "out")
    assert message.startswith("model.layers.0.self_attn.k_proj.weight: the source_base's tensor of shape [32, 64] ")


def test_source_base_that_does_not_fit(models: Models, tmp_path: Path) -> None:
    target, source = models.folder / "target", models.folder / "source"
    assert "source_base is the base_model itself" in problem(models.recipe(top={"source_base": f"{target}/"})).what
    assert "source_base is the source itself" in problem(models.recipe(top={"source_base": str(source)})).what
    llama = make_source(tmp_path / "llama", "llama", dtype=torch.float32)
    found = problem(models.recipe(top={"source_base": str(llama)}))
    assert found.where == f"source_base {llama} as the source"
    assert "text decoder is 'qwen2'" in found.what
    merge(models.recipe(top={"source_base": str(llama), "allow_family_mismatch": True}), tmp_path / "mixed")
    small = make_source(tmp_path / "small", "qwen2", decoder={"intermediate_size": 48})
    found = problem(models.recipe(top={"source_base": str(small)}))
    assert (found.where, "intermediate size" in str(found)) == (f"source_base {small} as the source", True)
    found = problem(models.recipe(top={"source_base": True}), models.folder / "base")
    assert "the output folder is a model of the recipe" in found.what


def test_base_with_the_names_of_another_model_besides_its_own(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models.folder / "base", tmp_path / "base")
    extra = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2)}
    write(tmp_path / "base", {**read(tmp_path / "base"), **extra})
    found = problem(models.recipe(top={"source_base": str(tmp_path / "base")}))
    assert found.where == str(tmp_path / "base")
    assert found.what.startswith("has a tensor model.layers.0.self_attn.q_proj.weight besides its decoder's model.lang")


def test_biases_that_are_not_there(models: Models, tmp_path: Path) -> None:
    only_ffn = NeuronSet({site: member for site, member in models.neurons.items() if "fwd" in site.projection})
    write_mask(tmp_path / "ffn.safetensors", only_ffn)
    found = problem(models.recipe(top={"biases": True, "masks": str(tmp_path / "ffn.safetensors")}))
    assert (found.field, "none in the masked projections" in found.what) == ("biases", True)
    for role, called in (("source", "source"), ("base", "source_base")):
        shutil.copytree(models.folder / role, tmp_path / role)
        name = f"{PREFIXES[role]}.0.self_attn.k_proj.bias"
        write(tmp_path / role, {n: t for n, t in read(tmp_path / role).items() if n != name})
        recipe = models.recipe(top={"biases": True, "source_base": True})
        if role == "source":
            recipe["models"][0]["model"] = str(tmp_path / role)
        else:
            recipe["parameters"]["source_base"] = str(tmp_path / role)
        found = problem(recipe)
        assert found.where == str(tmp_path / role)
        assert found.what.startswith(f"tensor {name} of the {called} is missing, but model.layers.0.self_attn.k_proj.b")


def planned(models: Models, folder: Path, variant: dict[str, Any], *options: str) -> Result:
    recipe = write_recipe(folder / "recipe.yml", models.recipe(**variant))
    return CliRunner().invoke(snrf, ["plan", str(recipe), *options])


UPDATES = {
    "dare": "beta 0.5, dare: drop_rate 0.6, seed 7",
    "dare, not rescaled": "beta 0.5, dare: drop_rate 0.5, seed 0, not rescaled",
    "mask-then-svd": "beta 0.5, rank 2, mask-then-svd",
    "source_base": "beta 0.5, rank 4, svd-then-mask, Delta = source - source_base",
    "biases": "beta 0.5, rank 4, svd-then-mask, biases",
}


@pytest.mark.parametrize("name", UPDATES)
def test_plan_names_the_variant(name: str, models: Models, tmp_path: Path) -> None:
    result = planned(models, tmp_path, VARIANTS[name])
    assert result.exit_code == 0, result.output
    assert f"update    {UPDATES[name]}\n" in result.stdout
    # A neuron with a bias is one neuron.
    total = next(line.split() for line in result.stdout.splitlines() if line.startswith("all "))
    assert total[1:4] == [str(len(models.neurons)), str(models.neurons.count()), "960"]
    biases = sum(name == "biases" and site.projection.startswith("attn") for site in models.neurons)
    assert f"tensors   {len(models.neurons) + biases} edited, " in result.stdout
    if name == "source_base":
        sizes = [sum(t.nbytes for t in read(models.folder / role).values()) for role in ("source", "base")]
        assert "of the source's {:.3g} kB and the source_base's {:.3g} kB\n".format(*(s / 1e3 for s in sizes)) in (
            result.stdout
        )
        assert f"source_base  {models.folder / 'base'} (qwen2_5_vl, " in result.stdout


@pytest.mark.parametrize(
    ("name", "dtype"), [("mask-then-svd", None), ("source_base", "float32"), ("biases", None), ("dare", "float32")]
)
def test_certificates_of_a_plan(name: str, dtype: str | None, rounded: Models, tmp_path: Path) -> None:
    recipe = rounded.recipe(**VARIANTS[name]) | ({"dtype": dtype} if dtype else {})
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(snrf, ["plan", str(path), "--certify", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    content = json.loads(result.stdout)
    edited = {entry["target"]: entry for entry in content["tensors"]["edited"]}
    exact, target, after = (
        expected(rounded, VARIANTS[name]),
        read(rounded.folder / "target"),
        merge(path, tmp_path / "o"),
    )
    assert edited.keys() == exact.keys()
    for tensor_name, entry in edited.items():
        rounding, certificate = entry["rounding"], entry["certificate"]
        step = exact[tensor_name] - target[tensor_name].double().numpy()
        assert rounding["update"] == pytest.approx(np.linalg.norm(step), rel=1e-3)
        lost = np.linalg.norm(after[tensor_name].double().numpy() - exact[tensor_name])
        assert rounding["lost"] == pytest.approx(lost, rel=2e-2, abs=1e-4 * np.linalg.norm(step))
        assert (rounding["lost"] < 1e-4 * rounding["update"]) is (dtype == "float32")
        changed = after[tensor_name].float() != target[tensor_name].float()
        assert rounding["changed"] == int(changed.sum())
        if name == "dare" or tensor_name.endswith("bias"):
            assert certificate is None
            continue
        assert certificate["method"] == "gram"
        assert certificate["rank"] <= 6
    assert (
        "certificate"
        not in json.loads(CliRunner().invoke(snrf, ["plan", str(path), "--json"]).stdout)["tensors"]["edited"][0]
    )


def test_certificates_as_a_table(models: Models, tmp_path: Path) -> None:
    result = planned(models, tmp_path, VARIANTS["biases"], "--certify", "--quiet")
    assert result.exit_code == 0, result.output
    rows = {
        line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.startswith("model.layers.")
    }
    assert rows.keys() == expected(models, VARIANTS["biases"]).keys()
    content = json.loads(planned(models, tmp_path, VARIANTS["biases"], "--certify", "--quiet", "--json").stdout)
    for entry in content["tensors"]["edited"]:
        row, certificate = rows[entry["target"]], entry["certificate"]
        if certificate is None:
            assert row == ["bias", *"------", "100.0", "%"]
            continue
        assert row[:5] == ["gram", "4", "1", f"{100 * certificate['captured']:.2f}", "%"]
        assert row[5] == f"{certificate['est']:.1e}"
    assert (
        f"{len(rows)} tensors fused, {len(models.neurons)} of them truncated to rank 4, which captures "
        in result.stdout
    )
    assert "rounding to the output's dtype takes 0% of the update's norm" in result.stdout
    assert "bias: the whole difference of the masked elements" in result.stdout


@pytest.mark.parametrize(
    ("changes", "header", "method"),
    [
        ({"source": {"rank": 0}}, "method rank captured error deficit", "exact full 100.00 % 0 0"),
        (VARIANTS["dare"], "method", "dare"),
    ],
    ids=["full rank", "dare"],
)
def test_table_of_updates_that_are_not_truncated(
    changes: dict[str, Any], header: str, method: str, models: Models, tmp_path: Path
) -> None:
    result = planned(models, tmp_path, changes, "--certify", "--quiet")
    lines = result.stdout[result.stdout.index("\ntensor ") :].split("\n\n")[0].strip().splitlines()
    assert lines[0].split() == f"tensor {header} rounding keeps".split()
    for line in lines[1:-1]:
        assert line.split()[1:] == [*method.split(), "100.0", "%"]
    assert lines[-1].startswith(f"{method.split()[0]}: M_S(Delta) ")
    assert len(lines) == 2 + len(models.neurons)
    entries = json.loads(planned(models, tmp_path, changes, "--certify", "--quiet", "--json").stdout)["tensors"][
        "edited"
    ]
    assert {entry["method"] for entry in entries} == {method.split()[0]}


def test_table_of_updates_of_which_some_are_truncated(models: Models, tmp_path: Path) -> None:
    """Where a mask has fewer neurons than the rank, mask-then-svd has nothing to truncate."""
    changes = {"source": {"rank": 6}, "top": {"order": "mask-then-svd"}}
    result = planned(models, tmp_path, changes, "--certify", "--quiet")
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.startswith("model.layers.")}
    few = {
        f"model.layers.{site.layer}.{MODULES[site.projection][0]}.weight": int(member.sum()) <= 6
        for site, member in models.neurons.items()
    }
    assert len(set(few.values())) == 2
    for name, is_few in few.items():
        assert rows[name][1:4] == (["exact", "full", "-"] if is_few else ["gram", "6", "1"])


def test_a_plan_with_problems_is_not_certified(models: Models, tmp_path: Path) -> None:
    result = planned(models, tmp_path, {"source": {"rank": 4000}}, "--certify", "--quiet")
    assert result.exit_code == 1
    assert "This merge cannot run:" in result.stdout
    assert "captured" not in result.stdout
