"""What the frontend sees of the router: requests in, tokens out, and the books on both."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec.structs import replace

from disagg.errors import DisaggError, PromptTooLong, Unauthorized, WorkerError
from disagg.frontend import GenerateRequest
from disagg.router.dispatch import Dispatcher
from disagg.router.hashes import PromptHashes
from disagg.router.ledger import Ledger, RequestRecord, SequenceRecord
from disagg.router.sequence import Sequence
from disagg.router.ticket import RequestTicket
from disagg.telemetry import fields

log = logging.getLogger(__name__)

AskPeers = Callable[[str], Awaitable[bytes | None]]
"""Returns the record of a request id as JSON, or None."""


class RouterService:
    """The router as a `Generator`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        ledger: Ledger,
        *,
        unix_time: Callable[[], float] = time.time,
        ask_peers: AskPeers | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._unix_time = unix_time
        self._ask_peers = ask_peers
        self._open: set[RequestTicket] = set()
        self._is_draining = False
        self._drained = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    async def submit(self, request: GenerateRequest) -> RequestTicket:
        """Queue a request; see `Generator`. A refusal is in the ledger as well."""
        try:
            self._check(request)
        except DisaggError as error:
            self._note_refused(request, error)
            raise
        record = self._record(request)
        ticket = RequestTicket(record, self._dispatcher.now, self._on_settled)
        ticket.sequences = self._sequences(request, ticket)
        self._ledger.add(record)
        self._open.add(ticket)
        self._dispatcher.submit(ticket.sequences)
        return ticket

    def max_model_len(self, model: str) -> int:
        """Longest prompt plus output, tokens."""
        del model  # one router serves one model, and the frontend has checked its name
        length = self._dispatcher.registry.max_model_len()
        if length is None:
            raise WorkerError("no worker has been seen yet")
        return length

    def healthy(self) -> bool:
        """Whether a new request would be served at once."""
        return not self._is_draining and any(worker.can_decode for worker in self._dispatcher.registry)

    def workers(self) -> list[dict[str, Any]]:
        """Every worker that was ever seen, by id."""
        seen = [worker for worker in self._dispatcher.registry if worker.welcome is not None]
        incompatible = self._dispatcher.registry.incompatible
        return [
            worker.describe() | {"incompatible": incompatible(worker)}
            for worker in sorted(seen, key=lambda worker: worker.name)
        ]

    def records(self, limit: int) -> list[dict[str, Any]]:
        """Newest first."""
        return [record.to_dict() for record in self._ledger.newest(limit)]

    async def record(self, request_id: str) -> dict[str, Any] | None:
        """One record, of another router if it is not ours."""
        record = self._ledger.get(request_id)
        if record is not None:
            return record.to_dict()
        theirs = await self._ask_peers(request_id) if self._ask_peers is not None else None
        return None if theirs is None else msgspec.json.decode(theirs, type=dict[str, Any])

    def own_record(self, request_id: str) -> bytes | None:
        """One of our own records as JSON, for another router."""
        record = self._ledger.get(request_id)
        return None if record is None else msgspec.json.encode(record.to_dict())

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._dispatcher.metrics.render()

    def note_rejected(self, request_id: str, client_request_id: str | None, error: DisaggError) -> None:
        """Put what was never submitted in the ledger."""
        self._add_refused(request_id, client_request_id, [0], error)

    async def drain(self, seconds: float) -> bool:
        """Refuse what is new and wait for what runs; False where `seconds` were not enough.

        What then still runs is ended.
        """
        self._is_draining = True
        self._drained.clear()
        if self._open:
            log.info("draining %s", fields(requests=len(self._open), seconds=seconds))
            try:
                async with asyncio.timeout(seconds):
                    await self._drained.wait()
            except TimeoutError:
                self.abort_all()
                return False
        return True

    def abort_all(self) -> None:
        """End whatever runs: its clients get an error."""
        self._is_draining = True
        for ticket in list(self._open):
            ticket.abort("aborted")
            ticket.fail(WorkerError("the router is stopping"))

    # --- taking in ---------------------------------------------------------------------------

    def _check(self, request: GenerateRequest) -> None:
        if self._is_draining:
            raise WorkerError("the router is draining")
        if not self._dispatcher.may_decode():
            raise WorkerError("no decode worker is ready")
        limit = self.max_model_len("")
        longest = max(map(len, request.prompts))
        if longest >= limit:
            raise PromptTooLong(f"the prompt has {longest} tokens, the context holds {limit}")
        num_tokens = sum(map(len, request.prompts)) * request.n
        self._dispatcher.queue.check_room(num_tokens, self._dispatcher.prefill_tokens_per_s())

    def _record(self, request: GenerateRequest) -> RequestRecord:
        return RequestRecord(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            arrived_unix_s=self._unix_time(),
            sequences=[
                SequenceRecord(index=prompt_index * request.n + choice, prompt_tokens=len(prompt))
                for prompt_index, prompt in enumerate(request.prompts)
                for choice in range(request.n)
            ],
        )

    def _sequences(self, request: GenerateRequest, ticket: RequestTicket) -> list[Sequence]:
        now = self._dispatcher.now()
        hashes = [PromptHashes(prompt, request.cache_salt) for prompt in request.prompts]
        choices = [
            request.sampling,
            *(replace(request.sampling, choice_index=c) for c in range(1, request.n)),
        ]
        return [
            Sequence(
                self._dispatcher,
                ticket,
                record,
                transfer_id=f"{request.request_id}-{record.index}",
                prompt=request.prompts[record.index // request.n],
                hashes=hashes[record.index // request.n],
                sampling=choices[record.index % request.n],
                cache_salt=request.cache_salt,
                override=request.decision_override,
                now=now,
            )
            for record in ticket.record.sequences
        ]

    def _note_refused(self, request: GenerateRequest, error: DisaggError) -> None:
        lengths = [len(prompt) for prompt in request.prompts for _ in range(request.n)]
        self._add_refused(request.request_id, request.client_request_id, lengths, error)

    def _add_refused(
        self, request_id: str, client_request_id: str | None, prompt_lengths: list[int], error: DisaggError
    ) -> None:
        kind = type(error).__name__
        sequences = [
            SequenceRecord(index=index, prompt_tokens=length, finish_reason="error", release="not_placed")
            for index, length in enumerate(prompt_lengths)
        ]
        if not isinstance(error, Unauthorized):  # who has no key must not push other records out
            self._ledger.add(
                RequestRecord(request_id, client_request_id, self._unix_time(), sequences, error=kind)
            )
        self._dispatcher.metrics.rejected.labels(kind).inc()
        # The client is not told why no worker serves it.
        why = error if isinstance(error, WorkerError) else None
        log.info("request refused %s", fields(id=request_id, error=kind, why=why))

    # --- settling ----------------------------------------------------------------------------

    def _on_settled(self, ticket: RequestTicket) -> None:
        """Every sequence has ended: count it and say so."""
        self._open.discard(ticket)
        if not self._open:
            self._drained.set()
        total = ticket.record.total()
        metrics, phases = self._dispatcher.metrics, total.phases
        metrics.requests.labels(total.decision or "none", total.finish_reason).inc()
        metrics.prompt_tokens.inc(total.prompt_tokens)
        metrics.completion_tokens.inc(total.completion_tokens)
        if phases.ttft_s is not None:
            metrics.ttft_s.observe(phases.ttft_s)
            for sequence in ticket.record.sequences:
                gaps = sequence.completion_tokens - 1
                if gaps > 0 and sequence.phases.decode_s is not None:
                    metrics.tpot_s.observe(sequence.phases.decode_s / gaps)
        if phases.total_s is not None:
            metrics.request_s.observe(phases.total_s)
        _log(ticket.record, total)


def _log(record: RequestRecord, total: SequenceRecord) -> None:
    phases = total.phases
    log.info(
        "request ended %s",
        fields(
            id=record.request_id,
            finish=total.finish_reason,
            decision=total.decision,
            reason=total.reason,
            prompt=total.prompt_tokens,
            output=total.completion_tokens,
            cached=total.cached_tokens.prefill or total.cached_tokens.decode,
            prefill=total.prefill_worker,
            decode=total.decode_worker,
            kv_bytes=total.kv.bytes_received,
            attempts=total.attempts,
            queue_ms=_ms(phases.queue_s),
            ttft_ms=_ms(phases.ttft_s),
            total_ms=_ms(phases.total_s),
            failures="; ".join(total.failures) or None,
        ),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
