"""The choice of keep: KL against a probe-by-probe computation, the bisection, held-out rows, and the recipe's text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from click.testing import CliRunner
from made_moments import sizes_of, write_random_moments
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from PIL import Image

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import tune as tuning
from mergekit_snrf.evidence.controls import Merge, regmean
from mergekit_snrf.evidence.recipes import open_recipe
from mergekit_snrf.evidence.study_results import Tuning
from mergekit_snrf.evidence.tune import HIGHEST, LOWEST, STEPS, Distance, held_out, kinds_of, tune
from mergekit_snrf.merge.recipefile import with_keep
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.models.moments import read_moments
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.profiling.settings import load_profile_config

BOARD = Path(__file__).resolve().parents[2] / "examples" / "board"
COUNT = 9


def kind(name: str, **changes: Any) -> dict[str, Any]:
    entry = {
        "name": name, "dataset": str(BOARD / f"keep_{name}.parquet"), "question": "question", "images": "image",
        "template": "{question}", "limit": 64, "seed": 0, "answer": {"by": "model", "max_new_tokens": 32},
    }  # fmt: skip
    return {**entry, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of random inputs for the board's target, which say that they used the board's probes, and a recipe."""
    folder = tmp_path_factory.mktemp("tune")
    text = json.loads((BOARD / "target" / "config.json").read_text())["text_config"]
    sizes = sizes_of(text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"])
    write_random_moments(folder / "moments.safetensors", sizes, keep=[kind("read"), kind("color")])
    (folder / "recipe.yml").write_text(
        f"merge_method: snrf\nbase_model: {BOARD / 'target'}\nmodels:\n  - model: {BOARD / 'source'}\n"
        "parameters:\n  update: regmean  # all neurons\n  moments: moments.safetensors\n  keep: 3   # to be tuned\n"
    )
    return folder


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return load_model(ModelRef(model=str(BOARD / "target"), device="cpu", dtype="float32"), images=True)


@pytest.fixture(scope="module")
def merge(folder: Path) -> Merge:
    recipe = {
        "merge_method": "snrf",
        "base_model": str(BOARD / "target"),
        "models": [{"model": str(BOARD / "source")}],
        "parameters": {"update": "regmean", "moments": str(folder / "moments.safetensors")},
        "dtype": "float32",
    }
    return open_recipe(MergeConfiguration.model_validate(recipe), MergeOptions(), None).merge


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LEAST", COUNT)
    monkeypatch.setattr(tuning, "MOST", COUNT)


@pytest.mark.usefixtures("few")
def test_distance_is_that_of_one_probe_at_a_time(folder: Path, model: tuple[Any, Any], merge: Merge) -> None:
    network, processor = model
    (read, color) = held_out(kinds_of(read_moments(folder / "moments.safetensors")), network, processor, [])
    assert (read.name, color.probes, color.name) == ("read", COUNT, "color")
    rows = parquet.read_table(BOARD / "keep_color.parquet").to_pylist()
    numbers = np.random.RandomState([0]).permutation(len(rows))[64 : 64 + COUNT]
    inputs, before = [], []
    with torch.no_grad():
        for number in numbers:
            image = Image.open(BytesIO(rows[number]["image"]["bytes"])).convert("RGB")
            prompt = processor(text=rows[number]["question"], images=[image], return_tensors="pt")
            whole = network.generate(**prompt, do_sample=False, max_new_tokens=32)
            inputs.append(({**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}, prompt))
            before.append(network(**inputs[-1][0]).logits.double().log_softmax(-1)[0])
        total, tokens, changed = 0.0, 0, 0
        with regmean(merge, 0.0, merge.moments)(network):  # type: ignore[arg-type]
            found = color.distance(network)
            for (arguments, prompt), ours in zip(inputs, before, strict=True):
                theirs = network(**arguments).logits.double().log_softmax(-1)[0]
                start = prompt["input_ids"].shape[1] - 1
                ours, theirs = ours[start:-1], theirs[start:-1]
                total += float((ours.exp() * (ours - theirs)).sum())
                tokens += len(ours)
                answer = network.generate(**prompt, do_sample=False, max_new_tokens=32)
                changed += not torch.equal(answer, arguments["input_ids"])
    assert found.kl == pytest.approx(total / tokens, rel=1e-3)
    assert found.changed == changed / COUNT > 0
    # The target itself is at no distance.
    assert color.distance(network).kl == pytest.approx(0, abs=1e-9)
    assert color.distance(network).changed == 0


class Weights:
    """Measures how far the weights moved, in place of the answers; smaller with every rise of keep."""

    name, probes = "weights", 1

    def __init__(self, network: Any) -> None:
        self._before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def distance(self, network: Any) -> Distance:
        return Distance(sum(float((t - self._before[n]).square().sum()) for n, t in network.state_dict().items()), 0.0)


def test_bisection_finds_the_smallest_keep(model: tuple[Any, Any], merge: Merge) -> None:
    network, _ = model
    measure: Any = Weights(network)

    def at(keep: float) -> float:
        with regmean(merge, keep, merge.moments)(network):  # type: ignore[arg-type]
            return measure.distance(network).kl

    bound = at(2.0) * 1.001
    seen: list[float] = []
    found = tune(merge, network, [measure], bound, visit=lambda point: seen.append(point.keep))
    assert measure.distance(network).kl == 0
    assert len(seen) == STEPS
    assert found.keep == pytest.approx(2.0, rel=(HIGHEST / LOWEST) ** (1 / 2**STEPS) - 1 + 0.01)
    assert at(found.keep) <= bound < at(found.keep / 1.03)
    assert [point.keep for point in found.points] == sorted(seen)
    assert found.chosen.kl == pytest.approx(at(found.keep))
    assert tune(merge, network, [measure], 1e9).keep == pytest.approx(LOWEST, rel=0.02)
    with pytest.raises(SnrfError, match=r"max_kl: keep 300 has a KL of"):
        tune(merge, network, [measure], at(300.0) / 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"limit": 97}, "192 rows, of which the moments used 97, leave 95 held-out probes"),
        ({"limit": None}, "192 rows, of which the moments used 192, leave 0 held-out probes"),
        ({"limit": 400}, "192 rows, of which the moments used 192, leave 0 held-out probes"),
        ({"sha256": "0" * 64}, "gives other probes than those that the moments used"),
        ({"dataset": "none.parquet"}, "none.parquet: is not in the working folder, but the moments were taken on it"),
    ],
)
def test_rows_that_are_not_held_out_are_refused(
    changes: dict[str, Any], text: str, tmp_path: Path, model: tuple[Any, Any]
) -> None:
    path = write_random_moments(tmp_path / "m.safetensors", sizes_of(1, 4, 4), keep=[kind("find", **changes)])
    with pytest.raises(SnrfError) as error:
        held_out(kinds_of(read_moments(path)), *model, [])
    assert text in str(error.value)


def test_a_profile_of_other_draws_is_refused(tmp_path: Path) -> None:
    entries = [kind(name) for name in ("read", "find", "color")]
    config = load_profile_config(BOARD / "profile.yml")
    path = write_random_moments(tmp_path / "m.safetensors", sizes_of(1, 4, 4), keep=entries)
    assert [one.source.limit for one in kinds_of(read_moments(path), config)] == [64] * 3
    for other, text in (
        (config.override(seed=1), "keep.0 draws 64 rows by seed 1"),
        (config.override(keep=()), "0 ki"),
    ):
        with pytest.raises(SnrfError, match=text):
            kinds_of(read_moments(path), other)
    bare = write_random_moments(tmp_path / "bare.safetensors", sizes_of(1, 4, 4), keep=None)
    with pytest.raises(SnrfError, match="does not say which probes to keep"):
        kinds_of(read_moments(bare))


@pytest.mark.usefixtures("few")
def test_command_writes_the_number_and_nothing_else(folder: Path, tmp_path: Path, one_thread: None) -> None:
    shutil.copy(folder / "moments.safetensors", tmp_path)
    recipe = Path(shutil.copy(folder / "recipe.yml", tmp_path))
    before = recipe.read_bytes()
    words = ["moments", "tune", str(recipe), "--max-kl", "0.05", "--quiet", "--json", str(tmp_path / "t.json")]
    dry = CliRunner().invoke(snrf, [*words, "--dry-run", "--figures", str(tmp_path / "figures")])
    assert (dry.exit_code, recipe.read_bytes()) == (0, before), dry.output
    tuning = Tuning.model_validate_json((tmp_path / "t.json").read_text())
    assert tuning.chosen.kl <= 0.05
    assert f"keep {tuning.keep:g} is the smallest with a KL of at most 0.05" in dry.output
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"keep.png", "keep.svg"}
    assert CliRunner().invoke(snrf, words).exit_code == 0
    assert recipe.read_bytes() == before.replace(b"keep: 3 ", f"keep: {tuning.keep:g} ".encode())
    other = CliRunner().invoke(snrf, ["moments", "tune", str(BOARD / "snrf.yml"), "--dry-run"])
    assert "update: does not use moments" in other.output


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parameters:\n  keep: 3  # c\n  update: regmean\n", "parameters:\n  keep: 1.96  # c\n  update: regmean\n"),
        ("parameters: {update: regmean, keep: 3.0}", "parameters: {update: regmean, keep: 1.96}"),
        ("models:\r\n- parameters:\r\n    keep: 1e1\r\n", "models:\r\n- parameters:\r\n    keep: 1.96\r\n"),
        ("parameters:\n  update: regmean # c\n", "parameters:\n  update: regmean # c\n  keep: 1.96\n"),
        ("parameters:\r\n  update: regmean\r\nx: 1", "parameters:\r\n  update: regmean\r\n  keep: 1.96\r\nx: 1"),
        ("parameters: {update: regmean}", "parameters: {update: regmean, keep: 1.96}"),
        ("keep: 1\nparameters: {update: regmean, keep: 3}", "keep: 1\nparameters: {update: regmean, keep: 1.96}"),
        ("# ä€🙂\nparameters: {keep: 3}", "# ä€🙂\nparameters: {keep: 1.96}"),
        ("parameters: {keep: [1, 3]}", None),
        ("parameters: {keep: &k 3}", None),
        ("parameters: {keep: [{filter: mlp, value: 3}, {value: 1}]}", None),
        ("models: [{parameters: {keep: 3}}]\nparameters: {keep: 3}", None),
        ("parameters: {beta: 1}", None),
    ],
)
def test_only_the_number_of_a_recipe_changes(text: str, expected: str | None) -> None:
    if expected is not None:
        assert with_keep(text, 1.96, "recipe.yml") == expected
        return
    with pytest.raises(SnrfError) as error:
        with_keep(text, 1.96, "recipe.yml")
    assert (error.value.where, error.value.field) == ("recipe.yml", "keep")
    assert "keep: 1.96" in str(error.value)
