"""profile.yml: every key, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.sets import PROJECTIONS
from mergekit_snrf.profiling.probes.template import fill_template, template_fields
from mergekit_snrf.profiling.settings import ProfileConfig, answer_column, load_profile_config

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


def test_the_example_of_the_design(tmp_path: Path) -> None:
    config = load(tmp_path, DESIGN)
    assert (config.target.model, config.source.model) == ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-Math-7B")
    assert (config.target.probes.question, config.target.probes.images) == ("problem", "images")
    assert (config.source.probes.config, config.source.probes.images) == ("main", None)
    assert (config.answer.by, config.answer.max_new_tokens) == ("model", 512)
    assert (config.limit, config.seed) == (100, 0)
    assert {config.select.ratio(name) for name in PROJECTIONS} == {0.1}


def test_every_further_key(tmp_path: Path) -> None:
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
    assert (config.tokens, config.scoring, config.weight, config.site) == ("answer", "exact", "residual", "post_o")
    assert (config.backend, config.batch_size, config.token_limit) == ("sdpa", 4, 2048)
    assert (config.dtype, config.device, config.trust_remote_code) == ("float32", "cuda:1", True)
    assert answer_column(config.target, config) == "solution"
    assert answer_column(config.source, config) == "answer"
    assert config.source.gguf_file == "model.Q8_0.gguf"
    ratios = [config.select.ratio(name) for name in ("attn.q", "attn.k", "attn.v", "fwd.up", "fwd.down")]
    assert ratios == [0.3, 0.3, 0.2, 0.1, 0.1]


def test_what_is_not_written_has_a_default(tmp_path: Path) -> None:
    config = load(tmp_path, SIDES)
    assert (config.answer.by, config.select.top_ratio, config.limit, config.seed) == ("model", 0.1, None, 0)
    assert (config.tokens, config.scoring, config.weight, config.site) == ("all", "exact", "paper", "pre_o")
    assert (config.dtype, config.device, config.device_map, config.trust_remote_code) == ("auto", None, None, False)
    assert answer_column(config.source, config) is None


@pytest.mark.parametrize(("text", "sigma"), [("1e-3", 1e-3), ("0.05", 0.05), ("2", 2.0), ("0", 0.0)])
def test_sigma_is_a_number_in_any_notation(tmp_path: Path, text: str, sigma: float) -> None:
    config = load(tmp_path, f"{SIDES}select: {{sigma: {text}}}\n")
    assert config.select.sigma == sigma
    assert config.select.ratio("attn.q") is None


WRONG = {
    "typo at the top": ("tokns: answer", ["'tokns'", "did you mean 'tokens'"]),
    "unknown key": ("colour: red", ["'colour'", "target, source, answer"]),
    "value of tokens": ("tokens: some", ["'tokens'", "'all' or 'answer'", "'some'"]),
    "value of scoring": ("scoring: fast", ["'scoring'", "'exact' or 'released'"]),
    "value of backend": ("backend: fast", ["'backend'", "'auto', 'blocked' or 'sdpa'"]),
    "screen of earlier versions": ("screen: 0.3", ["unknown key 'screen'"]),
    "compile of earlier versions": ("compile: true", ["unknown key 'compile'"]),
    "backend of released scores": ("scoring: released\nbackend: sdpa", ["backend has no meaning with scoring"]),
    "value of weight": ("weight: big", ["'weight'", "'paper', 'residual' or 'gradient'"]),
    "value of site": ("site: middle", ["'site'", "'pre_o' or 'post_o'"]),
    "value of dtype": ("dtype: int8", ["'dtype'", "'auto', 'float32'"]),
    "value of by": ("answer: {by: me}", ["'answer.by'", "'model' or 'column'"]),
    "limit": ("limit: 0", ["'limit'", "greater than or equal to 1", "got 0"]),
    "limit as text": ("limit: ten", ["'limit'", "integer", "'ten'"]),
    "limit as truth": ("limit: true", ["'limit'", "integer"]),
    "seed": ("seed: -1", ["'seed'", "got -1"]),
    "seed too large": ("seed: 4294967296", ["'seed'", "4294967296"]),
    "two rules": ("select: {sigma: 1, top_ratio: 0.1}", ["'select'", "top_ratio or sigma"]),
    "no rule": ("select: {}", ["'select'", "top_ratio or sigma"]),
    "ratio": ("select: {top_ratio: 1.5}", ["'select.top_ratio'", "less than or equal to 1"]),
    "ratio of nothing": ("select: {top_ratio: {attn: 0.1, ffn: 0.1}}", ["'ffn'", "attn, fwd, attn.q"]),
    "ratio of a kind": ("select: {top_ratio: {attn: 7, fwd: 0.1}}", ["'select.top_ratio.attn'", "less than or equal"]),
    "ratio of a half": ("select: {top_ratio: {attn: 0.1}}", ["fwd.up", "'fwd'"]),
    "ratio as truth": ("select: {top_ratio: true}", ["'select.top_ratio'", "number"]),
    "sigma": ("select: {sigma: -1}", ["'select.sigma'", "greater than or equal to 0"]),
    "at_least alone": ("select: {sigma: 1, at_least: 0.5}", ["at_least goes with top_ratio"]),
    "column and model": ("answer: {by: model, column: a}", ["'answer'", "by: column"]),
    "tokens and column": ("answer: {by: column, column: a, max_new_tokens: 3}", ["'answer'", "max_new_tokens"]),
    "no column": ("answer: {by: column}", ["no column is named for the target", "target.probes"]),
    "released": ("scoring: released\nweight: residual", ["weight has no meaning with scoring: released"]),
    "two devices": ("device: cpu\ndevice_map: auto", ["device and device_map exclude each other"]),
    "template": ("template: '{q.__class__}'", ["'target.template'", "plain name of a column"]),
    "trust": ("trust_remote_code: 'yes'", ["'trust_remote_code'", "boolean"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_named_with_what_is_allowed(tmp_path: Path, case: str) -> None:
    text, fragments = WRONG[case]
    with pytest.raises(SnrfError) as caught:
        load(tmp_path, SIDES + text + "\n")
    message = str(caught.value)
    for fragment in [str(tmp_path / "profile.yml"), *fragments]:
        assert fragment in message
    assert "\n" not in message
    assert "dictionary" not in message


def test_wrong_keys_of_a_section_are_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match=r"'target.probes.imges'; did you mean 'images'"):
        load(tmp_path, SIDES.replace("images: i", "imges: i"))
    with pytest.raises(SnrfError, match=r"'source.model' is missing"):
        load(tmp_path, SIDES.replace("model: a/source, ", ""))
    with pytest.raises(SnrfError, match=r"'source': probes.question is missing"):
        load(tmp_path, SIDES.replace("dataset: a/texts, question: q", "dataset: a/texts"))
    with pytest.raises(SnrfError, match=r"'target' is missing.*'source' is missing"):
        load(tmp_path, "seed: 1\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnrfError, match=r"nothing.yml: cannot be read"):
        load_profile_config(tmp_path / "nothing.yml")
    with pytest.raises(SnrfError, match=r"profile.yml: not valid YAML at line 2, column"):
        load(tmp_path, "target: {model: a\nsource: }\n")
    with pytest.raises(SnrfError, match=r"profile.yml: must be a mapping"):
        load(tmp_path, "- a\n- b\n")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SnrfError, match=r"binary.yml: is not a text file"):
        load_profile_config(tmp_path / "binary.yml")


def test_paths_are_looked_for_in_the_working_folder_and_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        with pytest.raises(SnrfError, match=r"profile.yml: key .* does not exist, looked for .*working.* and .*beside"):
            load(beside, text.replace(line, f"{line[:-1]}x.csv"))


def test_a_shared_template_serves_the_sides_without_one(tmp_path: Path) -> None:
    text = SIDES.replace("model: a/target", "model: a/target, template: '<image> {q}'") + "template: '{q} calc :'\n"
    config = load(tmp_path, text)
    assert (config.target.template, config.source.template) == ("<image> {q}", "{q} calc :")


def test_override_checks_like_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, DESIGN)
    changed = config.override(limit=5, dtype="float32", device=None)
    assert (changed.limit, changed.dtype, changed.device) == (5, "float32", None)
    assert changed.target == config.target
    assert config.limit == 100
    with pytest.raises(SnrfError, match="'limit'"):
        config.override(limit=0)


def test_a_dump_reads_back_the_same(tmp_path: Path) -> None:
    config = load(tmp_path, DESIGN)
    assert ProfileConfig.model_validate(config.model_dump(exclude_unset=True)) == config


def test_a_template_is_filled_with_columns_only() -> None:
    assert template_fields("<image> {a b} calc {{x}} {c}{c}") == ("a b", "c")
    assert fill_template("<image> {a b} calc {{x}} {c}{c}", {"a b": "{1}", "c": "2"}) == "<image> {1} calc {x} 22"
    with pytest.raises(SnrfError, match=r"names 'd', which is none of a, b"):
        fill_template("{d}", {"a": "", "b": ""})


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{a:{b}}", "{a", "a}"])
def test_a_template_runs_nothing(template: str) -> None:
    with pytest.raises(SnrfError, match=r"plain name of a column|not a format string"):
        template_fields(template)
