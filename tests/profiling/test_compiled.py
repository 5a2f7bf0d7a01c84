"""The compiled loops: the same impacts as the eager kernel and as zeroed modules, and the eager kernel without them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import load, make_source
from profiling.brute_force import ATTENTION, Layer, norms, text_layer, to_dtype
from profiling.test_capture import left_padded
from profiling.test_impact import assert_close, error, random_inputs
from profiling.test_run import ENVIRONMENT, FILES, command, profiled, write_config, write_probes
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.impact import compiled as impact_compiled
from mergekit_snrf.profiling.impact.layer import AttentionInputs, AttentionScores, Readout, attention_impact
from mergekit_snrf.profiling.measure.meter import Meter
from mergekit_snrf.profiling.result.profilefile import read_profile

COMPILER = shutil.which(os.environ.get("CXX") or "g++")
HEADERS = Path(sysconfig.get_path("include"), "Python.h").is_file()
needs_compiler = pytest.mark.skipif(not (COMPILER and HEADERS), reason="no C++ compiler, or no headers of Python")

BOTH = ((torch.float64, 1e-12), (torch.float32, 1e-5))
REAL = (torch.arange(64) >= torch.tensor([[5], [0]])).long()
COMPILED = {
    "Llama, 2 heads a kv head": lambda: text_layer("Llama", mask=REAL),
    "Llama, multi-query, attention bias": lambda: text_layer(
        "Llama", mask=REAL, num_key_value_heads=1, head_dim=16, attention_bias=True
    ),
    "Qwen2, q/k/v bias": lambda: text_layer("Qwen2", mask=REAL),
    "Mistral, window": lambda: text_layer("Mistral", mask=REAL, sliding_window=40),
}
EAGER = {
    "Qwen2, key bias + 400": lambda: text_layer("Qwen2", mask=REAL, key_bias=400.0),
    "Qwen3, q_norm and k_norm": lambda: text_layer("Qwen3", mask=REAL, head_dim=16),
    "Gemma2, soft-capped": lambda: text_layer(
        "Gemma2", 1, mask=REAL, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
}


@cache
def family(name: str) -> Layer:
    return (COMPILED | EAGER)[name]()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile here and now, for one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        impact_compiled._kernel.cache_clear()
        yield
    impact_compiled._kernel.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the compiled kernels for the time of a test."""
    kernel = impact_compiled._kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impact_compiled, "_kernel", cache(kernel.__wrapped__))
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of neurons that each call of the compiled loops measured."""
    seen: list[int] = []
    real = impact_compiled._Kernel._change

    def spy(self: impact_compiled._Kernel, *args: Tensor) -> Tensor:
        found = real(self, *args)
        seen.append(len(found))
        return found

    monkeypatch.setattr(impact_compiled._Kernel, "_change", spy)
    return seen


@needs_compiler
@pytest.mark.parametrize("name", COMPILED)
def test_every_neuron_equals_zeroing_it_in_the_real_module(name: str, calls: list[int]) -> None:
    layer = family(name)
    readout = Readout.of(layer.attention.o_proj.weight, layer.inputs.heads, layer.inputs.kv_heads)
    for site, weights in (("pre_o", None), ("post_o", readout)):
        expected = [norms(layer.differences(p, site), layer.counted) for p in ATTENTION]
        for dtype, bar in BOTH:
            calls.clear()
            actual = attention_impact(to_dtype(layer.inputs, dtype), readout=weights, compile=True)
            assert len(calls) >= layer.inputs.heads
            for one, other in zip(actual, expected, strict=True):
                assert one.dtype == dtype
                assert error(one, other) <= bar


@pytest.mark.parametrize("name", EAGER)
def test_what_is_not_compiled_is_eager_to_the_bit(name: str) -> None:
    """Without the bound on their changes, the scores of huge keys would overflow."""
    layer = family(name)
    for dtype, _ in BOTH:
        inputs = to_dtype(layer.inputs, dtype)
        assert equal(attention_impact(inputs, compile=True), attention_impact(inputs))


def equal(one: AttentionScores, other: AttentionScores) -> bool:
    return all(map(torch.equal, one, other))


def padded(dtype: torch.dtype = torch.float32, **fields: object) -> AttentionInputs:
    key_mask = torch.ones(2, 150)
    key_mask[0, :37] = 0
    key_mask[1, 140:] = 0
    return random_inputs(dtype=dtype, key_mask=key_mask, **fields)


@needs_compiler
def test_padding_windows_masks_weights_blocks_and_a_screen_give_what_the_eager_kernel_gives(calls: list[int]) -> None:
    weights = torch.rand(2, 150, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(2, 1, 150, 150, generator=torch.Generator().manual_seed(4)).tril()
    noise.masked_fill_(torch.ones(150, 150, dtype=torch.bool).triu(1), -torch.inf)
    for dtype, bar in BOTH:
        for inputs in (padded(dtype), padded(dtype, window=40), random_inputs(dtype=dtype, mask=noise.to(dtype))):
            counted = None if inputs.key_mask is None else weights * inputs.key_mask
            for options in ({}, {"screen": 0.3}, {"block_bytes": 40_000}):
                calls.clear()
                actual = attention_impact(inputs, counted, compile=True, **options)
                assert calls
                assert_close(actual, attention_impact(inputs, counted, **options), bar)


@needs_compiler
def test_large_changes_of_a_few_neurons_leave_the_others_to_the_compiled_loops(calls: list[int]) -> None:
    inputs = random_inputs()
    key = inputs.key.clone()
    key[..., 3] *= 1e3
    large = replace(inputs, key=key)
    actual = attention_impact(large, compile=True)
    # The key head of that neuron is out of reach, the other one is not.
    assert calls
    assert all(scores.isfinite().all() for scores in actual)
    assert_close(actual, attention_impact(large), 1e-5)
    calls.clear()
    attention_impact(replace(inputs, key=inputs.key * 1e3), compile=True)
    assert not calls


@needs_compiler
def test_large_scores_with_small_changes_do_not_overflow(calls: list[int]) -> None:
    """An offset of all scores changes no impact; 2^(200 / ln 2) is beyond float32."""
    offset = torch.zeros(150, 150).masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), -torch.inf) + 200
    inputs = random_inputs()
    actual = attention_impact(replace(inputs, mask=offset.expand(2, 1, -1, -1)), compile=True)
    assert calls
    # Scores of 200 keep two digits less than those of 2.
    assert_close(actual, attention_impact(inputs), 1e-4)


@needs_compiler
def test_blocks_of_every_size_need_two_compilations(fresh: None) -> None:
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    for tokens in range(33, 200, 20):
        answer = (torch.arange(tokens) >= tokens % 29).float()[None]
        for screen in (None, 0.4):
            inputs = random_inputs(tokens=tokens, batch=1)
            assert_close(
                attention_impact(inputs, answer, screen=screen, compile=True),
                attention_impact(inputs, answer, screen=screen),
                1e-5,
            )
    assert counters["stats"]["unique_graphs"] - before == 2


def test_nothing_is_compiled_unasked_or_for_short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impact_compiled, "_kernel", lambda *args: pytest.fail("compiled"))
    attention_impact(random_inputs())
    attention_impact(random_inputs(tokens=16), compile=True)


def broken_compile(*args: object, **options: object) -> object:
    raise RuntimeError("\n  the backend says no.\nand why, on many lines")


def wrong_compile(*args: object, **options: object) -> object:
    return lambda *tensors: None


@pytest.mark.parametrize(("broken", "reason"), [(broken_compile, "the backend says no"), (wrong_compile, "not enough")])
def test_a_compilation_that_fails_is_told_in_a_line_and_done_without(
    broken: object, reason: str, fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert equal(attention_impact(padded(), compile=True), attention_impact(padded()))
    (warning,) = warnings(caplog)
    assert warning.startswith(f"compile: true has no effect, the measurement goes on without it: {reason}")
    assert "\n" not in warning


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == impact_compiled.__name__]


@needs_compiler
@pytest.mark.parametrize("name", ["_powers", "_energies"])
def test_loops_that_compute_something_else_are_not_used(
    name: str, fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = impact_compiled._compiled

    def wrong(function: object, *args: object) -> object:
        made = compiled(function, *args)
        if function is not getattr(impact_compiled, name):
            return made
        return lambda *tensors: [made(*tensors)[0] * 1.001, *made(*tensors)[1:]]

    monkeypatch.setattr(impact_compiled, "_compiled", wrong)
    assert equal(attention_impact(padded(), compile=True), attention_impact(padded()))
    (warning,) = warnings(caplog)
    assert warning.endswith("goes on without it: Tensor-likes are not close!")


@needs_compiler
def test_a_failure_in_the_middle_leaves_the_rest_to_the_eager_kernel(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention_impact(padded(), compile=True)
    kernel = impact_compiled._kernel(torch.float32, 1)
    powers, done = kernel._powers, []

    def failing(*args: Tensor) -> tuple[Tensor, ...]:
        if len(done) == 5:
            raise RuntimeError("worn out")
        done.append(args)
        return powers(*args)

    monkeypatch.setattr(kernel, "_powers", failing)
    assert_close(attention_impact(padded(), compile=True), attention_impact(padded()), 1e-5)
    assert len(done) == 5
    assert [warning.rpartition(": ")[2] for warning in warnings(caplog)] == ["worn out"]


def test_a_run_without_a_compiler_ends_with_the_eager_profile(tmp_path: Path) -> None:
    from checkpoints import SOURCE_OF, make_target

    make_target(tmp_path / "target", "llama", "hub", dtype=torch.float32)
    make_source(tmp_path / "source", SOURCE_OF["llama"], dtype=torch.float32)
    write_probes(tmp_path, count=4)
    profiled(write_config(tmp_path), tmp_path / "eager")
    (tmp_path / "compiled").mkdir()
    path = write_config(tmp_path, name="compiled.yml", compile=True)
    environment = ENVIRONMENT | {"CXX": str(tmp_path / "c++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.run(command(path, tmp_path / "compiled"), capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.count("compile: true has no effect, the measurement goes on without it") == 1
    eager, compiled = (read_profile(tmp_path / name / FILES[1]) for name in ("eager", "compiled"))
    for site, statistics in eager.sites.items():
        assert torch.equal(compiled.sites[site].mean_impact, statistics.mean_impact)
    assert eager.provenance.fingerprint != compiled.provenance.fingerprint


def test_fused_attention_has_nothing_to_compile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend: sdpa has nothing to compile; use backend: auto or blocked"):
        attention_impact(random_inputs(), backend="sdpa", compile=True)
    model = load(make_source(tmp_path / "llama", "llama"), dtype=torch.float32)
    with pytest.raises(SnrfError, match="compile has no effect with backend: sdpa; use backend: auto or blocked"):
        Meter(model, backend="sdpa", compile=True)
    assert Meter(model, compile=True).impacts(left_padded())


def test_other_devices_than_cpus_are_told_apart(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = load(make_source(tmp_path / "llama", "llama"), dtype=torch.float32).to("meta")
    Meter(model, compile=True)
    assert "compile: true has no effect on layers that are not on a CPU" in caplog.text
