"""A generator without workers: replies by rule, or delta by delta as the test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from disagg.errors import DisaggError
from disagg.frontend import Delta, GenerateRequest
from disagg.protocol import FinishReason

Reply = Callable[[GenerateRequest, int], list[list[int]]]
"""The tokens of a sequence, in the pieces in which they are to come. Its last piece ends it."""


class FakeTicket:
    """One request. Says what the frontend did with it, and plays the worker's part when told to."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.entered = False
        self.left_with: type[BaseException] | None = None
        self.left = asyncio.Event()
        self.stopped: list[tuple[int, int]] = []
        self._open = set(range(len(request.prompts) * request.n))
        self._waiting: list[Delta] = []
        self._changed = asyncio.Event()
        self._error: DisaggError | None = None

    @property
    def aborted(self) -> bool:
        """Whether it was left with sequences still running."""
        return self.left.is_set() and bool(self._open)

    def push(
        self,
        *token_ids: int,
        index: int = 0,
        finish: FinishReason | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """Send tokens of one sequence; those pushed before the frontend looks come as one batch."""
        self._waiting.append(Delta(index, list(token_ids), finish, cached_tokens))
        if finish is not None:
            self._open.discard(index)
        self._changed.set()

    def fail(self, error: DisaggError) -> None:
        """Lose every worker."""
        self._error = error
        self._changed.set()

    async def __aenter__(self) -> Self:
        self.entered = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self.left_with = kind
        self.left.set()

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        while self._open or self._waiting:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            batch, self._waiting = self._waiting, []
            yield batch

    def stop_sequence(self, index: int, completion_tokens: int) -> None:
        self.stopped.append((index, completion_tokens))
        self._open.discard(index)
        self._changed.set()


class FakeGenerator:
    """Everything the frontend needs to know of what runs models."""

    def __init__(self, reply: Reply | None = None, context: int = 512) -> None:
        self.reply = reply
        self.context = context
        self.tickets: list[FakeTicket] = []
        self.submitted = asyncio.Event()
        self.rejected: list[tuple[str, str | None, DisaggError]] = []
        self.refusal: DisaggError | Exception | None = None
        self.is_healthy = True

    @property
    def request(self) -> GenerateRequest:
        """The only request so far."""
        (ticket,) = self.tickets
        return ticket.request

    async def ticket(self) -> FakeTicket:
        """Wait for the next request that is submitted."""
        await self.submitted.wait()
        self.submitted.clear()
        return self.tickets[-1]

    async def submit(self, request: GenerateRequest) -> FakeTicket:
        if self.refusal is not None:
            raise self.refusal
        ticket = FakeTicket(request)
        self.tickets.append(ticket)
        self.submitted.set()
        if self.reply is not None:
            for index in range(len(request.prompts) * request.n):
                self._play(ticket, index, self.reply(request, index))
        return ticket

    def _play(self, ticket: FakeTicket, index: int, pieces: list[list[int]]) -> None:
        for position, piece in enumerate(pieces):
            last = position == len(pieces) - 1
            full = sum(map(len, pieces)) >= ticket.request.sampling.max_tokens
            finish: FinishReason | None = ("length" if full else "stop") if last else None
            ticket.push(*piece, index=index, finish=finish, cached_tokens=None if position else 0)

    def max_model_len(self, model: str) -> int:
        return self.context

    def healthy(self) -> bool:
        return self.is_healthy

    def workers(self) -> list[dict[str, Any]]:
        return [{"id": "decode-0", "role": "decode"}]

    def records(self, limit: int) -> list[dict[str, Any]]:
        return [{"request_id": ticket.request.request_id} for ticket in reversed(self.tickets)][:limit]

    async def record(self, request_id: str) -> dict[str, Any] | None:
        found = [record for record in self.records(10**6) if record["request_id"] == request_id]
        return found[0] if found else None

    def metrics(self) -> bytes:
        return b"# TYPE disagg_requests_total counter\n"

    def note_rejected(self, request_id: str, client_request_id: str | None, error: DisaggError) -> None:
        self.rejected.append((request_id, client_request_id, error))
