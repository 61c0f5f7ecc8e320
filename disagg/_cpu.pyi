"""CPU kernels: matrix products, row operators and attention over the paged KV pool.

Tensors are on the CPU and float32 or bfloat16, all of one call alike; indices are int32 vectors. A
wrong shape, stride, type or index is a ValueError and nothing has been written. `threads` counts
the caller's. `level` None is the best of `levels()`. A row's result depends on that row alone, see
csrc/cpu/kernels.h.
"""

import enum

from torch import Tensor

class Level(enum.Enum):
    """Instructions that a kernel is compiled for."""

    BASELINE = 0
    AVX2 = 1
    AVX512 = 2

PANEL: int
"""Rows of a weight that are packed together."""

def levels() -> list[Level]:
    """Levels that this processor runs, the best last."""

def available_cpus() -> int:
    """Processors that this process may run on."""

def pack_linear(weight: Tensor, threads: int, level: Level | None = None) -> None:
    """Pack `weight` `[n, k]` where it lies: its bytes become `[n / PANEL, words of a row, PANEL]`.

    A word is one float32 or two bfloat16. `n` must be a multiple of PANEL.
    """

def unpack_rows(weight: Tensor, ids: Tensor, out: Tensor, threads: int) -> None:
    """Copy rows (int64 `ids`) of a packed weight to `out` `[ids, k]`."""

def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, threads: int, level: Level | None = None
) -> None:
    """`out = x @ weight.T + bias`, with equal results for `weight` `[n, k]` and packed.

    A packed one has four axes, `[n / PANEL, words of a row, PANEL, elements of a word]`.
    """

def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    threads: int,
    level: Level | None = None,
) -> None:
    """`out = norm(x) * weight`; with a residual `residual += x` and the norm is of the sum."""

def silu_and_mul(gate_up: Tensor, out: Tensor, threads: int, level: Level | None = None) -> None:
    """`out[rows, n] = silu(gate_up[:, :n]) * gate_up[:, n:]`."""

def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pool: Tensor,
    layer: int,
    token_pages: Tensor,
    token_offsets: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    threads: int,
    level: Level | None = None,
) -> None:
    """Norm (if weights are given) and rotate q and k in place; write k and v to their slots in the pool."""

class PagedAttention:
    """Causal attention of a batch over the paged pool. Used by one thread."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        threads: int,
        level: Level | None = None,
    ) -> None: ...
    def plan(self, qo_indptr: Tensor, kv_lens: Tensor, page_indptr: Tensor, page_indices: Tensor) -> None:
        """Cut a batch into tasks. Copies what it is given."""

    def run(self, q: Tensor, pool: Tensor, layer: int, out: Tensor) -> None:
        """Attend with the planned batch's `q` `[tokens, heads, head_dim]`."""
