"""Per-slot arrays of running sequences, from which a step's buffers are gathered at once.

A slot is a row of batch state that a sequence keeps while it runs. Gathering by slot keeps the
host's work a few numpy calls a step, whatever the batch.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disagg.engine.admission import MAX_INT32
from disagg.engine.plan import PENDING, SamplePlan, StepPlan
from disagg.engine.sequence import Sequence


class Span(NamedTuple):
    """A sequence's share of one step: its tokens `[start, start + length)`."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    """The span ends in the newest token, so its logits are drawn from."""


class SlotTable:
    """Page rows and sampling parameters of up to `num_slots` running sequences."""

    def __init__(self, num_slots: int, max_pages: int) -> None:
        self._free = list(range(num_slots))[::-1]
        self._pages = np.zeros((num_slots, max_pages), np.int32)
        self._columns = np.arange(max_pages, dtype=np.int32)
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int32)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._seed = np.zeros(num_slots, np.uint64)
        self._choice_index = np.zeros(num_slots, np.int32)

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def open(self, sequence: Sequence) -> None:
        """Give the sequence a slot; its page row moves into the table. Requires: one is free."""
        slot = self._free.pop()
        sampling = sequence.request.sampling
        self._temperature[slot] = sampling.temperature
        # Any number is a valid top_k; more than the vocabulary keeps all of it.
        self._top_k[slot] = min(sampling.top_k, MAX_INT32)
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sampling.seed
        self._choice_index[slot] = sampling.choice_index
        row = self._pages[slot]
        row[: sequence.num_pages] = sequence.pages[: sequence.num_pages]
        sequence.pages = row
        sequence.slot = slot

    def close(self, sequence: Sequence) -> None:
        """Take the slot back; the sequence keeps a copy of its page row."""
        if sequence.slot is None:
            return
        sequence.pages = sequence.pages[: sequence.num_pages].copy()
        self._free.append(sequence.slot)
        sequence.slot = None

    def plan(self, step: int, spans: Seq[Span], num_decodes: int, page_size: int) -> StepPlan:
        """Write the buffers of one step; the first `num_decodes` spans are decodes."""
        slots = np.array([span.sequence.slot for span in spans], np.int32)
        starts = np.array([span.start for span in spans], np.int32)
        query_lens = np.array([span.length for span in spans], np.int32)
        kv_lens = starts + query_lens
        num_pages = -(-kv_lens // page_size)
        page_indptr = np.zeros(len(spans) + 1, np.int32)
        np.cumsum(num_pages, out=page_indptr[1:])
        widest = int(num_pages.max())
        is_held = self._columns[:widest] < num_pages[:, None]
        return StepPlan(
            step=step,
            num_decodes=num_decodes,
            num_tokens=int(query_lens.sum()),
            token_ids=_new_tokens(spans).tobytes(),
            slots=slots.tobytes(),
            query_lens=query_lens.tobytes(),
            kv_lens=kv_lens.tobytes(),
            page_indptr=page_indptr.tobytes(),
            page_indices=self._pages[slots, :widest][is_held].tobytes(),
            samples=self._plan_samples(spans, slots),
        )

    def _plan_samples(self, spans: Seq[Span], slots: NDArray[np.int32]) -> SamplePlan:
        rows = np.array([row for row, span in enumerate(spans) if span.samples], np.int32)
        position = np.array(
            [s.start + s.length - s.sequence.request.num_prompt_tokens for s in spans if s.samples], np.int32
        )
        drawn = slots[rows]
        return SamplePlan(
            rows=rows.tobytes(),
            temperature=self._temperature[drawn].tobytes(),
            top_k=self._top_k[drawn].tobytes(),
            top_p=self._top_p[drawn].tobytes(),
            min_p=self._min_p[drawn].tobytes(),
            seed=self._seed[drawn].tobytes(),
            choice_index=self._choice_index[drawn].tobytes(),
            position=position.tobytes(),
        )


def _new_tokens(spans: Seq[Span]) -> NDArray[np.int32]:
    parts = []
    for sequence, start, length, _ in spans:
        if start >= sequence.num_tokens:
            parts.append(_PENDING_TOKEN)
        else:
            parts.append(sequence.tokens[start : start + length])
    return np.concatenate(parts)


_PENDING_TOKEN = np.array([PENDING], np.int32)
