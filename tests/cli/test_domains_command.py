"""``snrf domains`` as a user runs it: counts that are made up, and models whose neurons are zeroed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import example_inputs, load, make_source, make_target
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from mergekit_snrf.cli.mask import mask as snrf_mask
from mergekit_snrf.cli.snrf import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.domains import ablate_domains, domain_sets
from mergekit_snrf.evidence.evaluation import Evaluation
from mergekit_snrf.evidence.items import Items
from mergekit_snrf.evidence.results import DomainAblation, read_result
from mergekit_snrf.evidence.study import Setup
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.edits import deactivate, fuse_model
from mergekit_snrf.neurons.maskfile import ModelProvenance, load_mask, read_mask, write_mask
from mergekit_snrf.neurons.sets import NeuronSet, Site
from mergekit_snrf.profiling.result.domains import DomainsProvenance, write_domains

TOKENS = 100
MLPS = {
    "llava": ("vision_tower.encoder.layers.{}.mlp.activation_fn", "multi_modal_projector.act"),
    "qwen2_5_vl": ("visual.blocks.{}.mlp.act_fn", "visual.merger.mlp.1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "llava", "llava", "hub", dtype=torch.float32)


def write_counts(path: Path, model: Path | None = None, config_sha256: str | None = None) -> Path:
    """Counts of llava: neuron n of each module is specific to domain n % 3 for n < 6, and others are active alike."""
    tensors = {"text.tokens": torch.full((3, 3), TOKENS)}
    tensors |= {key: torch.full((3,), TOKENS) for key in ("vision.tokens", "projector.tokens")}
    sizes = {**{f"text.layers.{n}": 96 for n in range(3)}, **{f"vision.layers.{n}": 24 for n in range(3)}}
    for key, size in {**sizes, "projector.0": 64}.items():
        counts = torch.full((3, size), TOKENS // 2)
        for neuron in range(6):
            counts[:, neuron] = 0
            counts[neuron % 3, neuron] = TOKENS - neuron
        tensors[f"{key}.active"] = counts[:, None].repeat(1, 3, 1) if key.startswith("text") else counts
    if model is not None:
        config_sha256 = open_checkpoint(str(model)).config_sha256
    origin = ModelProvenance(path="llava", config_sha256=config_sha256)
    write_domains(path, tensors, DomainsProvenance(names=["a", "b", "c"], model=origin))
    return path


def snrf(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_masks_of_every_domain_and_module(tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "d.safetensors")
    # 6 of 96, of 24 and of 64 neurons in every layer; the bar is the share of the others.
    done = snrf("domains", "select", counts, tmp_path / "out", "--top", "0.25", "--percentile", "0.9")
    assert done.exit_code == 0, done.output
    places = {"": ("fwd.up", "fwd.down"), ".vision": ("vision.mlp",), ".projector": ("projector.mlp",)}
    files = {f"{name}{suffix}.safetensors" for name in "abc" for suffix in places}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for number, name in enumerate("abc"):
        for suffix, projections in places.items():
            path = tmp_path / "out" / f"{name}{suffix}.safetensors"
            mask = read_mask(path, towers=True)
            layers = 1 if suffix == ".projector" else 3
            assert {str(neuron) for neuron in mask.neurons.neurons()} == {
                f"{projection}.L{layer}.N{neuron}"
                for projection in projections
                for layer in range(layers)
                for neuron in (number, number + 3)
            }
            assert mask.provenance.target == ModelProvenance(path="llava")
            rule = mask.provenance.selection or {}
            assert (rule["domain"], rule["top"], rule["bar"]) == (name, 0.25, 0.5)
            assert f"{path}" in done.output
    both = snrf("mask", "union", tmp_path / "out/a.safetensors", tmp_path / "out/b.safetensors", tmp_path / "ab")
    assert (both.exit_code, both.output) == (0, f"{tmp_path / 'ab'}: 24 neurons\n")
    shown = snrf("mask", "show", tmp_path / "out/a.vision.safetensors", "--layers")
    assert shown.exit_code == 0, shown.output
    assert "vision.mlp       3        6  72  8.33 %" in shown.output


def test_show_counts_entropies_and_overlaps(tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "d.safetensors")
    shown = snrf("domains", "show", counts, "--top", "0.25", "--percentile", "0.9", "--figures", tmp_path / "f")
    assert shown.exit_code == 0, shown.output
    assert "the text decoder: 18 of 288 neurons are specific" in shown.output
    assert "with H from 0.000 nats (ln 3 = 1.099)" in shown.output
    assert "all    6  6  6\n0      2  2  2\n" in shown.output
    assert "a        6  0  0\nb        0  6  0\n" in shown.output
    assert "Warning" not in shown.output
    for name in ("domains.svg", "domains.png"):
        assert (tmp_path / "f" / name).stat().st_size > 1000
    assert "the projector: a 2, b 2, c 2" in (tmp_path / "f/domains.svg").read_text()
    with Image.open(tmp_path / "f/domains.png") as image:
        assert image.getextrema()[3][1] == 255
    # Below the median nothing is specific: the others are active alike on all domains.
    tensors = {"text.layers.0.active": torch.full((2, 3, 5), 7), "text.tokens": torch.full((2, 3), 9)}
    tensors["text.layers.0.active"][0, 0, 0] = 8
    write_domains(tmp_path / "flat.safetensors", tensors, DomainsProvenance(names=["x", "y"]))
    shown = snrf("domains", "show", tmp_path / "flat.safetensors", "--top", "0.5")
    assert "Warning: nothing in the text decoder is specific: every H is close to ln 2." in shown.output


def zeroed(model: nn.Module, family: str, neurons: NeuronSet) -> list[Any]:
    """Hooks that write zeros into activations, of the text decoder before up_proj is multiplied with them."""
    vision, projector = MLPS[family]
    handles = []
    for site, member in neurons.items():
        if site.projection == "fwd.down":
            continue
        text = f"language_model.layers.{site.layer}.mlp.act_fn"
        name = {"fwd.up": text, "vision.mlp": vision.format(site.layer), "projector.mlp": projector}[site.projection]
        (found,) = (module for path, module in model.named_modules() if path.endswith(name))

        def hook(module: nn.Module, args: Any, output: Tensor, member: Tensor = member) -> Tensor:
            return torch.where(member, 0.0, output)

        handles.append(found.register_forward_hook(hook))
    return handles


@pytest.mark.parametrize("family", MLPS)
def test_deactivated_neurons_are_zero_wherever_they_are(family: str, tmp_path: Path) -> None:
    """Against hooks that zero the activation itself, as MMNeuron does; bit for bit, and undone."""
    model = load(make_target(tmp_path / "target", family, "hub", dtype=torch.float64))
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in example_inputs(tmp_path / "target").items()}
    pick = torch.Generator().manual_seed(0)
    up = {Site(layer, "fwd.up"): torch.rand(96, generator=pick) < 0.3 for layer in (0, 2)}
    sets = {
        "decoder": NeuronSet({**up, **{Site(site.layer, "fwd.down"): member for site, member in up.items()}}),
        "vision": NeuronSet({Site(1, "vision.mlp"): torch.rand(24, generator=pick) < 0.5}),
        "projector": NeuronSet({Site(0, "projector.mlp"): torch.rand(64, generator=pick) < 0.5}),
    }
    sets["all"] = sets["decoder"] | sets["vision"] | sets["projector"]

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    before = logits()
    for neurons in sets.values():
        handles = zeroed(model, family, neurons)
        expected = logits()
        for handle in handles:
            handle.remove()
        with deactivate(model, neurons) as edit:
            found = logits()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not torch.equal(found, before)
        assert torch.equal(logits(), before)
        assert "activations" not in repr(edit)
    wrong = NeuronSet({Site(0, "vision.mlp"): torch.ones(25).bool()})
    with pytest.raises(
        SnrfError, match=r"layers\.0\.vision\.mlp of shape \[25\] does not fit .*, which has 24 neurons"
    ):
        deactivate(model, wrong)
    with pytest.raises(SnrfError, match="has neurons outside of the text decoder"):
        fuse_model(model, model, sets["all"])


def test_neurons_outside_of_the_decoder_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower.safetensors"
    write_mask(tower, NeuronSet({Site(1, "vision.mlp"): torch.ones(24).bool()}))
    make_source(tmp_path / "source", "llama")
    message = f"{tower}: has neurons outside of the text decoder (layers.1.vision.mlp); use them with 'snrf ablate'"
    (tmp_path / "r.yml").write_text(
        f"merge_method: snrf\nbase_model: {folder}\nmodels: [{{model: {tmp_path}/source}}]\n"
        f"parameters: {{masks: {tower}}}\n"
    )
    for words in (
        ("plan", tmp_path / "r.yml"),
        ("mask", "union", tower, tower, tmp_path / "out"),
        ("mask", "card", tower),
        ("mask", "random", tower, tmp_path / "out"),
        ("mask", "export", tower, tmp_path / "out", "--model", folder),
        ("report", tower, tmp_path / "out.html"),
    ):
        done = snrf(*words)
        assert done.exit_code == 1, done.output
        assert message in done.output, words
    assert load_mask(tower, towers=True).neurons.count() == 24


def recorded(model: nn.Module, inputs: dict[str, Tensor], seen: list[Tensor]) -> Evaluation:
    """Scores in [0, 1], so that they are shares: metric a of the first items, b of the others."""

    def scores(model: Any, processor: Any) -> dict[str, Items]:
        with torch.no_grad():
            seen.append(model(**inputs).logits[0, -1].double().sigmoid())
        return {"a": Items(tuple(seen[-1][:40].tolist())), "b": Items(tuple(seen[-1][40:80].tolist()))}

    return Evaluation("recorded", scores)


def test_the_matrix_is_that_of_models_zeroed_by_hand(folder: Path) -> None:
    model, inputs, seen = load(folder), example_inputs(folder), list[Tensor]()
    up = {name: torch.arange(96) % 7 == number for number, name in enumerate("ab")}
    sets = {
        "decoder": {
            name: NeuronSet({Site(1, projection): member for projection in ("fwd.up", "fwd.down")})
            for name, member in up.items()
        },
        "vision": {"a": NeuronSet({Site(0, "vision.mlp"): torch.arange(24) < 9}), "b": NeuronSet({})},
    }
    evaluation = recorded(model, inputs, seen)
    result = ablate_domains(Setup("ablation", "m", "e", seed=4), sets, model, None, evaluation, draws=2)
    places = [(one.module, one.domain) for one in result.studies]
    assert places == [("decoder", "a"), ("decoder", "b"), ("vision", "a")]
    # The model as it is was evaluated once, then every set with its two draws.
    assert len(seen) == 1 + 3 * 3
    for index, ((module, domain), one) in enumerate(zip(places, result.studies, strict=True)):
        neurons = sets[module][domain]
        shown = neurons.of("fwd.up", "vision.mlp")
        expected = [neurons, *(shown.random(seed) for seed in (4, 5))]
        for place, chosen in enumerate(expected):
            # In the decoder a random neuron is a row of fwd.up and the column of fwd.down with its index.
            handles = zeroed(model, "llava", chosen)
            with torch.no_grad():
                by_hand = model(**inputs).logits[0, -1].double().sigmoid()
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(seen[1 + 3 * index + place], by_hand, rtol=0, atol=1e-6)
        claim, random = one.study.conditions[1:]
        assert (claim.neurons, random.neurons, random.draws) == (shown.count(), shown.count(), 2)
        change = claim.metrics["b"].change
        assert change is not None
        expected_change = float(seen[1 + 3 * index][40:80].mean() - seen[0][40:80].mean())
        assert math.isclose(change.estimate, expected_change, abs_tol=1e-12)
        assert one.study.settings["domain"] == domain
    assert [sentence.partition(",")[0] for sentence in result.verdict] == [
        "Without the 14 neurons of a in the text decoder",
        "Without the 14 neurons of b in the text decoder",
        "Without the 9 neurons of a in the vision tower",
    ]
    with pytest.raises(SnrfError, match="no domain has neurons of its own"):
        ablate_domains(Setup("ablation", "m", "e"), {"vision": {"b": NeuronSet({})}}, model, None, evaluation)


EVALUATION = """
from mergekit_snrf.evidence.items import Items

def words(model, processor):
    import torch
    ids = torch.arange(40)[None]
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0].double().softmax(-1).amax(-1).tolist()
    return {"a": Items(tuple(scores[:20])), "odd": Items(tuple(scores[20:]))}
"""


def test_the_command_writes_matrix_and_figure(folder: Path, tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "d.safetensors", folder)
    (tmp_path / "e.py").write_text(EVALUATION)
    words = ["domains", "ablate", folder, counts, "--eval", f"{tmp_path / 'e.py'}:words", "--top", "0.25"]
    words += ["--percentile", "0.9", "--draws", "2", "--json", tmp_path / "r.json", "--figures", tmp_path, "--quiet"]
    done = snrf(*words, "--module", "decoder", "--module", "all")
    assert done.exit_code == 0, done.output
    result = read_result(tmp_path / "r.json")
    assert isinstance(result, DomainAblation)
    assert [(one.module, one.domain) for one in result.studies] == [(m, d) for m in ("decoder", "all") for d in "abc"]
    assert [one.study.conditions[1].neurons for one in result.studies] == [6] * 3 + [14] * 3
    for sentence in (*result.verdict, "Changes, the text decoder", "as many random, 2 draws"):
        assert sentence in done.output
    assert len(result.verdict) == 2
    assert "in all modules" in result.verdict[1]
    assert result.settings["counts_sha256"]
    assert "without a in the text decoder: a " in (tmp_path / "matrix.svg").read_text()
    mask = tmp_path / "mask.safetensors"
    write_mask(mask, NeuronSet({Site(0, "fwd.up"): torch.ones(96).bool()}))
    page = snrf("report", mask, tmp_path / "r.html", "--result", tmp_path / "r.json")
    assert page.exit_code == 0, page.output
    html = (tmp_path / "r.html").read_text()
    assert "Each domain&#39;s neurons off" in html
    assert result.verdict[0] in html
    # A mask of another module goes through snrf ablate, too.
    tower = tmp_path / "tower.safetensors"
    write_mask(tower, NeuronSet({Site(1, "vision.mlp"): torch.ones(24).bool()}))
    done = snrf("ablate", folder, "--mask", tower, "--eval", f"{tmp_path / 'e.py'}:words", "--draws", "1", "--quiet")
    assert done.exit_code == 0, done.output
    assert "No evidence that deactivating the 24 masked neurons changes a: +0.0 [+0.0, +0.0]" in done.output


def test_other_models_and_modules_are_refused(folder: Path, tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "d.safetensors", config_sha256="0" * 64)
    done = snrf("domains", "ablate", folder, counts, "--eval", "x.yml")
    assert (done.exit_code, "was counted with a model of another config.json" in done.output) == (1, True)
    tensors = {"text.layers.0.active": torch.ones(2, 3, 5).long(), "text.tokens": torch.full((2, 3), 9)}
    write_domains(tmp_path / "text.safetensors", tensors, DomainsProvenance(names=["x", "y"]))
    done = snrf("domains", "ablate", folder, tmp_path / "text.safetensors", "--eval", "x.yml", "--module", "vision")
    assert "--module: has no counts of the vision; it has decoder" in done.output
    done = snrf("domains", "show", tmp_path / "text.safetensors", "--top", "2")
    assert "--top: must be at most 1.0, got 2.0" in done.output
    assert snrf_mask.commands.keys() >= {"import", "export"}
    assert domain_sets([]) == {}
