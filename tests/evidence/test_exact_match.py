"""The built-in exact-match evaluation against transformers asked one prompt at a time."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from checkpoints import make_source
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import exact_match
from mergekit_snrf.evidence.evaluation import Items, evaluate, load_evaluation
from mergekit_snrf.evidence.exact_match import extract, normalised

BOARD = Path(__file__).parents[2] / "examples" / "board"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_yaml(path: Path, **metrics: Any) -> Path:
    content: dict[str, Any] = {"metrics": metrics, "max_new_tokens": 12, "batch_size": 4}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def board() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(BOARD / "target", dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(BOARD / "target")


@pytest.fixture(scope="module")
def answers(board: tuple[Any, Any]) -> list[str]:
    """What the board's target answers to the example's rows, asked one by one without padding."""
    model, processor = board
    texts = []
    for line in (BOARD / "probes_image.jsonl").read_text().splitlines():
        image = Image.open(BOARD / json.loads(line)["image"]).convert("RGB")
        inputs = processor(text="<image> calc :", images=image, return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        texts.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def test_scores_are_those_of_prompts_asked_one_by_one(board: tuple[Any, Any], answers: list[str]) -> None:
    evaluation = load_evaluation(str(BOARD / "exact_match.yml"))
    found = evaluate(evaluation, *board)["calc"]
    right = [json.loads(line)["answer"][-1] for line in (BOARD / "probes_image.jsonl").read_text().splitlines()]
    last = [re.findall(r"# (\d)", text)[-1:] for text in answers]
    assert found.malformed == tuple(not digits for digits in last)
    assert found.scores == tuple(float(digits == [digit]) for digits, digit in zip(last, right, strict=True))
    assert found.ids == tuple(map(str, range(64)))
    # Some are right, some wrong, some malformed, or the comparison says nothing.
    assert 0.1 < found.mean < 0.9
    assert 0 < sum(found.malformed) < 64


def board_with(path: Path, old: str, new: str) -> Any:
    """The example's evaluation, changed."""
    text = (BOARD / "exact_match.yml").read_text().replace("probes_image", str(BOARD / "probes_image"))
    assert old in text
    path.write_text(text.replace(old, new))
    return load_evaluation(str(path))


def test_questions_go_through_the_chat_template(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "model", "qwen2", dtype=torch.float32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for index, question in enumerate(["How many?", "How many clips did she sell in May?", "What is half of 48?"] * 3):
        messages = [{"role": "user", "content": f"{question} {index}"}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=12, repetition_penalty=1.0)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip()
        rows.append({"q": f"{question} {index}", "a": text if index % 3 else text + "x"})
    write_rows(tmp_path / "rows.jsonl", rows)
    path = write_yaml(tmp_path / "eval.yml", R={"data": "rows.jsonl", "question": "q", "answer": "a"})
    found = evaluate(load_evaluation(str(path)), model, tokenizer)["R"]
    assert found == Items((0.0, 1.0, 1.0) * 3, None, tuple(map(str, range(9))))


def test_a_limit_takes_the_same_rows_of_every_model(board: tuple[Any, Any], tmp_path: Path) -> None:
    evaluation = board_with(tmp_path / "limited.yml", "batch_size: 32", "batch_size: 32\nlimit: 5\nseed: 3\n")
    first, again = (evaluate(evaluation, *board)["calc"] for _ in range(2))
    whole = evaluate(load_evaluation(str(BOARD / "exact_match.yml")), *board)["calc"]
    assert first == again
    assert first.ids is not None
    assert len(first) == 5
    assert first.scores == tuple(whole.scores[int(name)] for name in first.ids)


SAME = {"7": "7.0", " 7 ": "+7.", "1,234.5": "1234.50", "0.5": ".5", "1e3": "1000", "-3": "-3.00"}
SAME |= {"Triangle  ABC ": "triangle abc", "STRASSE": "straße"}
DIFFERENT = {"7": "7a", "1,23": "123", "0.1": "0.10000000000000000001", "nan": "inf", "-7": "7", "": "0", "٧": "7"}


def test_answers_that_mean_the_same_and_that_differ() -> None:
    assert [one for one, other in SAME.items() if normalised(one) != normalised(other)] == []
    assert [one for one, other in DIFFERENT.items() if normalised(one) == normalised(other)] == []
    assert normalised("nan") == "nan"
    assert normalised("9" * 400) == Decimal("9" * 400)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"# (\d)", "1 # 3 ; # 4", "4"),
        (r"# \d", "1 # 3 ; # 4", "# 4"),
        (r"# (\d)", "# x", None),
        (r"#( \d)?", "# x", None),
        (None, " all ", " all "),
        (r"# (\d)", "# 1" + " " * 30_000, None),
        (r"# (\d)", " " * 30_000 + "# 1", "1"),
    ],
)
def test_the_last_match_is_the_answer(pattern: str | None, text: str, expected: str | None) -> None:
    assert extract(regex.compile(pattern) if pattern else None, text) == expected


@pytest.mark.parametrize("text", ["a" * 60 + "b", ("a" * 24 + "c") * 500])
def test_an_expression_that_backtracks_without_end_is_stopped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_match, "_SECONDS", 0.2)
    with pytest.raises(SnrfError, match=r"^answer_regex: '\(a\|aa\)\+\$' takes more than 0\.2 seconds"):
        extract(regex.compile("(a|aa)+$"), text)


GOOD = {"data": "rows.jsonl", "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": "none.jsonl"}, "metrics.R.data"),
        ({"data": "rows.txt"}, "metrics.R.data"),
        ({"data": None}, "metrics.R.data"),
        ({"data": {"file": "a"}}, "metrics.R.data"),
        ({"data": "holes.jsonl"}, None),
        ({"answer": "b"}, "metrics.R.answer"),
        ({"role": "lose"}, "metrics.R.role"),
        ({"answers": "a"}, None),
        ({"question": None}, "metrics.R"),
        ({"template": "{q.__class__}"}, "metrics.R.template"),
        ({"images": "i"}, None),
        ({"answer_regex": "("}, "metrics.R.answer_regex"),
        ({"answer_regex": ""}, "metrics.R.answer_regex"),
        ({"answer_regex": "a" * 1001}, "metrics.R.answer_regex"),
        ({"answer_regex": "(" * 499 + "a" + ")" * 499}, "metrics.R.answer_regex"),
        ({"answer_regex": "(?:(?:(?:(?:ab){1000}){1000}){1000})"}, "metrics.R.answer_regex"),
        ({"answer_regex": r"(?:[a{2}]\{9}{400}){,300}"}, "metrics.R.answer_regex"),
    ],
)
def test_a_file_that_cannot_be_used(change: dict[str, Any], field: str | None, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"q": "one", "a": "1", "i": "no.png"}])
    write_rows(tmp_path / "holes.jsonl", [{"q": str(i), "a": "" if i == 1 else "1"} for i in range(100)])
    path = write_yaml(tmp_path / "eval.yml", R={**GOOD, **change})
    with pytest.raises(SnrfError) as caught:
        load_evaluation(str(path))
    assert (caught.value.field or "").replace("key ", "").strip("'") == (field or "")
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("pattern", [r"# (\d{1,300})", r"(?:\w{1,20} ){1,50}", r"a{3}" * 200, r"\{(\d+)\}"])
def test_repeats_of_usual_size_compile(pattern: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"q": "one", "a": "1"}])
    load_evaluation(str(write_yaml(tmp_path / "eval.yml", R={**GOOD, "answer_regex": pattern})))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"metrics: [", None),
        (b"- 1", None),
        (b"metrics:", "key 'metrics'"),
        (b"metrics: {}", "key 'metrics'"),
        (b"metrics: {R: 3}", "key 'metrics.R'"),
        (b"metrics: {3: {data: a}}", "key 'metrics'"),
        (b"%s\nbatch_size: 0", "key 'batch_size'"),
        (b"%s\nlimit: true", "key 'limit'"),
        (b"%s\nseed: 4294967296", "key 'seed'"),
        (b"%s\nbatch-size: 1", None),
    ],
)
def test_a_file_that_is_not_an_evaluation(content: bytes, field: str | None, tmp_path: Path) -> None:
    path = tmp_path / "eval.yml"
    path.write_bytes(content.replace(b"%s", b"metrics: {R: {data: a.jsonl, question: q, answer: a}}"))
    with pytest.raises(SnrfError) as caught:
        load_evaluation(str(path))
    assert (caught.value.where, caught.value.field) == (str(path), field)
    assert "\n" not in str(caught.value)


def test_a_row_that_cannot_be_asked_is_an_error(board: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"q": "calc :" if index != 30 else "calc " * 60, "a": "1"} for index in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    path = write_yaml(tmp_path / "eval.yml", R={"data": "rows.jsonl", "template": "{q}", "answer": "a"})
    with pytest.raises(SnrfError, match=r"rows\.jsonl: .*row 30: .*61 tokens"):
        evaluate(load_evaluation(str(path)), *board)


def test_a_model_without_a_chat_template_names_the_key_to_set(board: tuple[Any, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"q": "calc :", "a": "1"}])
    path = write_yaml(tmp_path / "eval.yml", R=GOOD)
    with pytest.raises(SnrfError, match=r"metrics\.R\.template: has no chat template"):
        evaluate(load_evaluation(str(path)), *board)


def test_roles_are_read_from_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"q": "calc :", "a": "1"}])
    evaluation = load_evaluation(str(write_yaml(tmp_path / "eval.yml", R=GOOD, P={**GOOD, "role": "keep"})))
    assert (evaluation.role("R"), evaluation.role("P")) == ("gain", "keep")
