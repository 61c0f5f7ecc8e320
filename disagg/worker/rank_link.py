"""What rank 0 and another rank of one worker say to each other, over a private pair of sockets.

In order, both ways:

    rank 0 → rank   RankStart, MeetingAnswer…, then StepPlan, StepRetired and Submit as they come;
                    closed to end it
    rank → rank 0   MeetingPut and MeetingAsk…, RankReady | RankFailed, then Happened as it comes;
                    closed when it dies

Steps and transfer commands share the one stream: a page is pushed only after the step that
computed it has run on the rank that pushes. The pair has no name, so nobody else can connect; to a
rank on another node `nodes.py` extends it.
"""

import socket
import threading
from typing import Any

import msgspec
from msgspec import Raw, Struct

from disagg import errors
from disagg.config import WorkerConfig
from disagg.engine import StepPlan, StepRetired
from disagg.errors import DisaggError, WorkerError
from disagg.protocol import RankEndpoint
from disagg.transfer import (
    AbortPush,
    Arrived,
    AwaitKv,
    Command,
    Connect,
    Connected,
    ConnectFailed,
    Disconnect,
    Drain,
    Drained,
    Event,
    Fenced,
    FinishPush,
    PushChunk,
    PushComplete,
    PushFailed,
)

_LENGTH_BYTES = 4

# Numbered by place: append only, both ends are the same version anyway.
_KINDS: tuple[type, ...] = (
    Connect,
    Disconnect,
    PushChunk,
    FinishPush,
    AbortPush,
    AwaitKv,
    Drain,
    Connected,
    ConnectFailed,
    PushComplete,
    PushFailed,
    Fenced,
    Arrived,
    Drained,
)


class RankStart(Struct, frozen=True, array_like=True, tag="start"):
    """First to a rank: who it is."""

    config: WorkerConfig
    uuid: str
    rank: int
    host: str
    """Interface on which this rank listens for the others."""


class MeetingPut(Struct, frozen=True, array_like=True, tag="put"):
    """Leave something at the meeting of the tensor-parallel group."""

    key: str
    value: bytes


class MeetingAsk(Struct, frozen=True, array_like=True, tag="ask"):
    """Wait for what is left under a key; answered by MeetingAnswer, or the link closes."""

    key: str


class MeetingAnswer(Struct, frozen=True, array_like=True, tag="answer"):
    """What was left under the key that was asked for."""

    value: bytes


class Submit(Struct, frozen=True, array_like=True, tag="submit"):
    """For the rank's transfer thread."""

    kind: int
    command: Raw


class RankReady(Struct, frozen=True, array_like=True, tag="ready"):
    """Weights, pool and transfer agent are there."""

    endpoint: RankEndpoint


class RankFailed(Struct, frozen=True, array_like=True, tag="failed"):
    """The rank cannot go on; `kind` is the error's class."""

    kind: str
    reason: str


class Happened(Struct, frozen=True, array_like=True, tag="happened"):
    """An event of the rank's transfer thread."""

    kind: int
    event: Raw


ToRank = RankStart | MeetingAnswer | StepPlan | StepRetired | Submit
FromRank = MeetingPut | MeetingAsk | RankReady | RankFailed | Happened

TO_RANK = msgspec.msgpack.Decoder(ToRank)
FROM_RANK = msgspec.msgpack.Decoder(FromRank)


class Channel:
    """One end of the pair: whole frames of bytes, in order. One thread reads, any may send."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("rb")
        self._lock = threading.Lock()

    def send(self, payload: bytes) -> None:
        """Send one frame. Raises OSError where the other end is gone."""
        with self._lock:
            self._socket.sendall(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)

    def receive(self) -> bytes | None:
        """Wait for a frame; None once the other end is closed or dead."""
        try:
            header = self._reader.read(_LENGTH_BYTES)
            if len(header) < _LENGTH_BYTES:
                return None
            length = int.from_bytes(header, "little")
            payload = self._reader.read(length)
        except OSError:
            return None
        return payload if len(payload) == length else None

    def close(self) -> None:
        """Close this end: the other's `receive` returns None. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed before, or the other end is gone
        finally:
            self._socket.close()


def to_submit(command: Command) -> bytes:
    """Encode a command for another rank's transfer thread."""
    return msgspec.msgpack.encode(Submit(_KINDS.index(type(command)), _encode(command)))


def from_submit(message: Submit) -> Command:
    """Undo `to_submit`."""
    return _decode(message.kind, message.command)  # type: ignore[no-any-return]


def to_happened(event: Event) -> bytes:
    """Encode an event of this rank's transfer thread for rank 0."""
    return msgspec.msgpack.encode(Happened(_KINDS.index(type(event)), _encode(event)))


def from_happened(message: Happened) -> Event:
    """Undo `to_happened`."""
    return _decode(message.kind, message.event)  # type: ignore[no-any-return]


def to_error(kind: str, reason: str) -> DisaggError:
    """Make the error of ours that another rank named; a WorkerError for any other."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, DisaggError):
        return found(reason)
    return WorkerError(f"{kind}: {reason}")


def _encode(message: Command | Event) -> Raw:
    return Raw(msgspec.msgpack.encode(message, enc_hook=_from_error))


def _decode(kind: int, payload: Raw) -> Any:
    return msgspec.msgpack.decode(payload, type=_KINDS[kind], dec_hook=_to_foreign)


def _from_error(value: Any) -> Any:
    if isinstance(value, WorkerError):
        return (type(value).__name__, str(value))
    raise NotImplementedError(type(value).__name__)


def _to_foreign(kind: type, value: Any) -> Any:
    if kind is WorkerError:
        name, reason = value
        return to_error(name, reason)
    if kind is object:
        return value
    raise NotImplementedError(kind.__name__)
