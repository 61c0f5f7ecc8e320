"""What became of every request: one record each, bounded, newest first.

A record is written to while its request runs and stays true afterwards; `to_dict` is the body of
`/disagg/requests`. Nothing here is text of a prompt or an output. Records form no cycles and are
kept by the ten thousand, so the garbage collector is told not to walk them.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec
from msgspec import Struct, field

from disagg.protocol import FinishReason
from disagg.router.policy import Decision, Predicted


class CachedTokens(Struct, gc=False):
    """Prompt tokens that prefix caches held; the first attempt's, which computed the prompt."""

    prefill: int = 0
    decode: int = 0


class KvRecord(Struct, gc=False):
    """KV that moved for one sequence, summed over its attempts."""

    pages: int = 0
    bytes_expected: int = 0
    bytes_received: int = 0
    transport: str | None = None
    seconds: float = 0.0


class Phases(Struct, gc=False):
    """Seconds, summed over attempts; None where a sequence did not get so far or had no such phase."""

    queue_s: float | None = None
    """Arrival to the first hand-over."""
    reserve_s: float | None = None
    """Asking for decode pages to having them."""
    prefill_s: float | None = None
    """Hand-over of the prompt to its first token."""
    prefill_queue_s: float | None = None
    """Of that, in the prefill worker's queue."""
    prefill_compute_s: float | None = None
    """Of that, computing."""
    transfer_s: float | None = None
    """First token to the last KV byte: what the client could notice of the transfer."""
    decode_s: float | None = None
    """First token to the last."""
    ttft_s: float | None = None
    """Arrival to first token."""
    total_s: float | None = None
    """Arrival to end."""

    def add(self, name: str, seconds: float) -> None:
        """Add to one phase."""
        setattr(self, name, (getattr(self, name) or 0.0) + seconds)


class SequenceRecord(Struct, gc=False):
    """One sequence of a request."""

    index: int
    prompt_tokens: int
    decision: Decision | None = None
    reason: str | None = None
    prefill_worker: str | None = None
    decode_worker: str | None = None
    completion_tokens: int = 0
    cached_tokens: CachedTokens = field(default_factory=CachedTokens)
    predicted: Predicted | None = None
    kv: KvRecord = field(default_factory=KvRecord)
    attempts: int = 0
    failures: list[str] = field(default_factory=list)
    """Why each attempt but the last ended, oldest first."""
    phases: Phases = field(default_factory=Phases)
    finish_reason: FinishReason | None = None
    release: str | None = None
    """How both sides were told to let go: finished, aborted, cancelled, worker_lost, not_placed …"""


class RequestRecord(Struct, gc=False):
    """One HTTP request."""

    request_id: str
    client_request_id: str | None
    arrived_unix_s: float
    sequences: list[SequenceRecord]
    error: str | None = None
    """Kind of the error it was answered with, for example `PromptTooLong`."""

    @property
    def is_ended(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def to_dict(self) -> dict[str, Any]:
        """Body of `/disagg/requests/{id}`; `sequences` inside where there is more than one."""
        head = {
            "request_id": self.request_id,
            "client_request_id": self.client_request_id,
            "arrived_unix_s": self.arrived_unix_s,
        }
        total = self.total()
        body: dict[str, Any] = msgspec.to_builtins(total)
        del body["index"]
        if self.error is not None:
            body["error"] = self.error
        if len(self.sequences) > 1:
            body["sequences"] = [msgspec.to_builtins(sequence) for sequence in self.sequences]
        return head | body

    def total(self) -> SequenceRecord:
        """One sequence as it is; of several, sums, the most attempts, and the rest speaks for the request."""
        if len(self.sequences) == 1:
            return self.sequences[0]
        parts = self.sequences
        ended = self.is_ended
        return SequenceRecord(
            index=0,
            prompt_tokens=sum(s.prompt_tokens for s in parts),
            decision=_decision(parts),
            reason=_first(s.reason for s in parts),
            prefill_worker=_first(s.prefill_worker for s in parts),
            decode_worker=_first(s.decode_worker for s in parts),
            completion_tokens=sum(s.completion_tokens for s in parts),
            cached_tokens=CachedTokens(
                sum(s.cached_tokens.prefill for s in parts), sum(s.cached_tokens.decode for s in parts)
            ),
            predicted=_first(s.predicted for s in parts),
            kv=KvRecord(
                sum(s.kv.pages for s in parts),
                sum(s.kv.bytes_expected for s in parts),
                sum(s.kv.bytes_received for s in parts),
                _first(s.kv.transport for s in parts),
                sum(s.kv.seconds for s in parts),
            ),
            attempts=max(s.attempts for s in parts),  # 1 says that nothing was tried again
            failures=[failure for s in parts for failure in s.failures],
            phases=_phases([s.phases for s in parts]),
            finish_reason=_worst([s.finish_reason for s in parts]) if ended else None,
            release=_first(s.release for s in parts) if ended else None,
        )


class Ledger:
    """The newest `size` records. Looking one up and adding one are O(1)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: RequestRecord) -> None:
        """Add the newest; the oldest goes where there is no room, even if it still runs."""
        self._records[record.request_id] = record
        self._records.move_to_end(record.request_id)
        if len(self._records) > self._size:
            self._records.popitem(last=False)

    def get(self, request_id: str) -> RequestRecord | None:
        """The record of a request."""
        return self._records.get(request_id)

    def newest(self, limit: int) -> list[RequestRecord]:
        """Up to `limit` records, newest first."""
        return list(islice(reversed(self._records.values()), max(0, limit)))


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _decision(parts: list[SequenceRecord]) -> Decision | None:
    """`disaggregated` if any was: KV has moved for this request."""
    decisions = {s.decision for s in parts} - {None}
    return "disaggregated" if "disaggregated" in decisions else _first(decisions)


def _worst(reasons: list[FinishReason | None]) -> FinishReason | None:
    order: tuple[FinishReason, ...] = ("error", "abort", "length", "stop")
    return next((reason for reason in order if reason in reasons), _first(reasons))


def _phases(parts: list[Phases]) -> Phases:
    """The longest of each phase, but the first of the first tokens."""
    total = Phases()
    for name in Phases.__struct_fields__:
        known = [value for value in (getattr(part, name) for part in parts) if value is not None]
        if known:
            setattr(total, name, min(known) if name == "ttft_s" else max(known))
    return total
