"""The variants of the update against float64 numpy: DARE, a source's base, biases."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion import updates as update
from mergekit_snrf.fusion.fuse import ORDERS, Fusion, fuse, masked_update
from mergekit_snrf.fusion.fuse import settings as settings_of_fusion
from mergekit_snrf.neurons.sets import Site

examples = settings(max_examples=30)

Array = NDArray[np.float64]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Written down here and not taken from the package: the order of the projections is part of DARE's draw.
PLACE = {"attn.q": 0, "attn.k": 1, "attn.v": 2, "fwd.up": 3, "fwd.down": 4}


def float64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def truncated(matrix: Array, rank: int) -> Array:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def matrix_of(spectrum: Array, shape: tuple[int, int], seed: int = 0) -> Array:
    """Return a matrix of random singular vectors and the given singular values."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((shape[0], len(spectrum))))
    right, _ = np.linalg.qr(generator.standard_normal((shape[1], len(spectrum))))
    return (left * spectrum) @ right.T


def pair(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], seed: int = 0) -> list[Tensor]:
    """Return random weights of the given dtypes, all different."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for dtype in dtypes]


def some(length: int) -> Tensor:
    return torch.arange(length) % 3 == 1


def rows_of(matrix: Array, neurons: Tensor, axis: int) -> Array:
    return (matrix if axis == 0 else matrix.T)[neurons.numpy()]


def assert_added(result: Tensor, target: Tensor, neurons: Tensor, axis: int, step: Array) -> None:
    """Assert target + step in float64, rounded once, in the masked neurons, and the target's bits in all others."""
    assert (result.dtype, result.shape) == (target.dtype, target.shape)
    rows, before = (result, target) if axis == 0 else (result.mT, target.mT)
    assert torch.equal(rows[~neurons], before[~neurons])
    exact = rows_of(float64(target), neurons, axis) + step
    eps = torch.finfo(target.dtype).eps
    noise = 1e-12 if target.dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(float64(rows[neurons]), exact, rtol=eps, atol=noise * max(1.0, np.abs(step).max()))


def drawn(fusion: Fusion, site: Site, shape: tuple[int, int]) -> Array:
    """Return DARE's factors of the masked neurons, one a row: drawn in one call of numpy's own generator."""
    generator = np.random.RandomState([fusion.seed, site.layer, PLACE[site.projection]])
    kept = generator.random_sample(shape) >= fusion.drop_rate
    return kept / (1 - fusion.drop_rate) if fusion.rescale else kept.astype(float)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projection", ["attn.v", "fwd.down"])
def test_dare_equals_numpy(projection: str, dtype: torch.dtype, rescale: bool) -> None:
    site = Site(7, projection)
    target, source = pair((24, 40), (dtype, dtype))
    neurons = some(target.shape[site.axis])
    how = Fusion(0.5, update="dare", drop_rate=0.7, seed=11, rescale=rescale)
    delta = rows_of(float64(source) - float64(target), neurons, site.axis)
    step = delta * drawn(how, site, delta.shape)
    assert 0.6 < (step == 0).mean() < 0.8
    result, certificate, rounding = fuse(target, source, neurons, site.axis, how, site=site)
    assert_added(result, target, neurons, site.axis, 0.5 * step)
    assert certificate is None
    assert rounding.update == pytest.approx(0.5 * np.linalg.norm(step), rel=1e-5)


def test_dare_draws_by_seed_layer_and_projection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = pair((40, 24), (torch.float32, torch.float32))
    neurons = some(40)

    def updated(seed: int, site: Site) -> Tensor:
        how = Fusion(1.0, update="dare", drop_rate=0.5, seed=seed)
        return masked_update(target, source, neurons, 0, how, site=site).rows()

    first = updated(3, Site(1, "attn.k"))
    others = [updated(4, Site(1, "attn.k")), updated(3, Site(2, "attn.k")), updated(3, Site(1, "attn.v"))]
    for other in others:
        assert 0.3 < ((other == 0) != (first == 0)).float().mean() < 0.7
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(updated(3, Site(1, "attn.k")), first)
    finally:
        torch.set_num_threads(threads)
    # However many numbers are drawn at a time.
    for panel in (1, 24, 25, 100):
        monkeypatch.setattr(update, "_PANEL", panel)
        assert torch.equal(updated(3, Site(1, "attn.k")), first)


def test_dare_is_right_on_average() -> None:
    target, source = pair((6, 20), (torch.float64, torch.float64))
    everything = torch.ones(6, dtype=torch.bool)
    draws = 500
    total = torch.zeros_like(target)
    for seed in range(draws):
        how = Fusion(1.0, update="dare", drop_rate=0.8, seed=seed)
        total += masked_update(target, source, everything, 0, how, site=Site(0, "fwd.up")).rows()
    delta = float64(source) - float64(target)
    # The variance of one element is delta^2 p / (1 - p).
    deviation = np.abs(delta) * math.sqrt(0.8 / 0.2 / draws)
    assert (np.abs(float64(total) / draws - delta) < 5 * deviation).all()


def test_dare_that_drops_nothing_is_the_linear_update() -> None:
    target, source = pair((9, 8), (torch.bfloat16, torch.bfloat16))
    how = Fusion(0.5, update="dare", drop_rate=0.0)
    linear = fuse(target, source, some(9), 0, Fusion(0.5, 0)).tensor
    assert torch.equal(fuse(target, source, some(9), 0, how, site=Site(0, "attn.q")).tensor, linear)


def test_dare_without_site() -> None:
    weight = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"^w: update 'dare' draws by layer and projection; pass site$"):
        fuse(weight, weight, some(4), 0, Fusion(update="dare"), name="w")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.float32, torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_base_of_the_source_equals_numpy(axis: int, order: str, dtypes: tuple[torch.dtype, ...]) -> None:
    target, source, base = pair((24, 40), dtypes)
    neurons = some(target.shape[axis])
    delta = float64(source) - float64(base)
    for rank in (0, 3):
        step = rows_of(delta, neurons, axis)
        if rank:
            step = truncated(step, rank) if order == "mask-then-svd" else rows_of(truncated(delta, rank), neurons, axis)
        result = fuse(target, source, neurons, axis, Fusion(0.5, rank, order), source_base=base).tensor
        assert_added(result, target, neurons, axis, 0.5 * step)
    assert torch.equal(
        fuse(target, source, neurons, axis, Fusion(0.5, 3, order), source_base=target).tensor,
        fuse(target, source, neurons, axis, Fusion(0.5, 3, order)).tensor,
    )


@pytest.mark.parametrize("which", ["target", "source", "source_base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(which: str, bad: float, dtype: torch.dtype) -> None:
    for shape in ((4, 3), (4,)):
        tensors = {name: torch.ones(shape, dtype=dtype) for name in ("target", "source", "source_base")}
        tensors[which].view(-1)[-1] = bad
        target, source, base = tensors.values()
        for other in (None, base) if which != "source_base" else (base,):
            with pytest.raises(SnrfError, match=rf"^w: the {which}'s tensor of shape \[4.*\] holds NaN or infinite"):
                fuse(target, source, some(4), 0, Fusion(rank=1), name="w", source_base=other)
    big = torch.full((2, 3), 3e38)
    with pytest.raises(SnrfError, match=r"^w: the difference of source and source_base overflows torch\.float32"):
        fuse(torch.ones(2, 3), big, some(2), 0, Fusion(rank=1), name="w", source_base=-big)


@pytest.mark.parametrize("variant", [Fusion(0.5), Fusion(0.5, update="dare"), Fusion(0.5, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_equals_numpy(dtype: torch.dtype, variant: Fusion) -> None:
    target, source, base = pair((30,), (dtype, dtype, torch.float32))
    neurons = some(30)
    before = target.clone()
    for other in (None, base):
        step = 0.5 * (float64(source) - float64(target if other is None else other))[neurons.numpy()]
        result, certificate, rounding = fuse(target, source, neurons, 0, variant, source_base=other)
        assert_added(result, target, neurons, 0, step)
        assert certificate is None
        assert torch.equal(result, fuse(target, source, neurons, 0, variant, source_base=other).tensor)
        assert rounding.update == pytest.approx(np.linalg.norm(step), rel=1e-5)
        assert (rounding.weights, rounding.changed) == (10, int((result != target).sum()))
        lost = float64(result)[neurons.numpy()] - (float64(target)[neurons.numpy()] + step)
        assert rounding.lost == pytest.approx(np.linalg.norm(lost), rel=1e-2, abs=1e-6)
    assert torch.equal(target, before)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_tensors_that_do_not_fit(shape: tuple[int, ...], rank: int) -> None:
    ones, longer, mask = torch.ones(shape), torch.ones(5, *shape[1:]), torch.ones(4, dtype=torch.bool)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((ones, longer, mask, 0), {}, "target has shape"),
        ((ones, torch.ones(4, 3, 2), mask, 0), {}, "target has shape"),
        ((torch.ones(2, 4, 3), torch.ones(2, 4, 3), mask, 0), {}, "target has shape"),
        ((torch.ones(4, 3), torch.ones(3, 4), mask, 0), {}, "target has shape"),
        ((torch.ones(()), torch.ones(()), mask, 0), {}, "target has shape"),
        ((ones, ones, mask, 0), {"source_base": longer}, "source has shape"),
        ((longer, longer, mask, 0), {}, "the mask has 4 neurons, but axis 0 of shape [5"),
        ((ones, ones, mask[:0], 0), {}, "the mask has 0 neurons, but axis 0"),
        ((torch.ones(4, 3), torch.ones(4, 3), mask, 1), {}, "the mask has 4 neurons, but axis 1"),
    ]
    for arguments, named, message in cases:
        with pytest.raises(SnrfError, match=f"^w: {re.escape(message)}"):
            fuse(*arguments, Fusion(rank=rank), name="w", **named)


@pytest.mark.parametrize(
    ("field", "values", "range_"),
    [
        ("beta", (1.5, -0.1, math.nan, math.inf), "in [0, 1]"),
        ("rank", (-1,), "at least 0"),
        ("order", ("svd",), "one of svd-then-mask, mask-then-svd"),
        ("update", ("frank",), "one of low-rank, dare, regmean"),
        ("drop_rate", (1.0, -0.1, math.nan), "in [0, 1)"),
        ("seed", (-1, 2**32), "in [0, 4294967296)"),
    ],
)
def test_values_out_of_range(field: str, values: tuple[Any, ...], range_: str) -> None:
    assert settings_of_fusion()[field].range == range_
    for value in values:
        with pytest.raises(SnrfError) as raised:
            Fusion(**{field: value})
        assert (raised.value.field, raised.value.what[:14]) == (field, f"must be {range_}"[:14])
        assert str(raised.value).endswith(f"must be {range_}, got {value!r}")


@examples
@given(
    values=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=12),
    seed=st.integers(0, 2**16),
    axis=st.sampled_from([0, 1]),
    data=st.data(),
)
def test_mask_then_svd_is_never_worse_in_the_mask(
    values: list[float], seed: int, axis: int, data: st.DataObject
) -> None:
    """Eckart-Young: no update of rank r is nearer to M_S(Delta); the distance is that of its own singular values."""
    side = len(values)
    delta = matrix_of(np.sort(np.array(values))[::-1], (side + 3, side + 1), seed)
    length = delta.shape[axis]
    neurons = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    rank = data.draw(st.integers(1, side))
    masked = rows_of(delta, neurons, axis)
    source = torch.from_numpy(delta)
    distance = {}
    for order in ORDERS:
        rows = masked_update(torch.zeros_like(source), source, neurons, axis, Fusion(1.0, rank, order)).rows()
        distance[order] = np.linalg.norm(masked - float64(rows))
    least = np.linalg.norm(np.linalg.svd(masked, compute_uv=False)[rank:]) if masked.size else 0.0
    assert distance["mask-then-svd"] == pytest.approx(least, abs=1e-6)
    assert distance["mask-then-svd"] <= distance["svd-then-mask"] + 1e-6
