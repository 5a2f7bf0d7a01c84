from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import SOURCE_OF, VLMS, add_tensor, make_source, make_target, read
from click.testing import CliRunner, Result
from forked import forked, forked_ranks
from processors import PROCESSORS, WITHOUT_TEMPLATE, example_image, processor_missing

from mergekit_snrf.cli.profile import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.loading import load_model
from mergekit_snrf.neurons.maskfile import read_mask
from mergekit_snrf.neurons.sets import PROJECTIONS, Site
from mergekit_snrf.profiling.groups import Prompts
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.moments import take_moments
from mergekit_snrf.profiling.notebook import profile
from mergekit_snrf.profiling.probes.batches import ProbeBatch, probe_batches
from mergekit_snrf.profiling.result.profilefile import read_profile
from mergekit_snrf.profiling.result.selection import select
from mergekit_snrf.profiling.run import run
from mergekit_snrf.profiling.settings import SIDES, ProfileConfig, SideName, load_profile_config

FILES = ("m.safetensors", "m.target.profile.safetensors", "m.source.profile.safetensors")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_snrf.profiling.groups.load_model", lambda *a, **k: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the checkpoints ``target`` and ``source`` of a family, and probes for both."""

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make_target(folder / "target", family, "hub", dtype=torch.float32)
        make_source(folder / "source", SOURCE_OF[family], dtype=torch.float32)
        write_probes(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def plain(pair: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A profile.yml for llama, and the folder of what it gives."""
    path, out = write_config(pair("llama"), name="plain.yml"), tmp_path_factory.mktemp("plain")
    profiled(path, out)
    return path, out


def write_probes(folder: Path, count: int = 8) -> None:
    example_image().save(folder / "a.png")
    for name in ("image", "text"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for row in range(count):
                question = "What is the area " * (1 + row % 4) + f"of triangle {row}?"
                values = {"question": question, "answer": f"The answer is {row}."}
                file.write(json.dumps(values | ({"image": "a.png"} if name == "image" else {})) + "\n")


def config_of(family: str, **keys: Any) -> dict[str, Any]:
    images = {"dataset": "image.jsonl", "images": "image"} if has_processor(family) else {"dataset": "text.jsonl"}
    config: dict[str, Any] = {
        "target": {"model": "target", "probes": {**images, "question": "question"}},
        "source": {"model": "source", "probes": {"dataset": "text.jsonl", "question": "question"}},
        "answer": {"by": "model", "max_new_tokens": 4},
        "select": {"top_ratio": 0.5},
        "batch_size": 3,
    }
    if SOURCE_OF[family] in WITHOUT_TEMPLATE:
        config["source"]["template"] = "{question} Answer:"
    return config | keys


def has_processor(family: str) -> bool:
    """Whether images can go through a family's own processor here; some need torchvision, remote code has none."""
    return family in VLMS and family in PROCESSORS and not processor_missing(family)


def write_config(folder: Path, family: str = "llama", name: str = "profile.yml", **keys: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(config_of(family, **keys)))
    return path


def profiled(path: Path, out: Path, **options: Any) -> dict[str, bytes]:
    """Run in this process and return the files."""
    out.mkdir(exist_ok=True)
    run(load_profile_config(path), out / "m.safetensors", folder=path.parent, progress=False, **options)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def invoke(path: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(path), str(out), *options])


def batches_of(config: ProfileConfig, name: SideName, folder: Path) -> tuple[Any, Iterator[ProbeBatch]]:
    probes = Prompts(config, config.kind(name), folder).probes
    model, processor = load_model(config.kind(name).model, images=probes.rows.source.images is not None)
    return model, probe_batches(probes, model, processor, rule=config.answer, device="cpu")


def test_mask_holds_the_neurons_that_are_at_the_top_of_every_probe_of_both_models(pair, tmp_path):
    folder = pair("idefics3")
    ratios = {"attn": 0.5, "attn.v": 0.25, "fwd": 0.3}
    path = write_config(folder, "idefics3", select={"top_ratio": ratios})
    profiled(path, tmp_path)
    config = load_profile_config(path)
    expected: dict[Site, set[int]] = {}
    for name in SIDES:
        model, found = batches_of(config, name, folder)
        meter = Meter(model)
        for batch in found:
            for site, impacts in meter.impacts(batch).items():
                ratio = ratios.get(site.projection, ratios[site.projection.split(".")[0]])
                for probe in impacts:
                    top = set(probe.topk(int(ratio * len(probe))).indices.tolist())
                    expected[site] = expected.get(site, top) & top
    found = read_mask(tmp_path / "m.safetensors").neurons
    chosen = {site: set(member.nonzero().flatten().tolist()) for site, member in found.nonempty().items()}
    ups = {Site(site.layer, "fwd.down"): neurons for site, neurons in expected.items() if site.projection == "fwd.up"}
    assert chosen == {site: neurons for site, neurons in (expected | ups).items() if neurons}
    assert found.count() > 20


# Every processor that there is here, a model whose processor needs torchvision, both with code of their own, one layer
# type, and one without a chat template.
FAMILIES = ("llava", "llava_next", "idefics3", "gemma3", "qwen2_5_vl", "internvl_chat", "minicpmv", "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_profiles_end_to_end(family, pair, tmp_path):
    folder = pair(family)
    path = write_config(folder, family, limit=2, answer={"by": "model", "max_new_tokens": 2}, trust_remote_code=True)
    profiled(path, tmp_path)
    provenance = read_mask(tmp_path / "m.safetensors").provenance
    assert provenance.target.model_type == family
    assert provenance.target.probes["count"] == provenance.source.probes["count"] == 2
    assert ("images" in provenance.target.probes) is has_processor(family)
    profile = read_profile(tmp_path / "m.target.profile.safetensors")
    assert sorted(profile.sites) == sorted(Site(layer, name) for layer in range(3) for name in PROJECTIONS)
    assert all(bool((statistics.mean_impact > 0).any()) for statistics in profile.sites.values())


def test_same_inputs_give_the_same_bytes_wherever_they_lie(plain, tmp_path, monkeypatch):
    path, first = plain[0], contents(plain[1])
    assert sorted(first) == sorted(FILES)
    monkeypatch.chdir(path.parent)
    assert profiled(Path(path.name), tmp_path / "two") == first
    assert not any(str(path.parent).encode() in content or b"/tmp" in content for content in first.values())


def test_provenance_says_what_the_mask_was_made_of(pair, tmp_path):
    folder = pair("llava")
    profiled(write_config(folder, "llava", seed=5, limit=6, select={"sigma": 0.001}), tmp_path)
    provenance = read_mask(tmp_path / "m.safetensors").provenance
    assert (provenance.seed, provenance.dtype, provenance.operation) == (5, "float32", "profile")
    assert provenance.selection["sigma"] == 0.001
    assert provenance.selection["measure"] == {
        "scoring": "exact", "weight": "paper", "site": "pre_o", "tokens": "all"
    }  # fmt: skip
    assert provenance.versions.keys() == {"mergekit-snrf", "torch", "transformers"}
    target = provenance.target
    assert (target.path, target.model_type, len(target.config_sha256)) == ("target", "llava", 64)
    assert (target.probes["dataset"], target.probes["limit"], target.probes["count"]) == ("image.jsonl", 6, 6)
    assert target.probes["answer"]["max_new_tokens"] == 4
    assert len(target.probes["sha256"]) == 64
    profile = read_profile(tmp_path / "m.source.profile.safetensors")
    assert (profile.count, profile.provenance.side) == (6, "source")
    assert profile.provenance.model == provenance.source


def test_mask_can_be_selected_again_from_the_profiles(plain):
    profiles = [read_profile(plain[1] / name) for name in FILES[1:]]
    assert select(profiles, top_ratio=0.5) == read_mask(plain[1] / "m.safetensors").neurons


def test_command_reports_what_it_found(pair, tmp_path):
    result = invoke(write_config(pair("llama")), tmp_path / "m.safetensors", "--limit", "4", "--quiet")
    assert result.exit_code == 0, result.output
    count = read_mask(tmp_path / "m.safetensors").neurons.count()
    assert f"m.safetensors: {count} shared neurons" in result.output
    assert "target: 4 probes in" in result.output
    assert "attn.k" in result.output


def run_killed_in(journal: str, writes: int, *arguments: str) -> None:
    """Run the command until it has written a journal some times, and SIGKILL it in the middle of the next write."""
    left, replace = iter(range(writes)), os.replace

    def replace_or_die(written: Any, path: Any) -> None:
        if os.path.basename(path) == journal and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(written, path)

    def killed() -> None:
        os.replace = replace_or_die
        main([*arguments])

    assert forked(killed) == -signal.SIGKILL


def written(journal: Path) -> int:
    raw = journal.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["snrf"])["probes"]


def test_killed_runs_resume_to_the_bytes_of_an_uninterrupted_one(tmp_path):
    make_target(tmp_path / "target", "llama", "hub", dtype=torch.float32)
    make_source(tmp_path / "source", "llama", dtype=torch.float32)
    write_probes(tmp_path, count=16)
    path = write_config(tmp_path, batch_size=2)
    whole = profiled(path, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [str(path), str(out / "m.safetensors"), "--journal-every", "0"]
    run_killed_in("m.target.journal-0.safetensors", 3, *arguments)
    assert not (out / FILES[1]).exists()
    measured = written(out / "m.target.journal-0.safetensors")
    run_killed_in("m.source.journal-0.safetensors", 2, *arguments, "--resume")
    assert (out / FILES[1]).read_bytes() == whole[FILES[1]]
    assert 6 <= measured < 16
    assert not (out / FILES[0]).exists()
    assert profiled(path, out, resume=True) == whole


def test_two_processes_write_the_bytes_of_one(plain, tmp_path, capfd):
    assert forked_ranks(lambda: main([str(plain[0]), str(tmp_path / "m.safetensors")])) == [0, 0]
    assert capfd.readouterr().out.count("shared neurons") == 1
    assert contents(tmp_path) == contents(plain[1])


def test_resume_skips_a_finished_side_and_does_not_load_its_model(plain, tmp_path, no_model):
    path, out = plain[0], shutil.copytree(plain[1], tmp_path / "out")
    (out / "m.safetensors").unlink()
    assert profiled(path, out, resume=True) == contents(plain[1])


def test_other_probes_to_keep_change_the_moments_and_not_the_profile(pair, tmp_path, monkeypatch):
    keep = {"dataset": "text.jsonl", "question": "question", "limit": 3}
    before = profiled(write_config(pair("llama"), keep=[keep]), tmp_path)
    assert profiled(write_config(pair("llama")), tmp_path, resume=True) == before
    path = write_config(pair("llama"), keep=[keep | {"limit": 4}])
    after = profiled(path, tmp_path, resume=True)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"m.moments.safetensors"}
    take_moments(load_profile_config(path), tmp_path / "alone.safetensors", folder=path.parent, progress=False)
    assert (tmp_path / "alone.safetensors").read_bytes() == after["m.moments.safetensors"]
    monkeypatch.setattr("mergekit_snrf.profiling.groups.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert profiled(path, tmp_path, resume=True)["m.moments.safetensors"] == after["m.moments.safetensors"]


def test_resume_does_not_replace_a_finished_profile_of_other_settings(pair, tmp_path):
    folder = pair("llama")
    path = write_config(folder)
    whole = profiled(path, tmp_path)
    changed = write_config(folder, name="changed.yml", limit=3, seed=4)
    with pytest.raises(SnrfError, match=r"limit was None and is 3, seed was 0 and is 4") as caught:
        profiled(changed, tmp_path, resume=True)
    assert (caught.value.where, caught.value.field) == (str(tmp_path / FILES[1]), "resume")
    with pytest.raises(SnrfError, match="other settings: another batch_size"):
        profiled(write_config(folder, name="batch.yml", batch_size=4), tmp_path, resume=True)
    assert profiled(path, tmp_path, resume=True) == whole
    assert profiled(changed, tmp_path) != whole


def interrupted(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Leave the journal of a run that stopped after some batches."""
    measured: list[int] = []
    impacts = Meter.impacts

    def failing(self: Meter, batch: Any) -> Any:
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append(len(batch.numbers))
        return impacts(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "impacts", failing)
        with pytest.raises(KeyboardInterrupt):
            profiled(path, out, journal_seconds=0)


def test_journal_is_not_lost_by_forgetting_resume(pair, tmp_path, monkeypatch):
    path = write_config(pair("llama"))
    interrupted(path, tmp_path, monkeypatch, after=2)
    result = invoke(path, tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "m.target.journal-0.safetensors: --resume: " in result.output


@pytest.mark.parametrize(
    ("keys", "differences"),
    [
        ({"batch_size": 4, "seed": 1}, "batch_size was 3 and is 4, seed was 0 and is 1;"),
        ({"backend": "blocked"}, "backend was None and is 'blocked';"),
    ],
)
def test_journal_of_another_run_is_an_error(keys, differences, pair, tmp_path, monkeypatch):
    folder = pair("llama")
    interrupted(write_config(folder), tmp_path, monkeypatch, after=1)
    with pytest.raises(SnrfError, match=differences):
        profiled(write_config(folder, name="other.yml", **keys), tmp_path, resume=True)


def test_dry_run_prints_three_probes_of_each_side_and_loads_no_model(pair, no_model):
    path = write_config(pair("llava"), "llava", answer={"by": "column", "column": "answer"})
    result = CliRunner().invoke(main, [str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.output.count("--- row ") == 6
    assert result.output.count("1 image(s)") == 3
    assert "of triangle 2?" in result.output
    assert "--- answer: The answer is 1." in result.output
    generated = CliRunner().invoke(main, [str(write_config(pair("llava"), "llava")), "--dry-run"])
    assert "--- answer: (generated by the model, up to 4 tokens)" in generated.output


def test_profile_measures_batches_of_your_own(plain):
    path, out = plain
    model, batches = batches_of(load_profile_config(path), "source", path.parent)
    measured = profile(model, batches)
    saved = read_profile(out / FILES[2])
    assert measured.count == saved.count == 8
    for site, statistics in measured.sites.items():
        assert torch.equal(statistics.mean_impact, saved.sites[site].mean_impact)


@pytest.mark.parametrize(
    "keys",
    [
        {"scoring": "released"},
        {"tokens": "answer"},
        {"weight": "gradient"},
        {"site": "post_o"},
        {"answer": {"by": "column", "column": "answer"}},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_measure_runs_and_is_written_down(keys, pair, tmp_path):
    folder = pair("llama")
    plain = folder / "plain"
    if not plain.exists():
        profiled(write_config(folder, limit=3), plain)
    other = profiled(write_config(folder, name="other.yml", limit=3, **keys), tmp_path / "other")
    assert (plain / FILES[1]).read_bytes() != other[FILES[1]]
    provenance = read_profile(tmp_path / "other" / FILES[1]).provenance
    ((name, value),) = keys.items()
    if name == "answer":
        assert provenance.model.probes["answer"].items() >= value.items()
    else:
        assert (provenance.dtype if name == "dtype" else provenance.measure[name]) == value


def test_answers_that_were_cut_are_told(pair, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        profiled(write_config(pair("llama"), answer={"by": "model", "max_new_tokens": 1}), tmp_path)
    assert "answers reached max_new_tokens = 1 before they ended" in caplog.text


@pytest.mark.parametrize(
    ("place", "probes"),
    [
        ("text.jsonl: source.probes.question: ", {"question": "q"}),
        ("text.jsonl: source.probes.images: ", {"images": "i"}),
        ("source.probes.dataset", {"dataset": "nobody/nothing"}),
        ("source: source.probes.images: ", {"dataset": "image.jsonl", "images": "image"}),
    ],
)
def test_faults_of_the_source_are_found_before_the_target_is_loaded(place, probes, pair, tmp_path, no_model):
    source = config_of("llama")["source"]
    source["probes"] |= probes
    result = invoke(write_config(pair("llama"), name="fault.yml", source=source), tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert f"{pair('llama')}/{place}" in result.output or place == "source.probes.dataset" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"answer": {"by": "column", "column": "reply"}}, "target.probes.answer: "),
        ({"token_limit": 100, "answer": {"max_new_tokens": 99}}, "answer.max_new_tokens: "),
        pytest.param(
            {"device": "cuda"},
            "device: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_an_error_names_the_key_of_profile_yml(keys, field, pair, tmp_path, no_model):
    result = invoke(write_config(pair("llama"), **keys), tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert field in result.output


@pytest.mark.parametrize("mask", ["missing/m.safetensors", "file/m.safetensors", ".", "m.pt", "taken.safetensors"])
def test_a_mask_that_cannot_be_written_is_found_before_a_model_is_read(mask, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_snrf.profiling.run.check_models", lambda config: pytest.fail("a model was read"))
    (tmp_path / "file").touch()
    (tmp_path / "taken.safetensors").touch()
    with pytest.raises(SnrfError) as caught:
        run(load_profile_config(write_config(pair("llama"))), tmp_path / mask)
    assert str(tmp_path / mask) in str(caught.value)


def test_models_of_different_depth_are_told_from_their_headers(pair, tmp_path, no_model):
    other = make_source(tmp_path / "source", "llama", safe=False, decoder={"num_hidden_layers": 2})
    source = {**config_of("llama")["source"], "model": str(other)}
    result = invoke(write_config(pair("llama"), name="depth.yml", source=source), tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "layers: the target" in result.output


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    make_target(tmp_path / "target", "llama", "hub", dtype=torch.float32)
    make_source(tmp_path / "source", "llama", dtype=torch.float32)
    write_probes(tmp_path, count=3)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = read(tmp_path / "target")[name]
    weight[5, 5] = torch.nan
    add_tensor(tmp_path / "target", name, weight)
    result = invoke(write_config(tmp_path), tmp_path / "m.safetensors", "--quiet")
    assert result.exit_code == 1
    assert "%" not in result.output, "no progress bar"
    assert str(tmp_path / "target") in result.output
    assert name in result.output


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            SnrfError,
            r"target: out of memory \(CUDA out .* 2.00 GiB.\); lower batch_size \(now 3\)",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, "mat1 and mat2"),
    ],
    ids=["memory", "other"],
)
def test_running_out_of_memory_gives_advice(raised, error, message, pair, tmp_path, monkeypatch):
    def impacts(self: Meter, batch: Any) -> Any:
        raise raised

    monkeypatch.setattr(Meter, "impacts", impacts)
    with pytest.raises(error, match=message):
        profiled(write_config(pair("llama")), tmp_path)


def test_memory_budget_is_the_size_of_blocks(pair, tmp_path):
    path = write_config(pair("llama"))
    small = invoke(path, tmp_path / "m.safetensors", "--memory-budget", "40MB", "--quiet")
    assert small.exit_code == 0, small.output
    wrong = invoke(path, tmp_path / "m.safetensors", "--overwrite", "--memory-budget", "many")
    assert "--memory-budget: 'many'" in wrong.output
