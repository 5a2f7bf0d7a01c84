"""Rows of a dataset -> prompts -> batches with answers, on tiny checkpoints of three families."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_source, make_target
from PIL import Image
from processors import processor_missing
from profiling.probing import QUESTIONS, Options, lines, options, write_data
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.probes import render
from mergekit_snrf.profiling.probes.answers import Answer
from mergekit_snrf.profiling.probes.batches import ProbeBatch, probe_batches, probes_sha256
from mergekit_snrf.profiling.probes.source import RowError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": make_source(root / "llama", "llama"),
        "mistral": make_source(root / "mistral", "mistral"),
        "llava": make_target(root / "llava", "llava", "hub"),
        "qwen2_5_vl": make_target(root / "qwen2_5_vl", "qwen2_5_vl", "hub"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


class QwenByHand:
    """The image part of Qwen2.5-VL's processor, whose video part transformers cannot load without torchvision."""

    image_token = "<|image_pad|>"

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.chat_template = self.tokenizer.chat_template

    def apply_chat_template(self, messages: list[Any], **keys: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **keys)

    def __call__(self, text: list[str], images: list[list[Image.Image]], **keys: Any) -> dict[str, Tensor]:
        tensors = self.image_processor(images=[image for row in images for image in row], return_tensors="pt")
        counts = iter((tensors["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2).tolist())
        expanded = []
        for prompt in text:
            first, *others = prompt.split(self.image_token)
            expanded.append(first + "".join(self.image_token * next(counts) + other for other in others))
        tokens = self.tokenizer(expanded, **keys)
        kinds = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)
        return {**tokens, **tensors, "mm_token_type_ids": kinds.long()}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path], data: Path) -> tuple[Any, Any]:
    return options(folders["llama"], data / "texts.jsonl").load()


@pytest.fixture(scope="module")
def llava(folders: dict[str, Path], data: Path) -> tuple[Any, Any]:
    return options(folders["llava"], data / "images.jsonl", images="images").load()


@pytest.fixture(scope="module")
def qwen(folders: dict[str, Path], data: Path) -> tuple[Any, Any]:
    config = options(folders["qwen2_5_vl"], data / "images.jsonl", images="images")
    if not processor_missing("qwen2_5_vl"):
        return config.load()
    text = options(folders["qwen2_5_vl"], data / "texts.jsonl")
    return text.load()[0], QwenByHand(folders["qwen2_5_vl"])


class TestPrompts:
    def test_the_prompt_and_its_tokens_are_those_of_the_models_own_chat(self, data, folders, llama, llava):
        config = options(folders["llama"], data / "texts.jsonl", answer={"by": "column", "column": "a"}, batch_size=1)
        tokenizer = llama[1]
        for batch in config.batches(*llama):
            messages = [{"role": "user", "content": QUESTIONS[batch.numbers[0]]}]
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert batch.inputs["input_ids"][~batch.answer_mask].tolist() == expected["input_ids"]
        config = options(folders["llava"], data / "images.jsonl", images="images", batch_size=1, limit=3)
        rows, processor = config.rows(), llava[1]
        for batch in config.of_column().batches(*llava):
            row = next(row for row in rows.rows if row.number == batch.numbers[0])
            content = [{"type": "image", "image": image} for image in rows.images(row)]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": row.question}]}]
            expected = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            assert torch.equal(batch.inputs["input_ids"][~batch.answer_mask], expected["input_ids"][0])
            assert torch.equal(batch.inputs["pixel_values"], expected["pixel_values"].double())

    def test_images_go_where_the_question_says(self, data, folders, llava):
        texts = ["a", "<image>a", "a <image> b", "a<image><image>"]
        pictures = ["0.png", "1.png"]
        content = [{"q": text, "images": pictures[: max(1, text.count("<image>"))]} for text in texts]
        path = lines(data / "rows.jsonl", content)
        config = options(folders["llava"], path, images="images")
        start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        prompts = [config.render(row, llava[1]) for row in config.rows().rows]
        assert prompts == [
            f"{start}<image>\na{end}",
            f"{start}<image>\na{end}",
            f"{start}a <image>\n b{end}",
            f"{start}a<image>\n<image>\n{end}",
        ]
        lines(path, [{"q": "a <image> b <image>", "images": pictures[:1]}])
        with pytest.raises(RowError, match=r"the question has 2 <image> for 1 image"):
            config.render(config.rows().rows[0], llava[1])

    def test_a_template_replaces_the_chat(self, data, folders, llava, qwen):
        keys = {"images": "images", "template": "<image> {q} calc :", "limit": 2, "seed": 1}
        config = options(folders["llava"], data / "images.jsonl", **keys)
        first = config.rows().rows[0]
        assert config.render(first, llava[1]) == f"<image> {first.question} calc :"
        config = options(folders["qwen2_5_vl"], data / "images.jsonl", **keys)
        marker = "<|vision_start|><|image_pad|><|vision_end|>"
        assert config.render(first, qwen[1]) == f"{marker} {first.question} calc :"

    def test_a_template_has_as_many_placeholders_as_a_row_has_images(self, data, folders, llava):
        config = options(folders["llava"], data / "images.jsonl", images="images", template="<image> {q}")
        with pytest.raises(SnrfError, match=r"1 of 6 rows .*row 3: the template has 1 <image> for 2 image"):
            config.prepare(llava[1])

    def test_a_template_leaves_the_begin_of_the_text_to_the_tokenizer_once(self, data, folders):
        from tokenizers.processors import TemplateProcessing

        processor = options(folders["llama"], data / "texts.jsonl").processor()
        begin = (processor.bos_token, processor.bos_token_id)
        processor.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
        for template, count in (("{q}", 1), (f"{begin[0]}{{q}}", 1), (None, 1)):
            config = options(folders["llama"], data / "texts.jsonl", template=template, limit=1)
            row = config.rows().rows[0]
            probes = config.prepare(processor)
            ids = processor(config.render(row, processor), add_special_tokens=False)["input_ids"]
            added = probes.probes[0].tokens - len(ids)
            assert ids.count(begin[1]) + added == count

    def test_a_model_without_a_chat_template_needs_a_template(self, data, folders):
        config = options(folders["mistral"], data / "texts.jsonl")
        tokenizer = config.processor()
        with pytest.raises(SnrfError) as caught:
            config.prepare(tokenizer)
        assert (caught.value.where, caught.value.field) == (str(folders["mistral"]), "template")
        config = options(folders["mistral"], data / "texts.jsonl", template="{q} calc :")
        assert config.prepare(tokenizer).probes[0].prompt == f"{QUESTIONS[0]} calc :"

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "leaves out the question"),
            ("{{ raise_exception('no user here') }}", "no user here"),
            ("{{ 1 // 0 }}", "fails"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
            ("{{ 'a' * 10**10 }}", "GiB of memory"),
            ("{{ 'a' * 2 * 10**7 }}", "characters"),
            ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
            ("{% if", "fails"),
        ],
    )
    def test_a_chat_template_that_fails_is_one_error_with_the_model(self, data, folders, monkeypatch, template, reason):
        if reason == "seconds":
            monkeypatch.setattr(render, "MAX_SECONDS", 0.3)
        config = options(folders["llama"], data / "texts.jsonl")
        tokenizer = config.processor()
        tokenizer.chat_template = template
        with pytest.raises(SnrfError, match=reason) as caught:
            config.prepare(tokenizer)
        assert (caught.value.where, caught.value.field) == (str(folders["llama"]), "template")

    def test_what_fails_on_every_row_is_the_fault_of_the_model(self, data, folders, llava, monkeypatch):
        config = options(folders["llava"], data / "images.jsonl", images="images")
        monkeypatch.setattr(llava[1], "patch_size", None)
        with pytest.raises(SnrfError, match=r"none of the 6 rows can be used, all for the same reason") as caught:
            config.prepare(llava[1])
        assert caught.value.where == str(folders["llava"])

    def test_nothing_is_cut(self, tmp_path, folders):
        path = lines(tmp_path / "rows.jsonl", [{"q": "one two three " * 40}])
        config = options(folders["llama"], path)
        tokenizer = config.processor()
        whole = config.prepare(tokenizer).probes[0].tokens
        tokenizer.backend_tokenizer.enable_truncation(max_length=16)
        tokenizer.model_max_length = 16
        assert config.prepare(tokenizer).probes[0].tokens == whole > 100

    def test_a_probe_over_the_limit_is_left_out_and_counted(self, tmp_path, folders, llama):
        path = lines(tmp_path / "rows.jsonl", [{"q": "word " * (200 if i == 11 else 3)} for i in range(20)])
        for limit in ({"token_limit": 64}, {}):
            config = options(folders["llama"], path, answer={"max_new_tokens": 20}, **limit)
            model, tokenizer = llama
            positions = model.config.max_position_embeddings
            model.config.max_position_embeddings = 100
            try:
                probes = config.prepare(tokenizer, model)
            finally:
                model.config.max_position_embeddings = positions
            assert len(probes) == 19
            assert list(probes.bad) == [11]
            what = "the token_limit of 64" if limit else "the model's 100 positions"
            assert f"tokens and an answer of up to 20 exceed {what}" in probes.bad[11].what
        tokens = [probe.tokens for probe in probes.probes]
        config = options(folders["llama"], path, answer={"max_new_tokens": 20}, token_limit=tokens[0] + 20)
        assert len(config.prepare(tokenizer)) == 19
        with pytest.raises(SnrfError, match=r"max_new_tokens: 20 of 20 rows"):
            replace(config, token_limit=tokens[0] + 19).prepare(tokenizer)
        lines(path, [{"q": "word " * 200}])
        config = replace(config, token_limit=64)
        with pytest.raises(SnrfError, match=r"row 0: .* tokens and an answer of up to 20 exceed the token_limit"):
            config.prepare(tokenizer)

    def test_the_sha256_knows_prompts_images_and_answers(self, tmp_path, data, folders, llava):
        for name in ("0.png", "1.png"):
            (tmp_path / name).write_bytes((data / name).read_bytes())
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "a": "1", "images": ["0.png"]}])

        def digest(**keys: Any) -> str:
            config = options(folders["llava"], path, images="images", **keys)
            return probes_sha256(config.prepare(llava[1]))

        first = digest()
        assert first == digest() == digest(batch_size=1)
        assert len(first) == 64
        others = {digest(template="<image> {q}"), digest(answer={"by": "column", "column": "a"})}
        (tmp_path / "0.png").write_bytes((data / "1.png").read_bytes())
        others.add(digest())
        lines(path, [{"q": "b", "a": "1", "images": ["1.png"]}])
        others.add(digest())
        assert len({first, *others}) == 5


def greedy(
    model: Any, inputs: dict[str, Tensor], steps: int, ends: set[int], never: set[int] = frozenset()
) -> list[int]:
    """One prompt's most probable continuation, token by token, without a cache."""
    ids: list[int] = []
    while len(ids) < steps and not (ids and ids[-1] in ends):
        tail = torch.tensor([ids], dtype=torch.long)
        whole = {name: value for name, value in inputs.items() if name != "position_ids"}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in whole:
                added = tail if name == "input_ids" else torch.full_like(tail, int(name == "attention_mask"))
                whole[name] = torch.cat([whole[name], added], dim=1)
        with torch.no_grad():
            logits = model(**whole).logits[0, -1]
        logits[list(never)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids


def prompt_inputs(batch: ProbeBatch) -> dict[str, Tensor]:
    width = int((~batch.answer_mask[0]).sum())
    per_token = batch.inputs["input_ids"].shape
    return {name: value[:, :width] if value.shape == per_token else value for name, value in batch.inputs.items()}


CASES = ["llama", "llava", "qwen2_5_vl"]


@pytest.fixture
def case(request: pytest.FixtureRequest, data: Path, folders: dict[str, Path]) -> tuple[Options, Any, Any]:
    family = request.param
    model, processor = request.getfixturevalue({"qwen2_5_vl": "qwen"}.get(family, family))
    keys = {} if family == "llama" else {"images": "images"}
    dataset = data / ("texts.jsonl" if family == "llama" else "images.jsonl")
    config = options(folders[family], dataset, answer={"max_new_tokens": 7}, batch_size=6, **keys)
    return config, model, processor


class TestBatches:
    @pytest.mark.parametrize("case", CASES, indirect=True)
    @pytest.mark.parametrize("by", ["model", "column"])
    def test_a_probe_in_a_batch_is_the_probe_alone(self, case, by):
        config, model, processor = case
        if by == "column":
            config = config.of_column()
        alone = {batch.numbers: batch for batch in replace(config, batch_size=1).batches(model, processor)}
        together = config.batches(model, processor)
        assert max(len(batch.numbers) for batch in together) > 1
        assert any(not bool(batch.attention_mask[:, -1].all()) for batch in together)
        assert all(bool(batch.attention_mask[:, 0].all()) for batch in together)
        assert sorted(number for batch in together for number in batch.numbers) == list(range(len(QUESTIONS)))
        for batch in together:
            with torch.no_grad():
                logits = model(**batch.inputs, use_cache=False).logits
            for index, number in enumerate(batch.numbers):
                single = alone[number,]
                real = batch.attention_mask[index].bool()
                assert torch.equal(batch.inputs["input_ids"][index][real], single.inputs["input_ids"][0])
                assert torch.equal(batch.answer_mask[index][real], single.answer_mask[0])
                assert batch.answers[index] == single.answers[0]
                # Alone there is no padding, and the model finds the positions by itself.
                own = {name: value for name, value in single.inputs.items() if name != "position_ids"}
                with torch.no_grad():
                    expected = model(**own, use_cache=False).logits[0]
                torch.testing.assert_close(logits[index][real], expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("case", CASES, indirect=True)
    def test_the_answer_is_the_models_own_greedy_one(self, case):
        config, model, processor = case
        tokenizer = getattr(processor, "tokenizer", processor)
        never = {model.config.image_token_id} if config.source.images else set()
        never |= {model.config.vision_start_token_id} if hasattr(model.config, "vision_start_token_id") else set()
        for batch in replace(config, batch_size=1).batches(model, processor):
            expected = greedy(model, prompt_inputs(batch), 7, {tokenizer.eos_token_id}, never)
            assert batch.inputs["input_ids"][batch.answer_mask].tolist() == expected
            assert batch.answers == (tokenizer.decode(expected, skip_special_tokens=True),)

    def test_an_answer_ends_with_its_end_token_or_is_counted_as_cut(self, data, folders, llama):
        config = options(folders["llama"], data / "texts.jsonl", answer={"max_new_tokens": 7})
        model, tokenizer = llama
        free = {number: ids for batch in config.batches(*llama) for number, ids in answer_ids(batch).items()}
        assert all(len(ids) == 7 for ids in free.values())
        end = free[2][3]
        own = model.generation_config
        model.generation_config = GenerationConfig(eos_token_id=[end, tokenizer.eos_token_id])
        try:
            ended = config.batches(*llama)
        finally:
            model.generation_config = own
        for batch in ended:
            for flag, (number, ids) in zip(batch.ended, answer_ids(batch).items(), strict=True):
                expected = free[number][: free[number].index(end) + 1] if end in free[number] else free[number]
                assert ids == expected
                assert flag == (end in free[number])
        assert not all(flag for batch in ended for flag in batch.ended)

    def test_sampling_and_penalties_of_the_checkpoint_change_nothing(self, data, folders, llama):
        config = options(folders["llama"], data / "texts.jsonl", answer={"max_new_tokens": 7})
        model = llama[0]
        expected = [batch.answers for batch in config.batches(*llama)]
        own = model.generation_config
        wild = GenerationConfig(
            do_sample=True,
            temperature=9.0,
            top_k=3,
            top_p=0.5,
            repetition_penalty=5.0,
            no_repeat_ngram_size=1,
            max_length=3,
        )
        model.generation_config = wild
        try:
            assert [batch.answers for batch in config.batches(*llama)] == expected
            assert model.generation_config is wild
        finally:
            model.generation_config = own

    def test_an_answer_never_holds_an_image_token(self, data, folders, llava):
        config = options(
            folders["llava"], data / "images.jsonl", images="images", answer={"max_new_tokens": 3}, limit=2
        )
        model, processor = llava
        image = model.config.image_token_id

        def prefer(module: Any, inputs: Any, logits: Tensor) -> Tensor:
            logits = logits.clone()
            logits[..., image] = 1e9
            return logits

        handle = model.lm_head.register_forward_hook(prefer)
        try:
            for batch in config.batches(model, processor):
                assert image not in batch.inputs["input_ids"][batch.answer_mask].tolist()
                model(**batch.inputs)
        finally:
            handle.remove()

    def test_a_text_probe_of_a_vision_language_model_holds_no_image_token(self, tmp_path, folders, llava):
        path = lines(tmp_path / "rows.jsonl", [{"q": "what is <image> ?"}])
        config = options(folders["llava"], path)
        with pytest.raises(SnrfError, match="row 0: the prompt contains a token that stands for an image"):
            config.prepare(config.processor(), llava[0])

    def test_groups_are_of_similar_length_and_shards_make_the_same_batches(self, tmp_path, folders, llama):
        draw = np.random.RandomState(0)
        path = lines(tmp_path / "rows.jsonl", [{"q": "word " * int(n)} for n in draw.randint(1, 60, 30)])
        config = options(folders["llama"], path, answer={"max_new_tokens": 2}, batch_size=4)
        model, tokenizer = llama
        probes = config.prepare(tokenizer, model)
        assert sorted(p for group in probes.groups for p in group) == list(range(30))
        assert {len(group) for group in probes.groups} == {4, 2}
        lengths = [[probes.probes[p].length for p in group] for group in probes.groups]
        assert all(min(a) >= max(b) for a, b in pairwise(lengths))
        whole = list(probe_batches(probes, model, tokenizer, rule=config.rule, device="cpu"))
        for batch in whole:
            assert batch.attention_mask.float().mean() > 0.65
        shards = [
            list(probe_batches(probes, model, tokenizer, rule=config.rule, device="cpu", groups=groups))
            for groups in (range(0, len(probes.groups), 2), range(1, len(probes.groups), 2))
        ]
        again = {(batch.group, batch.numbers): batch for shard in shards for batch in shard}
        assert len(again) == len(whole)
        for batch in whole:
            same = again[batch.group, batch.numbers]
            assert batch.answers == same.answers
            for name, tensor in batch.inputs.items():
                assert torch.equal(tensor, same.inputs[name])

    def test_answers_of_uneven_length_share_no_batch(self, data, folders, llama, monkeypatch):
        lengths = {0: 3, 1: 90, 2: 80, 3: 2, 4: 1, 5: 85}

        def of_these_lengths(model: Any, processor: Any, inputs: dict[str, Tensor], most: int) -> list[Answer]:
            texts = processor.batch_decode(inputs["input_ids"])
            rows = [next(i for i, question in enumerate(QUESTIONS) if f"\n\n{question}<" in text) for text in texts]
            return [Answer((7,) * lengths[row]) for row in rows]

        monkeypatch.setattr("mergekit_snrf.profiling.probes.batches.generate_answers", of_these_lengths)
        found = options(folders["llama"], data / "texts.jsonl").batches(*llama)
        assert {number: ids for batch in found for number, ids in answer_ids(batch).items()} == {
            number: [7] * length for number, length in lengths.items()
        }
        assert len(found) > 1
        assert {batch.group for batch in found} == {0}
        for batch in found:
            real = batch.attention_mask.sum(dim=1)
            assert real.min() >= 0.7 * real.max()

    def test_an_answer_from_the_dataset_is_appended_as_it_is(self, data, folders, llama):
        config = options(folders["llama"], data / "texts.jsonl", answer={"by": "column", "column": "a"})
        tokenizer = llama[1]
        found = {number: ids for batch in config.batches(*llama) for number, ids in answer_ids(batch).items()}
        assert found == {
            i: tokenizer(f"x = {i * 17}", add_special_tokens=False)["input_ids"] for i in range(len(QUESTIONS))
        }

    def test_a_dataset_answer_with_an_image_token_is_bad(self, data, folders, llava):
        path = lines(data / "one.jsonl", [{"q": "a", "a": "<image>", "images": ["0.png"]}])
        config = options(folders["llava"], path, images="images", answer={"by": "column", "column": "a"})
        with pytest.raises(SnrfError, match="row 0: the answer contains a token that stands for an image"):
            config.batches(*llava)


def answer_ids(batch: ProbeBatch) -> dict[int, list[int]]:
    masked = zip(batch.numbers, batch.inputs["input_ids"], batch.answer_mask, strict=True)
    return {number: ids[mask].tolist() for number, ids, mask in masked}
