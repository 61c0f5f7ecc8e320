"""What runs next, and what became of it.

`plan()` decides one step and `retire()` takes its result. Several plans may be in flight between
the two: what they touch stays as it is until they retire. A sequence that is aborted or ends
meanwhile is planned no more, and its pages, its lock and its slot are freed by the retirement of
the last step that uses them; likewise a page that turned out to duplicate a cached one.

Pages never deadlock. A waiting sequence holds none; one that begins takes all that its prompt
needs, so a prefill never stops halfway for want of pages; a decode that finds none hands the
youngest running sequence back, and the oldest always goes on. Nobody starves: sequences begin in
the order of their arrival, and while the first of them lacks pages nothing is reserved.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter

import numpy as np
from msgspec.structs import replace

from disagg.engine.admission import Limits, checked_limits, chunk_end, limit_tokens, pages_to_begin, refuse
from disagg.engine.plan import StepPlan
from disagg.engine.request import Added, ChunkDone, EngineRequest, Event, Refused, Reservation, SequenceOutput
from disagg.engine.sequence import Sequence, State
from disagg.engine.slots import Chunk, Slots, SlotTable
from disagg.errors import InvariantBroken
from disagg.kv import KvCache, PageIds
from disagg.protocol import FinishReason

_BY_AGE = attrgetter("order")
_STOPPED = (State.HELD, State.ENDED)


class Scheduler:
    """Continuous batching over one KV cache. One thread; knows nothing of models and devices."""

    def __init__(
        self, *, cache: KvCache, limits: Limits, eos_token_ids: frozenset[int], clock: Callable[[], float]
    ) -> None:
        self.limits = checked_limits(limits)
        self._cache = cache
        self._eos = eos_token_ids
        self._clock = clock
        self._slots = SlotTable(self.limits)
        self._sequences: dict[str, Sequence] = {}
        self._in: dict[State, dict[str, Sequence]] = {state: {} for state in State}
        self._num_added = 0
        self._num_waiting_tokens = 0
        self._lacks_pages: str | None = None
        self._step = 0
        self._retired = 0
        self._flights: deque[tuple[int, list[Chunk]]] = deque()
        self._pinned_pages: list[tuple[int, PageIds]] = []
        self._pinned_sequences: list[Sequence] = []
        self._quarantined: set[int] = set()
        self._events: list[Event] = []
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_handed_back = 0

    # --- requests -----------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> Added | Refused:
        """Queue a request for prefill, and decode unless `prefill_only`."""
        num_tokens = len(request.token_ids)
        refused = self._refuse(request)
        if refused is not None:
            return refused
        if self._num_waiting_tokens and self._num_waiting_tokens + num_tokens > self.limits.max_queued_tokens:
            return Refused("queue_full", f"{self._num_waiting_tokens} prompt tokens wait already")
        self._enter(request, State.WAITING)
        self._num_waiting_tokens += num_tokens
        return Added(request.request_id)

    def reserve(self, request: EngineRequest, cap_match: bool) -> Reservation | Refused:
        """Take pages for a prompt whose KV comes from elsewhere, and for the next page of output.

        With `cap_match` the prefix match ends before the last token's page, so that at least one
        page is missing.
        """
        refused = self._refuse(request)
        if refused is not None:
            return refused
        if len(self._in[State.RESERVED]) + len(self._in[State.READY]) >= self.limits.max_num_seqs:
            return Refused("queue_full", f"{self.limits.max_num_seqs} reservations wait already")
        if self._lacks_pages in self._in[State.WAITING]:
            # Or a stream of reservations would take every page that comes free before it.
            return Refused("no_pages", "a queued request awaits pages")
        num_tokens = len(request.token_ids)
        sequence = self._enter(request, State.RESERVED)
        if not self._take_prompt_pages(sequence, num_tokens - 1 if cap_match else num_tokens):
            self._stop(sequence, State.ENDED)
            return Refused("no_pages", f"{self._cache.num_available} pages are available")
        return Reservation(
            request.request_id,
            sequence.num_committed,
            sequence.pages[: self.limits.pages_of(num_tokens)].tolist(),
            sequence.cached_tokens,
        )

    def start(self, request_id: str, token_id: int, finished: bool) -> None:
        """Decode a reservation: its KV has landed and `token_id` was sampled elsewhere.

        `finished` says that this token ended the sequence. Does nothing for an attempt that was
        aborted meanwhile; one whose token is none of this vocabulary ends in an error.
        """
        sequence = self._in[State.RESERVED].get(request_id)
        if sequence is None:
            return
        if not 0 <= token_id < self.limits.vocab_size:
            # Another model's worker sent it. Its KV is as useless, and must not be cached.
            self._events.append(_end_of(sequence, "error"))
            self._stop(sequence, State.ENDED)
            return
        sequence.num_computed = sequence.num_planned = sequence.num_tokens
        sequence.append(token_id)
        reason = sequence.end_reason
        self._commit(sequence)
        if finished or reason is not None:
            if not finished:
                # Only if the two workers disagree about end tokens; silence would hang the client.
                self._events.append(_end_of(sequence, reason))
            self._stop(sequence, State.ENDED)
        else:
            self._move(sequence, State.READY)

    def abort(self, request_id: str, keep_pages: bool = False) -> None:
        """Stop a request in any state. Idempotent; emits no event.

        With `keep_pages` the pages of one that has begun stay until `release`, for writes that
        still read them.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        holds = sequence.state is not State.WAITING
        self._stop(sequence, State.HELD if keep_pages and holds else State.ENDED)

    def release(self, request_id: str) -> None:
        """Free what a request holds, whatever its state. Idempotent."""
        self.abort(request_id)

    def quarantine(self, request_id: str) -> list[int]:
        """Abort a reservation, but keep the pages that a remote write may still reach.

        Returns those pages: in use and nobody's until `unquarantine`. Empty for a request that is
        unknown or has started, for then its writes have landed; that one is aborted.
        """
        sequence = self._in[State.RESERVED].get(request_id)
        if sequence is None:
            self.abort(request_id)
            return []
        end = self.limits.pages_of(sequence.num_tokens)
        missing: list[int] = sequence.pages[sequence.num_committed : end].tolist()
        sequence.pages = np.delete(sequence.pages, slice(sequence.num_committed, end))
        sequence.num_pages = len(sequence.pages)
        self._quarantined.update(missing)
        self._stop(sequence, State.ENDED)
        return missing

    def unquarantine(self, page_ids: list[int]) -> None:
        """Free quarantined pages: no write can reach them any more."""
        if not self._quarantined.issuperset(page_ids):
            raise InvariantBroken(f"not quarantined: {sorted(set(page_ids) - self._quarantined)}")
        self._quarantined.difference_update(page_ids)
        self._cache.give_back(np.array(page_ids, np.int32))

    # --- steps --------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Decide the next step: every decode, then prefill chunks with the rest of the token budget.

        None where nothing can run; there may still be events to take.
        """
        decodes = self._plan_decodes()
        chunks = self._plan_chunks(self.limits.max_num_batched_tokens - len(decodes))
        if not chunks and not len(decodes):
            return None
        self._step += 1
        self._flights.append((self._step, chunks))
        return self._slots.plan(self._step, decodes, chunks)

    def retire(self, plan: StepPlan, sampled: list[int]) -> list[Event]:
        """Take the result of the oldest step in flight: one token for each sample of the plan."""
        step, chunks = self._flights.popleft()
        if step != plan.step or len(sampled) != plan.num_samples:
            raise InvariantBroken(
                f"step {step} awaits retirement, not {plan.step} with {len(sampled)} samples"
            )
        self._retired = step
        self._retire_decodes(plan, sampled)
        tokens = islice(sampled, plan.num_decodes, None)
        for chunk in chunks:
            token_id = next(tokens) if chunk.is_last else None
            if chunk.sequence.state not in _STOPPED:
                self._retire_chunk(chunk, token_id)
        self._unpin()
        return self.take_events()

    def take_events(self) -> list[Event]:
        """Everything that happened since the last call."""
        events, self._events = self._events, []
        return events

    # --- what there is --------------------------------------------------------------------------

    def count(self, *states: State) -> int:
        """Sequences in any of these states."""
        return sum(len(self._in[state]) for state in states)

    @property
    def num_quarantined(self) -> int:
        """Pages that nobody may touch until they are fenced."""
        return len(self._quarantined)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        prefilling = self._in[State.PREFILLING].values()
        return self._num_waiting_tokens + sum(s.num_tokens - s.num_computed for s in prefilling)

    def audit(self) -> None:
        """Raise InvariantBroken unless every private page has exactly one holder and every slot too."""
        self._cache.audit()
        held = [sequence.private_pages for sequence in self._holders()]
        held += [pages for _, pages in self._pinned_pages]
        held.append(np.array(sorted(self._quarantined), np.int32))
        pages = np.sort(np.concatenate(held))
        if not np.array_equal(pages, self._cache.private_pages()):
            raise InvariantBroken(
                f"pages held {pages.tolist()}, owned {self._cache.private_pages().tolist()}"
            )
        slots = [sequence.slot for sequence in self._holders() if sequence.slot is not None]
        if len(set(slots)) != len(slots) or len(slots) + self._slots.num_free != self.limits.max_num_seqs:
            raise InvariantBroken(f"slots held {sorted(slots)}, {self._slots.num_free} free")

    def _holders(self) -> Iterator[Sequence]:
        yield from self._sequences.values()
        yield from (s for s in self._pinned_sequences if s.state is State.ENDED)

    # --- planning -------------------------------------------------------------------------------

    def _plan_decodes(self) -> Slots:
        ready = self._in[State.READY]
        while ready and self._slots.num_free:
            sequence = next(iter(ready.values()))
            self._slots.open(sequence)
            self._move(sequence, State.DECODING)
        slots = self._slots.decoding()
        lacking = slots[self._slots.lack_page(slots)]
        if not len(lacking):
            return slots
        pages = self._cache.take(len(lacking))
        if pages is not None:
            self._slots.add_pages(lacking, pages)
            return slots
        # Not enough for all. Oldest first, so that nobody is handed back for a younger one.
        for sequence in self._slots.sequences(lacking):
            self._make_room(sequence)
        slots = self._slots.decoding()
        return slots[~self._slots.lack_page(slots)]

    def _make_room(self, sequence: Sequence) -> None:
        """Have a page for the sequence's next token, handing others back for it where needed."""
        while sequence.state is State.DECODING:
            if (pages := self._cache.take(1)) is not None:
                sequence.pages[sequence.num_pages] = pages[0]
                sequence.num_pages += 1
                return
            if self._pinned_sequences or self._pinned_pages:
                return  # The retirement of a step in flight will free some; wait for it.
            self._hand_back(max(self._may_hand_back(), key=_BY_AGE))

    def _may_hand_back(self) -> Iterator[Sequence]:
        yield from self._in[State.DECODING].values()
        yield from self._in[State.READY].values()
        # Not a prefill_only one: its pages are being sent elsewhere.
        yield from (s for s in self._in[State.PREFILLING].values() if not s.request.prefill_only)

    def _hand_back(self, sequence: Sequence) -> None:
        self.num_handed_back += 1
        self._events.append(_end_of(sequence, "handed_back"))
        self._stop(sequence, State.ENDED)

    def _plan_chunks(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self._in[State.PREFILLING].values()):
            if budget > 0:
                chunks.append(self._plan_chunk(sequence, budget))
                budget -= chunks[-1].length
        waiting = self._in[State.WAITING]
        self._lacks_pages = None
        while budget > 0 and waiting and self._slots.num_free:
            sequence = next(iter(waiting.values()))
            if not self._begin(sequence):
                self._lacks_pages = sequence.request.request_id
                break
            chunks.append(self._plan_chunk(sequence, budget))
            budget -= chunks[-1].length
        return chunks

    def _plan_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.num_planned
        end = chunk_end(start, sequence.num_tokens, budget, self._cache.page_size)
        is_last = end == sequence.num_tokens
        if is_last:
            self._move(sequence, State.LAST_CHUNK if sequence.request.prefill_only else State.DECODING)
        return Chunk(sequence, start, end - start, is_last)

    def _begin(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its pages and a slot, or leave it waiting."""
        if not self._take_prompt_pages(sequence, sequence.num_tokens - 1):
            return False
        self._num_waiting_tokens -= sequence.num_tokens
        self.num_prompt_tokens += sequence.num_tokens
        self.num_cached_tokens += sequence.cached_tokens
        sequence.started_at = self._clock()
        self._slots.open(sequence)
        self._move(sequence, State.PREFILLING)
        return True

    def _take_prompt_pages(self, sequence: Sequence, max_match_tokens: int) -> bool:
        """Lock the prefix match and take the other pages to begin with, or neither.

        One page for each running decode is left alone, or a sequence that has just begun would
        often be handed back at once, its work lost.
        """
        request = sequence.request
        match = self._cache.match(
            sequence.tokens[: sequence.num_tokens], request.cache_salt, max_match_tokens
        )
        num_missing = pages_to_begin(request, self.limits) - len(match.page_ids)
        spare = self.count(State.DECODING, State.READY)
        enough = num_missing + spare <= self._cache.num_available
        pages = self._cache.take(num_missing) if enough else None
        if pages is None:
            self._cache.unlock(match.node)
            return False
        sequence.node = match.node
        sequence.pages = np.concatenate((match.page_ids, pages))
        sequence.num_pages = len(sequence.pages)
        sequence.num_committed = sequence.num_offered = len(match.page_ids)
        sequence.num_computed = sequence.num_planned = sequence.cached_tokens = match.num_tokens
        return True

    # --- retiring -------------------------------------------------------------------------------

    def _retire_decodes(self, plan: StepPlan, sampled: list[int]) -> None:
        learnt = self._slots.learn(plan, sampled)
        self.num_output_tokens += len(learnt.token_ids)
        news = zip(learnt.request_ids, learnt.positions, learnt.token_ids, strict=True)
        outputs = [SequenceOutput(request_id=i, position=at, token_ids=[token]) for i, at, token in news]
        for row, sequence in learnt.notable:
            self._commit(sequence)
            if (reason := sequence.end_reason) is not None:
                outputs[row] = replace(outputs[row], finish_reason=reason)
                self._stop(sequence, State.ENDED)
        self._events += outputs

    def _retire_chunk(self, chunk: Chunk, token_id: int | None) -> None:
        sequence = chunk.sequence
        sequence.num_computed = chunk.start + chunk.length
        if token_id is not None:
            sequence.append(token_id)
        self._commit(sequence)
        if token_id is not None:
            self._events.append(self._first_output(sequence, token_id))
        if sequence.request.prefill_only:
            self._events.append(self._chunk_done(sequence, is_last=token_id is not None))
            if token_id is not None:
                self._stop(sequence, State.HELD)
        elif token_id is not None and sequence.end_reason is not None:
            self._stop(sequence, State.ENDED)

    def _first_output(self, sequence: Sequence, token_id: int) -> SequenceOutput:
        self.num_output_tokens += 1
        return SequenceOutput(
            request_id=sequence.request.request_id,
            position=sequence.position - 1,
            token_ids=[token_id],
            finish_reason=sequence.end_reason,
            cached_tokens=sequence.cached_tokens,
            queue_s=sequence.started_at - sequence.added_at,
            compute_s=self._clock() - sequence.started_at,
        )

    def _chunk_done(self, sequence: Sequence, is_last: bool) -> ChunkDone:
        num_full = sequence.num_computed // self._cache.page_size
        num_pages = sequence.num_pages if is_last else num_full
        return ChunkDone(
            request_id=sequence.request.request_id,
            num_computed=sequence.num_computed,
            page_ids=sequence.pages[:num_pages].tolist(),
            is_last=is_last,
        )

    def _commit(self, sequence: Sequence) -> None:
        """Offer newly full pages to the prefix cache and take its pages over where it had them already."""
        size, first = self._cache.page_size, sequence.num_committed
        num_full = sequence.num_computed // size
        if num_full <= sequence.num_offered:
            return
        assert sequence.node is not None
        commit = self._cache.commit(
            sequence.tokens[first * size : num_full * size],
            sequence.pages[first:num_full],
            sequence.request.cache_salt,
            sequence.node,
        )
        sequence.node = commit.node
        sequence.num_offered = num_full
        sequence.num_committed = first + len(commit.page_ids)
        sequence.pages[first : sequence.num_committed] = commit.page_ids
        if len(commit.surplus):
            self._give_back_after(sequence.last_step, commit.surplus)

    # --- ends -----------------------------------------------------------------------------------

    def _stop(self, sequence: Sequence, state: State) -> None:
        """Plan the sequence no more; it lets go of things now, or when its steps have retired."""
        if sequence.state is State.WAITING:
            self._num_waiting_tokens -= sequence.num_tokens
        self._move(sequence, state)
        if sequence.last_step <= self._retired:
            self._let_go(sequence)
        elif sequence not in self._pinned_sequences:
            self._pinned_sequences.append(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self._slots.close(sequence)
        if sequence.state is State.ENDED:
            if sequence.node is not None:
                self._cache.unlock(sequence.node)
            self._cache.give_back(sequence.private_pages)
            sequence.num_pages = sequence.num_committed

    def _give_back_after(self, step: int, pages: PageIds) -> None:
        if step <= self._retired:
            self._cache.give_back(pages)
        else:
            self._pinned_pages.append((step, pages))

    def _unpin(self) -> None:
        """Let go of what waited for the step that has just retired."""
        if self._pinned_pages:
            due = [pages for step, pages in self._pinned_pages if step <= self._retired]
            self._pinned_pages = [(step, p) for step, p in self._pinned_pages if step > self._retired]
            for pages in due:
                self._cache.give_back(pages)
        if self._pinned_sequences:
            settled = [s for s in self._pinned_sequences if s.last_step <= self._retired]
            self._pinned_sequences = [s for s in self._pinned_sequences if s.last_step > self._retired]
            for sequence in settled:
                self._let_go(sequence)

    def _refuse(self, request: EngineRequest) -> Refused | None:
        if request.request_id in self._sequences:
            return Refused("invalid", f"request {request.request_id} is known already")
        return refuse(request, self.limits)

    def _enter(self, request: EngineRequest, state: State) -> Sequence:
        self._num_added += 1
        eos = frozenset() if request.sampling.ignore_eos else self._eos
        sequence = Sequence(
            request,
            state=state,
            limit_tokens=limit_tokens(request, self.limits),
            stop_ids=eos.union(request.sampling.stop_token_ids),
            order=self._num_added,
            added_at=self._clock(),
        )
        self._sequences[request.request_id] = self._in[state][request.request_id] = sequence
        return sequence

    def _move(self, sequence: Sequence, state: State) -> None:
        request_id = sequence.request.request_id
        if sequence.state is state:
            return
        if sequence.state is not State.ENDED:
            del self._in[sequence.state][request_id]
        sequence.state = state
        sequence.progress["is_decoding"] = state is State.DECODING
        if state is State.ENDED:
            del self._sequences[request_id]
        else:
            self._in[state][request_id] = sequence


def _end_of(sequence: Sequence, reason: FinishReason | None) -> SequenceOutput:
    return SequenceOutput(
        request_id=sequence.request.request_id,
        position=sequence.position,
        token_ids=[],
        finish_reason=reason,
    )
