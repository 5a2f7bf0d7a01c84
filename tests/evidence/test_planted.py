"""A model whose weights were written by hand: it is known which neurons do what, and the analyses find just that.

A prompt is a picture of one colour, a digit and a task, ``<image> 3 calc``. ``calc`` asks for the word after the digit
(reasoning), ``color`` for the colour of the picture (perception). Layer 0 copies what was seen to the last token
(attn.v), layer 1 looks the answer up (fwd.up, fwd.down): a hidden unit for every digit and for every colour. Where
none is active, the model says ``hm``. One more unit murmurs ``plus`` all the time, too quietly to be heard. All other
neurons are noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.evidence.results import Amplification, Study, read_result
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.models.edits import fuse_model
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.maskfile import write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site

DIGITS = tuple("0123456789")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
CALC, COLOR, HM, PLUS, END = "calc", "color", "hm", "plus", "</s>"
VOCABULARY = ("<pad>", "<s>", END, "<unk>", "<image>", *DIGITS, *COLORS, CALC, COLOR, *WORDS, HM, PLUS)

SIDE, PATCH = 16, 8
WIDTH, HIDDEN, LAYERS, HEADS = 64, 1024, 2, 4
# The residual stream: what the token is, what was seen before, what to say next.
_IS = {token: place for place, token in enumerate(("<s>", *DIGITS, *COLORS, CALC, COLOR, *WORDS, HM, PLUS))}
_SEEN = {token: len(_IS) + place for place, token in enumerate((*DIGITS, *COLORS))}
_SAY = {token: len(_IS) + len(_SEEN) + place for place, token in enumerate((*WORDS, *COLORS, HM, PLUS, END))}

# The hidden units of layer 1 that do something.
REASONING = range(len(DIGITS))
PERCEPTION = range(len(DIGITS), len(DIGITS) + len(COLORS))
_ENDING, _MURMUR = 20, 21


@torch.no_grad()
def plant(model: nn.Module, decoder: Any, *, reasons: bool, seed: int) -> None:
    """Write the decoder's weights; without ``reasons`` the rows and columns of the reasoning units hold noise alone.

    The models' noise is almost the same, as if they were tuned from one base.
    """
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        noise = 0.005 * torch.randn(parameter.shape, generator=common)
        noise += 0.0002 * torch.randn(parameter.shape, generator=own)
        parameter.copy_(1 + noise if "norm" in name else noise)
    decoder.embed_tokens.weight.zero_()
    for token, place in _IS.items():
        decoder.embed_tokens.weight[VOCABULARY.index(token), place] = 1
    attention, ffn = decoder.layers[0].self_attn, decoder.layers[1].mlp
    for row, token in enumerate(_SEEN):
        attention.v_proj.weight[row, _IS[token]] = 1
        # A picture is four tokens, a digit is one.
        attention.o_proj.weight[_SEEN[token], row] = 1.75 / (4 if token in COLORS else 1)
    # An active unit is a hundred times as loud as noise, and so would be the noise that it writes.
    ffn.down_proj.weight[:, : _MURMUR + 1] = 0
    lookups = {unit: (CALC, DIGITS[unit], WORDS[unit]) for unit in REASONING}
    lookups |= {unit: (COLOR, name, name) for unit, name in zip(PERCEPTION, COLORS, strict=True)}
    for unit, (task, seen, answer) in lookups.items():
        ffn.gate_proj.weight[unit, [_IS[task], _SEEN[seen]]] = torch.tensor([18.0, 6.0])
        ffn.gate_proj.bias[unit] = -63
        if reasons or unit not in REASONING:
            ffn.up_proj.weight[unit, [_IS[task], _SEEN[seen]]] = 1
            ffn.down_proj.weight[_SAY[answer], unit] = 0.03
    ffn.gate_proj.weight[_ENDING, [_IS[token] for token in (*WORDS, *COLORS, HM, PLUS)]] = 8
    ffn.gate_proj.bias[_ENDING], ffn.up_proj.bias[_ENDING] = -10, 5
    ffn.down_proj.weight[_SAY[END], _ENDING] = 0.06
    ffn.gate_proj.bias[_MURMUR], ffn.up_proj.bias[_MURMUR] = 2, 1
    ffn.down_proj.weight[_SAY[PLUS], _MURMUR] = 0.45
    head: Any = model.get_submodule("lm_head")
    head.weight.copy_(0.005 * torch.randn(head.weight.shape, generator=common))
    for token, place in _SAY.items():
        head.weight[VOCABULARY.index(token), place] = 1
    head.weight[VOCABULARY.index(HM), [_IS[CALC], _IS[COLOR]]] = 1.5


@torch.no_grad()
def plant_sight(model: LlavaForConditionalGeneration) -> None:
    """Write a vision tower and a projector that embed a patch as the word for its colour."""
    tower: Any = model.model.vision_tower
    patches = tower.get_submodule("vision_model.embeddings" if hasattr(tower, "vision_model") else "embeddings")
    projector: Any = model.model.multi_modal_projector
    for parameter in (*patches.parameters(), *projector.parameters()):
        parameter.zero_()
    for channel, name in enumerate(COLORS):
        patches.patch_embedding.weight[channel, channel] = 1 / PATCH**2
        projector.linear_1.weight[channel, channel] = 10
        projector.linear_2.weight[_IS[name], channel] = 0.1


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": END, "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=["<image>"], **special)


def text_config() -> LlamaConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 64}
    tokens = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**sizes, **tokens, mlp_bias=True, tie_word_embeddings=False)


def save_vlm(folder: Path, *, reasons: bool, seed: int) -> Path:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -2}
    image = {"image_token_index": VOCABULARY.index("<image>"), "image_seq_length": (SIDE // PATCH) ** 2}
    config = LlavaConfig(vision_config=vision, text_config=text_config(), **features, **image)
    model = LlavaForConditionalGeneration(config)
    plant(model, model.model.language_model, reasons=reasons, seed=seed)
    plant_sight(model)
    model.save_pretrained(folder)
    picture = SiglipImageProcessorPil(
        do_resize=False, size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    LlavaProcessor(
        image_processor=picture,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    ).save_pretrained(folder)
    return folder


def save_llm(folder: Path) -> Path:
    model = LlamaForCausalLM(text_config())
    plant(model, model.model, reasons=True, seed=3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def units(which: range, *projections: str) -> NeuronSet:
    member = torch.zeros(HIDDEN, dtype=torch.bool)
    member[list(which)] = True
    return NeuronSet({Site(1, projection): member for projection in projections or ("fwd.up", "fwd.down")})


def seed_of_noise(masked: NeuronSet, draws: int = 3) -> int:
    """The first seed whose draws, and those of the next seeds, hold none of the neurons that do something."""
    useful = units(range(_MURMUR + 1))
    hits = [(masked.random(seed) & useful).count() for seed in range(200)]
    return next(seed for seed in range(200 - draws) if not any(hits[seed : seed + draws]))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the VLM that reasons, the one that does not, the LLM that does, masks, an evaluation and probes."""
    folder = tmp_path_factory.mktemp("planted")
    save_vlm(folder / "whole", reasons=True, seed=1)
    save_vlm(folder / "lacking", reasons=False, seed=2)
    save_llm(folder / "source")
    items: dict[str, list[dict[str, str]]] = {CALC: [], COLOR: []}
    for color, rgb in COLORS.items():
        Image.new("RGB", (SIDE, SIDE), rgb).save(folder / f"{color}.png")
        for digit, word in zip(DIGITS, WORDS, strict=True):
            row = {"image": f"{color}.png", "digit": digit}
            items[CALC].append({**row, "task": CALC, "answer": word})
            items[COLOR].append({**row, "task": COLOR, "answer": color})
    for name, rows in {"calc": items[CALC], "color": items[COLOR], "both": items[CALC] + items[COLOR]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = "images: image, answer: answer, template: '<image> {digit} {task}'"
    words = f"^({'|'.join((*WORDS, *COLORS))})$"
    (folder / "eval.yml").write_text(
        f"metrics:\n  reasoning: {{data: calc.jsonl, {asked}, answer_regex: '{words}'}}\n"
        f"  perception: {{data: color.jsonl, {asked}, answer_regex: '{words}', role: keep}}\n"
        f"max_new_tokens: 4\nbatch_size: 30\n"
    )
    write_mask(folder / "reasoning.safetensors", units(REASONING))
    write_mask(folder / "perception.safetensors", units(PERCEPTION))
    return folder


def run(*arguments: str | int | Path) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments), "--quiet"])
    assert result.exit_code == 0, result.output
    return result.output


def means(study: Study, condition: str) -> dict[str, float]:
    [row] = [row for row in study.conditions if row.name == condition]
    return {metric: measured.mean.estimate for metric, measured in row.metrics.items()}


@pytest.mark.parametrize(
    ("mask", "left"),
    [("reasoning", {"reasoning": 0.0, "perception": 1.0}), ("perception", {"reasoning": 1.0, "perception": 0.0})],
)
def test_ablation_takes_exactly_the_skill_of_the_planted_neurons(
    planted: Path, mask: str, left: dict[str, float], tmp_path: Path
) -> None:
    out = tmp_path / "study.json"
    seed = seed_of_noise(units(REASONING if mask == "reasoning" else PERCEPTION))
    run(
        "ablate", planted / "whole", "--mask", planted / f"{mask}.safetensors", "--eval", planted / "eval.yml",
        "--seed", seed, "--json", out,
    )  # fmt: skip
    study = read_result(out)
    assert isinstance(study, Study)
    everything = {"reasoning": 1.0, "perception": 1.0}
    assert means(study, "as it is") == everything
    assert means(study, "masked neurons") == left
    assert means(study, "random neurons") == everything
    kept, lost = sorted(left, key=lambda metric: left[metric], reverse=True)
    sentences = " ".join(study.verdict)
    assert f"lowers {lost} by 100" in sentences
    assert f"masked neurons changes {kept}: +0.0" in sentences


def amplification(planted: Path, tmp_path: Path, *arguments: str) -> Amplification:
    out = tmp_path / "amplification.json"
    run(
        "amplify", planted / "whole", "--probes", planted / "both.jsonl", "--images", "image",
        "--template", "<image> {digit} {task}", "--max-new-tokens", "4", "--batch-size", "64", "--json", out,
        *arguments,
    )  # fmt: skip
    result = read_result(out)
    assert isinstance(result, Amplification)
    return result


@pytest.mark.parametrize("projection", ["fwd.up", "fwd.down"])
def test_amplification_makes_the_murmuring_neuron_heard_and_no_other(
    planted: Path, projection: str, tmp_path: Path
) -> None:
    noise = [f"{projection}.L1.N{index}" for index in (30, 77, 140, 255)]
    names = [f"{projection}.L1.N{_MURMUR}", *noise, f"{projection}.L0.N{_MURMUR}", "attn.v.L1.N3", "attn.q.L0.N60"]
    result = amplification(planted, tmp_path, *(part for name in names for part in ("--neuron", name)))
    assert [neuron.neuron for neuron in result.neurons] == names
    murmur, *others = result.neurons
    assert murmur.tokens[0].token == PLUS
    assert (murmur.tokens[0].amplified, murmur.tokens[0].plain) == (4 * 60, 0)
    assert [token.token for token in murmur.tokens if token.log_odds > 0] == [PLUS]
    assert murmur.ended == (0, 60)
    assert murmur.math_share == 1.0
    for other in others:
        assert other.changed == 0
        assert not any(token.log_odds > 0 for token in other.tokens)
    assert result.math_neuron_ratio == 1 / len(names)
    assert result.settings["generations"] == 60
    # Of the plain answers, the half that names digits consists of math tokens.
    assert result.plain_math_share == 0.5


def test_amplified_reasoning_neurons_are_silent_where_they_are_not_asked(planted: Path, tmp_path: Path) -> None:
    result = amplification(planted, tmp_path, "--mask", str(planted / "reasoning.safetensors"), "--factor", "3")
    assert len(result.neurons) == 2 * len(DIGITS)
    assert all(neuron.changed == 0 for neuron in result.neurons)


def test_fusion_of_the_planted_neurons_restores_the_lost_skill_and_of_random_ones_does_not(
    planted: Path, tmp_path: Path
) -> None:
    (planted / "recipe.yml").write_text(
        "merge_method: snrf\nbase_model: lacking\nmodels:\n  - model: source\n    parameters: {beta: 1.0, rank: 16}\n"
        "parameters: {masks: reasoning.safetensors}\n"
    )
    out = tmp_path / "study.json"
    run(
        "compare", planted / "recipe.yml", "--eval", planted / "eval.yml", "--linear-betas", "1.0",
        "--seed", seed_of_noise(units(REASONING)), "--json", out,
    )  # fmt: skip
    study = read_result(out)
    assert isinstance(study, Study)
    without, whole = {"reasoning": 0.0, "perception": 1.0}, {"reasoning": 1.0, "perception": 1.0}
    assert means(study, "target") == without
    assert means(study, "SNRF") == whole
    controls = {row.name for row in study.conditions if row.role == "control"}
    random = {name for name in controls if name.startswith("random neurons")}
    assert len(random) == 2
    for name in random:
        assert means(study, name) == without
    assert means(study, "linear, beta 1") == whole
    assert "SNRF raises reasoning by 100" in " ".join(study.verdict)


def test_one_end_of_the_planted_units_is_not_enough(planted: Path) -> None:
    from mergekit_snrf.evidence.evaluation import evaluate, load_evaluation

    model, processor = load_model(ModelRef(model=str(planted / "lacking"), device="cpu"), images=None)
    source, _ = load_model(ModelRef(model=str(planted / "source"), device="cpu"), images=None)
    evaluation = load_evaluation(str(planted / "eval.yml"))

    def metrics(neurons: NeuronSet, fusion: Fusion) -> dict[str, float]:
        with fuse_model(model, source, neurons, fusion):
            return {metric: items.mean for metric, items in evaluate(evaluation, model, processor).items()}

    full = Fusion(beta=1.0, rank=0)
    assert metrics(units(REASONING), full) == {"reasoning": 1.0, "perception": 1.0}
    for projection in ("fwd.up", "fwd.down"):
        assert metrics(units(REASONING, projection), full) == {"reasoning": 0.0, "perception": 1.0}
    assert metrics(units(range(5)), full) == {"reasoning": 0.5, "perception": 1.0}
