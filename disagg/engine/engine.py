"""One engine: a scheduler, the runner that executes its plans, and the clock beside them."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from disagg.engine.admission import Limits
from disagg.engine.plan import StepPlan
from disagg.engine.rates import StepRates
from disagg.engine.request import Added, EngineRequest, EngineStats, Refused, Reservation, StepOutput
from disagg.engine.scheduler import Scheduler
from disagg.engine.sequence import State
from disagg.kv import KvCache

Sampled = Callable[[], list[int]]
"""Waits for a launched step: one sampled token for each sample of its plan, in its order."""


class Runner(Protocol):
    """Executes planned steps on all ranks of one engine, in the order of their launch."""

    @property
    def depth(self) -> int:
        """Steps that may still run while the next is planned and launched: 0 runs each in `launch`."""
        ...

    def launch(self, plan: StepPlan) -> Sampled:
        """Begin one step; its tokens may be PENDING in the plans that follow."""
        ...

    def wait(self, step: int) -> None:
        """Wait until a step has ended on this rank, which rank 0 has retired or is about to."""
        ...


class _Flight(NamedTuple):
    plan: StepPlan
    sampled: Sampled
    launched_at: float


class Engine:
    """Computes requests in steps. One thread calls everything here, pages and events included.

    Host and device overlap: a step is launched before the one ahead of it has been retired, so that
    the device finds its next work waiting. See `Scheduler` for what that asks of it.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        cache: KvCache,
        limits: Limits,
        eos_token_ids: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.limits = limits
        self._runner = runner
        self._clock = clock
        self._rates = StepRates()
        self._num_steps = 0
        self._flights: deque[_Flight] = deque()
        self._retired_at = 0.0
        self._scheduler = Scheduler(
            cache=cache, limits=limits, eos_token_ids=frozenset(eos_token_ids), clock=clock
        )

    def add(self, request: EngineRequest) -> Added | Refused:
        """Queue a request for prefill, and decode unless `prefill_only`. Never raises on client input."""
        return self._scheduler.add(request)

    def reserve(self, request: EngineRequest, cap_match: bool) -> Reservation | Refused:
        """Take pages for a prompt whose KV comes from elsewhere, and for the next page of output."""
        return self._scheduler.reserve(request, cap_match)

    def start(self, request_id: str, token_id: int, finished: bool) -> None:
        """Decode a reservation: its KV has landed and `token_id`, of any value, was sampled elsewhere."""
        self._scheduler.start(request_id, token_id, finished)

    def abort(self, request_id: str, keep_pages: bool = False) -> None:
        """Stop a request in any state; with `keep_pages`, what it holds stays until `release`. Idempotent."""
        self._scheduler.abort(request_id, keep_pages)

    def release(self, request_id: str) -> None:
        """Free what a request holds, whatever its state. Idempotent."""
        self._scheduler.release(request_id)

    def quarantine(self, request_id: str) -> list[int]:
        """Abort a reservation and return the pages that stay in use until `unquarantine`."""
        return self._scheduler.quarantine(request_id)

    def unquarantine(self, page_ids: list[int]) -> None:
        """Free quarantined pages: no write can reach them any more."""
        self._scheduler.unquarantine(page_ids)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to step for. A step does nothing where all of it waits for pages."""
        if self._flights:
            return True
        return self._scheduler.count(State.WAITING, State.READY, State.PREFILLING, State.DECODING) > 0

    def step(self) -> StepOutput | None:
        """Launch the next step and retire the oldest; None where there is nothing to do and nothing to tell.

        The first step of a run retires none, and the last launches none.
        """
        now = self._clock()
        plan = self._scheduler.plan()
        if plan is not None:
            self._flights.append(_Flight(plan, self._runner.launch(plan), now))
        if plan is not None and len(self._flights) <= self._runner.depth:
            return StepOutput(events=self._scheduler.take_events())
        if not self._flights:
            events = self._scheduler.take_events()
            return StepOutput(events=events) if events else None
        return self._retire(self._flights.popleft())

    def _retire(self, flight: _Flight) -> StepOutput:
        plan = flight.plan
        tokens = flight.sampled()
        # It began when it was launched, or when the device had done the one before it.
        began_at, self._retired_at = max(flight.launched_at, self._retired_at), self._clock()
        events = self._scheduler.retire(plan, tokens)
        step_s = self._retired_at - began_at
        num_prefill_tokens = plan.num_tokens - plan.num_decodes
        self._num_steps += 1
        self._rates.record(num_prefill_tokens, plan.num_decodes, step_s)
        return StepOutput(
            events=events,
            num_prefill_tokens=num_prefill_tokens,
            num_decode_tokens=plan.num_decodes,
            step_s=step_s,
        )

    def stats(self) -> EngineStats:
        """Count what there is."""
        scheduler, cache = self._scheduler, self.cache
        return EngineStats(
            running=scheduler.count(State.PREFILLING, State.DECODING, State.LAST_CHUNK, State.READY),
            waiting=scheduler.count(State.WAITING),
            reserved=scheduler.count(State.RESERVED),
            held=scheduler.count(State.HELD),
            queued_tokens=scheduler.num_queued_tokens,
            pages_total=cache.num_pages,
            pages_free=cache.num_free,
            pages_cached=cache.num_cached,
            pages_in_use=cache.num_in_use,
            pages_quarantined=scheduler.num_quarantined,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            num_steps=self._num_steps,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=scheduler.num_output_tokens,
            num_handed_back=scheduler.num_handed_back,
        )

    def audit(self) -> None:
        """Raise InvariantBroken unless every page and slot has exactly one holder."""
        self._scheduler.audit()
