"""The operators of `ops.py` by the CUDA kernels of csrc/cuda; large matrix products are cuBLAS's, by torch.

Importing it needs `disagg._cuda`. Nothing here waits for the device, so all of it may be captured in a
CUDA graph; `experts` and `scaled_linear` allocate, products only at their first call on a stream. Sampling
is only here: on the CPU it is numpy's work.
"""

import functools

import torch
from torch import Tensor

from disagg import _cuda
from disagg.layers import torch_ops
from disagg.layers.fp8 import FP8, ScaledMatrix
from disagg.layers.torch_ops import pack_linear

__all__ = [
    "add_rms_norm",
    "embedding",
    "experts",
    "gather_tokens",
    "linear",
    "linear_add_rms_norm",
    "linear_silu_and_mul",
    "pack_gate_up",
    "pack_linear",
    "rms_norm",
    "rope_and_store",
    "sample",
    "scaled_linear",
    "silu_and_mul",
]

WORKSPACE_BYTES = 20 << 20
"""More than any plan of a GPU with 144 multiprocessors needs."""


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
    _cuda.silu_and_mul(gate_up, out, False, _stream(gate_up))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops. `weight` must have been written long before: it is loaded ahead of earlier kernels' end."""
    if not _linear(x, weight, bias, out):
        torch_ops.linear(x, weight, bias, out)


def linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    delta: Tensor,
    out: Tensor,
) -> None:
    """See ops."""
    if _linear(x, weight, bias, residual, residual=residual):
        rms_norm(residual, norm, eps, out)
    else:
        torch_ops.linear(x, weight, bias, delta)
        add_rms_norm(delta, residual, norm, eps, out)


def pack_gate_up(weight: Tensor) -> Tensor:
    """See ops. Eight rows of gate, eight of up, and so on, so that both of a pair are in one thread."""
    if weight.shape[0] % 16:
        return weight
    eights = weight.view(2, -1, 8, *weight.shape[1:]).transpose(0, 1)
    return weight.copy_(eights.clone(memory_format=torch.contiguous_format).view(weight.shape))


def linear_silu_and_mul(x: Tensor, weight: Tensor, bias: Tensor | None, gate_up: Tensor, out: Tensor) -> None:
    """See ops."""
    if not _linear(x, weight, bias, out, gated=True):
        torch_ops.linear(x, weight, bias, gate_up)
        _cuda.silu_and_mul(gate_up, out, gate_up.shape[1] % 16 == 0, _stream(x))


def scaled_linear(x: Tensor, weight: ScaledMatrix, bias: Tensor | None, out: Tensor) -> None:
    """See ops. `x` is contiguous, and bfloat16 as `out` is."""
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(x), device=x.device)
    _cuda.quantize(x, values, scales, _stream(x))
    torch.ops.aten._scaled_mm.out(
        values.view(FP8),
        weight.values.t(),
        scales[:, None],
        weight.scales[None],
        None,
        None,
        x.dtype,
        True,
        out=out,
    )
    if bias is not None:
        out += bias


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops. An id outside of the weight gives a row of NaN."""
    _cuda.embedding(token_ids.int(), weight, out, _stream(weight))


GROUPED_PAIRS = 16
"""Pairs of a token and an expert for each expert, above which torch's grouped product is the faster one."""


def experts(
    x: Tensor,
    scores: Tensor,
    choices: int,
    normalize: bool,
    token_pages: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor,
) -> None:
    """See ops. Small steps by kernels that read weights once, large ones by torch's grouped product."""
    num_tokens, (count, width, inner) = len(x), down.shape
    num_pairs, stream = num_tokens * choices, _stream(x)

    def int32s(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    chosen, places = int32s(num_tokens, choices), int32s(num_tokens, choices)
    weights = torch.empty((num_tokens, choices), device=x.device)
    tokens, ends = int32s(num_pairs), int32s(count)
    segments = int32s(_cuda.max_segments(num_pairs, count) + 1, 4)
    _cuda.route(scores, token_pages, normalize, chosen, weights, places, tokens, ends, segments, stream)
    few = num_pairs <= GROUPED_PAIRS * count and _cuda.experts_are_fast(x, width, inner)
    if not few and x.dtype == torch.bfloat16 and (width | inner) % 8 == 0:
        rows = x.new_empty((num_pairs, width))
        _cuda.embedding(tokens, x, rows, stream)
        projected = torch._grouped_mm(rows, gate_up.mT, ends)
        gated = x.new_empty((num_pairs, inner))
        _cuda.silu_and_mul(projected, gated, False, stream)
        results = torch._grouped_mm(gated, down.mT, ends)
    else:
        gated, results = x.new_empty((num_pairs, inner)), x.new_empty((num_pairs, width))
        _cuda.experts_gate_up(x, tokens, gate_up, segments, gated, stream)
        _cuda.experts_down(gated, down, segments, results, stream)
    _cuda.combine(results, weights, places, out, stream)


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


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    residual: Tensor | None = None,
    gated: bool = False,
) -> bool:
    """Multiply by our kernel, if that is the faster one for these sizes; tells whether it did."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    plan = _plan(len(x), *weight.shape, gated, x.device.index)
    if plan is None or not (x.is_contiguous() and out.is_contiguous()):
        return False
    stream = _stream(x)
    workspace = _workspace(x.device.index, stream)
    _cuda.linear(x, weight, bias, residual, out, gated, None, 0.0, None, None, None, plan, workspace, stream)
    return True


@functools.cache
def _plan(rows: int, n: int, k: int, gated: bool, device: int) -> _cuda.LinearPlan | None:
    """How our kernel divides a product; None where cuBLAS is faster, or ours does not know the sizes."""
    if not 0 < rows <= max_own_rows(n, k):
        return None
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return _cuda.plan_linear(rows, n, k, gated, sms)


def max_own_rows(n: int, k: int) -> int:
    """Up to how many rows our kernel takes less than cuBLAS for a weight `[n, k]`; 0 is never.

    Source: "A layer's matrix products by our own kernel" in benchmarks/engine/NOTES.md.
    """
    if n % 64 or k % 64 or n * k > 1 << 27:
        return 0
    if n * k <= 8 << 20:  # all latency
        return 128 if n <= 2048 else 64
    if n >= 16896:  # as many tiles of 128 as there are multiprocessors
        return 128
    return 64 if max(n, k) <= 4096 else 0


@functools.cache
def _workspace(device: int, stream: int) -> Tensor:
    """Room for sums of one stream's products, which it orders."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=torch.device("cuda", device))


def _stream(x: Tensor) -> int:
    """The raw handle of torch's current stream; `torch.cuda.current_stream` makes an object for it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)
