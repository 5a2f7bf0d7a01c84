"""Conversations, system prompts, template variables and several columns of images, against the template itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_source, make_target
from PIL import Image
from profiling.probing import lines, options
from transformers import AutoProcessor, AutoTokenizer

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.probes.conversation import read_conversation
from mergekit_snrf.profiling.probes.render import Renderer
from mergekit_snrf.profiling.probes.source import ProbeSource, RowError
from mergekit_snrf.profiling.settings import load_profile_config

pytest.importorskip("datasets")

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in MESSAGES
]
THINKING = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if not enable_thinking | default(true) %} <think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("llava"), "llava", "hub")


@pytest.mark.parametrize("conversation", [MESSAGES, SHARED], ids=["messages", "conversations"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversation_is_the_templates_own(llama, tmp_path, conversation, suffix):
    from datasets import Dataset

    path = lines(tmp_path / "chats.jsonl", [{"chat": conversation}] * 2)
    if suffix == "parquet":
        path = tmp_path / "chats.parquet"
        Dataset.from_list([{"chat": conversation}] * 2).to_parquet(path)
    config = options(llama, path, question="chat", answer={"by": "column", "column": "chat"})
    row = config.rows().rows[0]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True, tokenize=False)
    source = ProbeSource(dataset=str(path), question="chat")
    assert Renderer(tokenizer, source).render(row) == expected
    assert (row.answer, row.question) == ("6", "And 3 + 3?")
    with pytest.raises(RowError, match="a template writes only one"):
        Renderer(tokenizer, ProbeSource(dataset=str(path), question="chat", template="{chat}")).render(row)


def test_system_prompt_and_variables(llama, tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"q": "What is 2 + 2?"}] * 2)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = THINKING
    row = options(llama, path).rows().rows[0]
    settings: dict[str, Any] = {"system": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}}
    prompt = Renderer(tokenizer, ProbeSource(dataset=str(path), question="q", **settings)).render(row)
    assert prompt == "[system] Be brief.\n[user] What is 2 + 2?\n[assistant] <think></think>"


def test_columns_of_images(llava, tmp_path):
    """MMMU's layout: image_1, image_2, ..., marked in the question by number; missing ones are null."""
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{name}.png")
    questions = ["Is <image 1> redder than <image 2>?", "What is it?", "Is <image 2> redder than <image 1>?"]
    images = [("a.png", "b.png"), (None, "b.png"), ("a.png", "b.png")]
    content = [{"q": q, "image_1": a, "image_2": b} for q, (a, b) in zip(questions, images, strict=True)]
    path = lines(tmp_path / "rows.jsonl", content)
    source = ProbeSource(dataset=str(path), question="q", images=["image_1", "image_2"])
    config = options(llava, path, images=["image_1", "image_2"])
    rows = config.rows()
    assert [[image.getpixel((0, 0)) for image in rows.images(row)] for row in rows.rows] == [
        [(255, 0, 0), (0, 0, 255)], [(0, 0, 255)], [(255, 0, 0), (0, 0, 255)],
    ]  # fmt: skip
    processor = AutoProcessor.from_pretrained(llava)
    renderer = Renderer(processor, source)
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " redder than "}]
    messages = [{"role": "user", "content": [*parts, {"type": "image"}, {"type": "text", "text": "?"}]}]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert renderer.render(rows.rows[0]) == expected
    with pytest.raises(RowError, match="marks its images in the order 2, 1"):
        renderer.render(rows.rows[2])


def test_messages_around_the_last_question():
    user, empty = {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}
    assert read_conversation(
        [user, {"role": "system", "content": "n"}, {"role": "assistant", "content": "b"}], "c"
    ) == (
        (("user", "a"),),
        "b",
    )
    assert read_conversation([{"role": "system", "content": ""}, user, empty], "c") == ((("user", "a"),), "")
    assert read_conversation([user], "c") == ((("user", "a"),), None)


def test_own_system_prompt_replaces_that_of_a_conversation(llama, tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"q": MESSAGES}] * 2)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    # As templates of reasoning models do, this one leaves out earlier thoughts.
    tokenizer.chat_template = THINKING.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
    row = options(llama, path).rows().rows[0]
    row = replace(row, turns=tuple((r, f"<think>hm</think>{t}" if r == "assistant" else t) for r, t in row.turns))
    prompt = Renderer(tokenizer, ProbeSource(dataset=str(path), question="q", system="Mine.")).render(row)
    assert prompt == "[system] Mine.\n[user] What is 2 + 2?\n[assistant] 4\n[user] And 3 + 3?\n[assistant]"


def test_settings_reach_the_probes(llama, tmp_path):
    data = lines(tmp_path / "rows.jsonl", [{"q": "What is 2 + 2?"}] * 2)
    side = {"model": str(llama), "probes": {"dataset": str(data), "question": "q"}}
    more = {"system": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}}
    keep = [{"dataset": str(data), "question": "q"}, {"dataset": str(data), "template": "{q}"}]
    path = tmp_path / "profile.yml"
    path.write_text(json.dumps({"target": {**side, **more}, "source": side, "keep": keep}))
    config = load_profile_config(path)
    of_target, of_source = (config.kind(name).source for name in ("target", "source"))  # type: ignore[arg-type]
    assert (of_target.system, of_target.chat_template_kwargs) == ("Be brief.", {"enable_thinking": False})
    assert (of_source.system, of_source.chat_template_kwargs) == (None, None)
    assert [(k.source.system, k.source.chat_template_kwargs) for k in config.kept()] == [
        (None, {"enable_thinking": False}), (None, None),
    ]  # fmt: skip
    for wrong, message in (
        ({"template": "{q}", "system": "x"}, "system goes with the chat template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize cannot be set"),
        ({"probes": {**side["probes"], "images": []}}, "images"),  # type: ignore[dict-item]
    ):
        path.write_text(json.dumps({"target": {**side, **wrong}, "source": side}))
        with pytest.raises(SnrfError, match=message):
            load_profile_config(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "assistant", "content": "6"}], "has no message of the user"),
        ([{"role": "tool", "content": "6"}], "a message of 'tool'"),
        ([{"role": "user", "content": None}], "without text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "a part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}], "type 'image_url'"),
        ({"role": ["user"], "content": ["a", "b"]}, "lists of different lengths"),
        ([{"from": 3}], "a message of '3'"),
    ],
)
def test_conversations_that_cannot_be_used(value, message):
    with pytest.raises(RowError, match=message):
        read_conversation(value, "chat")
