"""Attention by FlashInfer's kernels, on NVIDIA GPUs. The library shows here and in `flashinfer_kernels`.

Prefill is its `fa3` on Hopper and `fa2` elsewhere; decode its tensor-core kernel. Neither takes a pool of
another type than the queries: what a step's chunks read of one is copied to theirs first, a layer at a
time. Both plan on the host and copy the plan to the device through page-locked memory of their own: the
caller lets the device take one step's inputs before it plans the next.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from disagg.attention import flashinfer_kernels as kernels
from disagg.attention.base import AttentionSizes
from disagg.attention.batch import AttentionBatch
from disagg.errors import ConfigError
from disagg.kv.views import layer_views
from disagg.layers.kernels import HOPPER

WORKSPACE_BYTES = 256 << 20
"""As FlashInfer recommends; it holds the partial results of split sequences."""

log = logging.getLogger(__name__)


class FlashInferPrefill:
    """Sequences with any number of new tokens."""

    name = "fi"
    capturable = False

    def __init__(self, sizes: AttentionSizes, device: torch.device) -> None:
        """Raises ConfigError where FlashInfer is missing or takes no such model."""
        flashinfer = _import(sizes)
        backend = kernels.FA3 if torch.cuda.get_device_capability(device) == HOPPER else kernels.FA2
        _load(backend, sizes)
        self._arguments = _arguments(sizes)
        self._page_size = sizes.layout.page_size
        self._widen_to = sizes.dtype if sizes.is_narrow else None
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            _workspace(device), "HND", backend=backend
        )

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`."""
        host, page_indices = batch.host, batch.page_indices
        if self._widen_to is not None:
            self._pages = page_indices[: int(host.page_indptr[-1])].long()
            page_indices = torch.arange(len(self._pages), dtype=torch.int32, device=page_indices.device)
        self._wrapper.plan(
            host.qo_indptr,
            host.page_indptr,
            page_indices,
            _last_page_lens(host.kv_lens, self._page_size),
            **self._arguments,
            causal=True,
        )

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens."""
        if self._widen_to is not None:
            pool, layer = widened_pages(pool, layer, self._pages, self._widen_to), 0
        self._wrapper.run(q, layer_views(pool, layer), out=out)


class FlashInferDecode:
    """Sequences with one new token each."""

    name = "fi"
    capturable = True

    def __init__(self, sizes: AttentionSizes, device: torch.device) -> None:
        """Raises ConfigError where FlashInfer is missing or takes no such model."""
        if sizes.is_narrow:
            raise ConfigError(
                "attention_backend fi decodes from KV of the model's type alone, and kv_cache_dtype is fp8; "
                "use fi,cuda"
            )
        self._flashinfer = _import(sizes)
        _load(kernels.FA2, sizes)
        arguments = _arguments(sizes)
        self._arguments = {"head_dim": arguments.pop("head_dim_qk"), **arguments}
        self._page_size = sizes.layout.page_size
        self._device = device
        self._workspace = _workspace(device)
        self._page_indices = torch.zeros(sizes.max_page_indices, dtype=torch.int32, device=device)
        self._eager = self._make()
        self._static: dict[int, Any] = {}
        self._planned = self._eager

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare for `batch`."""
        self._planned = self._wrapper_of(batch)
        host = batch.host
        self._planned.plan(
            host.page_indptr,
            batch.page_indices[: int(host.page_indptr[-1])],
            _last_page_lens(host.kv_lens, self._page_size),
            **self._arguments,
        )

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens."""
        self._planned.run(q, layer_views(pool, layer), out=out)

    def _wrapper_of(self, batch: AttentionBatch) -> Any:
        if not batch.is_static:
            return self._eager
        n = batch.num_sequences
        if n not in self._static:
            self._static[n] = self._make(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=torch.zeros(n + 1, dtype=torch.int32, device=self._device),
                paged_kv_indices_buffer=self._page_indices,
                paged_kv_last_page_len_buffer=torch.zeros(n, dtype=torch.int32, device=self._device),
            )
        return self._static[n]

    def _make(self, **options: Any) -> Any:
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=True, **options
        )


def widened_pages(pool: Tensor, layer: int, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """A pool of some pages and one layer of another, its bytes as elements of a wider type."""
    taken = pool.view(torch.uint8)[:, :, layer][pages]  # as bytes: torch cannot index every narrow type
    return taken.view(pool.dtype).to(dtype).unsqueeze(2)


def takes(sizes: AttentionSizes) -> bool:
    """Whether its kernels take this model."""
    return sizes.dtype in kernels.DTYPES and sizes.layout.head_dim in kernels.HEAD_DIMS


def _import(sizes: AttentionSizes) -> Any:
    try:
        import flashinfer
    except ImportError as error:
        raise ConfigError(
            f"attention_backend fi needs FlashInfer: install disagg[cuda] ({error}); or use reference"
        ) from error
    if sizes.dtype not in kernels.DTYPES:
        name = str(sizes.dtype).removeprefix("torch.")
        raise ConfigError(f"attention_backend fi takes dtype bfloat16 or float16, got {name}; use reference")
    if sizes.layout.head_dim not in kernels.HEAD_DIMS:
        raise ConfigError(
            f"attention_backend fi takes heads of 64, 128 or 256, the model's have {sizes.layout.head_dim}; "
            "use reference"
        )
    return flashinfer


def _load(backend: str, sizes: AttentionSizes) -> None:
    """Load the kernel now, and not in the first request; says so where it is compiled for it.

    Raises:
        ConfigError: nobody compiled it, and it cannot be compiled here.
    """
    kernel = backend, sizes.dtype, sizes.layout.head_dim
    began_at = time.monotonic()
    try:
        spec = kernels.spec_of(*kernel)
        compiled = spec.is_compiled
        if not compiled:
            log.warning("compiling for a minute or more what was not compiled ahead: kernel=%s", spec.name)
        kernels.load(*kernel)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"attention_backend fi has no compiled kernel for heads of {sizes.layout.head_dim} and dtype "
            f"{str(sizes.dtype).removeprefix('torch.')}, and cannot compile one ({_first_line(error)}); "
            "set CUDA_HOME to a toolkit with nvcc, or run python -m disagg.attention.flashinfer_kernels"
        ) from error
    if not compiled:
        log.warning("compiled kernel=%s seconds=%.1f", spec.name, time.monotonic() - began_at)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _arguments(sizes: AttentionSizes) -> dict[str, Any]:
    return {
        "num_qo_heads": sizes.num_qo_heads,
        "num_kv_heads": sizes.layout.num_heads,
        "head_dim_qk": sizes.layout.head_dim,
        "page_size": sizes.layout.page_size,
        "q_data_type": sizes.dtype,
        "kv_data_type": sizes.dtype,
    }


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _last_page_lens(kv_lens: Tensor, page_size: int) -> Tensor:
    """Tokens in each sequence's last page; 0 for one without pages."""
    return torch.where(kv_lens > 0, (kv_lens - 1) % page_size + 1, 0).int()
