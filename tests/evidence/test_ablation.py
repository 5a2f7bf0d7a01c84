"""Deactivation against models whose weights were zeroed by hand, and verdicts against their intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import LAYERS, example_inputs, load, make_source, make_target
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.ablate import ablate, check_mask, format_losses, least_important, verdict
from mergekit_snrf.evidence.evaluation import Evaluation, Items
from mergekit_snrf.evidence.results import Condition, Contrast, Interval, Measured, Study
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sets import NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import EDGES, Profile, SiteProfile

FAMILIES = ("qwen2_5_vl", "llava_next")
MODULES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "fwd.up": "mlp.up_proj",
    "fwd.down": "mlp.down_proj",
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / request.param, request.param, "hub")


def a_mask(folder: Path, ratio: float = 0.2) -> Mask:
    """Neurons of every site but one, more in deeper layers."""
    shape = find_decoder(open_checkpoint(str(folder))).shape
    sizes = {site: shape.neurons(site.projection) for site in shape.sites() if site != Site(1, "attn.v")}
    first = {site: torch.arange(size) < round(ratio * size * (site.layer + 1) / 2) for site, size in sizes.items()}
    return Mask(NeuronSet(first).random(99))


def a_profile(mask: Mask, seed: int = 0) -> Profile:
    """A profile with impacts that tie here and there."""
    rng = np.random.default_rng(seed)
    sites = {}
    for site, member in mask.neurons.items():
        impact = torch.from_numpy(rng.integers(0, 12, len(member)).astype(np.float32))
        hits = torch.zeros(len(member), len(EDGES), dtype=torch.int32)
        hits[:, -1] = 1
        sites[site] = SiteProfile(impact, torch.ones(len(member)), impact, hits)
    return Profile(sites, 1)


def zeroed_by_hand(folder: Path, chosen: dict[str, list[int]]) -> Any:
    """The checkpoint loaded anew, with rows (columns of down_proj) and biases of its text decoder set to zero."""
    model = load(folder)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for key, indices in chosen.items():
            _, layer, projection = key.split(".", 2)
            ends = f"layers.{layer}.{MODULES[projection]}"
            found = [name for name in tensors if f"{ends}." in name and "vision" not in name and "visual" not in name]
            assert found
            for name in found:
                for index in indices:
                    if projection == "fwd.down":
                        if name.endswith("weight"):
                            tensors[name][:, index] = 0
                    else:
                        tensors[name][index] = 0
    return model


def indices(neurons: NeuronSet) -> dict[str, list[int]]:
    return {site.key: member.nonzero().flatten().tolist() for site, member in neurons.items()}


def recorder(folder: Path, seen: list[Tensor]) -> Evaluation:
    inputs = example_inputs(folder)

    def scores(model: Any, processor: Any) -> dict[str, Items]:
        seen.append(model(**inputs).logits.clone())
        return {"R": Items(tuple(seen[-1][0, -1, :40].tolist()))}

    return Evaluation("recorder", scores)


def test_every_condition_is_the_model_that_was_zeroed_by_hand(folder: Path) -> None:
    seen: list[Tensor] = []
    model, mask = load(folder), a_mask(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile = a_profile(mask)
    study = ablate(model, None, recorder(folder, seen), mask, profile=profile, draws=2, seed=5)
    least = {
        site.key: np.lexsort((range(len(member)), profile.sites[site].mean_impact.numpy()))[: member.sum()].tolist()
        for site, member in mask.neurons.items()
    }
    expected = [{}, indices(mask.neurons), *(indices(mask.neurons.random(seed)) for seed in (5, 6)), least]
    inputs = example_inputs(folder)
    assert len(seen) == len(expected)
    logits = []
    for found, chosen in zip(seen, expected, strict=True):
        with torch.no_grad():
            logits.append(zeroed_by_hand(folder, chosen)(**inputs).logits)
        assert torch.equal(found, logits[-1])
        assert {key: len(value) for key, value in chosen.items()} in ({}, {k: len(v) for k, v in expected[1].items()})
    assert not any(torch.equal(one, other) for i, one in enumerate(logits) for other in logits[:i])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    names = ["as it is", "masked neurons", "random neurons", "least important neurons"]
    assert [condition.name for condition in study.conditions] == names
    assert [condition.role for condition in study.conditions] == ["reference", "claim", "control", "control"]
    count = mask.neurons.count()
    assert [(one.draws, one.neurons) for one in study.conditions] == [(1, 0), (1, count), (2, count), (1, count)]
    means = [float(one[0, -1, :40].double().mean()) for one in logits]
    found_means = [condition.metrics["R"].mean.estimate for condition in study.conditions]
    assert found_means == pytest.approx([means[0], means[1], (means[2] + means[3]) / 2, means[4]])
    assert study.conditions[2].settings["seeds"] == [5, 6]
    assert study.conditions[2].settings["means"]["R"] == pytest.approx(means[2:4])
    changes = [condition.metrics["R"].change for condition in study.conditions]
    assert changes[0] is None
    assert [one.estimate for one in changes[1:] if one] == pytest.approx([one - means[0] for one in found_means[1:]])
    contrasts = {contrast.right: contrast.difference.estimate for contrast in study.contrasts}
    assert contrasts == pytest.approx({names[2]: means[1] - found_means[2], names[3]: means[1] - means[4]})


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_weights_are_put_back_bit_for_bit_when_an_evaluation_fails(
    error: BaseException, call: int, tmp_path: Path
) -> None:
    folder = make_source(tmp_path / "model", "qwen2")
    model, mask = load(folder), a_mask(folder)
    with torch.no_grad():
        # A bit pattern that arithmetic would not bring back.
        model.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = []

    def scores(model: Any, processor: Any) -> dict[str, list[float]]:
        changed.append(any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()))
        if len(changed) == call + 1:
            raise error
        return {"R": [1.0, 0.0]}

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SnrfError
    with pytest.raises(expected):
        ablate(model, None, Evaluation("fails", scores), mask, profile=a_profile(mask))
    assert changed == [False] + [True] * call
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name


def test_the_least_important_are_those_of_the_lowest_mean_impact_ties_by_index() -> None:
    site = Site(0, "attn.k")
    impact = torch.tensor([3.0, 1.0, 0.5, 1.0, 1.0])
    hits = torch.zeros(5, len(EDGES), dtype=torch.int32)
    hits[:, -1] = 1
    profile = Profile({site: SiteProfile(impact.flip(0), torch.ones(5), impact, hits)}, 1)
    mask = NeuronSet({site: torch.tensor([True, True, False, False, True]), Site(1, "attn.k"): torch.zeros(5).bool()})
    assert [neuron.index for neuron in least_important(profile, mask).neurons()] == [1, 2, 3]
    with pytest.raises(SnrfError, match=r"profile: has 5 neurons at layers\.0\.attn\.k, where the mask has 4"):
        least_important(profile, NeuronSet({site: torch.ones(4).bool()}))
    with pytest.raises(SnrfError, match=r"profile: has 0 neurons at layers\.0\.fwd\.up, where the mask has 4"):
        least_important(profile, NeuronSet({Site(0, "fwd.up"): torch.ones(4).bool()}))


def test_masks_of_another_model_are_refused_by_headers(folder: Path) -> None:
    shape = find_decoder(open_checkpoint(str(folder))).shape
    check_mask(a_mask(folder), shape, "model")
    for neurons in (NeuronSet({}), NeuronSet({Site(LAYERS, "attn.q"): torch.ones(64).bool()})):
        with pytest.raises(SnrfError, match="m: "):
            check_mask(Mask(neurons, path="m"), shape, "model")


def test_nothing_to_deactivate_or_to_draw_is_refused(folder: Path) -> None:
    model, evaluation = load(folder), recorder(folder, [])
    with pytest.raises(SnrfError, match="m: has no neurons"):
        ablate(model, None, evaluation, Mask(NeuronSet({}), path="m"))
    with pytest.raises(SnrfError, match="draws must be at least 1, got 0"):
        ablate(model, None, evaluation, a_mask(folder), draws=0)


def interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate=estimate, low=low, high=high)


def a_study(change: Interval, difference: Interval, *, draws: int = 3, items: int = 400, scale: float = 1.0) -> Study:
    def condition(name: str, role: Any, change: Interval | None = None, **keys: Any) -> Condition:
        mean = interval(0.5 * scale, 0.4 * scale, 0.6 * scale)
        return Condition(name=name, role=role, neurons=12, metrics={"R": Measured(mean=mean, change=change)}, **keys)

    return Study(
        kind="ablation",
        model="model",
        evaluation="mine",
        items={"R": items},
        conditions=[
            condition("as it is", "reference"),
            condition("masked neurons", "claim", change),
            condition("random neurons", "control", draws=draws, settings={"means": {"R": [0.25, 0.5, 0.375]}}),
        ],
        contrasts=[Contrast(left="masked neurons", right="random neurons", metric="R", difference=difference)],
    )


DOWN, UP, NONE = interval(-0.2, -0.3, -0.1), interval(0.2, 0.1, 0.3), interval(-0.05, -0.12, 0.0)


@pytest.mark.parametrize(
    ("change", "difference", "sentences"),
    [
        (
            DOWN,
            DOWN,
            (
                "Deactivating the 12 masked neurons lowers R by 20.0 [10.0, 30.0] points.",
                "R is 20.0 [10.0, 30.0] points lower without the masked neurons than without as many random neurons "
                "(3 draws, 25.0 to 50.0).",
            ),
        ),
        (
            NONE,
            UP,
            (
                "No change of R by deactivating the 12 masked neurons can be told from chance: "
                "-5.0 [-12.0, +0.0] points.",
                "R is 20.0 [10.0, 30.0] points higher without the masked neurons than without as many random neurons "
                "(3 draws, 25.0 to 50.0).",
            ),
        ),
        (
            UP,
            NONE,
            (
                "Deactivating the 12 masked neurons raises R by 20.0 [10.0, 30.0] points.",
                "R without the masked neurons cannot be told from R without as many random neurons (3 draws, 25.0 to "
                "50.0): difference -5.0 [-12.0, +0.0] points.",
            ),
        ),
    ],
)
def test_the_verdict_says_what_the_intervals_support(
    change: Interval, difference: Interval, sentences: tuple[str, ...]
) -> None:
    found = verdict(a_study(change, difference))
    assert tuple(found[: len(sentences)]) == sentences
    assert found[len(sentences) :] == [
        "3 draws tell little of how much draws differ: the intervals over them are too narrow.",
        "The intervals are not corrected for their number.",
    ]


def test_the_verdict_tells_what_weakens_it() -> None:
    few_items = "The intervals of R are of fewer than 30 items, and too narrow."
    assert few_items not in verdict(a_study(DOWN, DOWN, items=30))
    assert few_items in verdict(a_study(DOWN, DOWN, items=29))
    assert verdict(a_study(DOWN, DOWN, draws=1))[-2].startswith("One draw of random neurons does not show")
    assert "lowers R by 0.2 [0.1, 0.3]." in verdict(a_study(DOWN, DOWN, scale=100.0))[0]


def test_lost_items_with_newly_malformed_answers_are_counted() -> None:
    before = {"R": Items((1.0, 1.0, 1.0, 0.0, 1.0), malformed=(False, False, True, False, False)), "P": Items((1.0,))}
    after = {"R": Items((0.0, 0.0, 0.0, 0.0, 1.0), malformed=(True, False, True, True, False)), "P": Items((0.0,))}
    (sentence,) = format_losses(before, after)
    assert sentence.startswith("3 items of R score lower with the masked neurons deactivated, 1 of them with an answer")
    assert format_losses(before, before) == []


def planted(broken: str) -> Callable[[Any, Any], dict[str, Items]]:
    """An evaluation that is 1 on every item while a weight is whole, for R, and always for P."""

    def scores(model: Any, processor: Any) -> dict[str, Items]:
        whole = bool(model.get_parameter(broken)[3].abs().sum() > 0)
        rng = np.random.default_rng(0)
        noise = rng.random(200) < 0.1
        return {"R": Items(tuple(float(whole and not one) for one in noise)), "P": Items((1.0, 0.0) * 100)}

    return scores


def test_a_skill_in_one_neuron_is_found_and_a_mask_beside_it_is_not_blamed(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "model", "llama")
    model = load(folder)
    evaluation = Evaluation("planted", planted("model.layers.1.self_attn.k_proj.weight"))
    size = model.model.layers[1].self_attn.k_proj.out_features
    site = Site(1, "attn.k")
    hit, missed = (Mask(NeuronSet({site: torch.arange(size) == index})) for index in (3, 4))
    # No draw of the seeds 0 to 4 happens to hold the neuron itself.
    assert not any(bool(hit.neurons.random(seed)[site][3]) for seed in range(5))
    found = ablate(model, None, evaluation, hit, draws=5).verdict
    assert found[0].startswith("Deactivating the masked neuron lowers R by 8")
    assert " lower without the masked neurons than without as many random neurons" in found[1]
    assert found[2].startswith("No change of P")
    innocent = ablate(model, None, evaluation, missed, draws=5).verdict
    assert [sentence.split(" ")[0] for sentence in innocent] == ["No", "R", "No", "P", "The"]
    assert all("cannot be told" in sentence for sentence in innocent[1:4:2])
