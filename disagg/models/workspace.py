"""Room for what a layer computes, used again by every layer and every step.

Making a tensor costs more than a small operator does: 4 us against 0.4 us, nine times a layer.
"""

import torch
from msgspec import Struct
from torch import Tensor

# Decode batches of so many sizes find their views made; each is some kilobytes.
MAX_SIZES = 256


class Activations(Struct, frozen=True):
    """Buffers for some tokens, `[tokens, …]`, contiguous. Each step finds in them what the last one left."""

    residual: Tensor
    normed: Tensor
    delta: Tensor
    """What a half of a layer adds to the residual."""
    qkv: Tensor
    q: Tensor
    """Of `qkv`: `[tokens, heads, head_dim]`, as k and v."""
    k: Tensor
    v: Tensor
    attended: Tensor
    """`[tokens, heads, head_dim]`."""
    gate_up: Tensor
    gated: Tensor


class Widths(Struct, frozen=True):
    """Elements of one token on one rank."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


class Workspace:
    """Grows to the largest step it has seen. Used by one thread."""

    def __init__(self, widths: Widths, dtype: torch.dtype, device: torch.device) -> None:
        self._widths = widths
        self._options = {"dtype": dtype, "device": device}
        self._capacity = 0
        self._buffers: dict[str, Tensor] = {}
        self._made: dict[int, Activations] = {}

    def reserve(self, num_tokens: int) -> None:
        """Grow now, so that buffers of up to `num_tokens` keep their addresses from here on."""
        if num_tokens > self._capacity:
            self._grow(num_tokens)

    def activations(self, num_tokens: int) -> Activations:
        """Buffers for `num_tokens`. All sizes share memory, so what is in one is lost by using another."""
        made = self._made.get(num_tokens)
        if made is None:
            self.reserve(num_tokens)
            if len(self._made) == MAX_SIZES:
                self._made.clear()
            made = self._made[num_tokens] = self._make(num_tokens)
        return made

    def _grow(self, num_tokens: int) -> None:
        w = self._widths
        heads = w.num_heads + 2 * w.num_kv_heads
        lengths = {
            "residual": w.hidden_size,
            "normed": w.hidden_size,
            "delta": w.hidden_size,
            "qkv": heads * w.head_dim,
            "attended": w.num_heads * w.head_dim,
            "gate_up": 2 * w.intermediate_size,
            "gated": w.intermediate_size,
        }
        self._made.clear()
        self._buffers.clear()  # before the larger ones are made
        for name, length in lengths.items():
            self._buffers[name] = torch.empty((num_tokens, length), **self._options)  # type: ignore[call-overload]
        self._capacity = num_tokens

    def _make(self, num_tokens: int) -> Activations:
        w = self._widths
        rows = {name: buffer[:num_tokens] for name, buffer in self._buffers.items()}
        heads = rows["qkv"].view(num_tokens, w.num_heads + 2 * w.num_kv_heads, w.head_dim)
        values_at = w.num_heads + w.num_kv_heads
        q, k, v = heads[:, : w.num_heads], heads[:, w.num_heads : values_at], heads[:, values_at:]
        rows["attended"] = rows["attended"].view(num_tokens, w.num_heads, w.head_dim)
        return Activations(**rows, q=q, k=k, v=v)
