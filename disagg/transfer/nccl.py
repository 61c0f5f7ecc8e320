"""KV over NCCL: pages go by grouped sends and receives between GPUs, word of them by NIXL's notifications.

For GPUs between which NCCL has a fast way and UCX has none. NCCL has two sides, and a thread that waits for
the other; so each pair of ranks that push and take has a communicator of two, and a thread at either end:

    source rank    post: Announce(pair, number, runs) →    target rank
    its thread     sends the runs                          takes them in, in the order of the numbers
                   hears the mark: they have landed     ←  then sends a mark

Notifications go as they do with NIXL. A target that hears nothing more of a source in the middle of a write
gives the pair up, and so does a source whose target has gone: the communicator is aborted, and with it what
waits on the device. Nothing lands after that.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from disagg.errors import LinkLost, TransferError
from disagg.nccl import Communicator, new_id
from disagg.protocol import PeerHello, RankEndpoint
from disagg.transfer.base import (
    Notified,
    PoolMemory,
    Transport,
    TransportEvent,
    Write,
    WriteEnded,
    WriteId,
)
from disagg.transfer.host import host_id, is_process_gone

NAME = "nccl"
BEAT_S = 0.5
"""Between two signs of life of a source while it writes."""
SILENT_S = 3.0
"""A target gives up a write whose source has been silent for so long."""
WRITE_S = 30.0
"""A source gives up a write that has not landed by then, with everything that waits behind it."""
MEET_S = 30.0
"""A source gives up a target that does not come to its pair."""
IDLE_S = 60.0
"""A source ends a pair without a write for so long, a target twice as long: its source may be gone."""
STOP_S = 5.0
GROUP_RUNS = 1_024
"""Runs of one grouped operation; both sides cut alike."""
POLL_S = 5e-5

_SOURCE, _TARGET = 0, 1
_PREFIX = b"nccl:"
"""Before the metadata of an agent that speaks this too."""

log = logging.getLogger(__name__)

PairId = bytes
Runs = list[tuple[int, int]]
"""`(address, bytes)`."""
Watch = Callable[[], None]
"""Called while a write is waited for; raises to give it up."""


class Announce(Struct, frozen=True, array_like=True, tag="nccl_announce"):
    """Source to target: the next write of a pair, which begins with its number 0."""

    pair: PairId
    number: int
    offsets: bytes
    """int64, from the base of the target's pool."""
    lengths: bytes
    """int64"""


class Beat(Struct, frozen=True, array_like=True, tag="nccl_beat"):
    """Source to target: this pair still writes."""

    pair: PairId


class Drop(Struct, frozen=True, array_like=True, tag="nccl_drop"):
    """Source to target: nothing more comes of this pair, nor the rest of what was announced."""

    pair: PairId


_MESSAGE = msgspec.msgpack.Decoder(Announce | Beat | Drop)


class Wire(Protocol):
    """One end of a connection of two ranks, for the thread that makes it. Failure is a `WorkerError`."""

    def send(self, runs: Runs, watch: Watch) -> None:
        """Send from memory; returns when the other end has all of it."""

    def receive(self, runs: Runs, watch: Watch) -> None:
        """Fill memory with what is sent, which is as long."""

    def abort(self) -> None:
        """End what is under way. Nothing is written to memory afterwards. Once, and the last call."""


MakeWire = Callable[[PairId, int], Wire]
"""`(pair, end)` meets the other end, 0 that sends and 1 that takes."""


class NcclWire:
    """A communicator of two, and a stream of its own."""

    def __init__(self, pair: PairId, end: int, device_id: int) -> None:
        # Here alone: streams and events of the same CUDA runtime that the pool is of.
        import torch

        torch.cuda.set_device(device_id)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._raw_stream = self._stream.cuda_stream
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._mark = torch.zeros(1, dtype=torch.uint8, device="cuda")
        self._stream.wait_stream(torch.cuda.current_stream())
        self._other = 1 - end
        self._nccl = Communicator(pair, end, 2)

    def send(self, runs: Runs, watch: Watch) -> None:
        """Send the runs, then wait for the mark."""
        for batch in _batches(runs):
            with self._nccl.group():
                for address, length in batch:
                    self._nccl.send(address, length, self._other, self._raw_stream)
        self._nccl.receive(self._mark.data_ptr(), 1, self._other, self._raw_stream)
        self._wait(watch)

    def receive(self, runs: Runs, watch: Watch) -> None:
        """Take the runs in, then send the mark, which the stream orders after them."""
        for batch in _batches(runs):
            with self._nccl.group():
                for address, length in batch:
                    self._nccl.receive(address, length, self._other, self._raw_stream)
        self._nccl.send(self._mark.data_ptr(), 1, self._other, self._raw_stream)
        self._wait(watch)

    def abort(self) -> None:
        """Abort the communicator: kernels that wait for the other end return."""
        self._nccl.abort()

    def _wait(self, watch: Watch) -> None:
        self._done.record(self._stream)
        while not self._done.query():  # type: ignore[no-untyped-call]
            watch()
            self._nccl.check()
            time.sleep(POLL_S)


def _batches(runs: Runs) -> list[Runs]:
    return [runs[begin : begin + GROUP_RUNS] for begin in range(0, len(runs), GROUP_RUNS)]


class _Report(NamedTuple):
    """What a pair's thread tells: a write has landed, or, with an error, the pair is over."""

    pair: PairId
    write_id: WriteId | None
    error: TransferError | None


class _End:
    """One end of a pair: the thread that has the wire, and the writes that it is to carry, in order."""

    def __init__(
        self, pair: PairId, end: int, make_wire: MakeWire, report: Callable[[_Report], None]
    ) -> None:
        self.pair = pair
        self._end = end
        self._make_wire = make_wire
        self._report = report
        self._jobs: queue.SimpleQueue[tuple[WriteId, Runs] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._takes_jobs = True
        self._gives_up: str | None = None
        self._made_at = self._heard_at = self._began_at = time.monotonic()
        self._has_met = False
        self._thread = threading.Thread(target=self._run, name=f"kv-nccl-{end}", daemon=True)

    def start(self) -> None:
        """Begin to meet the other end, which has been told or has told us."""
        self._thread.start()

    @property
    def takes_jobs(self) -> bool:
        """False once it has ended for want of writes."""
        return self._takes_jobs

    @property
    def is_alone(self) -> bool:
        """Whether the other end has not come in time."""
        return not self._has_met and time.monotonic() - self._made_at > MEET_S

    def submit(self, write_id: WriteId, runs: Runs) -> bool:
        """Carry a write after those before it; False where the end has come in the meantime."""
        with self._lock:
            if self._takes_jobs:
                self._jobs.put((write_id, runs))
            return self._takes_jobs

    def hear(self) -> None:
        """The other end lives."""
        self._heard_at = time.monotonic()

    def stop(self, reason: str) -> None:
        """Give up what is under way and end. Idempotent; does not wait."""
        self._gives_up = self._gives_up or reason
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for the end after `stop`; a thread that still waits for a rank that never came is left."""
        self._thread.join(STOP_S)

    def _run(self) -> None:
        # The edge of this thread: CUDA's and NCCL's own errors are the pair's end, not the process's.
        try:
            wire = self._make_wire(self.pair, self._end)
            self._has_met = True
            try:
                self._carry(wire)
            finally:
                wire.abort()
        except Exception as error:
            self._report(_Report(self.pair, None, LinkLost(str(error))))

    def _carry(self, wire: Wire) -> None:
        carry = wire.send if self._end == _SOURCE else wire.receive
        while (job := self._next_job()) is not None:
            write_id, runs = job
            self._heard_at = self._began_at = time.monotonic()
            self._watch()
            carry(runs, self._watch)
            self._report(_Report(self.pair, write_id, None))
        raise LinkLost(self._gives_up or "no write came for long")

    def _next_job(self) -> tuple[WriteId, Runs] | None:
        try:
            return self._jobs.get(timeout=IDLE_S * (1 + self._end))
        except queue.Empty:
            with self._lock:
                self._takes_jobs = not self._jobs.empty()
            return self._next_job() if self._takes_jobs else None

    def _watch(self) -> None:
        now = time.monotonic()
        if self._gives_up is not None:
            raise LinkLost(self._gives_up)
        if self._end == _TARGET and now - self._heard_at > SILENT_S:
            raise LinkLost(f"the source has been silent for {SILENT_S:g} s")
        if now - self._began_at > WRITE_S:
            raise LinkLost(f"a write did not end within {WRITE_S:g} s")


@dataclass(slots=True)
class _Source:
    """This rank's end of a pair in which it sends."""

    end: _End
    peer_uuid: str
    target_rank: int
    num_announced: int = 0
    open_writes: set[WriteId] = field(default_factory=set)
    beat_at: float = 0.0


@dataclass(slots=True)
class _Target:
    """This rank's end of a pair in which it takes."""

    end: _End
    num_submitted: int = 0
    early: dict[int, Runs] = field(default_factory=dict)
    """Announced before those with lower numbers."""


class NcclTransport:
    """One rank's ends of its pairs. Notifications are NIXL's."""

    name = NAME

    def __init__(
        self,
        notifier: Transport,
        pool: PoolMemory,
        *,
        make_wire: MakeWire | None = None,
        make_id: Callable[[], PairId] = new_id,
    ) -> None:
        """Carry writes from and to a pool.

        Args:
            notifier: Carries notifications; its own writes are not used.
            pool: On a GPU, unless `make_wire` is given.
            make_wire: Connects the two ends of a pair; by default NCCL does.
            make_id: Makes what the two ends must share.
        """
        self._notifier = notifier
        self._pool = pool
        self._make_wire = make_wire or (lambda pair, end: NcclWire(pair, end, pool.device_id))
        self._make_id = make_id
        self._peers: dict[str, PeerHello] = {}
        self._sources: dict[PairId, _Source] = {}
        self._targets: dict[PairId, _Target] = {}
        self._target_of: dict[str, PairId] = {}
        """Of each source, by the name of its agent, the newest pair."""
        self._over: set[PairId] = set()
        """Pairs that this rank has given up, of which announcements may still come."""
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._ended: list[TransportEvent] = []
        self._ids = itertools.count()

    def endpoint(self) -> RankEndpoint:
        """Say how peers reach this rank."""
        endpoint = self._notifier.endpoint()
        return replace(endpoint, agent_metadata=_PREFIX + endpoint.agent_metadata)

    def carrier(self, peer_uuid: str) -> str:
        """Name what carries writes to a peer."""
        return self.name

    def connect(self, peer: PeerHello) -> None:
        """Learn how to notify every rank of a peer; a pair is made with the first write to it."""
        for endpoint in peer.ranks:
            if not endpoint.agent_metadata.startswith(_PREFIX):
                raise TransferError(
                    f"{endpoint.agent_name} does not speak nccl; give both workers the same transport_backend"
                )
        ranks = [replace(e, agent_metadata=e.agent_metadata.removeprefix(_PREFIX)) for e in peer.ranks]
        self._notifier.connect(replace(peer, ranks=ranks))
        self._peers.setdefault(peer.uuid, peer)

    def disconnect(self, peer_uuid: str) -> None:
        """Forget a peer; its open writes end with LinkLost, and its pairs are aborted."""
        for source in [s for s in self._sources.values() if s.peer_uuid == peer_uuid]:
            self._give_up(source, LinkLost(f"peer {peer_uuid} was disconnected"))
        self._peers.pop(peer_uuid, None)
        self._notifier.disconnect(peer_uuid)

    def post(self, write: Write) -> WriteId:
        """Announce a write and have it sent."""
        source = self._source_to(write.peer_uuid, write.target_rank)
        offsets, lengths = write.runs.target_offsets, write.runs.lengths
        announce = Announce(source.end.pair, source.num_announced, offsets.tobytes(), lengths.tobytes())
        self._notify(source, announce)
        if source.num_announced == 0:
            self._sources[source.end.pair] = source
            source.end.start()
        source.num_announced += 1
        source.beat_at = time.monotonic()
        write_id = WriteId(next(self._ids))
        source.open_writes.add(write_id)
        if not source.end.submit(write_id, self._runs(write.runs.source_offsets, lengths)):
            self._give_up(source, LinkLost("the pair ended when its next write came"))
        return write_id

    def notify(self, peer_uuid: str, target_rank: int, payload: bytes) -> None:
        """Send a small message to one rank of a peer."""
        self._notifier.notify(peer_uuid, target_rank, payload)

    def poll(self) -> list[TransportEvent]:
        """Take in what is announced; return ended writes and notifications."""
        for event in self._notifier.poll():
            if not (isinstance(event, Notified) and self._on_message(event)):
                self._ended.append(event)
        while not self._reports.empty():
            self._on_report(self._reports.get())
        now = time.monotonic()
        for source in list(self._sources.values()):
            if source.open_writes and source.end.is_alone:
                self._give_up(source, LinkLost(f"the target did not come within {MEET_S:g} s"))
            elif source.open_writes and now - source.beat_at > BEAT_S:
                source.beat_at = now
                self._beat(source)
        events, self._ended = self._ended, []
        return events

    def close(self) -> None:
        """End every pair."""
        ends = [source.end for source in self._sources.values()]
        ends += [target.end for target in self._targets.values()]
        for source in list(self._sources.values()):
            self._give_up(source, LinkLost("this rank ends"))
        for pair in list(self._targets):
            self._forget_target(pair, "this rank ends")
        for end in ends:
            end.join()
        self._notifier.close()

    # --- as a source ------------------------------------------------------------------------------

    def _source_to(self, peer_uuid: str, target_rank: int) -> _Source:
        for source in self._sources.values():
            if (source.peer_uuid, source.target_rank) == (peer_uuid, target_rank) and source.end.takes_jobs:
                return source
        return _Source(
            _End(self._make_id(), _SOURCE, self._make_wire, self._reports.put), peer_uuid, target_rank
        )

    def _notify(self, source: _Source, message: Announce | Beat | Drop) -> None:
        payload = msgspec.msgpack.encode(message)
        self._notifier.notify(source.peer_uuid, source.target_rank, payload)

    def _beat(self, source: _Source) -> None:
        """Tell a target that its source lives, and see whether the target does."""
        peer, rank = self._peers[source.peer_uuid], source.target_rank
        try:
            # What UCX sends by shared memory to a dead process is lost without an error.
            if peer.host_id == host_id() and any(is_process_gone(*p) for p in peer.pids[rank : rank + 1]):
                raise LinkLost(f"the process of {source.peer_uuid}:{source.target_rank} is gone")
            self._notify(source, Beat(source.end.pair))
        except TransferError as error:
            self._give_up(source, error)

    def _give_up(self, source: _Source, error: TransferError) -> None:
        """End a pair and its open writes; the next write to its target makes another."""
        del self._sources[source.end.pair]
        source.end.stop(str(error))
        self._ended.extend(WriteEnded(write_id, error) for write_id in sorted(source.open_writes))
        try:
            self._notify(source, Drop(source.end.pair))
        except TransferError:
            log.debug("a target cannot be told that its pair is over", exc_info=True)

    def _on_report(self, report: _Report) -> None:
        source = self._sources.get(report.pair)
        if source is not None and report.error is not None:
            self._give_up(source, report.error)
        elif source is not None and report.write_id is not None:
            source.open_writes.discard(report.write_id)
            self._ended.append(WriteEnded(report.write_id, None))
        elif report.error is not None:
            self._forget_target(report.pair, str(report.error))

    # --- as a target ------------------------------------------------------------------------------

    def _on_message(self, event: Notified) -> bool:
        """Take in a message of a source; False where it is no business of ours."""
        try:
            message = _MESSAGE.decode(event.payload)
        except msgspec.DecodeError:
            return False
        match message:
            case Announce():
                self._on_announce(event.agent_name, message)
            case Beat(pair):
                if pair in self._targets:
                    self._targets[pair].end.hear()
            case Drop(pair):
                self._forget_target(pair, "the source has given it up")
        return True

    def _on_announce(self, agent_name: str, announce: Announce) -> None:
        pair = announce.pair
        if pair in self._over:
            return
        runs = self._announced_runs(announce)
        if runs is None:
            log.error("%s announced memory outside of the pool", agent_name)
            self._over.add(pair)
            self._forget_target(pair, "it was to write outside of the pool")
            return
        target = self._targets.get(pair) or self._begin_target(agent_name, pair)
        target.end.hear()
        target.early[announce.number] = runs
        while (following := target.early.pop(target.num_submitted, None)) is not None:
            target.end.submit(WriteId(target.num_submitted), following)
            target.num_submitted += 1

    def _begin_target(self, agent_name: str, pair: PairId) -> _Target:
        older = self._target_of.get(agent_name)
        if older is not None:
            self._forget_target(older, "its source has begun another")
        target = _Target(_End(pair, _TARGET, self._make_wire, self._reports.put))
        self._targets[pair], self._target_of[agent_name] = target, pair
        target.end.start()
        return target

    def _forget_target(self, pair: PairId, reason: str) -> None:
        target = self._targets.pop(pair, None)
        if target is not None:
            log.info("a pair in which KV was taken in is over: %s", reason)
            self._over.add(pair)
            self._target_of = {name: newest for name, newest in self._target_of.items() if newest != pair}
            target.end.stop(reason)

    def _announced_runs(self, announce: Announce) -> Runs | None:
        """Where a write is to land; None unless all of it is in the pool."""
        if len(announce.offsets) != len(announce.lengths) or len(announce.offsets) % 8:
            return None
        offsets, lengths = (np.frombuffer(each, np.int64) for each in (announce.offsets, announce.lengths))
        is_within = (offsets >= 0) & (lengths > 0) & (offsets <= self._pool.num_bytes - lengths)
        return self._runs(offsets, lengths) if is_within.all() else None

    def _runs(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Runs:
        return list(zip((offsets + self._pool.address).tolist(), lengths.tolist(), strict=True))
