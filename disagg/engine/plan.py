"""StepPlan: everything that the ranks must know of one step.

Plain ints and array buffers, so that rank 0 can send it to the other ranks as it is. Rows are
sequences, decodes first; buffers are little-endian C arrays of the type named beside them.
"""

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

PENDING = -1
"""Stands for a token that a step still in flight will sample; the runner takes it from the slot."""


class SamplePlan(Struct, frozen=True, array_like=True):
    """Which rows are sampled and how; one entry for each in every buffer."""

    rows: bytes = b""
    """int32: row of the plan whose last token's logits are drawn from."""
    temperature: bytes = b""
    """float32"""
    top_k: bytes = b""
    """int32"""
    top_p: bytes = b""
    """float32"""
    min_p: bytes = b""
    """float32"""
    seed: bytes = b""
    """uint64"""
    choice_index: bytes = b""
    """int32"""
    position: bytes = b""
    """int32: output position of the token to draw."""


class StepPlan(Struct, frozen=True, array_like=True, tag="step"):
    """One step over a batch of sequences, written once, run by every rank."""

    step: int
    """Counts up by one; plans are retired in this order."""
    num_decodes: int
    """The first rows, each with exactly one new token."""
    num_tokens: int
    token_ids: bytes
    """int32 `[num_tokens]`: new tokens of each row, one row after the other; may hold PENDING."""
    slots: bytes
    """int32 `[rows]`: the row of device state that stays the sequence's while it runs."""
    query_lens: bytes
    """int32 `[rows]`: new tokens of each row."""
    kv_lens: bytes
    """int32 `[rows]`: tokens in the sequence's pages after this step."""
    page_indptr: bytes
    """int32 `[rows + 1]`"""
    page_indices: bytes
    """int32 `[page_indptr[-1]]`: each row's pages, exactly those that hold `kv_lens` tokens."""
    samples: SamplePlan = SamplePlan()

    @property
    def num_rows(self) -> int:
        """Sequences in this step."""
        return len(self.slots) // 4

    @property
    def num_samples(self) -> int:
        """Tokens to sample."""
        return len(self.samples.rows) // 4


class StepRetired(Struct, frozen=True, array_like=True, tag="retired"):
    """Rank 0 has seen the end of a step, on its own device."""

    step: int


Int32s = NDArray[np.int32]


def packed(values: ArrayLike) -> bytes:
    """Write a buffer of a plan."""
    return np.asarray(values).astype(np.int32).tobytes()


def int32s(buffer: bytes) -> Int32s:
    """Read a buffer of a plan without copying it."""
    return np.frombuffer(buffer, np.int32)
