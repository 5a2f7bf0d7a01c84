"""Rows of a dataset -> prompts -> batches with answers, on tiny checkpoints of three families."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_source, make_target, read, write
from PIL import Image
from processors import SOURCE_CHATS, SOURCE_CORPUS, make_tokenizer, processor_missing
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models import loading
from mergekit_snrf.profiling.probes.answers import Answer
from mergekit_snrf.profiling.probes.batches import (
    ProbeBatch,
    load_rows,
    prepare,
    probe_batches,
    probes_sha256,
    render,
)
from mergekit_snrf.profiling.probes.rows import _encoded, _RowError
from mergekit_snrf.profiling.settings import ProfileConfig, SideConfig, load_profile_config, model_ref

datasets = pytest.importorskip("datasets")

BOARD = Path(__file__).parents[2] / "examples" / "board"
QUESTIONS = (
    "What is the area?",
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether in the two months?",
    "Find x.",
    "What is the length of AB if the angle ABC is a right angle?",
    "Hi!",
    "The base of a triangle is 3 and its height 4. What is the area?",
)
SIZES = ((24, 16), (16, 24), (40, 20), (20, 20), (34, 34), (16, 16))


@pytest.fixture(scope="module", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads, cache = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(threads)
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": make_source(root / "llama", "llama"),
        "mistral": make_source(root / "mistral", "mistral"),
        "llava": make_target(root / "llava", "llava", "hub"),
        "qwen2_5_vl": make_target(root / "qwen2_5_vl", "qwen2_5_vl", "hub"),
        "internvl_chat": make_target(root / "internvl_chat", "internvl_chat", "hub"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts.jsonl of questions and answers, and images.jsonl with one or two images a row beside it."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.RandomState(0)
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(pixels.randint(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    rows = [{"q": question, "a": f"x = {index * 17}"} for index, question in enumerate(QUESTIONS)]
    lines(folder / "texts.jsonl", rows)
    for index, row in enumerate(rows):
        row["images"] = [f"{index}.png"] if index != 3 else ["3.png", "0.png"]
    lines(folder / "images.jsonl", rows)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def options(model: Path | str, dataset: Path | str, **keys: Any) -> ProfileConfig:
    """A configuration whose two sides are the same; keys of probes and of the side are told apart by name."""
    probes = {"dataset": str(dataset), "question": "q"}
    probes |= {key: keys.pop(key) for key in ("question", "images", "split", "config") if key in keys}
    side = {"model": str(model), "probes": probes}
    side |= {key: keys.pop(key) for key in ("template", "gguf_file") if key in keys}
    return ProfileConfig.model_validate({"target": side, "source": side, **keys})


def rows_of(config: ProfileConfig) -> Any:
    return load_rows(config.target, config)


def load_model(side: SideConfig, **options: Any) -> tuple[Any, Any]:
    return loading.load_model(model_ref(side, **options), images=side.probes.images is not None)


def load_processor(side: SideConfig) -> Any:
    return loading.load_processor(model_ref(side), images=side.probes.images is not None)


def loaded(config: ProfileConfig, dtype: str = "float64") -> tuple[Any, Any]:
    return load_model(config.target, device="cpu", dtype=dtype)


def batches(config: ProfileConfig, model: Any, processor: Any, **keys: Any) -> list[ProbeBatch]:
    return list(probe_batches(rows_of(config), model, processor, config.target, config, device="cpu", **keys))


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
    return loaded(options(folders["llama"], data / "texts.jsonl"))


@pytest.fixture(scope="module")
def llava(folders: dict[str, Path], data: Path) -> tuple[Any, Any]:
    return loaded(options(folders["llava"], data / "images.jsonl", images="images"))


@pytest.fixture(scope="module")
def qwen(folders: dict[str, Path], data: Path) -> tuple[Any, Any]:
    config = options(folders["qwen2_5_vl"], data / "images.jsonl", images="images")
    if not processor_missing("qwen2_5_vl"):
        return loaded(config)
    text = options(folders["qwen2_5_vl"], data / "texts.jsonl")
    return loaded(text)[0], QwenByHand(folders["qwen2_5_vl"])


class TestRows:
    def test_every_kind_of_file_gives_the_same_rows(self, tmp_path: Path) -> None:
        content = [{"q": f"question, {i}", "a": i * 1.5} for i in range(4)]
        table = datasets.Dataset.from_list(content)
        table.to_csv(tmp_path / "rows.csv")
        table.to_parquet(tmp_path / "rows.parquet")
        (tmp_path / "rows.json").write_text(json.dumps(content))
        lines(tmp_path / "rows.jsonl", content)
        for suffix in ("csv", "parquet", "json", "jsonl"):
            config = options("m", tmp_path / f"rows.{suffix}", answer={"by": "column", "column": "a"})
            rows = rows_of(config).rows
            assert [(row.number, row.question, row.answer) for row in rows] == [
                (i, f"question, {i}", str(i * 1.5)) for i in range(4)
            ]

    def test_the_draw_never_changes(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "rows.jsonl", [{"q": str(i)} for i in range(20)])
        drawn = {
            (seed, limit): [row.number for row in rows_of(options("m", path, seed=seed, limit=limit)).rows]
            for seed, limit in ((0, 4), (0, 8), (1, 4), (0, 20), (0, 99))
        }
        # Written down once: the stream of MT19937 is the same on every machine and in every version of numpy.
        assert drawn[0, 4] == [6, 14, 15, 16]
        assert set(drawn[0, 4]) < set(drawn[0, 8])
        assert drawn[1, 4] != drawn[0, 4]
        assert drawn[0, 20] == drawn[0, 99] == list(range(20))

    def test_a_wrong_column_is_told_the_columns_there_are(self, data: Path) -> None:
        for keys in ({"question": "problem"}, {"images": "image"}, {"template": "{solution}"}):
            with pytest.raises(SnrfError, match=r"images.jsonl: has no column .*; the columns are q, a, images"):
                rows_of(options("m", data / "images.jsonl", **keys))
        with pytest.raises(SnrfError, match=r"has no column 'answer' \(probes.answer\)"):
            rows_of(options("m", data / "texts.jsonl", answer={"by": "column", "column": "answer"}))

    def test_bad_rows_are_named_and_counted_up_to_a_twentieth(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        content: list[dict[str, Any]] = [{"q": f"question {i}"} for i in range(40)]
        content[7]["q"], content[30]["q"] = None, "  "
        path = lines(tmp_path / "rows.jsonl", content)
        with caplog.at_level(logging.WARNING):
            rows = rows_of(options("m", path))
        assert [(bad.number, bad.reason) for bad in rows.bad] == [
            (7, "column 'q' is empty"),
            (30, "column 'q' is empty"),
        ]
        assert len(rows) == 38
        assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
            "row 7: column 'q' is empty; left out",
            "row 30: column 'q' is empty; left out",
        ]
        content[31]["q"] = None
        lines(path, content)
        with pytest.raises(SnrfError, match=r"3 of 40 rows cannot be used \(row 7: column 'q' is empty; row 30: .*5 %"):
            rows_of(options("m", path))

    def test_a_list_is_no_question(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "rows.jsonl", [{"q": ["a", "b"]}])
        with pytest.raises(SnrfError, match="row 0: column 'q' holds list, not text"):
            rows_of(options("m", path))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [('{"q": 1}\n{"q": ', "cannot be read as a dataset"), ("", "is empty|has no rows|cannot be read")],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: str, reason: str) -> None:
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(SnrfError, match=rf"rows.jsonl: ({reason})"):
            rows_of(options("m", tmp_path / "rows.jsonl"))

    def test_a_missing_file_or_split_or_kind_is_named(self, tmp_path: Path, data: Path) -> None:
        for name in ("nothing.jsonl", f"{tmp_path}/nothing.txt", f"{tmp_path}/nothing", "./nothing", "nothing.txt"):
            with pytest.raises(SnrfError, match=r"nothing.*: no such file; correct the path of probes.dataset"):
                rows_of(options("m", name))
        (tmp_path / "rows.xml").write_text("<q/>")
        with pytest.raises(SnrfError, match=r"rows.xml: a data file must end in one of .jsonl, .json, .parquet, .csv"):
            rows_of(options("m", tmp_path / "rows.xml"))
        with pytest.raises(SnrfError, match=r"config and revision are for datasets on the hub"):
            rows_of(options("m", data / "texts.jsonl", config="main"))
        assert len(rows_of(options("m", data / "texts.jsonl", split="train[:2]"))) == 2

    def test_probes_that_read_no_column_are_refused(self, data: Path) -> None:
        with pytest.raises(SnrfError, match=r"texts.jsonl: no column is read, .* template 'calc :', or set"):
            rows_of(options("m", data / "texts.jsonl", template="calc :", question=None))

    def test_a_dataset_that_the_hub_does_not_give_is_named(self) -> None:
        with pytest.raises(SnrfError, match=r"nobody/nothing: cannot be read as a dataset \(.*login"):
            rows_of(options("m", "nobody/nothing"))


class TestImages:
    def test_paths_bytes_and_features_give_the_same_pixels(self, tmp_path: Path, data: Path) -> None:
        files = [data / "0.png", data / "1.png"]
        rows = {"q": ["a"], "bytes": [[path.read_bytes() for path in files]]}
        rows["paths"] = [[str(path) for path in files]]
        rows["both"] = [[{"bytes": path.read_bytes(), "path": path.name} for path in files]]
        rows["feature"] = rows["both"]
        rows["one"] = [rows["both"][0][0]]
        table = datasets.Dataset.from_dict(rows)
        table = table.cast_column("feature", datasets.List(datasets.Image())).cast_column("one", datasets.Image())
        table.to_parquet(tmp_path / "rows.parquet")
        expected = [np.asarray(Image.open(path)) for path in files]
        sums = set()
        for column in ("bytes", "paths", "both", "feature", "one"):
            loaded_rows = rows_of(options("m", tmp_path / "rows.parquet", images=column))
            images = loaded_rows.images(loaded_rows.rows[0])
            assert [np.array_equal(np.asarray(i), e) for i, e in zip(images, expected, strict=False)] == [True] * (
                1 if column == "one" else 2
            )
            sums.add(loaded_rows.rows[0].images[:1])
        assert len(sums) == 1

    def test_a_path_is_looked_for_beside_the_file(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(data.parent)
        rows = rows_of(options("m", data / "images.jsonl", images="images"))
        assert [image.size for row in rows.rows for image in rows.images(row)] == [
            *SIZES[:4],
            SIZES[0],
            *SIZES[4:],
        ]

    def test_images_are_upright_and_rgb(self, tmp_path: Path) -> None:
        picture = Image.new("P", (6, 3))
        picture.putpalette([255, 0, 0] + [0] * 765)
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
        picture.save(tmp_path / "palette.png")
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "images": ["turned.jpg", "palette.png"]}])
        rows = rows_of(options("m", path, images="images"))
        turned, palette = rows.images(rows.rows[0])
        assert (turned.size, turned.mode) == ((3, 6), "RGB")
        assert palette.getpixel((0, 0)) == (255, 0, 0)

    def test_a_row_without_a_readable_image_is_bad(self, tmp_path: Path, data: Path) -> None:
        whole = (data / "2.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.png").write_text("no image")
        entries = [["nothing.png"], [], None, ["cut.png"], ["text.png"], [None]]
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "images": entry} for entry in entries])
        with pytest.raises(SnrfError) as caught:
            rows_of(options("m", path, images="images"))
        for fragment in (
            "6 of 6 rows cannot be used",
            "nothing.png' cannot be read (No such file",
            "row 1: no image in column 'images'; row 2: no image",
            "row 3: an image of",
            "row 4: an image of 8 bytes cannot be decoded",
            "; ...",
        ):
            assert fragment in str(caught.value)

    def test_a_relative_path_needs_a_local_file(self) -> None:
        with pytest.raises(_RowError, match="relative path, which only a local data file can have"):
            _encoded("0.png", None)


class TestPrompts:
    def test_the_prompt_and_its_tokens_are_those_of_the_models_own_chat(
        self, data: Path, folders: dict[str, Path], llama: tuple[Any, Any], llava: tuple[Any, Any]
    ) -> None:
        config = options(folders["llama"], data / "texts.jsonl", answer={"by": "column", "column": "a"}, batch_size=1)
        tokenizer = llama[1]
        for batch in batches(config, *llama):
            messages = [{"role": "user", "content": QUESTIONS[batch.numbers[0]]}]
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert batch.inputs["input_ids"][~batch.answer_mask].tolist() == expected["input_ids"]
        config = options(folders["llava"], data / "images.jsonl", images="images", batch_size=1, limit=3)
        rows, processor = rows_of(config), llava[1]
        for batch in batches(config.override(answer={"by": "column", "column": "a"}), *llava):
            row = next(row for row in rows.rows if row.number == batch.numbers[0])
            content = [{"type": "image", "image": image} for image in rows.images(row)]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": row.question}]}]
            expected = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            assert torch.equal(batch.inputs["input_ids"][~batch.answer_mask], expected["input_ids"][0])
            assert torch.equal(batch.inputs["pixel_values"], expected["pixel_values"].double())

    def test_images_go_where_the_question_says(
        self, tmp_path: Path, data: Path, folders: dict[str, Path], llava: tuple[Any, Any]
    ) -> None:
        texts = ["a", "<image>a", "a <image> b", "a<image><image>"]
        pictures = [str(data / "0.png"), str(data / "1.png")]
        content = [{"q": text, "images": pictures[: max(1, text.count("<image>"))]} for text in texts]
        path = lines(tmp_path / "rows.jsonl", content)
        config = options(folders["llava"], path, images="images")
        start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        prompts = [render(row, llava[1], config.target) for row in rows_of(config).rows]
        assert prompts == [
            f"{start}<image>\na{end}",
            f"{start}<image>\na{end}",
            f"{start}a <image>\n b{end}",
            f"{start}a<image>\n<image>\n{end}",
        ]
        lines(path, [{"q": "a <image> b <image>", "images": pictures[:1]}])
        with pytest.raises(SnrfError, match=r"row 0: the question has 2 <image> for 1 image"):
            render(rows_of(config).rows[0], llava[1], config.target)

    def test_a_template_replaces_the_chat(
        self, data: Path, folders: dict[str, Path], llava: tuple[Any, Any], qwen: tuple[Any, Any]
    ) -> None:
        keys = {"images": "images", "template": "<image> {q} calc :", "limit": 2, "seed": 1}
        config = options(folders["llava"], data / "images.jsonl", **keys)
        first = rows_of(config).rows[0]
        assert render(first, llava[1], config.target) == f"<image> {first.question} calc :"
        config = options(folders["qwen2_5_vl"], data / "images.jsonl", **keys)
        marker = "<|vision_start|><|image_pad|><|vision_end|>"
        assert render(first, qwen[1], config.target) == f"{marker} {first.question} calc :"

    def test_a_template_has_as_many_placeholders_as_a_row_has_images(
        self, data: Path, folders: dict[str, Path], llava: tuple[Any, Any]
    ) -> None:
        config = options(folders["llava"], data / "images.jsonl", images="images", template="<image> {q}")
        with pytest.raises(SnrfError, match=r"1 of 6 rows .*row 3: the template has 1 <image> for 2 image"):
            prepare(rows_of(config), llava[1], config.target, config)

    def test_a_template_leaves_the_begin_of_the_text_to_the_tokenizer_once(
        self, data: Path, folders: dict[str, Path]
    ) -> None:
        from tokenizers.processors import TemplateProcessing

        processor = load_processor(options(folders["llama"], data / "texts.jsonl").target)
        begin = (processor.bos_token, processor.bos_token_id)
        processor.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
        for template, count in (("{q}", 1), (f"{begin[0]}{{q}}", 1), (None, 1)):
            config = options(folders["llama"], data / "texts.jsonl", template=template, limit=1)
            row = rows_of(config).rows[0]
            probes = prepare(rows_of(config), processor, config.target, config)
            ids = processor(render(row, processor, config.target), add_special_tokens=False)["input_ids"]
            added = probes.probes[0].tokens - len(ids)
            assert ids.count(begin[1]) + added == count

    def test_a_model_without_a_chat_template_needs_a_template(self, data: Path, folders: dict[str, Path]) -> None:
        config = options(folders["mistral"], data / "texts.jsonl")
        tokenizer = load_processor(config.target)
        with pytest.raises(SnrfError, match=r"mistral: has no chat template; set template for this side"):
            prepare(rows_of(config), tokenizer, config.target, config)
        config = options(folders["mistral"], data / "texts.jsonl", template="{q} calc :")
        probes = prepare(rows_of(config), tokenizer, config.target, config)
        assert probes.probes[0].prompt == f"{QUESTIONS[0]} calc :"

    def test_a_chat_template_that_drops_the_question_is_refused(self, data: Path, folders: dict[str, Path]) -> None:
        config = options(folders["llama"], data / "texts.jsonl")
        tokenizer = load_processor(config.target)
        tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
        with pytest.raises(SnrfError, match="the chat template leaves out the question"):
            render(rows_of(config).rows[0], tokenizer, config.target)
        tokenizer.chat_template = "{{ raise_exception('no user here') }}"
        with pytest.raises(SnrfError, match=r"the chat template fails .*no user here"):
            render(rows_of(config).rows[0], tokenizer, config.target)

    def test_a_chat_template_that_prints_the_parts_of_a_message_is_refused(
        self, data: Path, folders: dict[str, Path]
    ) -> None:
        config = options(folders["llava"], data / "images.jsonl", images="images")
        processor = load_processor(config.target)
        processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        with pytest.raises(SnrfError, match="row 0: the chat template leaves out the question or its images"):
            render(rows_of(config).rows[0], processor, config.target)

    def test_nothing_is_cut(self, tmp_path: Path, folders: dict[str, Path]) -> None:
        path = lines(tmp_path / "rows.jsonl", [{"q": "one two three " * 40}])
        config = options(folders["llama"], path)
        tokenizer = load_processor(config.target)
        whole = prepare(rows_of(config), tokenizer, config.target, config).probes[0].tokens
        tokenizer.backend_tokenizer.enable_truncation(max_length=16)
        tokenizer.model_max_length = 16
        assert prepare(rows_of(config), tokenizer, config.target, config).probes[0].tokens == whole > 100

    def test_a_probe_over_the_limit_is_left_out_and_counted(
        self, tmp_path: Path, folders: dict[str, Path], llama: tuple[Any, Any]
    ) -> None:
        path = lines(tmp_path / "rows.jsonl", [{"q": "word " * (200 if i == 11 else 3)} for i in range(20)])
        for limit in ({"token_limit": 64}, {}):
            config = options(folders["llama"], path, answer={"max_new_tokens": 20}, **limit)
            model, tokenizer = llama
            positions = model.config.max_position_embeddings
            model.config.max_position_embeddings = 100
            try:
                probes = prepare(rows_of(config), tokenizer, config.target, config, model)
            finally:
                model.config.max_position_embeddings = positions
            assert len(probes) == 19
            assert [bad.number for bad in probes.bad] == [11]
            what = "the token_limit of 64" if limit else "the model's 100 positions"
            assert f"tokens and an answer of up to 20 exceed {what}" in probes.bad[0].reason
        tokens = [probe.tokens for probe in probes.probes]
        config = options(folders["llama"], path, answer={"max_new_tokens": 20}, token_limit=tokens[0] + 20)
        assert len(prepare(rows_of(config), tokenizer, config.target, config)) == 19
        with pytest.raises(SnrfError, match=r"20 of 20 rows cannot be used .*; lower answer.max_new_tokens"):
            prepare(rows_of(config), tokenizer, config.target, config.override(token_limit=tokens[0] + 19))
        lines(path, [{"q": "word " * 200}])
        config = config.override(token_limit=64)
        with pytest.raises(SnrfError, match=r"row 0: .* tokens and an answer of up to 20 exceed the token_limit"):
            prepare(rows_of(config), tokenizer, config.target, config)

    def test_the_sha256_knows_prompts_images_and_answers(
        self, tmp_path: Path, data: Path, folders: dict[str, Path], llava: tuple[Any, Any]
    ) -> None:
        for name in ("0.png", "1.png"):
            (tmp_path / name).write_bytes((data / name).read_bytes())
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "a": "1", "images": ["0.png"]}])

        def digest(**keys: Any) -> str:
            config = options(folders["llava"], path, images="images", **keys)
            return probes_sha256(prepare(rows_of(config), llava[1], config.target, config))

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
def case(request: pytest.FixtureRequest, data: Path, folders: dict[str, Path]) -> tuple[ProfileConfig, Any, Any]:
    family = request.param
    model, processor = request.getfixturevalue({"qwen2_5_vl": "qwen"}.get(family, family))
    keys = {} if family == "llama" else {"images": "images"}
    dataset = data / ("texts.jsonl" if family == "llama" else "images.jsonl")
    config = options(folders[family], dataset, answer={"max_new_tokens": 7}, batch_size=6, **keys)
    return config, model, processor


class TestBatches:
    @pytest.mark.parametrize("case", CASES, indirect=True)
    @pytest.mark.parametrize("by", ["model", "column"])
    def test_a_probe_in_a_batch_is_the_probe_alone(self, case: tuple[ProfileConfig, Any, Any], by: str) -> None:
        config, model, processor = case
        if by == "column":
            config = config.override(answer={"by": "column", "column": "a"})
        alone = {batch.numbers: batch for batch in batches(config.override(batch_size=1), model, processor)}
        together = batches(config, model, processor)
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

    def test_lengths_as_of_real_problems_waste_little_on_padding(
        self, tmp_path: Path, folders: dict[str, Path], llama: tuple[Any, Any]
    ) -> None:
        generator = np.random.default_rng(0)
        # Log-normal, as problems and their solutions are: the longest tenth is over twice as long as the median.
        lengths = generator.lognormal([[3.4, 4.2]], [[0.5, 0.6]], size=(96, 2)).astype(int) + 1
        lines(tmp_path / "long.jsonl", [{"q": " ".join("x" * q), "a": " ".join("y" * a)} for q, a in lengths.tolist()])
        config = options(
            folders["llama"], tmp_path / "long.jsonl", answer={"by": "column", "column": "a"}, batch_size=8
        )
        made = batches(config, *llama)
        tokens = sum(batch.attention_mask.numel() for batch in made)
        wasted = 1 - sum(int(batch.attention_mask.sum()) for batch in made) / tokens
        assert sorted(number for batch in made for number in batch.numbers) == list(range(96))
        assert len(made) <= 16
        assert 0 < wasted <= 0.1

    @pytest.mark.parametrize("case", CASES, indirect=True)
    def test_the_answer_is_the_models_own_greedy_one(self, case: tuple[ProfileConfig, Any, Any]) -> None:
        config, model, processor = case
        tokenizer = getattr(processor, "tokenizer", processor)
        never = (
            {model.config.image_token_id} if "images" in config.target.probes.model_dump(exclude_none=True) else set()
        )
        never |= {model.config.vision_start_token_id} if hasattr(model.config, "vision_start_token_id") else set()
        for batch in batches(config.override(batch_size=1), model, processor):
            expected = greedy(model, prompt_inputs(batch), 7, {tokenizer.eos_token_id}, never)
            assert batch.inputs["input_ids"][batch.answer_mask].tolist() == expected
            assert batch.answers == (tokenizer.decode(expected, skip_special_tokens=True),)

    def test_an_answer_ends_with_its_end_token_or_is_counted_as_cut(
        self, data: Path, folders: dict[str, Path], llama: tuple[Any, Any]
    ) -> None:
        config = options(folders["llama"], data / "texts.jsonl", answer={"max_new_tokens": 7})
        model, tokenizer = llama
        free = {number: ids for batch in batches(config, *llama) for number, ids in answer_ids(batch).items()}
        assert all(len(ids) == 7 for ids in free.values())
        end = free[2][3]
        own = model.generation_config
        model.generation_config = GenerationConfig(eos_token_id=[end, tokenizer.eos_token_id])
        try:
            ended = batches(config, *llama)
        finally:
            model.generation_config = own
        for batch in ended:
            for flag, (number, ids) in zip(batch.ended, answer_ids(batch).items(), strict=True):
                expected = free[number][: free[number].index(end) + 1] if end in free[number] else free[number]
                assert ids == expected
                assert flag == (end in free[number])
        assert not all(flag for batch in ended for flag in batch.ended)

    def test_sampling_and_penalties_of_the_checkpoint_change_nothing(
        self, data: Path, folders: dict[str, Path], llama: tuple[Any, Any]
    ) -> None:
        config = options(folders["llama"], data / "texts.jsonl", answer={"max_new_tokens": 7})
        model = llama[0]
        expected = [batch.answers for batch in batches(config, *llama)]
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
            assert [batch.answers for batch in batches(config, *llama)] == expected
            assert model.generation_config is wild
        finally:
            model.generation_config = own

    def test_an_answer_never_holds_an_image_token(
        self, data: Path, folders: dict[str, Path], llava: tuple[Any, Any]
    ) -> None:
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
            for batch in batches(config, model, processor):
                assert image not in batch.inputs["input_ids"][batch.answer_mask].tolist()
                model(**batch.inputs)
        finally:
            handle.remove()

    def test_a_text_probe_of_a_vision_language_model_holds_no_image_token(
        self, tmp_path: Path, folders: dict[str, Path], llava: tuple[Any, Any]
    ) -> None:
        path = lines(tmp_path / "rows.jsonl", [{"q": "what is <image> ?"}])
        config = options(folders["llava"], path)
        with pytest.raises(SnrfError, match="row 0: the prompt holds a token that stands for an image"):
            prepare(rows_of(config), load_processor(config.target), config.target, config, llava[0])

    def test_nothing_warns(
        self, data: Path, folders: dict[str, Path], llava: tuple[Any, Any], recwarn: pytest.WarningsRecorder
    ) -> None:
        records: list[logging.LogRecord] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = records.append  # type: ignore[method-assign]
        logger = logging.getLogger("transformers")
        logger.addHandler(handler)
        config = options(folders["llava"], data / "images.jsonl", images="images", answer={"max_new_tokens": 3})
        length, llava[1].tokenizer.model_max_length = llava[1].tokenizer.model_max_length, 8
        try:
            batches(config, *llava)
        finally:
            logger.removeHandler(handler)
            llava[1].tokenizer.model_max_length = length
        assert [record.getMessage() for record in records] == []
        assert [str(warning.message) for warning in recwarn if "transformers" in warning.filename] == []

    def test_groups_are_of_similar_length_and_shards_make_the_same_batches(
        self, tmp_path: Path, folders: dict[str, Path], llama: tuple[Any, Any]
    ) -> None:
        draw = np.random.RandomState(0)
        path = lines(tmp_path / "rows.jsonl", [{"q": "word " * int(n)} for n in draw.randint(1, 60, 30)])
        config = options(folders["llama"], path, answer={"max_new_tokens": 2}, batch_size=4)
        model, tokenizer = llama
        probes = prepare(rows_of(config), tokenizer, config.target, config, model)
        assert sorted(p for group in probes.groups for p in group) == list(range(30))
        assert {len(group) for group in probes.groups} == {4, 2}
        lengths = [[probes.probes[p].length for p in group] for group in probes.groups]
        assert all(min(a) >= max(b) for a, b in pairwise(lengths))
        whole = list(probe_batches(probes, model, tokenizer, config.target, config, device="cpu"))
        for batch in whole:
            assert batch.attention_mask.float().mean() > 0.65
        shards = [
            list(probe_batches(probes, model, tokenizer, config.target, config, device="cpu", groups=groups))
            for groups in (range(0, len(probes.groups), 2), range(1, len(probes.groups), 2))
        ]
        again = {(batch.group, batch.numbers): batch for shard in shards for batch in shard}
        assert len(again) == len(whole)
        for batch in whole:
            same = again[batch.group, batch.numbers]
            assert batch.answers == same.answers
            for name, tensor in batch.inputs.items():
                assert torch.equal(tensor, same.inputs[name])

    def test_answers_of_uneven_length_share_no_batch(
        self, data: Path, folders: dict[str, Path], llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lengths = {0: 3, 1: 90, 2: 80, 3: 2, 4: 1, 5: 85}

        def of_these_lengths(model: Any, processor: Any, inputs: dict[str, Tensor], most: int) -> list[Answer]:
            texts = processor.batch_decode(inputs["input_ids"])
            rows = [next(i for i, question in enumerate(QUESTIONS) if f"\n\n{question}<" in text) for text in texts]
            return [Answer((7,) * lengths[row]) for row in rows]

        monkeypatch.setattr("mergekit_snrf.profiling.probes.batches.generate_answers", of_these_lengths)
        found = batches(options(folders["llama"], data / "texts.jsonl"), *llama)
        assert {number: ids for batch in found for number, ids in answer_ids(batch).items()} == {
            number: [7] * length for number, length in lengths.items()
        }
        assert len(found) > 1
        assert {batch.group for batch in found} == {0}
        for batch in found:
            real = batch.attention_mask.sum(dim=1)
            assert real.min() >= 0.7 * real.max()

    def test_an_answer_from_the_dataset_is_appended_as_it_is(
        self, data: Path, folders: dict[str, Path], llama: tuple[Any, Any]
    ) -> None:
        config = options(folders["llama"], data / "texts.jsonl", answer={"by": "column", "column": "a"})
        tokenizer = llama[1]
        found = {number: ids for batch in batches(config, *llama) for number, ids in answer_ids(batch).items()}
        assert found == {
            i: tokenizer(f"x = {i * 17}", add_special_tokens=False)["input_ids"] for i in range(len(QUESTIONS))
        }

    def test_a_dataset_answer_with_an_image_token_is_bad(
        self, tmp_path: Path, data: Path, folders: dict[str, Path], llava: tuple[Any, Any]
    ) -> None:
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "a": "<image>", "images": [str(data / "0.png")]}])
        config = options(folders["llava"], path, images="images", answer={"by": "column", "column": "a"})
        with pytest.raises(SnrfError, match="row 0: the answer holds a token that stands for an image"):
            batches(config, *llava)


def answer_ids(batch: ProbeBatch) -> dict[int, list[int]]:
    masked = zip(batch.numbers, batch.inputs["input_ids"], batch.answer_mask, strict=True)
    return {number: ids[mask].tolist() for number, ids, mask in masked}


class TestLoading:
    def test_the_class_follows_the_configuration_and_the_probes(
        self, data: Path, folders: dict[str, Path], llama: tuple[Any, Any], llava: tuple[Any, Any]
    ) -> None:
        assert type(llama[0]).__name__ == "LlamaForCausalLM"
        assert type(llava[0]).__name__ == "LlavaForConditionalGeneration"
        assert type(llava[1]).__name__ == "LlavaProcessor"
        assert not llava[0].training
        assert llava[0].config._attn_implementation == "sdpa"
        model, tokenizer = loaded(options(folders["llava"], data / "texts.jsonl"), dtype="auto")
        assert type(model) is type(llava[0])
        assert not hasattr(tokenizer, "image_processor")
        assert model.dtype == torch.bfloat16

    def test_a_tokenizer_without_padding_gets_one(self, data: Path, tmp_path: Path) -> None:
        folder = make_source(tmp_path / "llama", "llama")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("pad_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_processor(options(folder, data / "texts.jsonl").target)
        assert tokenizer.pad_token == tokenizer.eos_token

    def test_a_chat_template_that_only_the_processor_reads_is_found(self, data: Path, tmp_path: Path) -> None:
        folder = make_target(tmp_path / "llava", "llava", "hub")
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        assert load_processor(options(folder, data / "texts.jsonl").target).chat_template == template

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_that_is_not_there_is_said_so(self, data: Path, folders: dict[str, Path]) -> None:
        side = options(folders["llama"], data / "texts.jsonl").target
        for device in ("cuda", "cuda:1"):
            with pytest.raises(SnrfError, match=rf"device: '{device}' is not available, torch .* finds no CUDA device"):
                load_model(side, device=device)

    def test_a_device_that_is_not_known_is_refused(self, data: Path, folders: dict[str, Path]) -> None:
        side = options(folders["llama"], data / "texts.jsonl").target
        with pytest.raises(SnrfError, match="device: 'gpu' is not a torch device"):
            load_model(side, device="gpu")

    def test_image_probes_need_an_image_processor(self, data: Path, folders: dict[str, Path]) -> None:
        side = options(folders["llama"], data / "images.jsonl", images="images").target
        with pytest.raises(SnrfError, match="llama: images: has no image processor"):
            load_model(side, device="cpu")

    @pytest.mark.skipif(not processor_missing("qwen2_5_vl"), reason="torchvision is installed")
    def test_a_processor_that_needs_torchvision_says_so(self, data: Path, folders: dict[str, Path]) -> None:
        side = options(folders["qwen2_5_vl"], data / "images.jsonl", images="images").target
        with pytest.raises(SnrfError, match="the processor needs torchvision, which is not installed; pip"):
            load_processor(side)

    def test_a_checkpoints_own_code_runs_only_if_trusted(self, data: Path, folders: dict[str, Path]) -> None:
        config = options(folders["internvl_chat"], data / "texts.jsonl", answer={"by": "column", "column": "a"})
        with pytest.raises(SnrfError, match="internvl_chat: trust_remote_code: is off, but"):
            load_model(config.target, device="cpu")
        model, tokenizer = load_model(config.target, device="cpu", trust_remote_code=True)
        assert type(model).__name__ == "InternVLChatModel"
        assert len(batches(config, model, tokenizer)) > 0

    def test_a_missing_folder_or_weight_is_named(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(SnrfError, match="nothing: the tokenizer cannot be loaded"):
            load_model(options(tmp_path / "nothing", data / "texts.jsonl").target, device="cpu")
        folder = make_source(tmp_path / "llama", "llama")
        tensors = read(folder)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        write(folder, tensors)
        with pytest.raises(SnrfError, match=r"1 weights are missing .*, such as model.layers.1.mlp.up_proj.weight"):
            load_model(options(folder, data / "texts.jsonl").target, device="cpu")

    def test_gguf(self, data: Path, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        values = write_gguf(gguf, tmp_path / "tiny.gguf")
        config = options(tmp_path, data / "texts.jsonl", gguf_file="tiny.gguf", answer={"max_new_tokens": 2})
        model, tokenizer = load_model(config.target, device="cpu")
        assert type(model).__name__ == "LlamaForCausalLM"
        weights = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
        np.testing.assert_array_equal(weights, values["blk.1.ffn_up.weight"])
        assert sum(len(batch.numbers) for batch in batches(config, model, tokenizer)) == len(QUESTIONS)


def write_gguf(gguf: Any, path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of two layers with its tokenizer, as llama.cpp does, and return its tensors."""
    tokenizer = make_tokenizer(SOURCE_CHATS["llama"], SOURCE_CORPUS, size=300)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    shapes = {"token_embd": (len(vocabulary), 32), "output_norm": (32,), "output": (len(vocabulary), 32)}
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    draw = np.random.RandomState(0)
    values = {f"{name}.weight": draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.skipif(not (BOARD / "profile.yml").is_file(), reason="the board example has no profile.yml yet")
def test_the_board_example_makes_batches() -> None:
    config = load_profile_config(BOARD / "profile.yml").override(limit=8)
    for side in (config.target, config.source):
        rows = load_rows(side, config, BOARD)
        model, processor = load_model(side, device="cpu", dtype="float32")
        found = list(probe_batches(rows, model, processor, side, config, device="cpu"))
        assert sum(len(batch.numbers) for batch in found) == 8
        assert all(flag for batch in found for flag in batch.ended)
        with torch.no_grad():
            assert all(bool(model(**batch.inputs).logits.isfinite().all()) for batch in found)
