"""Operators over the tokens of a step: C++ kernels on the CPU, torch elsewhere.

Each acts on a token's vector alone. On the CPU the bits of its result do not depend on which other
tokens are in the step, how many threads run or how a prompt was cut; sums are float32. Threads are
torch's (`torch.set_num_threads`). Types that the kernels do not know (float16) take torch's way.
"""

import torch
from torch import Tensor

from disagg import _cpu
from disagg.kv.views import layer_views

_KERNEL_TYPES = (torch.float32, torch.bfloat16)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in _KERNEL_TYPES


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`x / rms(x) * weight` over the last axis.

    Args:
        x: `[..., n]`; on the CPU its last axis is contiguous.
        weight: `[n]`.
        eps: Added to the mean square.
        out: Contiguous, shaped as `x`; may be `x`. By default a new tensor.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not _has_kernels(x):
        return out.copy_(_torch_rms_norm(x, weight, eps))
    width = x.shape[-1]
    rows = x if x.ndim == 2 else x.reshape(-1, width)
    _cpu.rms_norm(rows, None, weight, out.view(-1, width), eps, torch.get_num_threads())
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` in place; returns the sum's norm and `residual`. All are `[tokens, n]`.

    `out` takes the norm, by default a new tensor; it may be `x`.
    """
    if out is None:
        out = torch.empty_like(residual)
    if not _has_kernels(x):
        residual += x
        return out.copy_(_torch_rms_norm(residual, weight, eps)), residual
    _cpu.rms_norm(x, residual, weight, out, eps, torch.get_num_threads())
    return out, residual


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
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Norm and rotate each head of q and k in place, then write k and v to the pool.

    Args:
        q: `[tokens, heads, head_dim]`; may be a part of wider rows, as may k and v.
        k: `[tokens, kv_heads, head_dim]`.
        v: As k.
        positions: int32 or int64 `[tokens]`.
        cos_sin_cache: float32 `[positions, rotary_dim]`: cosines of pairs `(i, i + rotary_dim / 2)`,
            then their sines. Dimensions past `rotary_dim` are not rotated.
        pool: `[page, kv_head, layer, 2, token, head_dim]`.
        layer: Of the pool, from 0.
        token_pages: int32 `[tokens]`.
        token_offsets: int32 `[tokens]`, within the page.
        q_norm_weight: `[head_dim]` of an RMSNorm before the rotation, or None for none.
        k_norm_weight: As q's.
        eps: Of the norms.
    """
    if _has_kernels(q):
        where = (pool, layer, token_pages, token_offsets)
        norms = (q_norm_weight, k_norm_weight, eps)
        _cpu.rope_and_store(q, k, v, positions, cos_sin_cache, *where, *norms, torch.get_num_threads())
        return
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        if weight is not None:
            x.copy_(_torch_rms_norm(x, weight, eps))
        _torch_rotate(x, cos_sin_cache[positions.long()][:, None])
    keys, values = layer_views(pool, layer)
    slots = (token_pages.long(), slice(None), token_offsets.long())
    keys[slots] = k
    values[slots] = v


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, of `[tokens, 2 n]`: gate, then up; into `out` or a new tensor."""
    if out is None:
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    if not _has_kernels(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.mul(torch.nn.functional.silu(gate), up, out=out)
    _cpu.silu_and_mul(gate_up, out, torch.get_num_threads())
    return out


def pack_linear(weight: Tensor) -> Tensor:
    """Turn a weight into the form that `linear` and `embedding` read fastest, in place.

    On the CPU that is `[n / 32, words of a row, 32, elements of a word]` (a word is 32 bits) in the
    same memory, so `weight` itself must not be used again. Products with one token read it at the
    speed of memory, 3 to 5 times that of a plain `[n, k]`, with the same result to the bit.

    Returns:
        The packed weight; `weight` as it was on other devices and where `n` is not a multiple of 32.
    """
    n, k = weight.shape
    if not _has_kernels(weight) or n % _cpu.PANEL or k * weight.itemsize % 4 or not weight.is_contiguous():
        return weight
    _cpu.pack_linear(weight, torch.get_num_threads())
    return weight.view(n // _cpu.PANEL, k * weight.itemsize // 4, _cpu.PANEL, 4 // weight.itemsize)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, of `[tokens, k]` and `[n, k]`, plain or from `pack_linear`.

    Into `out`, which is no part of `x`, or a new tensor.
    """
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0] * (1 if weight.ndim == 2 else _cpu.PANEL)))
    # The kernels read bfloat16 in pairs.
    if not _has_kernels(x) or (x.shape[1] % 2 and x.dtype == torch.bfloat16):
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    _cpu.linear(x, weight, bias, out, torch.get_num_threads())
    return out


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows `[tokens, k]` of a weight `[n, k]`, plain or from `pack_linear`; into `out` or a new tensor."""
    if out is None:
        out = weight.new_empty(
            (len(token_ids), weight.shape[1] * (1 if weight.ndim == 2 else weight.shape[3]))
        )
    if weight.ndim == 2:
        return torch.index_select(weight, 0, token_ids, out=out)
    _cpu.unpack_rows(weight, token_ids.long(), out, torch.get_num_threads())
    return out


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def _torch_rotate(x: Tensor, cos_sin: Tensor) -> None:
    """Rotate `[tokens, heads, dim]` in place by `[tokens, 1, rotary_dim]`."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[..., :half], cos_sin[..., half:]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    x[..., :half] = a * cos - b * sin
    x[..., half : 2 * half] = b * cos + a * sin
