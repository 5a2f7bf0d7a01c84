"""`snrf sweep`: its rows against merged folders, what continues after an interruption, and which row is the best."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import load, make_source, make_target
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.grid import best_row, combinations
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.results import Sweep

# Scores that only depend on the weights, and a count of the calls.
EVALUATION = """
from pathlib import Path

def evaluation(model, processor, stop=0):
    calls = Path(__file__).with_name("calls")
    count = len(calls.read_text()) if calls.exists() else 0
    if stop and count >= stop:
        raise RuntimeError("stopped")
    calls.write_text("x" * (count + 1))
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    up, down = (next(t for n, t in weights.items() if n.endswith(end)) for end in ("up_proj.weight", "k_proj.weight"))
    return {"gain": (up.flatten()[:40] > 0).float().tolist(), "keep": (down.flatten()[:40] > 0).float().tolist()}

evaluation.roles = {"gain": "gain", "keep": "keep"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_target(tmp_path / "target", "llama", "hub")
    make_source(tmp_path / "source", "llama")
    mask = ["mask", "random", "--model", str(tmp_path / "target"), "--ratio", "0.9", str(tmp_path / "mask.safetensors")]
    assert CliRunner().invoke(snrf, mask).exit_code == 0
    recipe = {
        "merge_method": "snrf",
        "base_model": "target",
        "models": [{"model": "source", "parameters": {"beta": 0.5, "rank": 4}}],
        "parameters": {"masks": "mask.safetensors"},
    }
    (tmp_path / "snrf.yml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "evaluation.py").write_text(EVALUATION)
    return tmp_path


def sweep(folder: Path, *options: str, stop: int = 0) -> Result:
    reference = f"{folder / 'evaluation.py'}:evaluation" + (f"?stop={stop}" if stop else "")
    return CliRunner().invoke(
        snrf, ["sweep", str(folder / "snrf.yml"), "--eval", reference, "--linear-betas", "0.5", *options]
    )


def test_rows_are_those_of_merged_folders(folder: Path) -> None:
    out, grid = folder / "sweep.json", ["--set", "beta=0.25,1", "--set", "order=svd-then-mask,mask-then-svd"]
    result = sweep(folder, *grid, "--json", str(out), "--figures", str(folder / "figures"), "--keep-drop", "100")
    assert result.exit_code == 0, result.output
    done = Sweep.model_validate_json(out.read_text())
    names = [row.name for row in done.rows]
    assert names == [
        "target", "beta 0.25, order svd-then-mask", "beta 0.25, order mask-then-svd", "beta 1, order svd-then-mask",
        "beta 1, order mask-then-svd", "linear, beta 0.5",
    ]  # fmt: skip
    assert done.best in names[1:5]
    assert f"{done.best} was chosen among 4 combinations" in result.output
    assert (folder / "figures/gain-against-keep.svg").exists()
    best = folder / "snrf.best.yml"
    assert CliRunner().invoke(mergekit_yaml, [str(best), str(folder / "merged"), "--quiet"]).exit_code == 0
    scope: dict[str, object] = {"__file__": str(folder / "elsewhere" / "evaluation.py")}
    (folder / "elsewhere").mkdir()
    exec(EVALUATION, scope)
    found = scope["evaluation"](load(folder / "merged"), None)  # type: ignore[operator]
    row = next(row for row in done.rows if row.name == done.best)
    assert {metric: list(items.scores) for metric, items in row.scores.items()} == found
    others = [one for one in done.rows if one.name in names[1:5]]
    assert len({one.scores["gain"].scores for one in others}) > 1
    gains = {one.name: one.scores["gain"].mean for one in others}
    assert gains[done.best] == max(gains.values())


def test_order_of_the_values_does_not_matter(folder: Path) -> None:
    """Curves run from the weakest merge to the strongest, whatever the order in which the strengths are typed."""
    studies = []
    for order in ("beta=0.1,0.5,1", "beta=1,0.1,0.5"):
        out = folder / f"{order[5]}.json"
        result = sweep(folder, "--set", order, "--set", "order=svd-then-mask,mask-then-svd", "--json", str(out))
        assert result.exit_code == 0, result.output
        studies.append(Sweep.model_validate_json(out.read_text()).study)
    assert studies[0] == studies[1]


@pytest.mark.parametrize("changed", ["evaluation", "weights", "mask"])
def test_stale_scores_are_not_used(folder: Path, changed: str) -> None:
    out, grid = folder / "sweep.json", ["--set", "beta=0.25,1"]
    assert sweep(folder, *grid, "--json", str(out)).exit_code == 0
    if changed == "evaluation":
        (folder / "evaluation.py").write_text(EVALUATION.replace("> 0", ">= 0.01"))
    elif changed == "weights":
        make_source(folder / "source", "llama", seed=9)
    else:
        mask = ["mask", "random", "--model", str(folder / "target"), "--ratio", "0.5", str(folder / "mask.safetensors")]
        assert CliRunner().invoke(snrf, mask).exit_code == 0
    again = sweep(folder, *grid, "--json", str(out))
    if changed == "mask":
        # The target and the linear merge do not depend on it.
        assert again.exit_code == 0
        assert "3/4  beta 0.25" in again.stderr
        assert "target:" not in again.stderr
    else:
        assert again.exit_code == 1
        assert "is the sweep of another recipe, evaluation or model" in again.output


def test_another_grid_on_the_same_file_keeps_the_rows(folder: Path) -> None:
    out = folder / "sweep.json"
    assert sweep(folder, "--set", "beta=0.25,1", "--json", str(out)).exit_code == 0
    (folder / "calls").unlink()
    another = sweep(folder, "--set", "beta=0.5", "--json", str(out))
    assert another.exit_code == 0, another.output
    assert (folder / "calls").read_text() == "x"
    done = Sweep.model_validate_json(out.read_text())
    assert {row.name for row in done.rows} == {"target", "beta 0.25", "beta 1", "beta 0.5", "linear, beta 0.5"}
    assert done.best == "beta 0.5"


def test_imports_in_a_process_of_its_own() -> None:
    """Without mergekit imported before, and warnings as errors: the plugin registers itself."""
    program = (
        "import importlib, sys; importlib.import_module(sys.argv[1]); "
        "from mergekit.merge_methods import registry; assert 'snrf' in registry._METHODS"
    )
    for module in ("mergekit_snrf.evidence.grid", "mergekit_snrf.merge.method"):
        subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", program, module], check=True)


def test_interrupted_sweep_continues(folder: Path) -> None:
    out, grid = folder / "sweep.json", ["--set", "beta=0.25,0.5,1"]
    stopped = sweep(folder, *grid, "--json", str(out), stop=3)
    assert stopped.exit_code == 1
    assert "stopped" in stopped.output
    assert [row.name for row in Sweep.model_validate_json(out.read_text()).rows] == ["target", "beta 0.25", "beta 0.5"]
    other = sweep(folder, *grid, "--json", str(out))
    assert "is the sweep of another recipe, evaluation or model" in other.output
    (folder / "calls").write_text("")
    resumed = sweep(folder, *grid, "--json", str(out), stop=3)
    assert resumed.exit_code == 0, resumed.output
    assert (folder / "calls").read_text() == "xx"
    straight = folder / "straight.json"
    (folder / "calls").unlink()
    assert sweep(folder, *grid, "--json", str(straight), stop=9).exit_code == 0
    key = {"key": ""}
    of_both = [json.loads(path.read_text()) | key for path in (out, straight)]
    for one in of_both:
        del one["study"]["evaluation"]
    assert of_both[0] == of_both[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "betta=1"], r"--set: 'betta' is not a parameter; did you mean 'beta'"),
        (["--set", "beta="], r"--set: 'beta=' has no values"),
        (["--set", "beta=1,1"], r"--set: repeats a value"),
        (["--set", "beta=1", "--set", "beta=0.5"], r"--set: beta is set twice"),
        (["--set", "beta=[1"], r"--set: 'beta=\[1'"),
        (["--set", "beta=0.5,-2"], r"beta -2: .*beta: must be"),
        (["--set", "masks=mask.safetensors,none.safetensors"], r"masks none.safetensors: .*none.safetensors"),
        (["--set", "seed=" + ",".join(map(str, range(1001)))], r"1001 combinations, more than 1000"),
        (["--set", "beta=1", "--best", "/tmp/other/best.yml"], r"is in another folder"),
        (["--set", "beta=1", "--best", "mask.safetensors"], r"is not the name of a recipe"),
        (["--set", "beta=!!timestamp x"], r"--set: 'beta=!!timestamp x'"),
        (
            ["--set", "seed=" + ",".join(map(str, range(999))), "--set", "rank=" + ",".join(map(str, range(999)))],
            "998001",
        ),
    ],
)
def test_mistakes_before_a_model_is_loaded(folder: Path, options: list[str], message: str) -> None:
    result = sweep(folder, *options)
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert not (folder / "calls").exists()


def test_best_row() -> None:
    """Against a search of all rows, on random scores."""
    draw = random.Random(0)
    for _ in range(200):
        names = ["target", "a", "b", "c", "d"]
        means = {name: {m: draw.choice([0.0, 0.25, 0.5, 0.75]) for m in ("g", "k", "l")} for name in names}
        scores = {name: [{m: Items((v,) * 4) for m, v in one.items()}] for name, one in means.items()}
        roles = {"g": "gain", "k": "keep", "l": "keep"}
        drop = draw.choice([0.0, 25.0, 50.0])
        name, enough = best_row(names[1:], scores, roles, "target", drop)  # type: ignore[arg-type]
        fall = {n: max(100 * (means["target"][m] - means[n][m]) for m in ("k", "l")) for n in names[1:]}
        allowed = [n for n in names[1:] if fall[n] <= drop]
        assert enough == bool(allowed)
        if allowed:
            assert name in allowed
            assert means[name]["g"] == max(means[n]["g"] for n in allowed)
        else:
            assert fall[name] == min(fall.values())


def test_values_go_where_the_recipe_has_them() -> None:
    recipe = {"models": [{"model": "s", "parameters": {"beta": 1}}], "parameters": {"masks": "m"}}
    one = combinations(recipe, ["beta=0.5", "rank=4"])[0].recipe
    assert one["models"][0]["parameters"] == {"beta": 0.5}
    assert one["parameters"] == {"masks": "m", "rank": 4}
    assert recipe["models"][0]["parameters"] == {"beta": 1}  # type: ignore[index]
    with pytest.raises(SnrfError, match="not a parameter"):
        combinations(recipe, ["x"])
