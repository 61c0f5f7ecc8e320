"""A running request as the frontend holds it: tokens of all its sequences, as they come."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from disagg.errors import WorkerError
from disagg.frontend import Delta
from disagg.protocol import FinishReason
from disagg.router.ledger import RequestRecord
from disagg.router.sequence import Sequence


class RequestTicket:
    """The frontend's end of a request; see `Ticket`. Also the sink of its sequences.

    What comes while the frontend is busy is put together, a delta a sequence: the busier this
    process is, the less each token costs.
    """

    __slots__ = (
        "_clock",
        "_error",
        "_latest",
        "_num_open",
        "_on_settled",
        "_pending",
        "_waiter",
        "record",
        "sequences",
    )

    def __init__(
        self,
        record: RequestRecord,
        clock: Callable[[], float],
        on_settled: Callable[["RequestTicket"], None],
    ) -> None:
        self.record = record
        self.sequences: list[Sequence] = []
        self._clock = clock
        self._on_settled = on_settled
        self._num_open = len(record.sequences)
        self._pending: list[Delta] = []
        self._latest: dict[int, Delta] = {}
        self._error: WorkerError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # --- for the frontend --------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self.abort("aborted")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Delta]:
        if not self._pending:
            await self._something()
        batch, self._pending = self._pending, []
        self._latest.clear()
        return batch

    def stop_sequence(self, index: int, completion_tokens: int) -> None:
        """End one sequence at a stop string; no delta of it follows."""
        self.sequences[index].cut(completion_tokens, self._clock())
        if self._latest.pop(index, None) is not None:
            self._pending = [delta for delta in self._pending if delta.index != index]
        self._wake()

    def abort(self, release: str) -> None:
        """End whatever still runs."""
        if self._num_open:
            now = self._clock()
            for sequence in self.sequences:
                sequence.stop("abort", release, now)

    async def _something(self) -> None:
        """Wait until there is a delta, or raise what ends the iteration."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    # --- for the sequences -------------------------------------------------------------------

    def push(
        self, index: int, token_ids: list[int], finish: FinishReason | None, cached_tokens: int | None
    ) -> None:
        """Take tokens of a sequence, and its end."""
        latest = self._latest.get(index)
        if latest is None:
            # Copied: a later delta is added to it.
            delta = self._latest[index] = Delta(index, token_ids[:], finish, cached_tokens)
            self._pending.append(delta)
        else:
            latest.token_ids += token_ids
            latest.finish_reason = finish
            if cached_tokens is not None:
                latest.cached_tokens = cached_tokens
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: WorkerError) -> None:
        """Take the end of a sequence that has no result; it ends the request."""
        self._error = error
        self._wake()

    def on_closed(self) -> None:
        """Count a sequence whose record is closed."""
        self._num_open -= 1
        if not self._num_open:
            self._on_settled(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
