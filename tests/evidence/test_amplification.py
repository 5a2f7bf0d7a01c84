"""Amplified activations against models whose weights were multiplied by hand, and batches against single runs."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INTERMEDIATE, LAYERS, example_inputs, load, make_source, make_target
from processors import processor_missing
from torch import Tensor, nn
from transformers import GenerationConfig

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.amplify import (
    Sampling,
    amplified,
    amplify,
    generate_amplified,
    load_probes_config,
    pick_neurons,
)
from mergekit_snrf.evidence.results import read_result, write_result
from mergekit_snrf.evidence.tokens import Classifier
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.neurons.sets import PROJECTIONS, Neuron, NeuronSet, Site
from mergekit_snrf.profiling.probes.batches import load_rows, prepare
from mergekit_snrf.profiling.settings import ProfileConfig, SideConfig, model_ref

pytest.importorskip("datasets")

QUESTIONS = (
    "What is the area?",
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether in the two months?",
    "Hi!",
    "What is the length of AB if the angle ABC is a right angle?",
)
NEURONS = [Neuron(Site(layer, name), 3 + 5 * layer) for layer in range(LAYERS) for name in PROJECTIONS]
FACTOR = 64.0


@pytest.fixture(scope="module", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    threads, cache = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    torch.set_num_threads(threads)
    datasets.config.HF_DATASETS_CACHE = cache


class Asked:
    """A tiny model in float64, whose argmax no rounding can change, and probes of unequal length."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = make_source(folder / "model", "qwen2")
        self.probes_file = folder / "probes.jsonl"
        self.probes_file.write_text("".join(json.dumps({"question": text}) + "\n" for text in QUESTIONS))
        self.side, self.config = self.configured(max_new_tokens=12)
        self.model, self.processor = load_model(model_ref(self.side, device="cpu", dtype="float64"), images=False)
        self.rows = load_rows(self.side, self.config)

    def configured(self, **options: Any) -> tuple[SideConfig, ProfileConfig]:
        return load_probes_config(self.probes_file, str(self.folder), **options)

    def generate(
        self, neurons: Sequence[Neuron], sampling: Sampling | None = None, **options: Any
    ) -> dict[tuple[int, int, Neuron | None], tuple[int, ...]]:
        _, config = self.configured(**{"max_new_tokens": 12, **options})
        probes = prepare(self.rows, self.processor, self.side, config, self.model)
        found = generate_amplified(probes, self.model, self.processor, config, neurons, FACTOR, sampling)
        return {(one.number, one.sample, one.neuron): one.answer.ids for one in found}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory.mktemp("asked"))


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


def test_generations_are_those_of_stock_generate_with_weights_multiplied(asked: Asked) -> None:
    found = asked.generate(NEURONS, batch_size=7)
    assert len(found) == len(QUESTIONS) * (1 + len(NEURONS))
    changed = set()
    for neuron in (None, *NEURONS):
        model: Any = asked.model if neuron is None else scaled_by_hand(asked.model, neuron, FACTOR)
        for number, question in enumerate(QUESTIONS):
            expected = stock_answer(model, asked.processor, question)
            assert found[number, 0, neuron] == expected, (neuron, question)
            if expected != found[number, 0, None]:
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


def test_many_neurons_in_a_run_give_what_each_gives_alone(asked: Asked) -> None:
    together = asked.generate(NEURONS, batch_size=11)
    for neuron in NEURONS[::4]:
        alone = asked.generate([neuron], batch_size=1)
        assert alone == {key: ids for key, ids in together.items() if key[2] in (None, neuron)}


def test_both_ends_of_a_hidden_unit_give_the_same_generations(asked: Asked) -> None:
    up, down = (Neuron(Site(1, name), 8) for name in ("fwd.up", "fwd.down"))
    found = asked.generate([up, down])
    for number in range(len(QUESTIONS)):
        assert found[number, 0, up] == found[number, 0, down]
    assert any(found[number, 0, up] != found[number, 0, None] for number in range(len(QUESTIONS)))


def test_samples_do_not_depend_on_the_batch_or_on_other_neurons(asked: Asked) -> None:
    sampling = Sampling(samples=3, temperature=1.5)
    together = asked.generate(NEURONS[:4], sampling, batch_size=13, seed=5)
    alone = asked.generate(NEURONS[2:3], sampling, batch_size=1, seed=5)
    assert alone == {key: ids for key, ids in together.items() if key[2] in (None, NEURONS[2])}
    assert len({ids for (number, _, neuron), ids in together.items() if (number, neuron) == (0, None)}) == 3
    assert alone != asked.generate(NEURONS[2:3], sampling, batch_size=1, seed=6)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_are_drawn_from_the_softmax_at_the_temperature(asked: Asked, temperature: float) -> None:
    samples = 400
    found = asked.generate([], Sampling(samples, temperature), max_new_tokens=1, batch_size=400)
    message = [{"role": "user", "content": QUESTIONS[0]}]
    ids = asked.processor.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    logits = asked.model(**ids).logits[0, -1]
    probabilities = torch.softmax(logits / temperature, dim=0)
    drawn = torch.tensor([found[0, sample, None][0] for sample in range(samples)])
    # Quarters of the vocabulary by probability, each with the count that a binomial distribution allows.
    order = probabilities.argsort(descending=True)
    quarter = (4 * probabilities[order].cumsum(0)).long().clamp(max=3)
    for number in range(4):
        members = order[quarter == number]
        share = probabilities[members].sum()
        count = torch.isin(drawn, members).sum()
        assert abs(count - samples * share) < 3.5 * (samples * share * (1 - share)).sqrt()
    other = torch.log_softmax(logits / (2.5 / temperature), dim=0)
    assert torch.log(probabilities)[drawn].mean() > other[drawn].mean() + 0.02


def test_result_holds_the_counts_of_the_generations(asked: Asked, tmp_path: Path) -> None:
    neurons = [*NEURONS[:6], NEURONS[0]]
    even = Classifier("even", lambda token: ord(token[0]) % 2 == 0)
    result = amplify(
        asked.rows, asked.model, asked.processor, asked.side, asked.config, neurons, FACTOR,
        classifier=even, top=5, min_count=1, name="tiny",
    )  # fmt: skip
    found = asked.generate(NEURONS[:6])
    special = set(asked.processor.all_special_ids)

    def counted(neuron: Neuron | None) -> Counter[str]:
        ids = [i for (_, _, one), answer in found.items() if one == neuron for i in answer if i not in special]
        # The model has more embeddings than the tokenizer has tokens.
        pieces = [asked.processor.convert_ids_to_tokens(i) or f"<{i}>" for i in ids]
        return Counter(piece.replace("Ġ", " ") for piece in pieces)

    plain = counted(None)
    end = asked.processor.eos_token_id
    assert [entry.neuron for entry in result.neurons] == [str(neuron) for neuron in NEURONS[:6]]
    for neuron, entry in zip(NEURONS[:6], result.neurons, strict=True):
        expected = counted(neuron)
        # The tokenizer writes control characters and bytes of no character of their own as letters of its choice.
        common = {token for token in expected if token.isascii() and token.isprintable()}
        entries = [t for t in entry.tokens if t.token.isascii() and t.token.isprintable()]
        assert len(common) >= 3
        assert {t.token: (t.amplified, t.plain) for t in entries} == {t: (expected[t], plain[t]) for t in common}
        assert entry.totals == (expected.total(), plain.total())
        answers = [found[number, 0, neuron] for number in range(len(QUESTIONS))]
        without = [found[number, 0, None] for number in range(len(QUESTIONS))]
        assert entry.ended == (sum(end in ids for ids in answers), sum(end in ids for ids in without))
        assert entry.changed == sum(a != b for a, b in zip(answers, without, strict=True))
        leading = [t.token for t in entry.tokens[:5] if t.log_odds > 0]
        assert entry.math_share == (sum(map(even, leading)) / len(leading) if leading else None)
    shares = [entry.math_share or 0 for entry in result.neurons]
    assert result.math_neuron_ratio == sum(share > 0.5 for share in shares) / 6
    assert 0 < sum(share > 0.5 for share in shares) < 6
    assert result.plain_math_share == pytest.approx(
        sum(count for token, count in plain.items() if even(token)) / plain.total()
    )
    assert (result.model, result.factor, result.count, result.classifier) == ("tiny", FACTOR, 4, "even")
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


def test_factor_one_changes_nothing(asked: Asked) -> None:
    result = amplify(asked.rows, asked.model, asked.processor, asked.side, asked.config, NEURONS[:3], 1.0, min_count=1)
    for entry in result.neurons:
        assert entry.changed == 0
        assert all(token.log_odds == 0 for token in entry.tokens)
    assert result.math_neuron_ratio is None


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_logits_that_are_not_a_number_are_an_error_that_leaves_no_hook(asked: Asked) -> None:
    before = hooks(asked.model)
    with pytest.raises(SnrfError, match=r"row 1: .* not a number with attn.v.L0.N3 amplified by 1e\+308"):
        amplify(asked.rows, asked.model, asked.processor, asked.side, asked.config, [NEURONS[2]], 1e308)
    assert hooks(asked.model) == before


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (f"fwd.up.L{LAYERS}.N0", f"has layers 0 to {LAYERS - 1}"),
        (f"fwd.down.L0.N{INTERMEDIATE}", f"has fwd.down neurons 0 to {INTERMEDIATE - 1}"),
        ("attn.k.L0.N32", "has attn.k neurons 0 to 31"),
    ],
)
def test_neurons_that_the_model_does_not_have(asked: Asked, neuron: str, message: str) -> None:
    before = hooks(asked.model)
    with pytest.raises(SnrfError, match=message), amplified(asked.model, [Neuron.parse(neuron)], 2.0):
        pass
    assert hooks(asked.model) == before


def test_a_batch_of_another_size_and_a_projection_that_does_not_run_are_errors(asked: Asked) -> None:
    ids = torch.ones(3, 4, dtype=torch.long)
    with pytest.raises(SnrfError, match="not those of 2 generations"), amplified(asked.model, NEURONS[:2], 2.0):
        asked.model(ids)
    silent = pytest.raises(SnrfError, match=r"model.layers.0.self_attn.q_proj did not run")
    with silent, amplified(asked.model, [NEURONS[0]], 2.0):
        pass


def test_senseless_numbers_are_errors(asked: Asked) -> None:
    arguments = (asked.rows, asked.model, asked.processor, asked.side, asked.config)
    with pytest.raises(SnrfError, match="no neuron is named"):
        amplify(*arguments, [])
    with pytest.raises(SnrfError, match="factor must be a finite number, got nan"):
        amplify(*arguments, NEURONS, float("nan"))
    with pytest.raises(SnrfError, match="at least 1, got 10, 0 and 100"):
        amplify(*arguments, NEURONS, min_count=0)
    with pytest.raises(SnrfError, match="temperature must be positive"):
        Sampling(2, 0.0)
    with pytest.raises(SnrfError, match="samples must be 0"):
        Sampling(-1)


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
    with pytest.raises(SnrfError, match=f"has {len(every)} neurons; 1000 cannot be taken"):
        pick_neurons(neurons, 1000)
    with pytest.raises(SnrfError, match="has 0 neurons; at least one"):
        pick_neurons(NeuronSet({}), None)


def test_probes_of_a_profile_and_of_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"problem": "p"}\n')
    (tmp_path / "model").mkdir()
    profile = tmp_path / "profile.yml"
    profile.write_text(
        "target: {model: model, revision: abc, probes: {dataset: data.jsonl, question: problem, images: picture}}\n"
        "source: {model: model, probes: {dataset: data.jsonl, question: problem, answer: answer}}\n"
        "template: '{problem} ?'\nanswer: {by: column, column: answer}\nlimit: 7\nseed: 3\nbatch_size: 5\n"
    )
    side, config = load_probes_config(profile, str(tmp_path / "model"))
    assert (side.revision, side.probes.images, side.template) == ("abc", "picture", "{problem} ?")
    assert (config.answer.by, config.answer.max_new_tokens) == ("model", 128)
    assert (config.limit, config.seed, config.batch_size) == (7, 3, 5)
    side, config = load_probes_config(
        profile, "owner/other", side="source", limit=2, seed=0, max_new_tokens=9, batch_size=1
    )
    assert (side.model, side.revision, side.probes.images) == ("owner/other", None, None)
    assert (config.limit, config.seed, config.batch_size, config.answer.max_new_tokens) == (2, 0, 1, 9)
    side, _ = load_probes_config(tmp_path / "data.jsonl", "m", question="problem", images="picture")
    assert (side.probes.question, side.probes.images) == ("problem", "picture")
    side, _ = load_probes_config(tmp_path / "data.jsonl", "m", template="{problem} =")
    assert side.probes.question is None
    assert load_probes_config(tmp_path / "data.jsonl", "m")[0].probes.question == "question"
    with pytest.raises(SnrfError, match=r"is no profile\.yml, so it has no sides"):
        load_probes_config(tmp_path / "data.jsonl", "m", side="source")
    with pytest.raises(SnrfError, match="names its columns itself"):
        load_probes_config(profile, "m", question="problem")
    with pytest.raises(SnrfError, match="not a format string"):
        load_probes_config(tmp_path / "data.jsonl", "m", template="{problem")
