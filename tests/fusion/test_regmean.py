"""F against float64 numpy, from moments as files hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_snrf.fusion.regmean import EPS, DenseMoment, SketchMoment, regmean_filter, scaled


def inputs(tokens: int, d: int, seed: int, *, decay: float = 1.0) -> np.ndarray:
    """Correlated inputs whose spectrum falls."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -decay
    return rng.standard_normal((tokens, d)) @ mixing.T


def second_moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def oracle(gain: np.ndarray, keep: np.ndarray, strength: float) -> np.ndarray:
    d = len(gain)
    gain, keep = (moment * d / np.trace(moment) for moment in (gain, keep))
    return np.linalg.solve((gain + strength * keep + EPS * (1 + strength) * np.eye(d)).T, gain.T).T


def dense(moment: np.ndarray) -> DenseMoment:
    return DenseMoment.of(torch.from_numpy(moment))


def sketch(moment: np.ndarray, k: int) -> SketchMoment:
    values, vectors = np.linalg.eigh(moment)
    return SketchMoment.of(
        torch.from_numpy(vectors[:, ::-1][:, :k].copy()),
        torch.from_numpy(values[::-1][:k].copy()),
        float(np.trace(moment)),
    )


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@settings(max_examples=30)
@given(
    d=st.integers(1, 40),
    tokens=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    strength=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_dense_moments_give_the_filter_of_numpy(d: int, tokens: tuple[int, int], strength: float, seed: int) -> None:
    gain, keep = (inputs(count, d, seed + offset) for offset, count in enumerate(tokens))
    delta = np.random.default_rng(seed).standard_normal((5, d))
    applied = regmean_filter(dense(second_moment(gain)), dense(second_moment(keep)), strength).apply(
        torch.from_numpy(delta)
    )
    expected = delta @ oracle(second_moment(gain), second_moment(keep), strength)
    # What counts is the answer on the inputs; float16 correlations are good to .3 %.
    # A moment of fewer tokens than inputs has directions near the ridge, where rounding counts more.
    assert relative(applied.numpy() @ gain.T, expected @ gain.T) < (1e-2 if min(tokens) > 2 * d else 8e-2)


@pytest.mark.parametrize("strength", [0.0, 3.0, 300.0])
def test_whole_sketches_in_float16_give_the_filter_of_numpy(strength: float) -> None:
    gain, keep = inputs(90, 24, 0), inputs(300, 24, 1)
    delta = np.random.default_rng(2).standard_normal((7, 24)).astype(np.float32)
    expected = delta @ oracle(second_moment(gain), second_moment(keep), strength)
    sketches = sketch(second_moment(gain), 24), sketch(second_moment(keep), 24)
    found = regmean_filter(*sketches, strength).apply(torch.from_numpy(delta))
    assert relative(found.numpy() @ gain.T, expected @ gain.T) < 2e-3


@pytest.mark.parametrize("k", [1, 6, 30])
@pytest.mark.parametrize("strength", [0.0, 3.0, 300.0])
def test_sketches_are_the_filter_of_the_matrices_that_they_stand_for(strength: float, k: int) -> None:
    gain, keep = (sketch(second_moment(inputs(200, 30, seed)), k) for seed in (0, 1))
    matrices = [m.factor.double().numpy() @ m.factor.double().numpy().T + m.rest * np.eye(30) for m in (gain, keep)]
    delta = np.random.default_rng(3).standard_normal((4, 30))
    found = regmean_filter(gain, keep, strength).apply(torch.from_numpy(delta))
    assert relative(found.numpy(), delta @ oracle(*matrices, strength)) < 1e-5
    chosen = torch.arange(30) % 3 == 0
    columns = regmean_filter(gain, keep, strength).apply(torch.from_numpy(delta), chosen)
    torch.testing.assert_close(columns, found[:, chosen])


def test_a_larger_strength_lets_less_of_the_update_reach_the_inputs_to_keep() -> None:
    gain, keep = inputs(200, 32, 0), inputs(200, 32, 1)
    delta = torch.from_numpy(np.random.default_rng(4).standard_normal((8, 32)))
    leaks = []
    for strength in (0.0, 0.5, 3.0, 30.0, 300.0):
        filtered = regmean_filter(dense(second_moment(gain)), dense(second_moment(keep)), strength).apply(delta)
        leaks.append(float((filtered @ torch.from_numpy(keep).T).norm()))
    assert leaks == sorted(leaks, reverse=True)
    assert leaks[-1] < 0.05 * leaks[0]


def test_directions_of_the_gain_alone_pass_and_shared_ones_shrink() -> None:
    gain, keep = np.diag([1.0, 1.0, 0.0, 0.0]), np.diag([1.0, 0.0, 1.0, 0.0])
    passed = regmean_filter(dense(gain), dense(keep), 3.0).apply(torch.eye(4))
    np.testing.assert_allclose(passed.diagonal().numpy(), [1 / 4, 1, 0, 0], atol=3e-3)


def test_rounding_that_makes_a_moment_indefinite_is_not_amplified() -> None:
    d = 64
    x = inputs(8, d, 0)
    moment = dense(second_moment(x))
    # Far more rounding than float16 makes: the smallest eigenvalue is below the ridge.
    noise = torch.randn(len(moment.correlation), generator=torch.Generator().manual_seed(0)) * 3e-2
    noisy = DenseMoment(moment.scale, (moment.correlation.float() + noise).clamp(-1, 1).half())
    assert float(torch.linalg.eigvalsh(noisy.matrix())[0]) < -EPS
    passed = regmean_filter(noisy, noisy, 0.0).apply(torch.eye(d))
    assert float(torch.linalg.matrix_norm(passed, 2)) < 3


@pytest.mark.parametrize("d", [1, 5])
def test_a_dense_moment_is_its_matrix_with_trace_d(d: int) -> None:
    whole = torch.from_numpy(second_moment(inputs(20, d, 1)))
    found = dense(whole.numpy()).matrix()
    torch.testing.assert_close(found, scaled(whole), rtol=2e-3, atol=2e-3)
    assert float(found.diagonal().sum()) == pytest.approx(d, rel=1e-3)


def test_an_input_that_is_always_zero_has_no_correlations() -> None:
    whole = np.diag([1.0, 0.0, 2.0])
    moment = dense(whole)
    assert moment.matrix()[1].abs().max() == 0
    assert bool(torch.isfinite(regmean_filter(moment, moment, 1.0).apply(torch.eye(3))).all())


@pytest.mark.parametrize(
    ("gain", "keep", "strength"),
    [
        (dense(np.eye(3)), dense(np.eye(4)), 1.0),
        (dense(np.eye(3)), sketch(np.eye(3), 2), 1.0),
        (dense(np.eye(3)), dense(np.eye(3)), -1.0),
        (dense(np.eye(3)), dense(np.eye(3)), float("nan")),
        (dense(np.eye(3)), dense(np.eye(3)), float("inf")),
    ],
)
def test_moments_that_do_not_go_together_are_refused(gain, keep, strength) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):  # noqa: PT011
        regmean_filter(gain, keep, strength)


def test_forms_that_hold_no_moment_are_refused() -> None:
    with pytest.raises(ValueError, match="correlation"):
        DenseMoment(torch.ones(3), torch.ones(5, dtype=torch.float16))
    with pytest.raises(ValueError, match="factor"):
        SketchMoment(torch.ones(2, 3).half(), 0.0)
    with pytest.raises(ValueError, match="rest"):
        SketchMoment(torch.ones(3, 2).half(), float("nan"))
    with pytest.raises(ValueError, match="delta"):
        regmean_filter(dense(np.eye(3)), dense(np.eye(3)), 1.0).apply(torch.ones(2, 4))
