from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance, Provenance, read_mask, write_mask
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import EDGES, Profile, SiteProfile, edge_ranks, write_profile

K0, UP1, DOWN1 = Site(0, "attn.k"), Site(1, "fwd.up"), Site(1, "fwd.down")
TARGET, SOURCE = ModelProvenance(path="owner/target", model_type="qwen2_5_vl"), ModelProvenance(path="owner/source")


def members(*indices: int, of: int) -> torch.Tensor:
    return torch.tensor([index in indices for index in range(of)])


A = NeuronSet({K0: members(0, 1, 2, of=8), UP1: members(3, 4, of=12)})
B = NeuronSet({K0: members(1, 2, 7, of=8), DOWN1: members(0, of=12)})
C = NeuronSet({K0: members(2, of=8), UP1: members(4, 5, of=12)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_mask(tmp_path / "a", A, Provenance(target=TARGET, source=SOURCE, selection={"top_ratio": 0.1}))
    write_mask(tmp_path / "b", B, Provenance(target=TARGET))
    write_mask(tmp_path / "c", C, Provenance(target=TARGET, source=SOURCE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A decoder with 2 layers, 4 heads of 3, every 2 sharing a key and value head, and an FFN of 10."""
    sizes = {"self_attn.q_proj": 12, "self_attn.k_proj": 6, "self_attn.v_proj": 6, "mlp.up_proj": 10}
    weights = {f"model.layers.{n}.{name}.weight": torch.zeros(s, 5) for n in range(2) for name, s in sizes.items()}
    weights |= {f"model.layers.{n}.mlp.down_proj.weight": torch.zeros(5, 10) for n in range(2)}
    config = {
        "model_type": "unheard_of",
        "num_hidden_layers": 2,
        "hidden_size": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 3,
        "intermediate_size": 10,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model" / "model.safetensors")
    return str(tmp_path / "model")


def snrf(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["mask", *arguments])


def done(*arguments: str) -> str:
    result = snrf(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def error_of(*arguments: str) -> str:
    """Return the one line of a command that ends with exit code 1."""
    result = snrf(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def inputs(mask: Mask) -> list[tuple[str, str]]:
    return [(entry["file"], entry["sha256"]) for entry in mask.provenance.inputs or []]


def test_show_prints_counts_shares_and_provenance(folder: Path) -> None:
    assert done("show", "a").splitlines() == [
        "projection  layers  neurons  of    share",
        "attn.q           0        0   0        -",
        "attn.k           1        3   8  37.50 %",
        "attn.v           0        0   0        -",
        "fwd.up           1        2  12  16.67 %",
        "fwd.down         0        0   0        -",
        "all              2        5  20  25.00 %",
        "",
        f"sha256            {digest('a')}",
        "target            owner/target, qwen2_5_vl",
        "source            owner/source",
        "selection         top_ratio 0.1",
    ]

    assert done("show", "--layers", "a").splitlines()[8:11] == [
        "layer  attn.q  attn.k  attn.v  fwd.up  fwd.down",
        "0           0       3       0       0         0",
        "1           0       0       0       2         0",
    ]


def test_show_prints_json(folder: Path) -> None:
    shown = json.loads(done("show", "a", "--json"))
    assert shown["sha256"] == digest("a")
    none = {"tensors": 0, "neurons": 0, "of": 0}
    held = {"attn.k": {"tensors": 1, "neurons": 3, "of": 8}, "fwd.up": {"tensors": 1, "neurons": 2, "of": 12}}
    assert shown["counts"] == {**dict.fromkeys(PROJECTIONS, none), **held}
    assert shown["layers"] == {"layers.0.attn.k": 3, "layers.1.fwd.up": 2}
    assert shown["provenance"]["target"] == {"path": "owner/target", "model_type": "qwen2_5_vl"}


def test_show_of_an_empty_mask(folder: Path) -> None:
    write_mask("empty", NeuronSet({}))
    assert "all              0        0   0      -" in done("show", "empty")
    assert done("show", "--layers", "empty").splitlines()[8] == "layer  attn.q  attn.k  attn.v  fwd.up  fwd.down"


@pytest.mark.parametrize(
    ("operation", "expected", "count"),
    [("intersect", A & B & C, 1), ("union", A | B | C, 8), ("subtract", (A - B) - C, 2)],
)
def test_combinations(folder: Path, operation: str, expected: NeuronSet, count: int) -> None:
    assert done(operation, "a", "b", "c", "out") == f"out: {count} neurons\n"
    mask = read_mask("out")
    assert mask.neurons == expected
    assert expected.count() == count
    assert mask.provenance.operation == operation
    assert (mask.provenance.target, mask.provenance.source) == (TARGET, None)
    assert inputs(mask) == [(name, digest(name)) for name in "abc"]


def test_the_output_may_be_an_input(folder: Path) -> None:
    before = digest("a")
    done("union", "a", "b", "a")
    assert read_mask("a").neurons == A | B
    assert inputs(read_mask("a")) == [("a", before), ("b", digest("b"))]


@pytest.mark.parametrize("operation", ["intersect", "union", "subtract"])
def test_masks_that_do_not_combine(folder: Path, operation: str) -> None:
    write_mask("other", NeuronSet({K0: members(0, of=9)}))
    assert error_of(operation, "a", "other", "out").startswith("layers.0.attn.k: ")
    assert not Path("out").exists()
    assert [snrf(operation, *names).exit_code for names in (["a", "out"], ["a"])] == [2, 2]


def test_random_draws_as_many(folder: Path) -> None:
    assert done("random", "a", "out") == "out: 5 neurons\n"
    mask = read_mask("out")
    assert mask.neurons == A.random(0)
    assert {site: mask.neurons.count(site) for site in mask.neurons} == {K0: 3, UP1: 2}
    known = mask.provenance
    assert (known.operation, known.seed, known.target, known.source) == ("random", 0, TARGET, SOURCE)
    assert inputs(mask) == [("a", digest("a"))]
    for out, seed in (("first", 5), ("second", 5), ("third", 6)):
        done("random", "a", out, "--seed", str(seed))
    assert Path("first").read_bytes() == Path("second").read_bytes()
    assert read_mask("first").neurons == A.random(5) != read_mask("third").neurons


def test_random_for_a_model(folder: Path, model: str) -> None:
    assert done("random", "--model", model, "--ratio", "0.25", "--seed", "3", "out") == "out: 22 neurons\n"
    mask = read_mask("out")
    counts = {"attn.q": 3, "attn.k": 2, "attn.v": 2, "fwd.up": 2, "fwd.down": 2}
    lengths = {"attn.q": 12, "attn.k": 6, "attn.v": 6, "fwd.up": 10, "fwd.down": 10}
    sites = [Site(layer, name) for layer in range(2) for name in PROJECTIONS]
    # round() goes to the even number at a half: 1.5 and 2.5 are 2.
    as_many = NeuronSet({site: torch.arange(lengths[site.projection]) < counts[site.projection] for site in sites})
    assert mask.neurons == as_many.random(3)
    config_sha256 = digest(f"{model}/config.json")
    assert mask.provenance.target == ModelProvenance(path=model, model_type="unheard_of", config_sha256=config_sha256)
    assert (mask.provenance.selection, mask.provenance.seed) == ({"ratio": 0.25}, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a", "give either MASK and OUT"),
        ("a b out", "give either MASK and OUT"),
        ("a out --ratio 0.1", "give either MASK and OUT"),
        ("out --model m", "give either MASK and OUT"),
        ("a out --model m --ratio 0.1", "give either MASK and OUT"),
        ("out --model m --ratio 0", "'--ratio'"),
        ("out --model m --ratio 1.1", "'--ratio'"),
        ("out --model m --ratio nan", "'--ratio'"),
        ("a out --seed -1", "'--seed'"),
        ("a out --seed 4294967296", "'--seed'"),
        ("", "Missing argument"),
    ],
)
def test_random_is_used_in_two_ways(folder: Path, words: str, message: str) -> None:
    result = snrf("random", *words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out").exists()


def make_profile(path: str, strongest: int) -> str:
    """A profile of one probe and one projection of 8 neurons."""
    ranks = (torch.arange(8) - strongest) % 8 + 1
    hits = torch.nn.functional.one_hot(torch.bucketize(ranks, torch.tensor(edge_ranks(EDGES, 8))), len(EDGES))
    site = SiteProfile(1.0 / ranks, ranks / 8, 1.0 / ranks, hits.to(torch.int32))
    write_profile(path, Profile({K0: site}, 1))
    return path


def test_select_keeps_the_profiles(folder: Path) -> None:
    profiles = [make_profile("first", 3), make_profile("second", 2)]
    before = [digest(name) for name in profiles]
    result = snrf("select", *profiles, "--top-ratio", "0.25")
    assert result.exit_code == 2
    assert "OUT, second, is a profile, which the mask would replace; name the mask's file last" in result.stderr
    assert done("select", *profiles, "a", "--top-ratio", "0.25") == "a: 1 neurons\n"
    assert [str(neuron) for neuron in read_mask("a").neurons.neurons()] == ["attn.k.L0.N3"]
    assert [digest(name) for name in profiles] == before


RELEASED = {"attn_q": {"0": [11]}, "attn_k": {"0": [3, 7], "1": []}, "fwd_down": {"1": [0, 9]}}


def test_import_maps_repeated_heads_to_rows(folder: Path, model: str) -> None:
    Path("neurons.json").write_text(json.dumps(RELEASED))
    assert done("import", "neurons.json", "out", "--model", model) == "out: 5 neurons\n"
    mask = read_mask("out")
    names = ["attn.k.L0.N0", "attn.k.L0.N4", "attn.q.L0.N11", "fwd.down.L1.N0", "fwd.down.L1.N9"]
    assert list(map(str, mask.neurons.neurons())) == names
    assert mask.provenance.operation == "import"
    assert inputs(mask) == [("neurons.json", digest("neurons.json"))]
    assert mask.provenance.target is not None
    assert mask.provenance.target.config_sha256 == digest(f"{model}/config.json")
    Path("neurons.json").write_text(json.dumps({"attn_k": {"0": [3, 5]}}))
    done("import", "neurons.json", "out", "--model", model, "--kv-indices", "rows")
    assert list(map(str, read_mask("out").neurons.neurons())) == ["attn.k.L0.N3", "attn.k.L0.N5"]


def test_export_and_import_give_the_mask_back(folder: Path, model: str) -> None:
    done("random", "--model", model, "--ratio", "0.3", "mask")
    mask = read_mask("mask")
    assert done("export", "mask", "neurons.json", "--model", model).startswith("neurons.json: ")
    exported = json.loads(Path("neurons.json").read_text())
    assert exported.keys() == {"attn_q", "attn_k", "attn_v", "fwd_up", "fwd_down"}
    repeated = {"attn_k": 2, "attn_v": 2}
    for key, by_layer in exported.items():
        for layer, indices in by_layer.items():
            assert len(indices) == repeated.get(key, 1) * mask.neurons.count(Site(int(layer), key.replace("_", ".")))
    done("import", "neurons.json", "again", "--model", model)
    assert read_mask("again").neurons == mask.neurons


def test_masks_of_another_model_are_not_exported(folder: Path, model: str) -> None:
    assert "layers.0.attn.k" in error_of("export", "a", "neurons.json", "--model", model)
    assert not Path("neurons.json").exists()


def test_the_model_is_needed_and_checked(folder: Path, model: str) -> None:
    Path("neurons.json").write_text("{}")
    assert snrf("import", "neurons.json", "out").exit_code == 2
    assert snrf("export", "a", "out").exit_code == 2
    assert error_of("import", "neurons.json", "out", "--model", "./none").startswith("./none: no such folder;")
    Path(model, "model.safetensors").write_bytes(b"damaged")
    for arguments in (["import", "neurons.json"], ["export", "a"], ["random", "--ratio", "0.5"]):
        assert f"{model}/model.safetensors: cannot be read" in error_of(*arguments, "out", "--model", model)


@pytest.mark.parametrize("command", [["union", "a", "b"], ["random", "a"]], ids=" ".join)
def test_only_masks_are_replaced(folder: Path, model: str, command: list[str]) -> None:
    weights = Path("model/model.safetensors")
    before = weights.read_bytes()
    assert "already exists and is not a snrf-mask file" in snrf(*command, str(weights)).output
    assert weights.read_bytes() == before
    assert "the path of the file to write is empty" in snrf(*command, "").output
    assert snrf(*command, "a").exit_code == 0


@pytest.mark.parametrize(
    ("command", "mask", "message"),
    [
        ("show M --json", "missing", "missing: no such file, looked for "),
        ("intersect M out a", "damaged", "damaged: not a readable safetensors file"),
        ("random M out", "hf://owner/repo", "hf://owner/repo: not a hub reference; the form is hf://owner/repo@rev"),
        ("export M out --model model", "hf://owner/repo/m.safetensors", "m.safetensors: cannot be downloaded ("),
    ],
)
def test_masks_that_cannot_be_read(folder: Path, model: str, command: str, mask: str, message: str) -> None:
    Path("damaged").write_bytes(Path("a").read_bytes()[:-1])
    assert message in error_of(*(mask if word == "M" else word for word in command.split()))
    assert not Path("out").exists()


@pytest.mark.parametrize("out", ["missing/out", "a/out", "/proc/out"])
def test_outputs_that_cannot_be_written(folder: Path, model: str, out: str) -> None:
    Path("neurons.json").write_text("{}")
    write_mask("fitting", NeuronSet({}))
    before = digest("a")
    for command in (
        f"union a b {out}",
        f"random a {out}",
        f"random --model {model} --ratio 0.5 {out}",
        f"import neurons.json {out} --model {model}",
        f"export fitting {out} --model {model}",
    ):
        assert error_of(*command.split()).startswith(f"{out}: cannot be written (")
    assert digest("a") == before
    assert error_of("random", "a", "model").startswith("model: cannot be written (Is a directory)")
    assert snrf("union", "a", "b", "model").exit_code == 2
    assert Path(model, "config.json").is_file()


def test_the_command_as_a_user_runs_it(folder: Path) -> None:
    command = [Path(sys.executable).with_name("snrf"), "mask", "show", "a", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout)["counts"]["attn.k"]["neurons"] == 3


@pytest.mark.parametrize("arguments", [[], ["mask", "show", "-h"], ["amplify", "-h"]])
def test_help_needs_neither_torch_nor_mergekit(arguments: list[str]) -> None:
    code = "import sys; from mergekit_snrf.cli.snrf import main\ntry: main(prog_name='snrf')\n"
    code += "finally: print(sorted({'torch', 'mergekit', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "mask" in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1:] == ["[]"]
