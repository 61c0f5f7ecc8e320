"""The operators of `ops.py` by the C++ kernels of csrc/cpu, for float32 and bfloat16."""

import torch
from torch import Tensor

from disagg import _cpu
from disagg.layers import torch_ops
from disagg.layers.torch_ops import scaled_linear

__all__ = [
    "add_rms_norm",
    "embedding",
    "experts",
    "linear",
    "linear_add_rms_norm",
    "linear_silu_and_mul",
    "pack_gate_up",
    "pack_linear",
    "rms_norm",
    "rope_and_store",
    "scaled_linear",
    "silu_and_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops."""
    width = x.shape[-1]
    rows = x if x.ndim == 2 else x.reshape(-1, width)
    _cpu.rms_norm(rows, None, weight, out.view(-1, width), eps, torch.get_num_threads())


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops."""
    _cpu.rms_norm(x, residual, weight, out, eps, torch.get_num_threads())


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
    """See ops. Takes no padding: every token has a page."""
    where = (pool, layer, token_pages, token_offsets)
    norms = (q_norm_weight, k_norm_weight, eps)
    _cpu.rope_and_store(q, k, v, positions, cos_sin_cache, *where, *norms, torch.get_num_threads())


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """See ops."""
    _cpu.silu_and_mul(gate_up, out, torch.get_num_threads())


def pack_linear(weight: Tensor) -> Tensor:
    """See ops."""
    if weight.ndim == 3:
        packed = [pack_linear(part) for part in weight]
        return weight.view(len(weight), *packed[0].shape)
    n, k = weight.shape
    if n % _cpu.PANEL or k * weight.itemsize % 4 or not weight.is_contiguous():
        return weight
    _cpu.pack_linear(weight, torch.get_num_threads())
    return weight.view(n // _cpu.PANEL, k * weight.itemsize // 4, _cpu.PANEL, 4 // weight.itemsize)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops."""
    if x.shape[1] % 2 and x.dtype == torch.bfloat16:  # the kernels read it in pairs
        torch_ops.linear(x, weight, bias, out)
    else:
        _cpu.linear(x, weight, bias, out, torch.get_num_threads())


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
    linear(x, weight, bias, delta)
    add_rms_norm(delta, residual, norm, eps, out)


def linear_silu_and_mul(x: Tensor, weight: Tensor, bias: Tensor | None, gate_up: Tensor, out: Tensor) -> None:
    """See ops."""
    linear(x, weight, bias, gate_up)
    silu_and_mul(gate_up, out)


def pack_gate_up(weight: Tensor) -> Tensor:
    """See ops."""
    return pack_linear(weight) if weight.ndim == 2 else weight


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops."""
    if weight.ndim == 2:
        torch_ops.embedding(token_ids, weight, out)
    else:
        _cpu.unpack_rows(weight, token_ids.long(), out, torch.get_num_threads())


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
    """See ops. Takes no padding."""
    inner = down.shape[2] if down.ndim == 3 else down.shape[2] * down.shape[4]

    def mlp(rows: Tensor, expert: int) -> Tensor:
        projected, gated = x.new_empty((len(rows), 2 * inner)), x.new_empty((len(rows), inner))
        linear(rows, gate_up[expert], None, projected)
        silu_and_mul(projected, gated)
        result = torch.empty_like(rows)
        linear(gated, down[expert], None, result)
        return result

    torch_ops.mix(x, scores, choices, normalize, mlp, out)
