"""CUDA kernels for Hopper: row operators, sampling and attention over the paged KV pool.

Absent where the build found no nvcc. Tensors are on the current CUDA device and float32, float16 or
bfloat16, all of one call alike but for a pool, which may be float8_e4m3fn; indices are int32 vectors.
A wrong shape, stride or type is a ValueError; what indices say is not checked. `stream` is the raw
handle of a CUDA stream: a call only launches there, and may be captured in a graph. RuntimeError where
CUDA refuses the launch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float, stream: int
) -> None:
    """`out = norm(x) * weight`; with a residual `residual += x`, and the norm is of the sum.

    `out` may be `x`.
    """

def silu_and_mul(gate_up: Tensor, out: Tensor, interleaved: bool, stream: int) -> None:
    """`out[rows, n] = silu(gate_up[:, :n]) * gate_up[:, n:]`; or of eights of gate and up in turn."""

def quantize(x: Tensor, values: Tensor, scales: Tensor, stream: int) -> None:
    """`values[row] * scales[row] = x[row]` in e4m3 (as uint8); a row's largest element is its largest."""

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
    stream: int,
) -> None:
    """Norm (if weights are given) and rotate q and k in place; write k and v to their places in the pool.

    A token whose page is -1 is padding: nothing of it is read or written.
    """

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
    stream: int,
) -> None:
    """Draw a token of each row of `logits` `[rows, vocab]`, as engine/sampler.py does.

    `keys` are int32 `[rows, 2]`, the halves of each draw's key, lower first. The token goes to
    `out[row]` and to `last_tokens[slots[row]]`; a row whose slot is -1 is padding and writes nothing.
    """

def gather_tokens(token_ids: Tensor, slots: Tensor, last_tokens: Tensor, stream: int) -> None:
    """`token_ids[i] = last_tokens[slots[i]]` where it is PENDING (-1); 0 where the slot is -1 as well."""

def embedding(token_ids: Tensor, weight: Tensor, out: Tensor, stream: int) -> None:
    """`out[i] = weight[token_ids[i]]`; a row of NaN where the id is outside of the vocabulary."""

class DecodeAttention:
    """Attention of one query token a row over the paged pool; csrc/cuda/decode_attention.h is its manual.

    Fast for head_dim 64 and 128, bfloat16 and float16, at most 8 query heads a KV head, page sizes 16,
    32, 64, ...; other shapes and float32 are taken too. `kv_dtype`, the pool's, is dtype or
    float8_e4m3fn, which is fast for head_dim 128. kv_lens, page_indptr and page_indices are final
    before `plan` and until the step's last `run`; so is the pool, but for each row's newest token.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        max_rows: int,
        dtype: torch.dtype | str,
        num_sms: int,
        kv_dtype: torch.dtype | str | None = None,
    ) -> None: ...
    @property
    def is_fast(self) -> bool:
        """Whether these sizes have the fast kernel."""

    def workspace_bytes(self) -> int:
        """Size of the uint8 `workspace` that `plan` and `run` share; its first contents do not matter."""

    def plan(self, kv_lens: Tensor, page_indptr: Tensor, workspace: Tensor, stream: int) -> None:
        """Divide a step's KV among the multiprocessors: one small kernel, once a step."""

    def run(
        self,
        q: Tensor,
        pool: Tensor,
        layer: int,
        page_indices: Tensor,
        kv_lens: Tensor,
        page_indptr: Tensor,
        out: Tensor,
        workspace: Tensor,
        stream: int,
    ) -> None:
        """Attend with `q` `[rows, heads, head_dim]`; rows whose kv_len is 0 become zeros in `out`."""

class PeerCopier:
    """Maps pools of other processes of this host and copies runs into them, on a stream of its own.

    One thread uses it. RuntimeError in CUDA's words where a pool cannot be exported or mapped, or a
    copy failed. Mapped memory stays, whatever becomes of its process, until it is closed.
    """

    def __init__(self, device: int, blocks: int) -> None:
        """Copy from this device, by so many of its multiprocessors."""

    def handle(self, address: int) -> tuple[bytes, int]:
        """Make what lets another process map the memory at an address, and how far in that lies."""

    def open(self, handle: bytes, num_bytes: int) -> int:
        """Map what a handle of another process stands for, so large at least; returns its first address."""

    def close(self, base: int) -> None:
        """Unmap it. Every copy into it must have ended."""

    def copy(
        self,
        source: int,
        target: int,
        source_offsets: NDArray[np.int64],
        target_offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> int:
        """Begin to copy runs of bytes, all in multiples of 16; returns what `is_done` asks for."""

    def is_done(self, copy: int) -> bool:
        """Whether a copy has landed in full; asked no more once it was."""

    def wait(self) -> None:
        """Wait until no copy is under way."""

class LinearPlan:
    """How a product is divided among the multiprocessors; csrc/cuda/linear_division.h is its manual."""

    tokens: int
    groups: int
    multicast: int
    splits: int
    slices: int
    w_stages: int
    x_stages: int
    sends: int
    def __init__(
        self,
        tokens: int,
        groups: int,
        multicast: int,
        splits: int,
        slices: int,
        w_stages: int,
        x_stages: int,
        sends: int,
    ) -> None: ...

def plan_linear(rows: int, n: int, k: int, gated: bool, num_sms: int) -> LinearPlan:
    """Divide a product by its sizes alone; ValueError where it is not one for `linear`."""

def linear_workspace_bytes(plan: LinearPlan, rows: int, n: int, k: int) -> int:
    """Size of the uint8 workspace that `linear` needs, zeroed before its first use; mostly 0."""

def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    gated: bool,
    squares: Tensor | None,
    eps: float,
    squares_out: Tensor | None,
    norm: Tensor | None,
    normed: Tensor | None,
    plan: LinearPlan,
    workspace: Tensor,
    stream: int,
) -> None:
    """`out = x @ weight.T + bias + residual` in bfloat16, for at most 256 rows; sums are float32.

    `gated`: the weight has eight rows of gate, eight of up, and so on; `out = silu(gate) * up`. `residual`
    may be `out`. With `squares_out`, float32 `[n / 64, 256]`, a row's sums of squares of `out` go there and
    `out * norm` to `normed`, which wants a plan with splits. A product that takes `normed` as x, and those as
    `squares`, has its sums divided by the root mean square: RMSNorm without a kernel. The weight is loaded
    before the kernel that precedes this has ended, so it must have been written, and the device synchronized,
    long before.
    """

def max_segments(pairs: int, experts: int) -> int:
    """Most segments that `route` makes of so many pairs of a token and an expert."""

def route(
    logits: Tensor,
    token_pages: Tensor | None,
    normalize: bool,
    experts: Tensor,
    weights: Tensor,
    places: Tensor,
    tokens: Tensor,
    ends: Tensor,
    segments: Tensor,
    stream: int,
) -> None:
    """Choose each token's experts by `logits` `[tokens, experts]`, and order the pairs by expert.

    All but `weights` (float32) are int32. `experts`, `weights` and `places` (where in the order) are
    `[tokens, choices]`; `tokens` (of each place) `[tokens * choices]`; `ends` (of each expert's pairs)
    `[experts]`; `segments` `[n, 4]` is read by the next two, and has a row more than there may be segments.
    """

def experts_are_fast(x: Tensor, width: int, inner: int) -> bool:
    """Whether the next two run at the speed of memory for experts of these sizes; they take any."""

def experts_gate_up(
    x: Tensor, tokens: Tensor, weight: Tensor, segments: Tensor, out: Tensor, stream: int
) -> None:
    """`silu(gate) * up` of each pair: `x[tokens]` by its expert's `weight` `[experts, 2 n, k]`."""

def experts_down(x: Tensor, weight: Tensor, segments: Tensor, out: Tensor, stream: int) -> None:
    """Each pair's row of `x` by its expert's `weight` `[experts, n, k]`; behind `experts_gate_up`."""

def combine(y: Tensor, weights: Tensor, places: Tensor, out: Tensor, stream: int) -> None:
    """`out[token]` = its weighted sum of `y[places]`; place -1 adds nothing."""
