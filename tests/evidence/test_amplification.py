"""Amplified activations against models whose weights were multiplied by hand, and batches against single runs."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INTERMEDIATE, LAYERS, example_inputs, load, make_source, make_target
from processors import processor_missing
from torch import Tensor, nn
from transformers import GenerationConfig

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence import amplify as amplification
from mergekit_snrf.evidence.amplify import amplified, amplify, generate_amplified, pick_neurons
from mergekit_snrf.evidence.asked import Asked, AskedOptions, load_asked
from mergekit_snrf.evidence.results import Amplification, read_result, write_result
from mergekit_snrf.evidence.tokens import is_math
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.sets import PROJECTIONS, Neuron, NeuronSet, Site
from mergekit_snrf.profiling.probes.batches import prepare
from mergekit_snrf.profiling.probes.rows import load_rows

QUESTIONS = (
    "What is the area?",
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether in the two months?",
    "Hi!",
    "What is the length of AB if the angle ABC is a right angle?",
)
NEURONS = [Neuron(Site(layer, name), 3 + 5 * layer) for layer in range(LAYERS) for name in PROJECTIONS]
FACTOR = 64.0


class Tiny:
    """A tiny model in float64, whose argmax no rounding can change, and probes of unequal length."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_source(folder / "model", "qwen2")
        self.probes_file = folder / "probes.jsonl"
        self.probes_file.write_text("".join(json.dumps({"question": text}) + "\n" for text in QUESTIONS))
        self.how = self.asked(max_new_tokens=12)
        self.model, self.processor = load_model(self.how.model, images=False)
        self.rows = load_rows(self.how.source, answers=False)

    def asked(self, **options: Any) -> Asked:
        ref = ModelRef(model=str(self.folder), device="cpu", dtype="float64")
        return load_asked(self.probes_file, ref, AskedOptions(**options))

    def generate(self, neurons: Sequence[Neuron], **options: Any) -> dict[tuple[int, Neuron | None], tuple[int, ...]]:
        asked = self.asked(**{"max_new_tokens": 12, **options})
        probes = prepare(self.rows, self.processor, rule=asked.rule, batch_size=asked.batch_size, model="tiny")
        found = generate_amplified(probes, self.model, self.processor, asked, neurons, FACTOR)
        return {(one.number, one.neuron): one.answer.ids for one in found}

    def amplify(self, neurons: Sequence[Neuron], *factor: float) -> Amplification:
        return amplify(self.rows, self.model, self.processor, self.how, neurons, *factor)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@torch.no_grad()
def scaled_by_hand(model: nn.Module, neuron: Neuron, factor: float) -> nn.Module:
    """A copy of the model with the neuron's row and bias, or its column, multiplied."""
    scaled = copy.deepcopy(model)
    linear: Any = find_live_decoder(scaled).layers[neuron.site.layer].get_submodule(neuron.site.module)
    if neuron.site.projection == "fwd.down":
        linear.weight[:, neuron.index] *= factor
    else:
        linear.weight[neuron.index] *= factor
        if linear.bias is not None:
            linear.bias[neuron.index] *= factor
    return scaled


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen2_5_vl", "hub"), ("llava", "hub"), ("gemma3", "nested"), ("idefics3", "hub"), ("qwen3", "hub")],
)
@torch.no_grad()
def test_logits_are_those_of_a_model_whose_weights_were_multiplied(family: str, layout: str, tmp_path: Path) -> None:
    if family in ("qwen2_5_vl", "gemma3", "idefics3") and processor_missing(family):
        pytest.skip("its processor needs a package that is missing")
    folder = make_target(tmp_path / "target", family, layout)
    model, inputs = load(folder, dtype=torch.float64), example_inputs(folder)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    chosen = [NEURONS[1], NEURONS[3], None, NEURONS[7], NEURONS[9], NEURONS[10]]
    with amplified(model, chosen, FACTOR):
        together = model(**batch_of(inputs, len(chosen))).logits
    plain = model(**inputs).logits[0]
    torch.testing.assert_close(together[2], plain, rtol=1e-9, atol=1e-9)
    for row, neuron in enumerate(chosen):
        if neuron is not None:
            expected = scaled_by_hand(model, neuron, FACTOR)(**inputs).logits[0]
            torch.testing.assert_close(together[row], expected, rtol=1e-9, atol=1e-9)
            assert (expected - plain).abs().max() > 1e-3, f"{neuron} has no effect, so nothing was tested"


def batch_of(inputs: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    return {name: tensor.repeat(size, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}


def test_generations_are_those_of_stock_generate_with_weights_multiplied(tiny: Tiny) -> None:
    found = tiny.generate(NEURONS, batch_size=7)
    assert len(found) == len(QUESTIONS) * (1 + len(NEURONS))
    changed = set()
    for neuron in (None, *NEURONS):
        model: Any = tiny.model if neuron is None else scaled_by_hand(tiny.model, neuron, FACTOR)
        for number, question in enumerate(QUESTIONS):
            expected = stock_answer(model, tiny.processor, question)
            assert found[number, neuron] == expected, (neuron, question)
            if expected != found[number, None]:
                changed.add(neuron)
    assert {neuron.site.projection for neuron in changed} == set(PROJECTIONS)


def stock_answer(model: Any, tokenizer: Any, question: str) -> tuple[int, ...]:
    """The greedy answer to one question, by transformers alone: no batch, no padding."""
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return tuple(model.generate(**ids, generation_config=greedy)[0, ids["input_ids"].shape[1] :].tolist())


def test_both_ends_of_a_hidden_unit_give_the_same_generations(tiny: Tiny) -> None:
    up, down = (Neuron(Site(1, name), 8) for name in ("fwd.up", "fwd.down"))
    found = tiny.generate([up, down])
    for number in range(len(QUESTIONS)):
        assert found[number, up] == found[number, down]
    assert any(found[number, up] != found[number, None] for number in range(len(QUESTIONS)))


def test_result_holds_the_counts_of_the_generations(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amplification, "MIN_COUNT", 1)
    monkeypatch.setattr(amplification, "TOP", 5)
    result = tiny.amplify([*NEURONS[:6], NEURONS[0]], FACTOR)
    found = tiny.generate(NEURONS[:6])
    special = set(tiny.processor.all_special_ids)

    def counted(neuron: Neuron | None) -> Counter[str]:
        ids = [i for (_, one), answer in found.items() if one == neuron for i in answer if i not in special]
        # The model has more embeddings than the tokenizer has tokens.
        pieces = [tiny.processor.convert_ids_to_tokens(i) or f"<{i}>" for i in ids]
        return Counter(piece.replace("Ġ", " ") for piece in pieces)

    plain, end = counted(None), tiny.processor.eos_token_id
    assert [entry.neuron for entry in result.neurons] == [str(neuron) for neuron in NEURONS[:6]]
    for neuron, entry in zip(NEURONS[:6], result.neurons, strict=True):
        expected = counted(neuron)
        # The tokenizer writes control characters and bytes of no character of their own as letters of its choice.
        common = {token for token in expected if token.isascii() and token.isprintable()}
        entries = [t for t in entry.tokens if t.token.isascii() and t.token.isprintable()]
        assert len(common) >= 3
        assert {t.token: (t.amplified, t.plain) for t in entries} == {t: (expected[t], plain[t]) for t in common}
        assert entry.totals == (expected.total(), plain.total())
        answers = [found[number, neuron] for number in range(len(QUESTIONS))]
        without = [found[number, None] for number in range(len(QUESTIONS))]
        assert entry.ended == (sum(end in ids for ids in answers), sum(end in ids for ids in without))
        assert entry.changed == sum(a != b for a, b in zip(answers, without, strict=True))
        leading = [t.token for t in entry.tokens[:5] if t.log_odds > 0]
        assert entry.math_share == (sum(map(is_math, leading)) / len(leading) if leading else None)
    shares = [entry.math_share or 0 for entry in result.neurons]
    assert result.math_neuron_ratio == sum(share > 0.5 for share in shares) / 6
    assert result.plain_math_share == pytest.approx(
        sum(count for token, count in plain.items() if is_math(token)) / plain.total()
    )
    assert (result.factor, result.count, result.classifier) == (FACTOR, 4, "words")
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_logits_that_are_not_a_number_are_an_error_that_leaves_no_hook(tiny: Tiny) -> None:
    before = hooks(tiny.model)
    with pytest.raises(SnrfError, match=r"row 1: .* not a number with attn.v.L0.N3 amplified by 1e\+308"):
        tiny.amplify([NEURONS[2]], 1e308)
    assert hooks(tiny.model) == before


def test_neurons_batches_and_arguments_that_do_not_fit(tiny: Tiny) -> None:
    before = hooks(tiny.model)
    absent = Neuron.parse(f"fwd.down.L0.N{INTERMEDIATE}")
    for neurons, text in (([absent], str(absent)), ([NEURONS[0]], r"layers.0.self_attn.q_proj did not run")):
        with pytest.raises(SnrfError, match=text), amplified(tiny.model, neurons, 2.0):
            pass
    with pytest.raises(SnrfError, match="not those of 2 generations"), amplified(tiny.model, NEURONS[:2], 2.0):
        tiny.model(torch.ones(3, 4, dtype=torch.long))
    assert hooks(tiny.model) == before
    with pytest.raises(SnrfError, match="no neuron is named"):
        tiny.amplify([])
    with pytest.raises(SnrfError, match="nan") as caught:
        tiny.amplify(NEURONS, float("nan"))
    assert caught.value.field == "factor"


def test_random_neurons_of_a_mask_are_nested_in_order_and_seeded() -> None:
    members = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.5
    neurons = NeuronSet({Site(1, "attn.k"): members, Site(0, "fwd.up"): torch.ones(9, dtype=torch.bool)})
    every = pick_neurons(neurons, None)
    assert every == list(neurons.neurons())
    few, more = pick_neurons(neurons, 5, seed=1), pick_neurons(neurons, 12, seed=1)
    assert len(few) == 5
    assert len(set(more)) == 12
    assert set(few) < set(more)
    assert more == sorted(more, key=every.index)
    assert more != pick_neurons(neurons, 12, seed=2)
    with pytest.raises(SnrfError, match=f"has {len(every)} neurons, not 1000"):
        pick_neurons(neurons, 1000)
    with pytest.raises(SnrfError, match="has 0 neurons, not at least one"):
        pick_neurons(NeuronSet({}), None)


def test_probes_of_a_profile_and_of_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"problem": "p"}\n')
    (tmp_path / "model").mkdir()
    profile = tmp_path / "profile.yml"
    profile.write_text(
        "target: {model: model, revision: abc, probes: {dataset: data.jsonl, question: problem, images: picture}}\n"
        "source: {model: owner/source, probes: {dataset: data.jsonl, question: problem, answer: answer}}\n"
        "template: '{problem} ?'\nanswer: {by: column, column: answer}\nlimit: 7\nseed: 3\nbatch_size: 5\n"
    )
    asked = load_asked(profile, ModelRef(model=str(tmp_path / "model")))
    assert (asked.model.revision, asked.source.images, asked.source.template) == ("abc", "picture", "{problem} ?")
    assert (asked.rule.by, asked.rule.max_new_tokens) == ("model", 128)
    assert (asked.source.limit, asked.source.seed, asked.batch_size) == (7, 3, 5)
    options = AskedOptions(limit=2, seed=0, max_new_tokens=9, batch_size=1)
    asked = load_asked(profile, ModelRef(model="owner/source"), options)
    assert (asked.model, asked.source.images) == (ModelRef(model="owner/source"), None)
    assert (asked.source.limit, asked.source.seed, asked.batch_size, asked.rule.max_new_tokens) == (2, 0, 1, 9)
    assert load_asked(profile, ModelRef(model="owner/other")).source.images == "picture"
    data, ref = tmp_path / "data.jsonl", ModelRef(model="m")
    source = load_asked(data, ref, AskedOptions(question="problem", images="picture")).source
    assert (source.question, source.images) == ("problem", "picture")
    assert load_asked(data, ref, AskedOptions(template="{problem} =")).source.question is None
    assert load_asked(data, ref).source.question == "question"
    with pytest.raises(SnrfError) as caught:
        load_asked(profile, ref, AskedOptions(question="problem"))
    assert caught.value.field == "question"
