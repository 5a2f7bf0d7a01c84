"""profile.yml: every key, and the key that an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.profiling.measure.meter import Measure
from mergekit_snrf.profiling.probes.source import AnswerRule, ProbeSource, fill_template, template_fields
from mergekit_snrf.profiling.settings import ProfileConfig, load_profile_config

DESIGN = """\
target:
  model: Qwen/Qwen2.5-VL-7B-Instruct
  probes: {dataset: hiyouga/geometry3k, split: train, question: problem, images: images}
source:
  model: Qwen/Qwen2.5-Math-7B
  probes: {dataset: openai/gsm8k, config: main, split: train, question: question}
answer: {by: model, max_new_tokens: 512}
select: {top_ratio: 0.1}
limit: 100
seed: 0
"""
SIDES = """\
target: {model: a/target, probes: {dataset: a/images, question: q, images: i}}
source: {model: a/source, probes: {dataset: a/texts, question: q}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "profile.yml"
    path.write_text(text)
    return path


def load(folder: Path, text: str) -> ProfileConfig:
    return load_profile_config(write(folder, text))


def test_the_example_of_the_design(tmp_path):
    config = load(tmp_path, DESIGN)
    target, source = config.kind("target").source, config.kind("source").source
    assert (config.kind("target").model.model, config.kind("source").model.model) == (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen2.5-Math-7B",
    )
    assert (target.question, target.images, source.config, source.images) == ("problem", "images", "main", None)
    assert (config.answer.by, config.answer.max_new_tokens) == ("model", 512)
    assert (target.limit, source.limit, target.seed) == (100, 100, 0)


def test_every_further_key(tmp_path):
    text = """\
target:
  model: a/target
  revision: main
  template: "<image> {problem} calc :"
  probes: {dataset: a/images, revision: v1, split: "train[:5]", images: i, answer: solution}
source: {model: a/source, gguf_file: model.Q8_0.gguf, probes: {dataset: a/texts, question: q}, template: "{q} calc :"}
answer: {by: column, column: answer}
select: {top_ratio: {attn: 0.3, fwd: 0.1, attn.v: 0.2}, at_least: 0.9}
tokens: answer
scoring: exact
weight: residual
site: post_o
backend: sdpa
batch_size: 4
token_limit: 2048
dtype: float32
device: cuda:1
trust_remote_code: true
"""
    config = load(tmp_path, text)
    assert config.measure == Measure(tokens="answer", scoring="exact", weight="residual", site="post_o")
    assert (config.backend, config.batch_size, config.token_limit) == ("sdpa", 4, 2048)
    assert config.kind("target").model == ModelRef(
        model="a/target", revision="main", dtype="float32", device="cuda:1", trust_remote_code=True
    )
    assert config.kind("source").model.gguf_file == "model.Q8_0.gguf"
    assert (config.kind("target").source.answer, config.kind("source").source.answer) == ("solution", "answer")
    assert (config.kind("target").source.revision, config.kind("target").source.split) == ("v1", "train[:5]")


def test_defaults(tmp_path):
    config = load(tmp_path, SIDES)
    assert (config.answer, config.limit, config.seed) == (AnswerRule(), None, 0)
    assert config.measure == Measure()
    assert config.kind("source").model == ModelRef(model="a/source")
    assert config.kind("source").source == ProbeSource(dataset="a/texts", question="q")


WRONG = {
    "typo at the top": ("tokns: answer", "tokns", "did you mean 'tokens'"),
    "unknown key": ("colour: red", "colour", "target, source, keep"),
    "value of tokens": ("tokens: some", "tokens", "'some'"),
    "value of scoring": ("scoring: fast", "scoring", "'released'"),
    "value of backend": ("backend: fast", "backend", "'sdpa'"),
    "backend of released scores": ("scoring: released\nbackend: sdpa", None, "backend"),
    "value of weight": ("weight: big", "weight", "'gradient'"),
    "value of site": ("site: middle", "site", "'post_o'"),
    "value of dtype": ("dtype: int8", "dtype", "'float32'"),
    "value of by": ("answer: {by: me}", "answer.by", "'column'"),
    "limit": ("limit: 0", "limit", "at least 1"),
    "limit as text": ("limit: ten", "limit", "'ten'"),
    "limit as truth": ("limit: true", "limit", "whole number"),
    "seed": ("seed: -1", "seed", "got -1"),
    "seed too large": ("seed: 4294967296", "seed", "4294967296"),
    "column and model": ("answer: {by: model, column: a}", "answer", "by: column"),
    "tokens and column": ("answer: {by: column, column: a, max_new_tokens: 3}", "answer", "max_new_tokens"),
    "no column": ("answer: {by: column}", None, "target.probes"),
    "released": ("scoring: released\nweight: residual", None, "weight"),
    "two devices": ("device: cpu\ndevice_map: auto", None, "device_map: auto"),
    "template": ("template: '{q.__class__}'", "target.template", "plain name of a column"),
    "trust": ("trust_remote_code: 'yes'", "trust_remote_code", "true or false"),
    "two rules": ("select: {sigma: 1, top_ratio: 0.1}", "select", "top_ratio"),
    "ratio": ("select: {top_ratio: 1.5}", "select.top_ratio", "1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_file_the_key_and_what_is_allowed(tmp_path, case):
    text, key, fragment = WRONG[case]
    with pytest.raises(SnrfError) as caught:
        load(tmp_path, SIDES + text + "\n")
    message = str(caught.value)
    assert str(tmp_path / "profile.yml") in message
    assert fragment in message
    assert key is None or f"{key}: " in message or f"'{key}'" in message
    assert "dictionary" not in message


def test_keys_of_a_section_are_named_with_their_place(tmp_path):
    with pytest.raises(SnrfError, match=r"'target.probes.imges'; did you mean 'images'"):
        load(tmp_path, SIDES.replace("images: i", "imges: i"))
    with pytest.raises(SnrfError, match=r"'source.model' is missing"):
        load(tmp_path, SIDES.replace("model: a/source, ", ""))
    with pytest.raises(SnrfError, match=r"source: question is missing"):
        load(tmp_path, SIDES.replace("dataset: a/texts, question: q", "dataset: a/texts"))
    with pytest.raises(SnrfError, match=r"names no column"):
        load(tmp_path, SIDES.replace("question: q", "answer: a") + "template: 'calc :'")
    with pytest.raises(SnrfError, match=r"'target' is missing"):
        load(tmp_path, "seed: 1\n")


@pytest.mark.parametrize("content", [b"target: {model: a\nsource: }\n", b"- a\n- b\n", b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "profile.yml").write_bytes(content)
    with pytest.raises(SnrfError) as caught:
        load_profile_config(tmp_path / "profile.yml")
    assert caught.value.where == str(tmp_path / "profile.yml")


def test_paths_are_looked_for_in_the_working_folder_and_then_beside_the_file(tmp_path, monkeypatch):
    beside, working = tmp_path / "beside", tmp_path / "working"
    for folder in (beside, working):
        (folder / "target").mkdir(parents=True)
    (beside / "source").mkdir()
    for name in ("images.jsonl", "texts.csv"):
        (beside / name).write_text("")
    text = """\
target: {model: target, probes: {dataset: images.jsonl, question: q}}
source: {model: source, probes: {dataset: texts.csv, question: q}}
"""
    monkeypatch.chdir(working)
    config = load(beside, text)
    assert config.target.model == "target"
    assert Path(config.source.model) == beside / "source"
    assert Path(config.target.probes.dataset) == beside / "images.jsonl"
    for line in ("model: target", "dataset: texts.csv"):
        with pytest.raises(SnrfError, match=r"profile.yml: .* does not exist, looked for .*working.* and .*beside"):
            load(beside, text.replace(line, f"{line[:-1]}x.csv"))
    for model in ("a/" * 2000, "~nobody/model"):
        with pytest.raises(SnrfError, match=r"target.model: .*; correct the path"):
            load(beside, text.replace("model: target", f"model: {model}"))


def test_a_shared_template_serves_the_sides_without_one(tmp_path):
    text = SIDES.replace("model: a/target", "model: a/target, template: '<image> {q}'") + "template: '{q} calc :'\n"
    config = load(tmp_path, text)
    assert (config.kind("target").source.template, config.kind("source").source.template) == (
        "<image> {q}",
        "{q} calc :",
    )


def test_override_checks_like_the_file(tmp_path):
    config = load(tmp_path, DESIGN)
    changed = config.override(limit=5, dtype="float32", device=None)
    assert (changed.limit, changed.dtype, changed.device) == (5, "float32", None)
    assert changed.target == config.target
    assert config.limit == 100
    with pytest.raises(SnrfError, match="limit: "):
        config.override(limit=0)


def test_a_template_is_filled_with_columns_only():
    assert template_fields("<image> {a b} calc {{x}} {c}{c}") == ("a b", "c")
    assert fill_template("<image> {a b} calc {{x}} {c}{c}", {"a b": "{1}", "c": "2"}) == "<image> {1} calc {x} 22"
    with pytest.raises(SnrfError, match="no column 'd'"):
        fill_template("{d}", {"a": "", "b": ""})


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{a:{b}}", "{a", "a}"])
def test_a_template_runs_nothing(template):
    with pytest.raises(SnrfError, match=r"plain name of a column|not a format string"):
        template_fields(template)
