from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FAMILIES,
    HEADS,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    SOURCE_OF,
    SOURCE_VOCAB,
    SOURCES,
    TARGET_VOCAB,
    TARGETS,
    WIDTH,
    add_tensor,
    example_inputs,
    load,
    make_source,
    make_target,
    probe_inputs,
    read,
    shard,
    write,
)
from processors import BY_HAND, PROCESSORS, QUESTION, VLMS, WITHOUT_TEMPLATE, example_image, image_inputs
from processors import processor_missing as missing
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

Case = tuple[str, str]
HEAD_DIM = {"qwen2": 16, "qwen3": 32, "llama": 16, "mistral": 8, "gemma": 8, "gemma2": 8, "gemma3": 8}
PROJECTIONS = {
    "self_attn.q_proj": lambda head_dim: (HEADS * head_dim, WIDTH),
    "self_attn.k_proj": lambda head_dim: (KV_HEADS * head_dim, WIDTH),
    "self_attn.v_proj": lambda head_dim: (KV_HEADS * head_dim, WIDTH),
    "self_attn.o_proj": lambda head_dim: (WIDTH, HEADS * head_dim),
    "mlp.gate_proj": lambda head_dim: (INTERMEDIATE, WIDTH),
    "mlp.up_proj": lambda head_dim: (INTERMEDIATE, WIDTH),
    "mlp.down_proj": lambda head_dim: (WIDTH, INTERMEDIATE),
}
PLACEHOLDERS = {"minicpmv": "<unk>", "internvl_chat": "<IMG_CONTEXT>", "internvl": "<IMG_CONTEXT>"}
PLACEHOLDERS |= {"gemma3": "<image_soft_token>", "mistral3": "[IMG]"}
PLACEHOLDERS |= dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|image_pad|>")


def decoder(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in read(folder).items() if name.startswith(f"{prefix}.")}


@pytest.fixture(scope="module", params=list(TARGETS), ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "-".join(case), *case)


@torch.no_grad()
def test_target_loads_and_runs(case: Case, folder: Path) -> None:
    model = load(folder)
    inputs = example_inputs(folder)
    logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, TARGET_VOCAB)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert load(folder, dtype=torch.float32, attn_implementation="eager")(**inputs).logits.isfinite().all()
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    generated = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, pad_token_id=ids.pad_token_id)
    prompt = inputs["input_ids"].shape[1] if case[0] not in ("internvl_chat", "minicpmv") else 0
    assert generated.shape == (1, prompt + 2)


def test_decoder_lies_where_the_layout_says(case: Case, folder: Path) -> None:
    head_dim = HEAD_DIM[SOURCE_OF[case[0]]]
    tensors = decoder(folder, TARGETS[case])
    assert {name.split(".")[1] for name in tensors} == {str(layer) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        for projection, shape in PROJECTIONS.items():
            assert tensors[f".{layer}.{projection}.weight"].shape == shape(head_dim), (layer, projection)
            has_bias = SOURCE_OF[case[0]] == "qwen2" and re.fullmatch(r"self_attn\.[qkv]_proj", projection)
            assert (f".{layer}.{projection}.bias" in tensors) is bool(has_bias)


def test_every_tensor_is_random_and_small(folder: Path) -> None:
    tensors = read(folder)
    constant = [name for name, tensor in tensors.items() if tensor.numel() > 1 and tensor.float().std() == 0]
    assert constant == []
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2**20


def test_source_fits_target(case: Case, folder: Path, tmp_path: Path) -> None:
    source = make_source(tmp_path, SOURCE_OF[case[0]])
    ours, theirs = decoder(folder, TARGETS[case]), decoder(source, "model.layers")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}
    assert not any(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert read(source)["model.embed_tokens.weight"].shape == (SOURCE_VOCAB, WIDTH)
    assert SOURCE_VOCAB != TARGET_VOCAB


def test_embeddings_are_tied_as_the_family_has_them(case: Case, folder: Path, tmp_path: Path) -> None:
    heads = [name for name in read(folder) if name.endswith("lm_head.weight")]
    assert len(heads) == (0 if FAMILIES[case[0]].tied else 1)
    other = make_target(tmp_path, *case, tied=not FAMILIES[case[0]].tied)
    load(other)
    assert len([name for name in read(other) if name.endswith("lm_head.weight")]) == 1 - len(heads)


@torch.no_grad()
def test_image_reaches_the_logits(case: Case, folder: Path) -> None:
    if case[0] not in VLMS:
        pytest.skip("a text-only model")
    inputs = example_inputs(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDERS.get(case[0], "<image>"))
    assert (inputs["input_ids"] == placeholder).sum() >= 4
    model = load(folder, dtype=torch.float32)
    changed = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    last, other = (model(**tensors).logits[0, -1] for tensors in (inputs, changed))
    assert (last - other).abs().max() > 1e-3


@torch.no_grad()
def test_question_without_an_image(folder: Path) -> None:
    inputs = probe_inputs(folder, QUESTION)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert QUESTION in tokenizer.decode(inputs["input_ids"][0])
    assert load(folder)(**inputs).logits.isfinite().all()


def test_side_files_load(case: Case, folder: Path) -> None:
    assert (folder / "chat_template.jinja").exists()
    assert (folder / "generation_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert len(tokenizer) <= TARGET_VOCAB
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer(QUESTION).input_ids) == QUESTION
    if case[0] not in PROCESSORS:
        return
    if missing(case[0]):
        assert AutoImageProcessor.from_pretrained(folder)(example_image(), return_tensors="pt")["pixel_values"].numel()
    else:
        processor = AutoProcessor.from_pretrained(folder)
        assert isinstance(processor, ProcessorMixin)
        assert type(processor).__name__ == PROCESSORS[case[0]].processor
        assert processor.chat_template == tokenizer.chat_template


def test_inputs_made_by_hand_are_the_processors(case: Case, folder: Path) -> None:
    if case[0] not in PROCESSORS or case[0] not in BY_HAND:
        pytest.skip("made in one way only")
    if missing(case[0]):
        pytest.skip(f"AutoProcessor needs {', '.join(missing(case[0]))}")
    by_hand, theirs = (
        image_inputs(folder, case[0], QUESTION, example_image(), by_hand=by_hand) for by_hand in (True, False)
    )
    assert by_hand.keys() == theirs.keys()
    assert all(torch.equal(by_hand[name], theirs[name]) for name in theirs)


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if len(family.layouts) > 1])
def test_layouts_hold_the_same_model(family: str, tmp_path: Path) -> None:
    logits = []
    for layout in FAMILIES[family].layouts:
        folder = make_target(tmp_path / layout, family, layout)
        logits.append(load(folder)(**example_inputs(folder)).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.remote])
def test_remote_code_loads_by_every_auto_class(family: str, tmp_path: Path) -> None:
    folder = make_target(tmp_path, family, "hub")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == family
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__module__.startswith("transformers_modules.")
    model.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again").keys() == read(folder).keys()


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_source_loads_and_runs(family: str, safe: bool, tmp_path: Path) -> None:
    folder = make_source(tmp_path, family, safe=safe)
    assert (folder / ("model.safetensors" if safe else "pytorch_model.bin")).exists()
    inputs = example_inputs(folder)
    assert load(folder)(**inputs).logits.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.chat_template is None) is (family in WITHOUT_TEMPLATE)
    assert QUESTION in tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_hold_the_same_tensors(safe: bool, tmp_path: Path) -> None:
    whole = make_source(tmp_path / "whole", "qwen2", safe=safe)
    made = make_source(tmp_path / "made", "qwen2", safe=safe, max_shard_size=100_000)
    before = read(whole)
    assert shard(whole, "100KB") == len([*made.glob("*-of-*")]) > 1
    for folder in (whole, made):
        load(folder)
        after = read(folder)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert shard(whole, "1GB") == 1
    assert not [*whole.glob("*.index.json")]
    load(whole)


def test_seed_and_dtype(tmp_path: Path) -> None:
    first = read(make_target(tmp_path / "a", "qwen3_vl", "hub", seed=3, dtype=torch.float32))
    again = read(make_target(tmp_path / "b", "qwen3_vl", "hub", seed=3, dtype=torch.float32))
    half = read(make_target(tmp_path / "c", "qwen3_vl", "hub", seed=3, dtype=torch.float16))
    other = read(make_target(tmp_path / "d", "qwen3_vl", "hub", seed=4, dtype=torch.float32))
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor.half(), half[name])
        assert not torch.equal(tensor, other[name])
    assert load(tmp_path / "c").dtype == torch.float16


def test_llava_has_position_ids_that_bfloat16_cannot_hold(tmp_path: Path) -> None:
    folder = make_target(tmp_path, "llava", "hub")
    whole = {name: tensor for name, tensor in read(folder).items() if not tensor.is_floating_point()}
    assert list(whole) == ["vision_tower.vision_model.embeddings.position_ids"]
    (positions,) = whole.values()
    assert positions.dtype == torch.int64
    assert not torch.equal(positions, positions.bfloat16().long())


def test_load_refuses_a_tensor_too_many_or_too_few(tmp_path: Path) -> None:
    folder = make_target(tmp_path, "idefics3", "hub")
    tensors = read(folder)
    add_tensor(folder, "model.text_model.stray", torch.arange(300))
    assert torch.equal(read(folder)["model.text_model.stray"], torch.arange(300))
    with pytest.raises(AssertionError, match=r"unexpected_keys.*stray"):
        load(folder)
    lost = tensors.pop("model.text_model.layers.1.mlp.up_proj.weight")
    write(folder, tensors)
    with pytest.raises(AssertionError, match=r"missing_keys.*layers\.1\.mlp\.up_proj"):
        load(folder)
    write(folder, {**tensors, "model.text_model.layers.1.mlp.up_proj.weight": lost})
    load(folder)
