from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import ORDERS, Fusion, fuse, masked_update
from mergekit_snrf.fusion.updates import working_dtype

examples = settings(max_examples=30)

Array = NDArray[np.float64]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHAPES = [(24, 40), (40, 24), (20, 20)]


def rows_of(
    target: Tensor, source: Tensor, neurons: Tensor, axis: int, rank: int, order: str = "svd-then-mask"
) -> Tensor:
    return masked_update(target, source, neurons, axis, Fusion(1.0, rank, order)).rows()


def float64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def exact_update(target: Tensor, source: Tensor, neurons: Tensor, axis: int, rank: int, order: str) -> Array:
    """Return M_S(Delta_r) (Eq. 9-11), or the rank-r SVD of M_S(Delta), as a whole matrix in float64."""
    keep = neurons.numpy()[:, None] if axis == 0 else neurons.numpy()[None, :]
    delta = float64(source) - float64(target)
    if order == "mask-then-svd":
        delta = delta * keep
    if rank:
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        delta = (left[:, :rank] * values[:rank]) @ right[:rank]
    return delta * keep


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """Return the distance to the next number of ``dtype``."""
    info = torch.finfo(dtype)
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(values), info.tiny)))) * info.eps


def assert_fused(result: Tensor, target: Tensor, source: Tensor, neurons: Tensor, axis: int, how: Fusion) -> None:
    """Assert that masked neurons are Eq. 11 in float64, rounded once, and that all others are the target's bits."""
    assert (result.dtype, result.shape, result.device) == (target.dtype, target.shape, target.device)
    rows, target_rows = (result, target) if axis == 0 else (result.mT, target.mT)
    assert torch.equal(bits(rows[~neurons]), bits(target_rows[~neurons]))
    exact = float64(target) + how.beta * exact_update(target, source, neurons, axis, how.rank, how.order)
    rounded = float64(torch.from_numpy(exact).to(target.dtype))
    # The maths is done in float32, or in float64 where a tensor is float64.
    precision = 1e-12 if torch.float64 in (target.dtype, source.dtype) else 4 * torch.finfo(torch.float32).eps
    delta = np.linalg.norm(float64(source) - float64(target), 2)
    allowed = ulp(rounded, target.dtype) + precision * (np.abs(float64(target)) + how.beta * delta)
    assert (np.abs(float64(result) - rounded) <= allowed).all()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def pair(shape: tuple[int, int], target: torch.dtype, source: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random weights and the same weights with a power-law difference of a fifth of their size."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.05 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    side = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], side, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], side, generator=generator, dtype=torch.float64)).Q
    delta = (left * torch.arange(1, side + 1) ** -0.5) @ right.mT
    weights[0, 0] = -0.0
    return weights.to(target), (weights + 0.01 * (shape[0] * shape[1]) ** 0.5 * delta / delta.norm()).to(source)


def every_third(length: int) -> Tensor:
    return torch.arange(length) % 3 == 1


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_fusion_equals_numpy_in_every_dtype(target_dtype: str, source_dtype: str, order: str) -> None:
    for shape in SHAPES:
        target, source = pair(shape, DTYPES[target_dtype], DTYPES[source_dtype])
        before = target.clone(), source.clone()
        for axis in (0, 1):
            neurons = every_third(shape[axis])
            for beta, rank in ((0.5, 0), (1.0, 1), (0.5, 3), (1.0, min(shape) - 1), (0.5, min(shape))):
                how = Fusion(beta, rank, order)
                result = fuse(target, source, neurons, axis, how).tensor
                assert_fused(result, target, source, neurons, axis, how)
                assert not torch.equal(result, target)
        assert torch.equal(bits(target), bits(before[0]))
        assert torch.equal(bits(source), bits(before[1]))


@examples
@given(data=st.data())
def test_small_fusions(data: st.DataObject) -> None:
    rows, columns = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    dtypes = data.draw(st.tuples(st.sampled_from(list(DTYPES.values())), st.sampled_from(list(DTYPES.values()))))
    size = rows * columns
    values = st.lists(st.integers(-64, 64), min_size=size, max_size=size).map(
        lambda whole: torch.tensor(whole).reshape(rows, columns) / 16
    )
    target, source = data.draw(values).to(dtypes[0]), data.draw(values).to(dtypes[1])
    axis = data.draw(st.sampled_from([0, 1]))
    length = target.shape[axis]
    neurons = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    how = Fusion(data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), 0)
    assert_fused(fuse(target, source, neurons, axis, how).tensor, target, source, neurons, axis, how)
    rank = data.draw(st.integers(1, min(rows, columns)))
    for order in ORDERS:
        # Whole numbers have ties, where only the energy of what is kept of all neurons is defined.
        everything = torch.ones(length, dtype=torch.bool)
        update = float64(rows_of(target, source, everything, axis, rank, order))
        kept = np.linalg.svd(float64(source) - float64(target), compute_uv=False)[:rank]
        assert np.linalg.norm(update) ** 2 == pytest.approx((kept**2).sum(), rel=1e-5, abs=1e-5)
        result = fuse(target, source, neurons, axis, Fusion(0.5, rank, order)).tensor
        unmasked = (result, target) if axis == 0 else (result.mT, target.mT)
        assert torch.equal(bits(unmasked[0][~neurons]), bits(unmasked[1][~neurons]))


@pytest.mark.parametrize("axis", [0, 1])
def test_as_few_neurons_as_the_rank_need_no_truncation(axis: int) -> None:
    target, source = pair((24, 40), torch.float32, torch.bfloat16)
    neurons = torch.zeros(target.shape[axis], dtype=torch.bool)
    neurons[[2, 5, 11]] = True
    whole = rows_of(target, source, neurons, axis, 0)
    for rank in (3, 4):
        assert torch.equal(rows_of(target, source, neurons, axis, rank, "mask-then-svd"), whole)
    assert not torch.equal(rows_of(target, source, neurons, axis, 3, "svd-then-mask"), whole)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [0, 1, 4, 20])
def test_nothing_selected_or_nothing_different(rank: int, order: str) -> None:
    target, source = pair((24, 20), torch.bfloat16, torch.float16)
    nothing, everything = torch.zeros(24, dtype=torch.bool), torch.ones(24, dtype=torch.bool)
    assert torch.equal(bits(fuse(target, source, nothing, 0, Fusion(1.0, rank, order)).tensor), bits(target))
    assert torch.equal(fuse(target, target.clone(), everything, 0, Fusion(1.0, rank, order)).tensor, target)
    assert torch.equal(fuse(target, source, everything, 0, Fusion(0.0, rank, order)).tensor, target)


def test_the_result_is_a_tensor_of_its_own() -> None:
    target, source = pair((24, 40), torch.float32, torch.float32)
    result = fuse(target, source, torch.zeros(24, dtype=torch.bool), 0, Fusion()).tensor
    assert result.data_ptr() != target.data_ptr()
    result.zero_()
    assert target.abs().sum() > 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_views_fuse_as_copies_do(axis: int, order: str) -> None:
    target, source = pair((24, 40), torch.float32, torch.float32)
    neurons, how = every_third(target.shape[axis]), Fusion(0.5, 3, order)
    expected = fuse(target, source, neurons, axis, how).tensor
    view = fuse(target.mT.contiguous().mT, source.mT.contiguous().mT, neurons, axis, how).tensor
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-7)
    strided = torch.zeros(48, 80)[::2, ::2]
    strided.copy_(target)
    torch.testing.assert_close(fuse(strided, source, neurons, axis, how).tensor, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bf16", "bf16"), torch.float32),
        (("fp16", "bf16"), torch.float32),
        (("fp32", "bf16"), torch.float32),
        (("fp64", "bf16"), torch.float64),
        (("bf16", "fp64"), torch.float64),
    ],
)
def test_maths_is_in_float32_or_float64(dtypes: tuple[str, str], expected: torch.dtype) -> None:
    target, source = pair((6, 5), DTYPES[dtypes[0]], DTYPES[dtypes[1]])
    assert working_dtype(target, source) == expected
    assert rows_of(target, source, every_third(6), 0, 2).dtype == expected


def test_overflow_is_named() -> None:
    big, neurons = torch.full((2, 3), 3e38), torch.tensor([True, False])
    with pytest.raises(SnrfError, match=r"^w: the difference of source and target overflows torch\.float32; check"):
        fuse(big, -big, neurons, 0, Fusion(rank=0), name="w")
    half, wide = torch.full((2, 3), 6e4, dtype=torch.float16), torch.full((2, 3), 1e6)
    for rank in (0, 1):
        with pytest.raises(SnrfError, match=r"^w: the fused weights overflow torch\.float16; merge in a wider dtype"):
            fuse(half, wide, neurons, 0, Fusion(rank=rank), name="w")
    assert torch.isfinite(fuse(half.float(), wide, neurons, 0, Fusion(rank=1)).tensor).all()


def test_rank_out_of_range() -> None:
    weight = torch.zeros(4, 3)
    with pytest.raises(SnrfError, match=r"^w: rank: 4 exceeds the smaller side of shape \[4, 3\]; use at most 3"):
        fuse(weight, weight, torch.ones(4, dtype=torch.bool), 0, Fusion(rank=4), name="w")
