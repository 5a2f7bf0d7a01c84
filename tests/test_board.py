"""The board pair: its task, the committed checkpoints as transformers loads them, and the scripts as users run them."""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

BOARD = Path(__file__).resolve().parents[1] / "examples" / "board"
FOLDERS = ("base", "source", "target")
SPLIT_EXAMPLES = {
    "8 - 6": "train",
    "8 + 5": "valid",
    "4 - 4": "test",
    "8 + 6 + 5": "train",
    "8 - 6 x 0": "valid",
    "2 - 3 - 7": "test",
}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"board_script_{name}", BOARD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluate = load_script("evaluate")
make_probes = load_script("make_probes")
import board_scores  # noqa: E402  (evaluate.py puts its folder on the path)
import board_task  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> tuple[Any, Any]:
    return evaluate.load(BOARD / "target")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def sampled(ask: str, split: str, n: int = 150, seed: int = 0) -> list[board_task.Problem]:
    return board_task.distinct_problems(np.random.default_rng(seed), ask, split, n)


class TestTask:
    def test_chain_of_thought_against_python_arithmetic(self) -> None:
        python = {"+": operator.add, "-": operator.sub, "x": operator.mul}
        for problem in sampled("calc", "train"):
            glyphs = [cell for cell in problem.board.cells if cell != "."]
            value = int(glyphs[0])
            for sign, digit in zip(glyphs[1::2], glyphs[2::2], strict=True):
                value = python[sign](value, int(digit))
            # Reducing once at the end must agree: mod 10 is a ring homomorphism.
            assert board_task.final_answer(problem.answer) == value % 10
            *steps, final = problem.answer.split(" ; ")
            for step in steps:
                left, sign, right, equals, result = step.split()
                assert (equals, int(result)) == ("=", python[sign](int(left), int(right)) % 10)
            assert final == f"# {steps[-1].split()[-1]}"

    def test_documented_example(self) -> None:
        assert board_task.solve(list("3+4x7")) == ("3 + 4 = 7 ; 7 x 7 = 9 ; # 9", 9)

    @pytest.mark.parametrize("ask", board_task.ASKS)
    def test_prompt_and_picture_determine_one_answer(self, ask: str) -> None:
        problems = [*sampled(ask, "train", seed=1), *sampled(ask, "test", seed=2)]
        answers: dict[tuple[str, bytes], str] = {}
        for problem in problems:
            # A text prompt has no color, so that color is only ever asked with the picture.
            shown = (problem.prompt(False), board_task.render(problem.board).tobytes() if ask == "color" else b"")
            assert answers.setdefault(shown, problem.answer) == problem.answer
            assert problem.accepts(problem.answer)
        assert len(set(answers.values())) > 1

    @pytest.mark.parametrize("ask", board_task.ASKS)
    def test_other_answers_are_refused(self, ask: str) -> None:
        problem = sampled(ask, "test", 1)[0]
        wrong = {
            "read": f"{problem.answer} 1",
            "find": f"{problem.answer} {problem.answer}",
            "color": next(color for color in board_task.COLORS if color != problem.board.color),
            "calc": f"# {(board_task.solve(problem.board.glyphs)[1] + 1) % 10}",
        }[ask]
        assert not problem.accepts(wrong)
        assert not problem.accepts("")

    @pytest.mark.parametrize("text", ["", "7", "#", "# 12", "# 7 ;", "# 7 # 7", "# +", "3 + 4 = 7 ;", "# 7 ..."])
    def test_malformed_answers(self, text: str) -> None:
        assert board_task.final_answer(text) is None

    def test_only_the_final_digit_of_calc_counts(self) -> None:
        problem = board_task.Problem("calc", board_task.Board(tuple("3+4......"), "red", 0))
        assert problem.accepts("3 + 4 = 9 ; # 7")
        assert not problem.accepts("3 + 4 = 7 ; # 9")

    def test_splits_are_disjoint_and_sized_as_documented(self) -> None:
        expressions = {
            split: {problem.board.glyphs for problem in sampled("calc", split, 400)} for split in board_task.SPLITS
        }
        assert not expressions["train"] & expressions["valid"]
        assert not expressions["train"] & expressions["test"]
        assert not expressions["valid"] & expressions["test"]
        every = [(a, s, b) for a in board_task.DIGITS for s in board_task.OPERATORS for b in board_task.DIGITS]
        every += [(*e, s, c) for e in every for s in board_task.OPERATORS for c in board_task.DIGITS]
        share = np.mean([board_task.split_of(glyphs) == "train" for glyphs in every])
        assert share == pytest.approx(0.8, abs=0.02)

    def test_split_is_a_property_of_the_expression(self) -> None:
        # Written down once: a changed hash would let the committed models be scored on what they trained on.
        assert [board_task.split_of(text.split()) for text in SPLIT_EXAMPLES] == list(SPLIT_EXAMPLES.values())

    def test_rendering_is_deterministic_and_shows_the_cells(self) -> None:
        board = board_task.Board(tuple("3+4.x7..."), "green", 7)
        picture = board_task.render(board)
        assert picture.shape == (24, 24, 3)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, board_task.render(board))
        cells = picture.reshape(3, 8, 3, 8, 3).swapaxes(1, 2).reshape(9, 8, 8, 3).astype(float)
        # Green ink is far above noise: a cell has green pixels if and only if it is not blank.
        inked = (cells[..., 1] - cells[..., 0] > 60).sum(axis=(1, 2)) > 3
        assert list(inked) == [cell != "." for cell in board.cells]
        other = board_task.render(board_task.Board(board.cells, "green", 8))
        assert (picture != other).any()

    def test_bad_values_are_named(self) -> None:
        with pytest.raises(ValueError, match="9 cells"):
            board_task.Board(("1",), "red", 0)
        with pytest.raises(ValueError, match="'pink'"):
            board_task.Board(tuple("3+4......"), "pink", 0)
        with pytest.raises(ValueError, match=r"1\.\.3, got 4"):
            board_task.Problem("find", board_task.Board(tuple("3+4......"), "red", 0), 4)
        with pytest.raises(ValueError, match="'dev'"):
            board_task.sample_board(np.random.default_rng(0), (3,), "dev")
        with pytest.raises(ValueError, match=r"\(5,\)"):
            board_task.sample_board(np.random.default_rng(0), (5,), "test")


class TestScores:
    def test_wilson_interval_solves_its_equation(self) -> None:
        # The ends are the shares p with |successes / n - p| = z sqrt(p (1 - p) / n).
        for successes, n in [(0, 10), (3, 10), (181, 200), (200, 200)]:
            found = board_scores.wilson(successes, n)
            for end in (found.low / 100, found.high / 100):
                if 0 < end < 1:
                    distance = abs(successes / n - end)
                    assert distance == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / n), rel=1e-5)
            assert found.low <= 100 * successes / n <= found.high

    @staticmethod
    def result(shares: dict[str, float], n: int = 400, seed: int = 0) -> Any:
        rng = np.random.default_rng(5)
        return evaluate.Result({task: rng.random(n) < share for task, share in shares.items()}, 0.0, n, seed, "test")

    def test_bootstrap_interval_against_the_normal_approximation(self) -> None:
        result = self.result({"calc3": 0.4, "calc4": 0.7})
        found = result.estimate(evaluate.REASONING)
        shares = [result.correct[task].mean() for task in ("calc3", "calc4")]
        spread = 100 * np.sqrt(sum(p * (1 - p) / 400 for p in shares)) / 2
        assert found.value == pytest.approx(100 * np.mean(shares)) == result.reasoning
        assert found.low == pytest.approx(found.value - 1.96 * spread, abs=0.5)
        assert found.high == pytest.approx(found.value + 1.96 * spread, abs=0.5)

    def test_paired_difference_is_tighter_than_two_intervals(self) -> None:
        first = self.result({"calc3": 0.5, "calc4": 0.5})
        better = {task: row | (np.arange(400) % 10 == 0) for task, row in first.correct.items()}
        other = evaluate.Result(better, 0.0, 400, 0, "test")
        gain = evaluate.difference(first, other, evaluate.REASONING)
        assert gain.value == pytest.approx(other.reasoning - first.reasoning)
        assert 0 < gain.low < gain.value < gain.high
        alone = first.estimate(evaluate.REASONING)
        assert gain.high - gain.low < (alone.high - alone.low) / 2
        back = evaluate.difference(other, first, evaluate.REASONING)
        assert (back.low, back.high) == pytest.approx((-gain.high, -gain.low))

    def test_only_the_same_problems_and_tasks_pair_up(self) -> None:
        first = self.result({"calc3": 0.5, "calc4": 0.5, "read": 0.5})
        with pytest.raises(ValueError, match="400, 0, test and 400, 1, test"):
            evaluate.difference(first, self.result({"calc3": 0.5, "calc4": 0.5}, seed=1), evaluate.REASONING)
        seeing = self.result({"calc3": 0.5, "calc4": 0.5, "read": 0.5, "color": 0.5})
        assert evaluate.difference(first, seeing, evaluate.PERCEPTION) is None

    def test_problems_are_held_out_and_the_same_every_time(self) -> None:
        for task in evaluate.TASKS:
            asked = board_scores.problems(task, 50)
            assert asked == board_scores.problems(task, 50)
            assert asked != board_scores.problems(task, 50, seed=1)
            assert {board_task.split_of(problem.board.glyphs) for problem in asked} == {"test"}
            assert len({problem.board.cells for problem in asked}) == 50
        for task, operands in (("calc3", 3), ("calc4", 4)):
            assert {len(p.board.glyphs) for p in board_scores.problems(task, 50)} == {2 * operands - 1}


class TestCommittedPair:
    def test_size(self) -> None:
        files = [file for name in FOLDERS for file in (BOARD / name).rglob("*")]
        assert sum(file.stat().st_size for file in files) < 8e6

    def test_llms_load_as_bfloat16_llamas_of_one_shape(self) -> None:
        models = {
            name: AutoModelForCausalLM.from_pretrained(BOARD / name, local_files_only=True) for name in FOLDERS[:2]
        }
        for name, model in models.items():
            assert (model.config.model_type, model.dtype) == ("llama", torch.bfloat16)
            assert AutoTokenizer.from_pretrained(BOARD / name, local_files_only=True).padding_side == "left"
        base, source = (model.state_dict() for model in models.values())
        assert {key: value.shape for key, value in base.items()} == {k: v.shape for k, v in source.items()}
        assert any(not torch.equal(base[key], source[key]) for key in base)

    def test_target_loads_with_its_processor(self) -> None:
        model = AutoModelForImageTextToText.from_pretrained(BOARD / "target", local_files_only=True)
        processor = AutoProcessor.from_pretrained(BOARD / "target", local_files_only=True)
        assert (model.config.model_type, model.dtype) == ("llava", torch.bfloat16)
        board = board_task.Board(tuple("3+4.x7..."), "green", 7)
        picture = board_task.render(board)
        inputs = processor(images=Image.fromarray(picture), text="<image> calc :", return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
        expected = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(inputs["pixel_values"][0], expected, atol=1e-5, rtol=0)

    def test_target_sees_and_half_calculates(self, target: tuple[Any, Any]) -> None:
        result = evaluate.evaluate(*target, n=40)
        assert result.mean(["read"]) > 75
        assert result.mean(["find"]) > 75
        assert result.mean(["color"]) > 75
        assert 5 < result.reasoning < 75

    @pytest.mark.parametrize("name", ["base", "source"])
    def test_llms_calculate(self, name: str) -> None:
        result = evaluate.evaluate(*evaluate.load(BOARD / name), n=40)
        assert result.reasoning > 90
        assert result.malformed < 5
        assert "color" not in result.correct

    def test_answers_do_not_depend_on_the_batch(self, target: tuple[Any, Any]) -> None:
        one, many = (evaluate.evaluate(*target, n=4, batch_size=size) for size in (1, 4))
        for task in evaluate.TASKS:
            np.testing.assert_array_equal(one.correct[task], many.correct[task])

    def test_record_matches_the_checkpoints(self, target: tuple[Any, Any]) -> None:
        record = json.loads((BOARD / "training.json").read_text())
        assert record["smoke"] is False
        measured = record["measured"]
        assert measured["base"]["accuracy"]["calc3"]["value"] >= 98
        assert 25 <= measured["target"]["reasoning"]["value"] <= 45
        assert measured["target"]["accuracy"]["color"]["value"] >= 90
        result = evaluate.evaluate(*target, measured["n"], measured["seed"])
        # Other processors round differently, which may turn an answer or two in 400.
        assert result.reasoning == pytest.approx(measured["target"]["reasoning"]["value"], abs=1.5)
        assert result.perception == pytest.approx(measured["target"]["perception"]["value"], abs=1.5)


class TestProbes:
    @pytest.mark.parametrize("kind", ["text", "image"])
    def test_committed_probes_are_held_in_and_right(self, kind: str, tmp_path: Path) -> None:
        make_probes.write_probes(tmp_path, 64, 0)
        file = f"probes_{kind}.jsonl"
        assert (tmp_path / file).read_text() == (BOARD / file).read_text()
        rows = [json.loads(line) for line in (BOARD / file).read_text().splitlines()]
        assert len(rows) == 64
        for row in rows:
            *steps, final = row["answer"].split(" ; ")
            assert len(steps) in (2, 3)
            glyphs = [*steps[0].split()[:3], *(token for step in steps[1:] for token in step.split()[1:3])]
            assert board_task.split_of(glyphs) == "train"
            assert board_task.solve(glyphs)[1] == int(final.split()[-1])
            if kind == "text":
                assert [cell for cell in row["question"].split() if cell != "."] == glyphs
            else:
                committed, again = (np.asarray(Image.open(root / row["image"])) for root in (BOARD, tmp_path))
                np.testing.assert_array_equal(committed, again)


class TestScripts:
    def test_smoke_training_then_evaluation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = run(BOARD / "train.py", "--out", "pair", "--smoke", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "learned nothing" in done.stdout
        record = json.loads((tmp_path / "pair/training.json").read_text())
        assert record["smoke"] is True
        assert set(record["steps"].values()) == {1}
        assert str(tmp_path) not in json.dumps(record)

        monkeypatch.chdir(tmp_path)
        options = ["--out", "again", "--pair", "pair", "--seed", "2", "--smoke", "1"]
        again = CliRunner().invoke(load_script("train").main, options)
        torch.use_deterministic_algorithms(False)
        assert again.exit_code == 0, again.output
        weights = {
            name: [(tmp_path / pair / name / "model.safetensors").read_bytes() for pair in ("pair", "again")]
            for name in FOLDERS
        }
        assert [name for name, (one, other) in weights.items() if one == other] == ["base", "source"]

        options = ["pair/target", "pair/source", "-n", "4", "--json", "scores.json"]
        scored = CliRunner().invoke(evaluate.main, options)
        assert scored.exit_code == 0, scored.output
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert list(scores["models"]) == ["pair/target", "pair/source"]
        assert set(scores["models"]["pair/target"]["accuracy"]) == set(evaluate.TASKS)
        assert set(scores["models"]["pair/source"]["accuracy"]) == set(evaluate.TASKS) - {"color"}
        assert scores["differences"]["pair/source"]["perception"] is None
        assert scores["models"]["pair/target"]["malformed_calc"] > 50
        assert "malformed calc" in scored.stdout

    def test_wrong_folder_is_one_sentence(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(evaluate.main, [str(tmp_path)])
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: ")
        assert "holds no config.json" in done.stderr

    def test_training_gates_name_what_was_missed(self) -> None:
        train = load_script("train")
        shares = {"calc3": 1.0, "calc4": 1.0, "read": 1.0, "find": 1.0, "color": 0.5}
        perfect = TestScores.result(shares)
        assert train.missed(perfect, perfect, perfect) == [
            "15 <= target R <= 60",
            "target color >= 90",
            "target P >= 90",
        ]
