"""Operators over the tokens of a step: C++ kernels on the CPU, CUDA kernels on GPUs, torch elsewhere.

Each acts on a token's vector alone. On the CPU the bits of its result do not depend on which other
tokens are in the step, how many threads run or how a prompt was cut; sums are float32. Threads are
torch's (`torch.set_num_threads`). Types that the kernels do not know take torch's way, and so do GPUs
where the build found no nvcc. Here are the meaning and the defaults; `*_ops.py` do the work.
"""

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from disagg.layers import cpu_ops, torch_ops
from disagg.layers.fp8 import ScaledMatrix, Weight
from disagg.layers.kernels import why_no_cuda_kernels

log = logging.getLogger(__name__)

_CPU_TYPES = (torch.float32, torch.bfloat16)
_CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Ops(Protocol):
    """What each of the `*_ops.py` is; `out` is always given."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...

    def rope_and_store(
        self,
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
    ) -> None: ...

    def silu_and_mul(self, gate_up: Tensor, out: Tensor) -> None: ...

    def pack_linear(self, weight: Tensor) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None: ...

    def linear_add_rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        delta: Tensor,
        out: Tensor,
    ) -> None: ...

    def pack_gate_up(self, weight: Tensor) -> Tensor: ...

    def linear_silu_and_mul(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate_up: Tensor, out: Tensor
    ) -> None: ...

    def scaled_linear(self, x: Tensor, weight: ScaledMatrix, bias: Tensor | None, out: Tensor) -> None: ...

    def embedding(self, token_ids: Tensor, weight: Tensor, out: Tensor) -> None: ...

    def experts(
        self,
        x: Tensor,
        scores: Tensor,
        choices: int,
        normalize: bool,
        token_pages: Tensor,
        gate_up: Tensor,
        down: Tensor,
        out: Tensor,
    ) -> None: ...


def _ops_for(x: Tensor) -> _Ops:
    if x.is_cpu and x.dtype in _CPU_TYPES:
        return cpu_ops
    if x.is_cuda and x.dtype in _CUDA_TYPES:
        return _ops_of_cuda()
    return torch_ops


@functools.cache
def _ops_of_cuda() -> _Ops:
    """Load the CUDA kernels, once and only where a CUDA tensor is."""
    if (reason := why_no_cuda_kernels()) is not None:
        log.warning("no CUDA kernels, torch serves, several times slower: %s", reason)
        return torch_ops
    from disagg.layers import cuda_ops

    return cuda_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`x / rms(x) * weight` over the last axis.

    Args:
        x: `[..., n]`, whose last axis is contiguous.
        weight: `[n]`.
        eps: Added to the mean square.
        out: Contiguous, shaped as `x`; may be `x`. By default a new tensor.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _ops_for(x).rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` in place; returns the sum's norm and `residual`. All are `[tokens, n]`.

    `out` takes the norm, by default a new tensor; it may be `x`.
    """
    if out is None:
        out = torch.empty_like(residual)
    _ops_for(x).add_rms_norm(x, residual, weight, eps, out)
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
        token_pages: int32 `[tokens]`; on GPUs -1 marks padding, of which nothing is read or written.
        token_offsets: int32 `[tokens]`, within the page.
        q_norm_weight: `[head_dim]` of an RMSNorm before the rotation, or None for none.
        k_norm_weight: As q's.
        eps: Of the norms.
    """
    where = (pool, layer, token_pages, token_offsets)
    norms = (q_norm_weight, k_norm_weight, eps)
    _ops_for(q).rope_and_store(q, k, v, positions, cos_sin_cache, *where, *norms)


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, of `[tokens, 2 n]`: gate, then up; into `out` or a new tensor."""
    if out is None:
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    _ops_for(gate_up).silu_and_mul(gate_up, out)
    return out


def pack_linear(weight: Tensor) -> Tensor:
    """Turn a weight into the form that `linear` and `embedding` read fastest, in place.

    On the CPU that is `[n / 32, words of a row, 32, elements of a word]` (a word is 32 bits) in the
    same memory, so `weight` itself must not be used again. Products with one token read it at the
    speed of memory, 3 to 5 times that of a plain `[n, k]`, with the same result to the bit.

    Experts' weights `[experts, n, k]` are packed each for itself.

    Returns:
        The packed weight; `weight` as it was on other devices and where `n` is not a multiple of 32.
    """
    return _ops_for(weight).pack_linear(weight)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, of `[tokens, k]` and `[n, k]`, plain or from `pack_linear`.

    Into `out`, which is no part of `x`, or a new tensor. By a scaled matrix each token is rounded to eight
    bits too, with a scale of its own.
    """
    if isinstance(weight, ScaledMatrix):
        if out is None:
            out = x.new_empty((x.shape[0], weight.shape[0]))
        _ops_for(x).scaled_linear(x, weight, bias, out)
        return out
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0] * (1 if weight.ndim == 2 else weight.shape[2])))
    _ops_for(x).linear(x, weight, bias, out)
    return out


def linear_add_rms_norm(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    delta: Tensor,
    out: Tensor,
) -> None:
    """Add `x @ weight.T + bias` to `residual` in place; `out` takes the sum's norm, times `norm`.

    `delta` is room for the product, shaped as `residual`, of whose contents nothing is known afterwards.
    """
    if isinstance(weight, ScaledMatrix):
        _ops_for(x).scaled_linear(x, weight, bias, delta)
        _ops_for(x).add_rms_norm(delta, residual, norm, eps, out)
    else:
        _ops_for(x).linear_add_rms_norm(x, weight, bias, residual, norm, eps, delta, out)


def pack_gate_up(weight: Tensor) -> Tensor:
    """Turn rows of gate, then up, or their bias, into the form that `linear_silu_and_mul` reads fastest.

    In place, as `pack_linear`: `weight` itself must not be used again.
    """
    return _ops_for(weight).pack_gate_up(weight)


def linear_silu_and_mul(x: Tensor, weight: Weight, bias: Tensor | None, gate_up: Tensor, out: Tensor) -> None:
    """`silu(gate) * up` into `out`, of `x @ weight.T + bias`.

    Weight and bias are from `pack_gate_up`; a scaled matrix has rows of gate, then up, as its bias.
    `gate_up` is room for the product, of whose contents nothing is known afterwards.
    """
    if isinstance(weight, ScaledMatrix):
        _ops_for(x).scaled_linear(x, weight, bias, gate_up)
        _ops_for(x).silu_and_mul(gate_up, out)
    else:
        _ops_for(x).linear_silu_and_mul(x, weight, bias, gate_up, out)


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows `[tokens, k]` of a weight `[n, k]`, plain or from `pack_linear`; into `out` or a new tensor."""
    if out is None:
        out = weight.new_empty(
            (len(token_ids), weight.shape[1] * (1 if weight.ndim == 2 else weight.shape[3]))
        )
    _ops_for(weight).embedding(token_ids, weight, out)
    return out


def experts(
    x: Tensor,
    scores: Tensor,
    choices: int,
    normalize: bool,
    token_pages: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """A mixture of experts: each token through the gated MLPs that its scores choose, and their weighted sum.

    Weights are the softmax of the scores. Of equal scores the lower expert is chosen.

    Args:
        x: `[tokens, k]`.
        scores: `[tokens, experts]`.
        choices: Experts of a token.
        normalize: Whether a token's weights are made to sum to one.
        token_pages: int32 `[tokens]`; on GPUs -1 marks padding, which no expert sees and which becomes zero.
        gate_up: `[experts, 2 n, k]`, rows of gate, then up; plain or from `pack_linear`.
        down: `[experts, k, n]`, alike.
        out: Contiguous, shaped as `x` and no part of it. By default a new tensor.
    """
    if out is None:
        out = torch.empty_like(x)
    _ops_for(x).experts(x, scores, choices, normalize, token_pages, gate_up, down, out)
    return out
