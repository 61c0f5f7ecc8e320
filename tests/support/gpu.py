"""Buffers and calls for tests of CUDA kernels."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from disagg.nccl import MULTI_RANK

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Two roundings of half a unit in the last place.
RELATIVE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ERRORS: dict[str, float] = {}
"""Largest error of each operator and type so far, in units of what it is compared with."""


def needs_nccl(num_ranks: int) -> pytest.MarkDecorator:
    """Skip where so many processes cannot talk by NCCL; here because one GPU is all that most have."""
    return pytest.mark.skipif(
        torch.cuda.device_count() < num_ranks and os.environ.get(MULTI_RANK) != "1",
        reason=f"needs {num_ranks} GPUs, or NCCL 2.31 and {MULTI_RANK}=1",
    )


_GUARD = 256  # elements; a multiple of every alignment that a kernel looks at


class Guarded:
    """Memory with a margin on both sides that nothing may write to."""

    def __init__(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> None:
        """Poisoned with NaN, or -7 (bytes: 249); `offset` elements past an aligned address."""
        self._poison = float("nan") if dtype.is_floating_point else 249 if dtype == torch.uint8 else -7
        size = torch.Size(shape).numel()
        self._whole = torch.full((2 * _GUARD + offset + size,), self._poison, dtype=dtype, device="cuda")
        self._begin, self._end = _GUARD + offset, _GUARD + offset + size
        self.tensor = self._whole[self._begin : self._end].view(shape)

    def check(self) -> Tensor:
        """The tensor, after the margins were looked at."""
        for margin in (self._whole[: self._begin], self._whole[self._end :]):
            untouched = margin.isnan() if margin.is_floating_point() else margin == self._poison
            assert untouched.all(), "written past the end"
        return self.tensor


def random(*shape: int, dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Normal values on the GPU, `offset` elements past an aligned address."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = torch.Size(shape).numel()
    values = torch.randn(size + offset, generator=generator, device="cuda").to(dtype)
    return values[offset:].view(shape)


def call(run: Callable[[], None], captured: bool) -> None:
    """Run once: at once, or as a CUDA graph."""
    if captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
    else:
        run()
    torch.cuda.synchronize()


def assert_near(
    name: str, got: Tensor, want: Tensor, scale: Tensor | None = None, roundings: int = 1
) -> None:
    """Compare with float64: errors in units of `scale`, by default each wanted value's size.

    `roundings`: how often two in a row are made on the way.
    """
    assert want.dtype == torch.float64
    scale = want.abs() if scale is None else scale
    error = ((got.double() - want).abs() / (scale + 1e-3)).max().item() if got.numel() else 0.0
    key = f"{name} {str(got.dtype).removeprefix('torch.')}"
    ERRORS[key] = max(ERRORS.get(key, 0.0), error)
    assert error <= roundings * RELATIVE[got.dtype], f"{key}: {error}"
