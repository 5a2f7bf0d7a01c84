"""Deactivation against models whose weights were zeroed by hand, and found by the skill that they carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import example_inputs, load, make_source, make_target
from made_profiles import impact_profile
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.ablate import ablation_rows
from mergekit_snrf.evidence.analysis import least_important
from mergekit_snrf.evidence.evaluation import Evaluation
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.results import Study
from mergekit_snrf.evidence.study import Setup, run_study
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.decoder import find_decoder
from mergekit_snrf.neurons.sets import NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import Profile

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


def some_neurons(folder: Path, ratio: float = 0.2) -> NeuronSet:
    """Neurons of every site but one, more in deeper layers."""
    shape = find_decoder(open_checkpoint(str(folder))).shape
    sizes = {site: shape.neurons(site.projection) for site in shape.sites() if site != Site(1, "attn.v")}
    first = {site: torch.arange(size) < round(ratio * size * (site.layer + 1) / 2) for site, size in sizes.items()}
    return NeuronSet(first).random(99)


def a_profile(neurons: NeuronSet, seed: int = 0) -> Profile:
    """A profile with impacts that tie here and there."""
    rng = np.random.default_rng(seed)
    impacts = {site: torch.from_numpy(rng.integers(0, 12, len(member))) for site, member in neurons.items()}
    return impact_profile(impacts)


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
                if projection != "fwd.down":
                    tensors[name][indices] = 0
                elif name.endswith("weight"):
                    tensors[name][:, indices] = 0
    return model


def ablated(model: Any, evaluation: Evaluation, neurons: NeuronSet, **options: Any) -> Study:
    rows = ablation_rows(neurons, **options)
    return run_study(Setup("ablation", "model", evaluation.name), rows, model, None, evaluation)


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
    model, neurons = load(folder), some_neurons(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile = a_profile(neurons)
    least_of_all = least_important([profile], neurons)
    study = ablated(model, recorder(folder, seen), neurons, least=least_of_all, draws=2, seed=5)
    least = {
        site.key: np.lexsort((range(len(member)), profile.sites[site].mean_impact.numpy()))[: member.sum()].tolist()
        for site, member in neurons.items()
    }
    expected = [{}, indices(neurons), *(indices(neurons.random(seed)) for seed in (5, 6)), least]
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
    count = neurons.count()
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
    model, neurons = load(folder), some_neurons(folder)
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
        ablated(model, Evaluation("fails", scores), neurons, least=neurons.random(7))
    assert changed == [False] + [True] * call
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name


def test_the_least_important_are_those_of_the_lowest_mean_impact_ties_by_index() -> None:
    site = Site(0, "attn.k")
    profile = impact_profile({site: torch.tensor([3.0, 1.0, 0.5, 1.0, 1.0])})
    mask = NeuronSet({site: torch.tensor([True, True, False, False, True]), Site(1, "attn.k"): torch.zeros(5).bool()})
    assert [neuron.index for neuron in least_important([profile], mask).neurons()] == [1, 2, 3]
    for other, found in ((site, 5), (Site(0, "fwd.up"), 0)):
        with pytest.raises(SnrfError, match=rf"^profile: has {found} neurons at {other}, where the mask has 4"):
            least_important([profile], NeuronSet({other: torch.ones(4).bool()}))


def test_the_impacts_of_several_profiles_are_averaged_over_their_probes() -> None:
    site = Site(0, "attn.k")
    profiles = [impact_profile({site: torch.tensor(means)}, n) for means, n in (([1.0, 4.2], 1), ([5.0, 4.0], 3))]
    # The means over all four probes are 4 and 4.05.
    for given, least in ((profiles, 0), (profiles[:1], 0), (profiles[1:], 1)):
        neurons = least_important(given, NeuronSet({site: torch.tensor([True, False])}))
        assert [neuron.index for neuron in neurons.neurons()] == [least]


@pytest.mark.parametrize(("draws", "keep", "field"), [(0, True, "draws"), (3, False, "mask")])
def test_nothing_to_deactivate_or_to_draw_is_refused(draws: int, keep: bool, field: str) -> None:
    neurons = NeuronSet({Site(0, "attn.k"): torch.full((8,), keep)})
    with pytest.raises(SnrfError) as found:
        ablation_rows(neurons, draws=draws)
    assert found.value.field == field
