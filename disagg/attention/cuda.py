"""Decode attention by the CUDA kernel of csrc/cuda, which plans on the device."""

import torch
from torch import Tensor

from disagg.attention.base import AttentionSizes
from disagg.attention.batch import AttentionBatch
from disagg.errors import ConfigError
from disagg.layers.kernels import why_no_cuda_kernels


class CudaDecode:
    """Sequences with one new token each; any lengths, without a plan on the host."""

    name = "cuda"
    capturable = True

    def __init__(self, sizes: AttentionSizes, device: torch.device) -> None:
        """Raises ConfigError where this build has no CUDA kernels or they do not take these sizes."""
        if (reason := why_no_cuda_kernels()) is not None:
            raise ConfigError(f"attention_backend cuda has no kernels here: {reason}; use auto")
        from disagg._cuda import DecodeAttention

        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        layout = sizes.layout
        heads = (sizes.num_qo_heads, layout.num_heads, layout.head_dim)
        dtype = str(sizes.dtype).removeprefix("torch.")
        try:
            self._attention = DecodeAttention(*heads, layout.page_size, sizes.max_rows, dtype, num_sms)
        except ValueError as error:
            raise ConfigError(f"attention_backend cuda cannot run this model: {error}; use fi") from error
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


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
