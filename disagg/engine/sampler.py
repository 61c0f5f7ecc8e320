"""Drawing tokens from logits: each draw is a function of its logits and (seed, choice, position).

`draws.py` says how. Here the batch is drawn at once in torch, for GPUs; logits on the CPU go to
`host_sampler.py`. Both make the same noise, and tests hold them against each other.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disagg.engine.draws import (
    GREEDY_BELOW,
    ROUND_FACTORS,
    ROUND_SHIFTS,
    TOKEN_FACTOR,
    TOP_TOKENS,
    SamplingRows,
)
from disagg.engine.host_sampler import draw_rows


def sample(logits: Tensor, rows: SamplingRows) -> list[int]:
    """Draw one token of each row.

    Args:
        logits: `[n, vocab]`, any floating type; left as it is.
        rows: `n` rows. Temperature is applied first, then min_p, top_k and top_p, as vLLM does;
            tokens that tie with the last one kept are kept as well.
    """
    if logits.device.type == "cpu":
        return draw_rows(as_float32(logits), rows)
    tokens: list[int] = sample_batch(logits, rows).tolist()
    return tokens


def as_float32(logits: Tensor) -> NDArray[np.float32]:
    """Logits on the CPU as a numpy array. Exact; bfloat16 is the upper half of a float32."""
    if logits.dtype == torch.bfloat16:
        halves: NDArray[np.uint16] = logits.contiguous().view(torch.uint16).numpy()
        return np.left_shift(halves, 16, dtype=np.uint32).view(np.float32)
    values: NDArray[np.float32] = logits.float().numpy()
    return values


def sample_batch(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Draw one token of each row on any device: int64 `[n]` there."""
    drawn = np.flatnonzero(rows.temperature >= GREEDY_BELOW)
    tokens = logits.argmax(-1)
    if len(drawn):
        at = _tensor(drawn, logits.device)
        tokens[at] = _draw(logits[at].float(), rows.at(drawn))
    return tokens


def _draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Draw from float32 logits; every row's temperature is above zero."""
    # The highest logit is moved to 0 first, so that nothing overflows upwards.
    scaled = (logits - logits.amax(-1, keepdim=True)) / _column(rows.temperature, logits.device)
    _drop_unlikely(scaled, rows)
    keys = _tensor(rows.key.view(np.int32).reshape(-1, 2), logits.device)
    token_ids = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    return (scaled - log_exponential(keys, token_ids)).argmax(-1)


def log_exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """The logarithm of each token's exponential noise: float32 `[n, vocab]`.

    Args:
        keys: int32 `[n, 2]`, the halves of each draw's key, lower first.
        token_ids: int32 `[vocab]`
    """
    x = (token_ids * _signed(TOKEN_FACTOR)).expand(len(keys), -1).clone()
    for half, factors, shifts in zip((0, 1), ROUND_FACTORS, ROUND_SHIFTS, strict=True):
        x += keys[:, half : half + 1]
        for shift, factor in zip(shifts, (*factors, None), strict=True):
            shifted = x >> shift
            shifted &= (1 << (32 - shift)) - 1  # torch's shift of int32 copies the sign
            x ^= shifted
            if factor is not None:
                x *= _signed(factor)
    x &= 0x7FFFFFFF
    u = x.float().add_(0.5).mul_(-(2.0**-31))
    return u.log1p_().neg_().log_()


def _drop_unlikely(scaled: Tensor, rows: SamplingRows) -> None:
    """Set the logits of tokens that min_p, top_k and top_p exclude to minus infinity, in place."""
    vocab = scaled.shape[-1]
    by_min_p = np.flatnonzero(rows.min_p > 0)
    if len(by_min_p):
        at = _tensor(by_min_p, scaled.device)
        some = scaled[at]
        floor = some.amax(-1, keepdim=True) + _column(rows.min_p[by_min_p], scaled.device).log()
        scaled[at] = some.masked_fill(some < floor, -torch.inf)
    by_rank = np.flatnonzero(((rows.top_k > 0) & (rows.top_k < vocab)) | (rows.top_p < 1))
    if len(by_rank):
        at = _tensor(by_rank, scaled.device)
        some = scaled[at]
        floor = _rank_floor(some, rows.top_k[by_rank], rows.top_p[by_rank])
        scaled[at] = some.masked_fill(some < floor, -torch.inf)


def _rank_floor(scaled: Tensor, top_k: NDArray[np.int32], top_p: NDArray[np.float32]) -> Tensor:
    """The lowest logit that top_k and then top_p keep: `[n, 1]`.

    top_p keeps the likeliest tokens until their share of what top_k kept reaches it.
    """
    vocab = scaled.shape[-1]
    k = np.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    floor = scaled.new_empty((len(scaled), 1))
    # Rows that can be decided by their likeliest tokens are; the others need the whole order.
    pending = np.arange(len(scaled))
    for width in (min(vocab, TOP_TOKENS), vocab):
        if len(pending) == 0:
            break
        at = _tensor(pending, scaled.device)
        found, decided = _floor_within(scaled[at], k[pending], top_p[pending], width)
        done = _tensor(np.flatnonzero(decided), scaled.device)
        floor[at[done]] = found[done]
        pending = pending[~decided]
    return floor


def _floor_within(
    scaled: Tensor, k: NDArray[np.int64], top_p: NDArray[np.float32], width: int
) -> tuple[Tensor, NDArray[np.bool_]]:
    """The floor as far as the `width` likeliest tokens tell, and for which rows they do."""
    device = scaled.device
    top = scaled.topk(width, -1).values
    is_kept = torch.arange(width, device=device) < _column(k, device)
    ranked = top.masked_fill(~is_kept, -torch.inf)
    needs_all = _column(k > width, device)
    total = torch.where(needs_all, scaled.logsumexp(-1, keepdim=True), ranked.logsumexp(-1, keepdim=True))
    # Of these the share is of what top_k kept, which is not seen whole here.
    is_partial = (k > width) & (k < scaled.shape[-1])
    # Probability of all likelier tokens: a token is kept while that is below top_p.
    share = (ranked - total).exp().double()
    before = share.cumsum(-1) - share
    keeps_all = _column(top_p >= 1, device)  # and not what rounds up to 1
    is_kept &= (before < _column(top_p, device)) | keeps_all
    num_kept = is_kept.sum(-1, keepdim=True).clamp(min=1)
    is_enough = (num_kept[:, 0] < width).cpu().numpy() & ~is_partial
    decided = (k <= width) | is_enough | (width == scaled.shape[-1])
    return top.gather(-1, num_kept - 1), decided


def _signed(factor: int) -> int:
    """The int32 with the same bits, for torch has no arithmetic of uint32; both wrap alike."""
    return factor - (1 << 32) if factor >= 1 << 31 else factor


def _tensor(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _column(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return _tensor(values, device)[:, None]
