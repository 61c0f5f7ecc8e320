"""Weights in eight bits: e4m3 with a scale for each row, an output of the product."""

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of the type."""
MULTIPLE = 16
"""Of what both sizes of a matrix must be."""


class ScaledMatrix(NamedTuple):
    """`values[i] * scales[i]` is row i."""

    values: Tensor
    """e4m3 `[n, k]`"""
    scales: Tensor
    """float32 `[n]`"""

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape


Weight = Tensor | ScaledMatrix


def scale_rows(x: Tensor) -> ScaledMatrix:
    """Round a matrix to e4m3, each row's largest element to the type's largest value."""
    wide = x.float()
    # A row of zeros stays one.
    scales = wide.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return ScaledMatrix((wide / scales[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scales)
