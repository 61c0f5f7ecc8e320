"""Rounding to eight bits on the GPU, and products by such weights."""

import pytest
import torch

from disagg import _cuda
from disagg.layers import ops, torch_ops
from disagg.layers.fp8 import FP8, LARGEST, scale_rows
from support.gpu import DTYPES, RELATIVE, Guarded, assert_near, call, random

TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@CAPTURED
@TYPES
@pytest.mark.parametrize("n", [1, 7, 64, 4096, 4104, 14336, 40000])
@pytest.mark.parametrize("rows", [1, 77])
def test_quantize(rows: int, n: int, dtype: torch.dtype, captured: bool) -> None:
    x = random(rows, n, dtype=dtype, seed=n + captured)
    x *= torch.logspace(-4, 3, rows, device="cuda")[:, None]
    x[rows // 2] = 0
    values, scales = Guarded(rows, n, dtype=torch.uint8), Guarded(rows, dtype=torch.float32)
    call(lambda: _cuda.quantize(x, values.tensor, scales.tensor, stream()), captured)
    got, factors = values.check().view(FP8).double(), scales.check().double()[:, None]
    largest = x.double().abs().amax(1, keepdim=True)
    zero = largest == 0
    assert_near("quantize scales", scales.tensor[~zero[:, 0], None], largest[~zero[:, 0]] / LARGEST)
    assert (factors > 0).all()
    # Half a step of three bits, or of the smallest ones; and a division that is rounded.
    error = (got * factors - x.double()).abs()
    assert (error <= x.double().abs() * 2.0**-4 * 1.001 + factors * 2.0**-10).all()
    # On a GPU torch divides by a number by its reciprocal: half of the scales would be off in the last bit,
    # and with them a row's ties, of which bfloat16 has many. On the CPU it divides, as the kernel does.
    nearest = scale_rows(x.cpu()).values.view(torch.uint8) == values.tensor.cpu()
    assert nearest.double().mean() > 0.9999


@CAPTURED
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("shape", [(6144, 4096), (48, 96), (4096, 14336)], ids=str)
def test_scaled_linear(shape: tuple[int, int], rows: int, biased: bool, captured: bool) -> None:
    n, k = shape
    x = random(rows, k, dtype=torch.bfloat16, seed=rows)
    weight = scale_rows(random(n, k, dtype=torch.bfloat16, seed=1) / k**0.5)
    bias = random(n, dtype=torch.bfloat16, seed=2) if biased else None
    out = Guarded(rows, n, dtype=torch.bfloat16)
    ops.linear(x, weight, bias)  # what the library makes at first use must not be made in a capture
    call(lambda: ops.linear(x, weight, bias, out=out.tensor), captured)
    rounded = scale_rows(x)
    product = (rounded.values.double() * rounded.scales[:, None]) @ (
        weight.values.double() * weight.scales[:, None]
    ).T
    want = product if bias is None else product + bias.double()
    # The tensor cores cut a sum to fourteen bits at each step of 32 inputs, always towards zero; a bias is
    # added to what is rounded.
    cut = k / 32 * 2.0**-13 * product.abs().max()
    assert_near("scaled_linear", out.check(), want, want.abs() + cut / RELATIVE[torch.bfloat16], roundings=2)


def test_torchs_way_is_the_same() -> None:
    x, weight = (
        random(9, 256, dtype=torch.bfloat16, seed=1),
        scale_rows(random(64, 256, dtype=torch.bfloat16, seed=2)),
    )
    plain = torch.empty(9, 64, dtype=torch.bfloat16, device="cuda")
    torch_ops.scaled_linear(x, weight, None, plain)
    assert_near(
        "scaled_linear", ops.linear(x, weight), plain.double(), plain.double().abs() + 16.0, roundings=2
    )


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 8, device="cuda")
    values, scales = torch.zeros(2, 8, dtype=torch.uint8, device="cuda"), torch.zeros(2, device="cuda")
    for bad in (
        (x, values[:1], scales),
        (x, values.int(), scales),
        (x, values, scales[:1]),
        (x.int(), values, scales),
    ):
        with pytest.raises(ValueError, match="must be"):
            _cuda.quantize(*bad, stream())
