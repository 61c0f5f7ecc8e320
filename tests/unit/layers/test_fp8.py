"""Eight-bit weights: how far they are from what was rounded, and products by them."""

import pytest
import torch

from disagg.layers import ops
from disagg.layers.fp8 import FP8, LARGEST, ScaledMatrix, scale_rows


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(matrix: ScaledMatrix) -> torch.Tensor:
    return matrix.values.double() * matrix.scales[:, None].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_has_its_own_scale(dtype: torch.dtype) -> None:
    x = (random(6, 300) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 1e-30])[:, None]).to(dtype)
    matrix = scale_rows(x)
    assert (matrix.values.dtype, matrix.scales.dtype) == (FP8, torch.float32)
    assert matrix.shape == (6, 300)
    assert (matrix.values.float().abs().amax(1) == LARGEST).all()
    # Three bits behind the point; below the smallest normal, steps of 2^-9.
    error = (dequantized(matrix) - x.double()).abs()
    assert (error <= x.double().abs() * 2.0**-4 + matrix.scales[:, None].double() * 2.0**-10).all()


def test_zeros_stay_zeros() -> None:
    matrix = scale_rows(torch.zeros(2, 16))
    assert (matrix.values.float() == 0).all()
    assert matrix.scales.isfinite().all()
    assert (matrix.scales > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_the_rounded_rows(biased: bool, dtype: torch.dtype) -> None:
    x, weight = random(5, 96).to(dtype), scale_rows(random(48, 96, seed=1))
    bias = random(48, seed=2).to(dtype) if biased else None
    got = ops.linear(x, weight, bias)
    want = dequantized(scale_rows(x)) @ dequantized(weight).T + (0 if bias is None else bias.double())
    assert got.dtype == dtype
    tolerance = dict(atol=1e-4, rtol=1e-5) if dtype == torch.float32 else dict(atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(got.double(), want, **tolerance)
    out = torch.full_like(got, float("nan"))
    assert ops.linear(x, weight, bias, out=out) is out
    assert torch.equal(out, got)
