"""Rotary position embedding: the table of cosines and sines, for each way of scaling it."""

import math
from typing import Literal

import torch
from msgspec import Struct
from torch import Tensor

RopeKind = Literal["default", "linear", "llama3"]


class RopeSpec(Struct, frozen=True, kw_only=True):
    """How positions turn into angles. Fields past `theta` matter to the kind that they name."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    """linear: positions are divided by it; llama3: low frequencies are."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def cos_sin_cache(rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Angles of every position: float32 `[num_positions, head_dim]`, cosines first, then sines.

    Each half has one column per pair of dimensions `(i, i + head_dim / 2)`.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, _frequencies(rope, head_dim))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)


def _frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians a position, float32 `[head_dim / 2]`.

    Computed in float32 in the order of the published implementations, because a position of some
    thousands makes differences in the last bit visible.
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1's scaling: long waves are slowed down, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_slowed = rope.original_max_position / rope.low_freq_factor
    smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / rope.factor, frequencies)
    is_between = (wavelengths >= longest_kept) & (wavelengths <= shortest_slowed)
    return torch.where(is_between, between, slowed)
