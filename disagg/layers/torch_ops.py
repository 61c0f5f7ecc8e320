"""The operators of `ops.py` in torch: for devices and types without kernels of ours."""

from collections.abc import Callable

import torch
from torch import Tensor

from disagg.kv.views import layer_views
from disagg.layers.fp8 import ScaledMatrix, scale_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops."""
    out.copy_(_norm(x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ops."""
    residual += x
    out.copy_(_norm(residual, weight, eps))


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
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        if weight is not None:
            x.copy_(_norm(x, weight, eps))
        _rotate(x, cos_sin_cache[positions.long()][:, None])
    keys, values = layer_views(pool, layer)
    places = (token_pages.long(), slice(None), token_offsets.long())
    keys[places] = k
    values[places] = v


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """See ops."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=out)


def pack_linear(weight: Tensor) -> Tensor:
    """See ops. torch reads weights as they are."""
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


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
    return weight


def scaled_linear(x: Tensor, weight: ScaledMatrix, bias: Tensor | None, out: Tensor) -> None:
    """See ops."""
    rows = scale_rows(x)
    product = (rows.values.float() @ weight.values.float().t()) * rows.scales[:, None] * weight.scales
    out.copy_(product if bias is None else product + bias)


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops."""
    torch.index_select(weight, 0, token_ids, out=out)


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
    """See ops. Waits for the device to know who is chosen; takes no padding."""

    def mlp(rows: Tensor, expert: int) -> Tensor:
        gate, up = torch.nn.functional.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert])

    mix(x, scores, choices, normalize, mlp, out)


def mix(
    x: Tensor,
    scores: Tensor,
    choices: int,
    normalize: bool,
    mlp: Callable[[Tensor, int], Tensor],
    out: Tensor,
) -> None:
    """Experts one after the other, each over its tokens; a token's sum is in the order of their numbers."""
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :choices]
    weights = scores.float().softmax(-1).gather(1, chosen)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = chosen.flatten()
    pairs, counts = experts.argsort(stable=True), experts.bincount(minlength=scores.shape[1])
    total = torch.zeros_like(x, dtype=torch.float32)
    for expert, mine in enumerate(torch.split(pairs, counts.tolist())):
        if len(mine):
            tokens = mine // choices
            total[tokens] += mlp(x[tokens], expert).float() * weights.flatten()[mine, None]
    out.copy_(total)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def _rotate(x: Tensor, cos_sin: Tensor) -> None:
    """Rotate `[tokens, heads, dim]` in place by `[tokens, 1, rotary_dim]`."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[..., :half], cos_sin[..., half:]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    x[..., :half] = a * cos - b * sin
    x[..., half : 2 * half] = b * cos + a * sin
