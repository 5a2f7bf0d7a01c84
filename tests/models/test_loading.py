"""Models and processors as transformers loads them, from tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_source, make_target, read, write
from processors import processor_missing

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models import loading
from mergekit_snrf.models.loading import load_model, load_processor
from mergekit_snrf.models.reference import ModelRef


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    targets = ("llava", "qwen2_5_vl", "internvl_chat")
    made = {name: make_target(root / name, name, "hub") for name in targets}
    return {"llama": make_source(root / "llama", "llama"), **made}


def ref(folder: Path, **keys: Any) -> ModelRef:
    return ModelRef(**{"model": str(folder), "device": "cpu", **keys})


@pytest.mark.parametrize(
    ("family", "images", "model_class", "processor_class"),
    [
        ("llama", False, "LlamaForCausalLM", None),
        ("llama", None, "LlamaForCausalLM", None),
        ("llava", True, "LlavaForConditionalGeneration", "LlavaProcessor"),
        ("llava", None, "LlavaForConditionalGeneration", "LlavaProcessor"),
        ("llava", False, "LlavaForConditionalGeneration", None),
    ],
)
def test_the_class_follows_the_configuration_and_the_images(family, images, model_class, processor_class, folders):
    model, processor = load_model(ref(folders[family]), images=images)
    assert type(model).__name__ == model_class
    assert (type(processor).__name__ == processor_class) is (processor_class is not None)
    assert hasattr(processor, "image_processor") is (processor_class is not None)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    folder = make_source(tmp_path / "llama", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_processor(ref(folder), images=False)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_chat_template_that_only_the_processor_reads_is_found(tmp_path):
    folder = make_target(tmp_path / "llava", "llava", "hub")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_processor(ref(folder), images=False).chat_template == template


@pytest.mark.parametrize("device", ["gpu", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_does_not_exist_is_named(device, folders):
    with pytest.raises(SnrfError, match=device) as caught:
        load_model(ref(folders["llama"], device=device), images=False)
    assert caught.value.field == "device"


def test_images_need_an_image_processor(folders):
    with pytest.raises(SnrfError) as caught:
        load_model(ref(folders["llama"]), images=True)
    assert (caught.value.where, caught.value.field) == (str(folders["llama"]), "images")


@pytest.mark.skipif(not processor_missing("qwen2_5_vl"), reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_is_explained(folders):
    with pytest.raises(SnrfError, match="torchvision"):
        load_processor(ref(folders["qwen2_5_vl"]), images=True)


def test_a_torchvision_that_does_not_load_is_named_with_the_version_that_fits(folders, monkeypatch):
    def raising(error):
        def fail(*arguments, **options):
            raise error

        return fail

    broken = RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(loading, "version", lambda package: "0.1.0")
    monkeypatch.setattr(loading, "import_module", raising(broken))
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", raising(ModuleNotFoundError("No Processor")))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(SnrfError, match=r"as 0\.1\.0 and cannot .*nms.*'torchvision==0\.24\.\*'"):
        load_processor(ref(folders["llava"]), images=True)


def test_a_checkpoints_own_code_runs_only_if_trusted(folders):
    with pytest.raises(SnrfError) as caught:
        load_model(ref(folders["internvl_chat"]), images=False)
    assert caught.value.field == "trust_remote_code"
    model, _ = load_model(ref(folders["internvl_chat"], trust_remote_code=True), images=False)
    assert type(model).__name__ == "InternVLChatModel"


def test_a_missing_folder_or_weight_is_named(tmp_path):
    with pytest.raises(SnrfError, match="nothing"):
        load_model(ref(tmp_path / "nothing"), images=False)
    folder = make_source(tmp_path / "llama", "llama")
    tensors = read(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write(folder, tensors)
    with pytest.raises(SnrfError, match=r"model.layers.1.mlp.up_proj.weight"):
        load_model(ref(folder), images=False)
