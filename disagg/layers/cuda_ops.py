"""The operators of `ops.py` by the CUDA kernels of csrc/cuda; matrix products are cuBLAS's, by torch.

Importing it needs `disagg._cuda`. Nothing here waits for the device or allocates, so all of it may be
captured in a CUDA graph. Sampling is only here: on the CPU it is numpy's work.
"""

import torch
from torch import Tensor

from disagg import _cuda
from disagg.layers.torch_ops import linear, pack_linear

__all__ = [
    "add_rms_norm",
    "embedding",
    "gather_tokens",
    "linear",
    "pack_linear",
    "rms_norm",
    "rope_and_store",
    "sample",
    "silu_and_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops."""
    width = x.shape[-1]
    rows = x if x.ndim == 2 else x.reshape(-1, width)
    _cuda.rms_norm(rows, None, weight, out.view(-1, width), eps, _stream(x))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops."""
    _cuda.rms_norm(x, residual, weight, out, eps, _stream(x))


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    pool: Tensor,
    layer: int,
    token_pages: Tensor,
    token_offsets: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    """See ops. A token whose page is -1 is padding: nothing of it is read or written."""
    where = (pool, layer, token_pages, token_offsets)
    _cuda.rope_and_store(
        q, k, v, positions, cos_sin_cache, *where, q_norm_weight, k_norm_weight, eps, _stream(q)
    )


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """See ops."""
    _cuda.silu_and_mul(gate_up, out, _stream(gate_up))


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops. An id outside of the weight gives a row of NaN."""
    _cuda.embedding(token_ids.int(), weight, out, _stream(weight))


def gather_tokens(token_ids: Tensor, slots: Tensor, last_tokens: Tensor) -> None:
    """Replace each PENDING (-1) of `token_ids` by `last_tokens[slot]`; 0 where its slot is -1 as well.

    All are int32; `slots` has one entry a token.
    """
    _cuda.gather_tokens(token_ids, slots, last_tokens, _stream(token_ids))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    slots: Tensor,
    out: Tensor,
    last_tokens: Tensor,
) -> None:
    """Draw a token of each row, as `engine/sampler.py`, into `out[row]` and `last_tokens[slots[row]]`.

    Args:
        logits: `[rows, vocab]` with contiguous rows.
        temperature: float32 `[rows]`, as `top_p` and `min_p`.
        top_k: int32 `[rows]`
        top_p: See temperature.
        min_p: See temperature.
        keys: int32 `[rows, 2]`, the halves of each draw's key, lower first.
        slots: int32 `[rows]`; -1 marks padding, for which nothing is written.
        out: int32 `[rows]`
        last_tokens: int32 `[slots]`
    """
    filters = (temperature, top_k, top_p, min_p)
    _cuda.sample(logits, *filters, keys, slots, out, last_tokens, _stream(logits))


def _stream(x: Tensor) -> int:
    """The raw handle of torch's current stream; `torch.cuda.current_stream` makes an object for it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)
