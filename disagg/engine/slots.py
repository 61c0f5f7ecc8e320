"""Per-slot tables of running sequences: a step reads and writes the rows of all of them at once.

A slot is a row of batch state that a sequence keeps from its begin until the last step that uses
it has retired, so a step in flight may name its sequences by their slots. The host's work is a few
numpy calls a step, whatever the batch.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disagg.engine.admission import MAX_INT32, Limits
from disagg.engine.plan import PENDING, SamplePlan, StepPlan, int32s, packed
from disagg.engine.sequence import PROGRESS, Sequence
from disagg.kv.prefix import NO_PAGES, PageIds

Slots = NDArray[np.int64]
"""Sequences by their slots."""
Counts = NDArray[np.int64]
"""One number for each of some slots."""


class Chunk(NamedTuple):
    """A prefilling sequence's share of one step: its tokens `[start, start + length)`."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool
    """It ends in the newest token, so its logits are drawn from."""


class SlotTable:
    """Progress, tokens, page rows and sampling parameters of up to `num_slots` running sequences."""

    def __init__(self, limits: Limits) -> None:
        num_slots, max_len = limits.max_num_seqs, limits.max_model_len
        self._page_size = limits.page_size
        self._free = list(range(num_slots))[::-1]
        self._sequences = np.empty(num_slots, np.object_)
        self._request_ids = np.empty(num_slots, np.object_)
        self._progress = np.zeros(num_slots, PROGRESS)
        self._num_tokens, self._num_computed = self._progress["num_tokens"], self._progress["num_computed"]
        self._num_planned, self._num_pages = self._progress["num_planned"], self._progress["num_pages"]
        self._limit_tokens = self._progress["limit_tokens"]
        self._is_decoding = self._progress["is_decoding"]
        self._tokens = np.empty((num_slots, max_len), np.int32)
        self._pages = np.empty((num_slots, limits.pages_of(max_len)), np.int32)
        self._page_run = self._pages.reshape(-1).data
        """The same, row after row."""
        self._may_stop = np.zeros(limits.vocab_size, np.bool_)
        """Tokens that would end some sequence, now or once."""
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
        """Give the sequence a slot; its rows move into the tables. Requires: one is free."""
        slot = self._free.pop()
        sampling = sequence.request.sampling
        self._temperature[slot] = sampling.temperature
        # Any number is a valid top_k; more than the vocabulary keeps all of it.
        self._top_k[slot] = min(sampling.top_k, MAX_INT32)
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sampling.seed
        self._choice_index[slot] = sampling.choice_index
        for token_id in sequence.stop_ids:
            if 0 <= token_id < len(self._may_stop):
                self._may_stop[token_id] = True
        num_tokens, num_pages = sequence.num_tokens, sequence.num_pages
        self._tokens[slot, :num_tokens] = sequence.tokens[:num_tokens]
        self._pages[slot, :num_pages] = sequence.pages[:num_pages]
        self._progress[slot] = sequence.progress
        sequence.tokens, sequence.pages = self._tokens[slot], self._pages[slot]
        sequence.progress = self._progress[slot, ...]
        self._request_ids[slot] = sequence.request.request_id
        self._sequences[slot] = sequence
        sequence.slot = slot

    def close(self, sequence: Sequence) -> None:
        """Take the slot back; the sequence keeps copies of its progress and its page row."""
        if sequence.slot is None:
            return
        sequence.pages = sequence.pages[: sequence.num_pages].copy()
        sequence.progress = sequence.progress.copy()
        sequence.tokens = NO_PAGES  # It runs no more, and only a running one's are needed.
        self._sequences[sequence.slot] = self._request_ids[sequence.slot] = None
        self._free.append(sequence.slot)
        sequence.slot = None

    def sequences(self, slots: Slots) -> list[Sequence]:
        """Who has these slots. Requires: somebody has."""
        found: list[Sequence] = self._sequences[slots].tolist()
        return found

    # --- decodes ------------------------------------------------------------------------------

    def decoding(self) -> Slots:
        """Sequences that the step after those in flight may still add a token to, oldest first."""
        is_open = self._is_decoding & (self._num_planned + 1 < self._limit_tokens)
        slots = is_open.nonzero()[0]
        return slots[self._progress["order"][slots].argsort()]

    def lack_page(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of them have no page for the next token."""
        return self._num_planned[slots] >= self._num_pages[slots] * self._page_size

    def add_pages(self, slots: Slots, page_ids: PageIds) -> None:
        """Give each of them one page more."""
        self._pages[slots, self._num_pages[slots]] = page_ids
        self._num_pages[slots] += 1

    def learn(self, plan: StepPlan, sampled: list[int]) -> "Learnt":
        """Append what a step has sampled to those of its decodes that have not stopped meanwhile."""
        slots = int32s(plan.slots)[: plan.num_decodes].astype(np.int64)
        lens = int32s(plan.kv_lens)[: plan.num_decodes].astype(np.int64)
        token_ids = np.array(sampled[: plan.num_decodes], np.int32)
        goes_on = self._is_decoding[slots]
        slots, lens, token_ids = slots[goes_on], lens[goes_on], token_ids[goes_on]
        self._tokens[slots, lens] = token_ids
        self._num_computed[slots] = lens
        self._num_tokens[slots] = lens + 1
        is_at_limit = lens + 1 >= self._limit_tokens[slots]
        rows = (is_at_limit | self._may_stop[token_ids] | (lens % self._page_size == 0)).nonzero()[0]
        return Learnt(
            self._request_ids[slots].tolist(),
            (lens - self._progress["num_prompt_tokens"][slots]).tolist(),
            token_ids.tolist(),
            list(zip(rows.tolist(), self.sequences(slots[rows]), strict=True)),
        )

    # --- plans --------------------------------------------------------------------------------

    def plan(self, step: int, decodes: Slots, chunks: Seq[Chunk]) -> StepPlan:
        """Write the buffers of one step, and note it as the newest of its sequences."""
        num_decodes = len(decodes)
        slots = np.concatenate((decodes, np.array([chunk.sequence.slot for chunk in chunks], np.int64)))
        query_lens, is_drawn = np.ones(len(slots), np.int64), np.ones(len(slots), np.bool_)
        query_lens[num_decodes:] = [chunk.length for chunk in chunks]
        is_drawn[num_decodes:] = [chunk.is_last for chunk in chunks]
        starts = self._num_planned[slots]
        kv_lens = starts + query_lens
        self._num_planned[slots] = kv_lens
        self._progress["last_step"][slots] = step
        num_pages = -(-kv_lens // self._page_size)
        page_indptr = np.zeros(len(slots) + 1, np.int64)
        num_pages.cumsum(out=page_indptr[1:])
        first_pages = slots * self._pages.shape[1]
        rows = zip(first_pages.tolist(), (first_pages + num_pages).tolist(), strict=True)
        return StepPlan(
            step=step,
            num_decodes=num_decodes,
            num_tokens=int(query_lens.sum()),
            token_ids=self._new_tokens(decodes, starts[:num_decodes], chunks),
            slots=packed(slots),
            query_lens=packed(query_lens),
            kv_lens=packed(kv_lens),
            page_indptr=packed(page_indptr),
            page_indices=b"".join([self._page_run[first:end] for first, end in rows]),
            samples=self._plan_samples(is_drawn.nonzero()[0], slots, kv_lens),
        )

    def _new_tokens(self, decodes: Slots, starts: Counts, chunks: Seq[Chunk]) -> bytes:
        is_known = starts < self._num_tokens[decodes]
        newest = np.where(is_known, self._tokens[decodes, starts], np.int32(PENDING))
        prompts = [sequence.tokens[start : start + length] for sequence, start, length, _ in chunks]
        return np.concatenate([newest, *prompts]).tobytes()

    def _plan_samples(self, rows: NDArray[np.int64], slots: Slots, kv_lens: Counts) -> SamplePlan:
        drawn = slots[rows]
        return SamplePlan(
            rows=packed(rows),
            temperature=self._temperature[drawn].tobytes(),
            top_k=self._top_k[drawn].tobytes(),
            top_p=self._top_p[drawn].tobytes(),
            min_p=self._min_p[drawn].tobytes(),
            seed=self._seed[drawn].tobytes(),
            choice_index=self._choice_index[drawn].tobytes(),
            position=packed(kv_lens[rows] - self._progress["num_prompt_tokens"][drawn]),
        )


class Learnt(NamedTuple):
    """One new token of each of some sequences."""

    request_ids: list[str]
    positions: list[int]
    """Output positions."""
    token_ids: list[int]
    notable: list[tuple[int, Sequence]]
    """Those that may end or have filled a page, each with its row in the other lists."""
