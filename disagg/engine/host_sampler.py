"""Drawing tokens on the CPU, a row at a time in numpy.

Not torch: its operators on a row of logits are split over the very threads that the kernels use,
and where cores are shared with other processes each such split can cost a time slice.
"""

import math

import numpy as np
from numpy.typing import NDArray

from disagg.engine.draws import (
    GREEDY_BELOW,
    ROUND_FACTORS,
    ROUND_SHIFTS,
    TOKEN_FACTOR,
    TOP_TOKENS,
    SamplingRows,
)

Logits = NDArray[np.float32]


def draw_rows(logits: Logits, rows: SamplingRows) -> list[int]:
    """Draw one token of each row of `logits`, float32 `[n, vocab]`; see `sampler.sample`."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for i in np.flatnonzero(rows.temperature >= GREEDY_BELOW).tolist():
        tokens[i] = _draw(
            scale(logits[i], rows.temperature[i]),
            int(rows.top_k[i]),
            float(rows.top_p[i]),
            float(rows.min_p[i]),
            int(rows.key[i]),
        )
    return tokens


def _draw(scaled: Logits, top_k: int, top_p: float, min_p: float, key: int) -> int:
    floor = keep_above(scaled, top_k, top_p, min_p)
    if floor == -math.inf:
        noise = log_exponential(key, np.arange(len(scaled), dtype=np.uint32))
        return int(np.argmax(np.subtract(scaled, noise, out=noise)))
    kept = np.flatnonzero(scaled >= floor)
    return int(kept[np.argmax(scaled[kept] - log_exponential(key, kept.astype(np.uint32)))])


def scale(logits: Logits, temperature: np.float32) -> Logits:
    """Divide by the temperature, the highest logit moved to 0 first so that nothing overflows upwards."""
    with np.errstate(over="ignore"):  # downwards it may, to minus infinity: never drawn
        scaled: Logits = logits - logits.max()
        scaled /= temperature
    return scaled


def keep_above(scaled: Logits, top_k: int, top_p: float, min_p: float) -> float:
    """The lowest logit that min_p, then top_k, then top_p keep; minus infinity where all are kept."""
    vocab = len(scaled)
    floor = -math.inf
    if min_p > 0:
        floor = float(scaled.max() + np.log(np.float32(min_p)))
    k = top_k if 0 < top_k < vocab else vocab
    if top_p < 1:
        return max(floor, _top_p_floor(scaled, k, top_p, floor))
    if k < vocab:
        floor = max(floor, float(np.partition(scaled, vocab - k)[vocab - k]))
    return floor


def _top_p_floor(scaled: Logits, k: int, top_p: float, floor: float) -> float:
    """The lowest of the likeliest tokens whose share of the k likeliest above `floor` reaches `top_p`."""
    vocab = len(scaled)
    for width in (min(k, TOP_TOKENS), k):
        top = np.partition(scaled, vocab - width)[vocab - width :] if width < vocab else scaled.copy()
        top = -np.sort(-top)
        top = top[: max(1, np.count_nonzero(top >= floor))]
        ranked = np.exp(top - top[0]).astype(np.float64)
        total = ranked.sum()
        if width < k:
            # The share is of what top_k kept.
            kept = scaled if k == vocab else np.partition(scaled, vocab - k)[vocab - k :]
            total = np.exp(kept[kept >= floor] - top[0]).sum(dtype=np.float64)
        # Probability of all likelier tokens: a token is kept while that is below top_p.
        before = np.cumsum(ranked) - ranked
        num_kept = max(1, int(np.count_nonzero(before < top_p * total)))
        if num_kept < len(top) or width == k:
            break
    return float(top[num_kept - 1])


def log_exponential(key: int, token_ids: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The logarithm of each token's exponential noise: float32, of the shape of `token_ids`."""
    x = token_ids * np.uint32(TOKEN_FACTOR)
    shifted = np.empty_like(x)
    for half, factors, shifts in zip((key, key >> 32), ROUND_FACTORS, ROUND_SHIFTS, strict=True):
        x += np.uint32(half & 0xFFFFFFFF)
        for shift, factor in zip(shifts, (*factors, None), strict=True):
            np.right_shift(x, np.uint32(shift), out=shifted)
            x ^= shifted
            if factor is not None:
                x *= np.uint32(factor)
    x &= np.uint32(0x7FFFFFFF)
    u = x.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(-(2.0**-31))
    with np.errstate(divide="ignore"):  # u may round to 1, whose noise is infinite: it never wins
        np.log1p(u, out=u)
    np.negative(u, out=u)
    return np.log(u, out=u)
