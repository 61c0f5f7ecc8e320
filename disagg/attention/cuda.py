"""Decode attention by the CUDA kernel of csrc/cuda, which plans on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from disagg.attention.base import AttentionSizes
from disagg.attention.batch import AttentionBatch
from disagg.errors import ConfigError
from disagg.layers.kernels import why_no_cuda_kernels

if TYPE_CHECKING:
    from disagg._cuda import DecodeAttention


class CudaDecode:
    """Sequences with one new token each; any lengths, without a plan on the host."""

    name = "cuda"
    capturable = True

    def __init__(self, sizes: AttentionSizes, device: torch.device) -> None:
        """Raises ConfigError where this build has no CUDA kernels or they do not take these sizes."""
        if (reason := why_no_cuda_kernels()) is not None:
            raise ConfigError(f"attention_backend cuda has no kernels here: {reason}; use auto")
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        try:
            self._attention = _make(sizes, num_sms)
        except ValueError as error:
            raise ConfigError(
                f"attention_backend cuda cannot run this model with max_num_seqs {sizes.max_rows}: {error}; "
                "use fi"
            ) from error
        num_bytes = self._attention.workspace_bytes()
        self._workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def plan(self, batch: AttentionBatch) -> None:
        """Divide the work of `batch`, by a small kernel."""
        self._batch = batch
        self._attention.plan(batch.kv_lens, batch.page_indptr, self._workspace, _stream())

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens."""
        batch = self._batch
        self._attention.run(
            q,
            pool,
            layer,
            batch.page_indices,
            batch.kv_lens,
            batch.page_indptr,
            out,
            self._workspace,
            _stream(),
        )


def is_fast(sizes: AttentionSizes) -> bool:
    """Whether the fast kernel takes these sizes, and not only the plain one. Requires the kernels."""
    try:
        return _make(sizes, num_sms=1).is_fast
    except ValueError:
        return False


def _make(sizes: AttentionSizes, num_sms: int) -> DecodeAttention:
    from disagg._cuda import DecodeAttention

    layout = sizes.layout
    heads = (sizes.num_qo_heads, layout.num_heads, layout.head_dim)
    return DecodeAttention(*heads, layout.page_size, sizes.max_rows, sizes.dtype, num_sms, sizes.kv_dtype)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
