from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import ask_hub, commit_of, hub_of
from safetensors.torch import save, save_file
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.checkpoint import Checkpoint, open_checkpoint, weight_files
from mergekit_snrf.models.shards import ITEM_BYTES, TensorHeader

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TENSORS = {
    "embed.weight": torch.zeros(5, 8, dtype=torch.bfloat16),
    "layers.0.weight": torch.zeros(3, 8, dtype=torch.float16),
    "layers.1.weight": torch.zeros(2, 3),
    "positions": torch.arange(7),
    "flag": torch.tensor(True),
}
FIRST = {name: tensor for name, tensor in TENSORS.items() if not name.startswith("layers.1")}
SECOND = {name: tensor for name, tensor in TENSORS.items() if name not in FIRST}
EXPECTED = {
    "embed.weight": ("BF16", (5, 8)),
    "layers.0.weight": ("F16", (3, 8)),
    "layers.1.weight": ("F32", (2, 3)),
    "positions": ("I64", (7,)),
    "flag": ("BOOL", ()),
}


def folder_of(path: Path, config: Any = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def sharded(path: Path, suffix: str = "safetensors", **places: Any) -> Path:
    """Write two shards and their index; ``places`` overrides where the index says a tensor is."""
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    weight_map = {}
    for number, tensors in enumerate((FIRST, SECOND), start=1):
        file = f"model-{number:05}-of-00002.{suffix}"
        if suffix == "safetensors":
            save_file(tensors, path / file)
        else:
            torch.save(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 1}, "weight_map": {**weight_map, **places}}
    (path / f"{stem}.index.json").write_text(json.dumps(index))
    return path


def headers(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (header.dtype, header.shape) for name, header in checkpoint.tensors.items()}


@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "bin shards", "state_dict"])
def test_headers_of_every_layout(tmp_path, layout):
    folder = folder_of(tmp_path / "model")
    if layout == "one file":
        save_file(TENSORS, folder / "model.safetensors")
    elif layout == "bin":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    elif layout == "state_dict":
        torch.save({"state_dict": TENSORS, "epoch": 3}, folder / "pytorch_model.bin")
    else:
        sharded(folder, "safetensors" if layout == "shards" else "bin")
    checkpoint = open_checkpoint(str(folder), trust_remote_code=True)
    assert headers(checkpoint) == EXPECTED
    assert {(folder / header.file).is_file() for header in checkpoint.tensors.values()} == {True}
    assert len({header.file for header in checkpoint.tensors.values()}) == (2 if "shards" in layout else 1)
    assert checkpoint.bytes == sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert (checkpoint.name, checkpoint.folder, checkpoint.trust_remote_code) == (str(folder), folder, True)
    assert checkpoint.config == CONFIG
    assert checkpoint.config_sha256 == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert (checkpoint.model_type, checkpoint.needs_remote_code) == ("qwen2", False)


def test_weights_are_not_read(tmp_path):
    folder, size = folder_of(tmp_path / "model"), 4 * 10**9
    header = json.dumps({"a": {"shape": [50_000, 40_000], "dtype": "BF16", "data_offsets": [0, size]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = open_checkpoint(str(folder)).tensors["a"]
    assert (tensor.parameters, tensor.bytes) == (size // 2, size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_bytes_of_every_dtype(tmp_path, dtype):
    folder = folder_of(tmp_path / "model")
    size = 6 * ITEM_BYTES[dtype]
    header = json.dumps({"a": {"shape": [2, 3], "dtype": dtype, "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    assert open_checkpoint(str(folder)).tensors == {"a": TensorHeader(dtype, (2, 3), "model.safetensors")}
    assert open_checkpoint(str(folder)).bytes == size


def test_an_index_wins_over_a_whole_file_and_safetensors_over_bin(tmp_path):
    folder = sharded(folder_of(tmp_path / "model"))
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    torch.save({"another": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert headers(open_checkpoint(str(folder))) == EXPECTED
    (folder / "model.safetensors.index.json").unlink()
    assert headers(open_checkpoint(str(folder))) == {"other": ("F32", (1,))}
    (folder / "model.safetensors").unlink()
    assert headers(open_checkpoint(str(folder))) == {"another": ("F32", (1,))}


def test_a_tensor_in_two_shards_is_that_of_the_index(tmp_path):
    folder = sharded(folder_of(tmp_path / "model"))
    save_file({**SECOND, "embed.weight": torch.zeros(9, 9)}, folder / "model-00002-of-00002.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert headers(checkpoint) == EXPECTED
    assert checkpoint.tensors["embed.weight"].file == "model-00001-of-00002.safetensors"


def error_of(folder: Path) -> str:
    with pytest.raises(SnrfError) as caught:
        open_checkpoint(str(folder))
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_missing_shard_or_tensor(tmp_path, suffix):
    shard = f"model-00002-of-00002.{suffix}"
    folder = sharded(folder_of(tmp_path / "model"), suffix, **{"layers.0.weight": shard})
    assert f"{folder / shard}: lacks tensor 'layers.0.weight', which the index" in error_of(folder)
    (folder / shard).unlink()
    assert f"{folder / shard}: the index names this shard, but the file is missing" in error_of(folder)


PLACES = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "./x", "x/", 3, None, [], "", ".", "..", "a\0b"]


@pytest.mark.parametrize("place", [*PLACES, "x" * 300], ids=lambda place: str(place)[:9])
def test_an_index_that_leaves_the_folder_or_names_no_file(tmp_path, place):
    save_file(FIRST, tmp_path / "model.safetensors")
    folder = sharded(folder_of(tmp_path / "model"), **{"layers.0.weight": place})
    assert re.search("the index names this shard, but the file is missing|does not map tensors", error_of(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    assert "'weight_map' does not map tensors to file names" in error_of(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "not valid JSON") for content in (b"", b"{", b"\xff\xff", b"[" * 100_000)),
        *((content, "not a JSON object") for content in (b"[]", b"null")),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_broken_json(tmp_path, file, content, message):
    folder = sharded(folder_of(tmp_path / "model"))
    (folder / file).write_bytes(content)
    assert error_of(folder).startswith(f"{folder / file}: {message}")


def test_folders_without_weights_or_config(tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty/config.json: cannot be read" in error_of(tmp_path / "empty")
    folder = folder_of(tmp_path / "model")
    (folder / "model-00001-of-00002.safetensors").touch()
    assert "holds neither model.safetensors nor pytorch_model.bin nor an index of shards" in error_of(folder)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3, None, {"state_dict": 3}, {5: torch.zeros(2)}])
def test_a_bin_that_is_no_state_dict(tmp_path, content):
    folder = folder_of(tmp_path / "model")
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: cannot be read (it does not map names to tensors)" in error_of(folder)


class Exploit:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_bin_is_not_executed(tmp_path):
    folder = folder_of(tmp_path / "model")
    torch.save({"a": torch.zeros(1), "b": Exploit(tmp_path / "executed")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: cannot be read" in error_of(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_flipped_bytes_give_headers_or_one_error(tmp_path, file):
    folder = folder_of(tmp_path / "model")
    if file == "model.safetensors":
        save_file(TENSORS, folder / file)
    else:
        torch.save(TENSORS, folder / file)
    good, dice, seen = (folder / file).read_bytes(), random.Random(4), set()
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(dice.randint(1, 12)):
            damaged[dice.randrange(min(len(good), 600))] = dice.randrange(256)
        (folder / file).write_bytes(damaged)
        try:
            open_checkpoint(str(folder))
        except SnrfError as error:
            seen.add(str(folder / file) in str(error))
    assert seen == {True}


@pytest.mark.parametrize("name", ["", "model", "./model", "/no/such/model", "~/model", "a/b/c", "a/b/", "../model"])
def test_names_that_are_no_model(name):
    with pytest.raises(SnrfError, match="no such folder"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", ["owner/--model", "ow ner/model", "owner/" + "x" * 300])
def test_names_that_are_no_hub_id(name, tmp_path):
    with pytest.raises(SnrfError, match="neither a local folder nor a model") as caught:
        open_checkpoint(name, cache_dir=str(tmp_path))
    assert caught.value.where == name


def test_text_config_is_completed_by_transformers(tmp_path):
    text = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 7}

    def text_config(config: dict[str, Any]) -> dict[str, Any]:
        return dict(Checkpoint("model", None, {}, config, b"").text_config)

    flat = text_config({"model_type": "qwen3", **text})
    assert {key: flat[key] for key in text} == text
    assert flat["head_dim"] == 128
    nested = text_config({"model_type": "llava", "text_config": {"model_type": "llama", **text}})
    assert {key: nested[key] for key in text} == text
    assert nested["num_key_value_heads"] == 4
    for key in ("text_config", "llm_config", "language_config"):
        remote = text_config({"model_type": "unheard_of", key: {"model_type": "qwen3", **text}, "hidden_size": 1})
        assert {name: remote[name] for name in text} == text
        assert remote["head_dim"] == 128
        assert text_config({"model_type": "unheard_of", key: {"model_type": "new", **text}}) == {
            "model_type": "new",
            **text,
        }
    assert text_config({"model_type": "unheard_of", **text}) == {"model_type": "unheard_of", **text}
    assert text_config({"text_config": 5, **text}) == {"text_config": 5, **text}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "num_hidden_layers": "many"},
        {"model_type": "llava", "text_config": 5},
        {"model_type": "unheard_of", "llm_config": {"model_type": "qwen2", "num_hidden_layers": [1]}},
    ],
)
def test_configs_that_transformers_refuses(config):
    with pytest.raises(SnrfError, match=r"^model/config\.json: transformers refuses this \w+ config") as caught:
        Checkpoint("model", None, {}, config, b"").text_config  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"model_type": "internvl_chat"}, {"model_type": ["qwen2"]}])
def test_unknown_model_types_need_remote_code_if_there_is_some(config):
    assert Checkpoint("model", None, {}, config, b"").needs_remote_code == (not config)
    code = {"AutoConfig": "configuration_x.XConfig"}
    assert Checkpoint("model", None, {}, {**config, "auto_map": code}, b"").needs_remote_code


def test_defaults_of_another_layout_are_not_taken_for_the_files():
    config = {**CONFIG, "model_type": "llava", "mm_vision_tower": "clip"}
    assert Checkpoint("model", None, {}, config, b"").text_config == config


SIDE_FILES = [
    "LICENSE", "LICENSE.txt", "Notice.md", "USE_POLICY.md", "added_tokens.json", "chat_template.jinja", "config.json",
    "configuration_x.py", "merges.txt", "processor_config.json", "qwen.tiktoken", "sentencepiece.bpe", "spiece.spm",
    "tokenizer.json", "tokenizer.model",
]  # fmt: skip
WEIGHTS = [
    "MODEL.SAFETENSORS", "consolidated.00.pth", "model-00001-of-00002.safetensors", "model.onnx",
    "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "q4.gguf",
]  # fmt: skip
NESTED = ["additional_chat_templates/tool_use.jinja", "code/modeling/x.py", "processor/preprocessor_config.json"]
NESTED += ["notes.md", "processor/vocab.yaml", "words"]
OTHER_MODELS = ["onnx/model.onnx", "onnx/tokenizer.json", "checkpoint-5/rank/state.json", "checkpoint-5/optimizer.pt"]
OTHER_MODELS += [".git/config.json", "__pycache__/x.pyc", ".cache/huggingface/x.json"]
OTHERS = [".gitattributes", ".hidden.json", "README.md", "mergekit_config.yml", "picture.png"]


def test_side_files_are_everything_small_that_belongs_to_the_model(tmp_path):
    folder = folder_of(tmp_path / "model")
    for name in (*SIDE_FILES, *WEIGHTS, *OTHERS, *NESTED, *OTHER_MODELS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "config.json":
            (folder / name).touch()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    save_file(TENSORS, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.side_files() == tuple(sorted(SIDE_FILES + NESTED))
    assert len(repr(checkpoint)) < 200
    with (folder / "words").open("wb") as file:
        file.truncate(2 * 10**8)
    assert "words" not in checkpoint.side_files()
    (folder / "words").unlink()
    (folder / "words").symlink_to("nowhere")
    with pytest.raises(SnrfError, match="words: cannot be read"):
        open_checkpoint(str(folder)).side_files()
    assert weight_files([*SIDE_FILES, *WEIGHTS, *OTHERS]) == tuple(sorted(WEIGHTS))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def cached(cache: Path, files: dict[str, bytes], revision: str = "main") -> Path:
    """Lay files out as huggingface_hub's cache does."""
    commit = commit_of(revision)
    root = cache / "models--owner--model"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.usefixtures("offline")
def test_a_model_in_the_cache(tmp_path):
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": save(TENSORS)}
    folder = cached(tmp_path, files)
    old = cached(tmp_path, {**files, "model.safetensors": save(FIRST)}, "old")
    checkpoint = open_checkpoint("owner/model", cache_dir=str(tmp_path))
    assert (checkpoint.name, checkpoint.folder, headers(checkpoint)) == ("owner/model", folder, EXPECTED)
    checkpoint = open_checkpoint("owner/model", "old", cache_dir=str(tmp_path))
    assert (checkpoint.revision, checkpoint.folder, len(checkpoint.tensors)) == ("old", old, len(FIRST))


@pytest.mark.usefixtures("offline")
def test_a_cache_without_what_the_configuration_calls_for_has_no_side_files(tmp_path):
    config = {**CONFIG, "vision_config": {}, "auto_map": {"AutoConfig": "own.Config", "AutoModel": "a/b--their.Model"}}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(TENSORS)}
    folder = cached(tmp_path, files)
    checkpoint = open_checkpoint("owner/model", cache_dir=str(tmp_path))
    missing = ("own.py", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    assert (checkpoint.commit, checkpoint.missing) == (None, missing)
    with pytest.raises(SnrfError, match=r"owner/model: the cache lacks own\.py, preprocessor_config\.json, tokenizer"):
        checkpoint.side_files()
    for name in ("own.py", "processor_config.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).touch()
    assert len(open_checkpoint("owner/model", cache_dir=str(tmp_path)).side_files()) == 5


def index_of(weight_map: Any) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("missing", ["config.json", "second.safetensors", "index and weights"])
def test_an_incomplete_cache_asks_the_hub(tmp_path, missing):
    weight_map = {**dict.fromkeys(FIRST, "first.safetensors"), **dict.fromkeys(SECOND, "second.safetensors")}
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": index_of(weight_map),
        "first.safetensors": save(FIRST),
        "second.safetensors": save(SECOND),
    }
    if missing == "index and weights":
        del files["model.safetensors.index.json"]
    else:
        del files[missing]
    cached(tmp_path, files)
    with pytest.raises(SnrfError, match=r"^owner/model: neither a local folder nor a model that the hub gives"):
        open_checkpoint("owner/model", cache_dir=str(tmp_path))


def hub_files(tensors: dict[str, Tensor], **more: bytes) -> dict[str, bytes]:
    small = {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}"}
    small |= {"onnx/config.json": b"{}", "onnx/model.onnx": b""}
    return {**small, "model.safetensors": save(tensors), **more}


def test_models_on_a_hub(tmp_path):
    shards = hub_files({}, **{"1.safetensors": save(FIRST), "2.safetensors": save(SECOND)})
    weight_map = {**dict.fromkeys(FIRST, "1.safetensors"), **dict.fromkeys(SECOND, "2.safetensors")}
    del shards["model.safetensors"]
    shards["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    without = {name: content for name, content in hub_files({}).items() if name != "model.safetensors"}
    repositories = {
        "owner/model": {"main": hub_files(TENSORS), "v1": hub_files(FIRST)},
        "owner/shards": {"main": shards},
        "owner/bin": {"main": {**without, "pytorch_model.bin": b"weights"}},
        "owner/broken": {"main": {**without, "model.safetensors": b"weights of a model"}},
        "owner/bad_config": {"main": {**hub_files(FIRST), "config.json": b"["}},
        "owner/empty": {"main": {}},
    }
    failing = ["owner/bin", "owner/broken", "owner/bad_config", "owner/empty", "owner/model@v2", "owner/nothing"]
    with hub_of(repositories) as hub:
        answers = ask_hub(hub.endpoint, tmp_path, "owner/model", "owner/model@v1", "owner/shards", *failing)
    whole = answers["owner/model"]
    assert whole["folder"] is None
    assert {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in whole["tensors"].items()} == EXPECTED
    assert {file for _, _, file in whole["tensors"].values()} == {"model.safetensors"}
    assert whole["config_sha256"] == hashlib.sha256(json.dumps(CONFIG).encode()).hexdigest()
    assert whole["side_files"] == ["config.json", "tokenizer.json"]
    assert (answers["owner/model@v1"]["revision"], answers["owner/model@v1"]["tensors"].keys()) == ("v1", FIRST.keys())
    assert {name: file for name, (_, _, file) in answers["owner/shards"]["tensors"].items()} == weight_map

    refused = "neither a local folder nor a model that the hub gives"
    for name, message in {
        "owner/bin": "owner/bin: has no safetensors weights on the hub; download it first (hf download owner/bin)",
        "owner/broken": "owner/broken: its weights cannot be read (SafetensorsParsingError: ",
        "owner/bad_config": "not valid JSON",
        "owner/empty": f"owner/empty: {refused} (RemoteEntryNotFoundError: 404 Client Error.); check the name,",
        "owner/model@v2": f"owner/model: {refused} (RevisionNotFoundError: 404 Client Error.); check the name,",
        "owner/nothing": f"owner/nothing: {refused} (RepositoryNotFoundError: 404 Client Error.); check the name,",
    }.items():
        assert answers[name].startswith("SnrfError: ")
        assert message in answers[name]
        assert "\n" not in answers[name]


def test_a_cache_is_brought_up_to_the_hubs_revision(tmp_path):
    """Weights and configuration alone are there, as after loading a model's class."""
    files = hub_files(TENSORS, **{"additional_chat_templates/x.jinja": b"x", "chat_template.jinja": b"y"})
    files |= {"tokenizer_config.json": b"{}"}
    cache = tmp_path / "hub"
    folder = cached(cache, {name: files[name] for name in ("config.json", "model.safetensors")})
    with hub_of({"owner/model": {"main": files}}) as hub:
        (answer,) = ask_hub(hub.endpoint, tmp_path, "owner/model").values()
        assert (answer["folder"], answer["commit"]) == (str(folder), commit_of("main"))
        others = {"model.safetensors", "onnx/config.json", "onnx/model.onnx"}
        assert answer["side_files"] == sorted(files.keys() - others)
        assert all((folder / name).is_file() for name in answer["side_files"])
        # A branch that moved on, or a model whose cached commit is not the hub's.
        (cache / "models--owner--model" / "refs" / "main").write_text("0" * 40)
        folder.rename(folder.with_name("0" * 40))
        (answer,) = ask_hub(hub.endpoint, tmp_path, "owner/model").values()
        assert (answer["folder"], answer["commit"]) == (None, commit_of("main"))
    (answer,) = ask_hub(hub.endpoint, tmp_path, "owner/model").values()
    assert answer.startswith("SnrfError: owner/model: neither")


def test_a_hub_that_cannot_be_reached(tmp_path):
    with hub_of({}) as hub:
        pass
    (answer,) = ask_hub(hub.endpoint, tmp_path, "owner/model").values()
    refused = "SnrfError: owner/model: neither a local folder nor a model that the hub gives (ConnectError: "
    assert answer.startswith(refused)
    assert answer.endswith("check the name, the network and the login (hf auth login)")


def test_files_of_a_checkpoint_are_downloaded_without_other_weights(tmp_path, monkeypatch):
    def answer(name: str, **options: Any) -> Path:
        asked.update(options, name=name)
        if name == "owner/fails":
            raise ConnectionError("no route\nto the hub")
        return tmp_path

    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    headers = {"w": TensorHeader("F32", (1, 1), "model-00001-of-00001.safetensors")}
    files = ("config.json", "tokenizer.json", "README.md", "model-00001-of-00001.safetensors", "model.onnx")
    checkpoint = Checkpoint("owner/model", None, headers, {}, b"{}", files, revision="abc", commit="def")
    assert checkpoint.local("cache") == tmp_path
    shard = "model-00001-of-00001.safetensors"
    assert asked.pop("allow_patterns") == [shard, "config.json", "tokenizer.json", "*.index.json"]
    assert asked == {"name": "owner/model", "revision": "abc", "cache_dir": "cache"}
    with pytest.raises(SnrfError, match=r"owner/fails: cannot be downloaded \(ConnectionError: no route\)"):
        replace(checkpoint, name="owner/fails").local()


def test_an_adapter_and_a_sum_of_models_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter without its model; write BASE+ADAPTER in a recipe" in error_of(tmp_path)
    with pytest.raises(SnrfError, match="only a recipe takes base\\+adapter"):
        open_checkpoint("a/b+c/d")
