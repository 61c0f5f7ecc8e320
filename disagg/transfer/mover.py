"""What one rank's transfer thread decides: pushes, their ends, and what may still land.

A *push* is one attempt, `(transfer_id, generation)`, to bring pages to one peer. It takes chunks
until it is finished, fails, or is aborted, and then ends in exactly one way:

    complete              every write has landed and every overlapping target rank was notified
    failed, then fenced   PushFailed at once; Fenced once no write of it can land any more
    aborted, then fenced  Fenced, at once where nothing is under way

`KvMover` has no thread and no clock of its own; `thread.TransferThread` drives it.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import msgspec

from disagg.errors import LayoutMismatch, LinkLost, TransferError, TransferTimeout, WorkerError
from disagg.kv.layout import PageLayout
from disagg.protocol import KvLayout, PeerHello, PushDone, decoder, encode
from disagg.transfer.base import Notified, Transport, Write, WriteEnded, WriteId, split_agent_name
from disagg.transfer.host import host_id
from disagg.transfer.nccl import NAME as NCCL
from disagg.transfer.plan import check_layouts, check_pages, plan_transfer, shared_heads
from disagg.transfer.slow import LinkFacts, LinkSpeed, why_slow

AWAIT_POLL_S = 0.0005
"""Between polls while KV is awaited: its receiver must progress the transport for it to move."""
STUCK_POLL_S = 0.01
"""Between polls while only writes past their deadline are open, as with a peer that hangs."""
NOTIFY_LINGER_S = 1.0
"""Progress this long after a notification: nothing tells that it has left."""
SETTLE_S = 1.0
"""After a write ended in an error, bytes that it had handed to the network may land for this long."""
DRAIN_S = 0.1
"""How long `Drain` progresses, so that bytes in this host's receive buffers land before it returns."""
MAX_CLOSED = 16_384
"""Ended attempts remembered, so that a late chunk of one is not posted."""

log = logging.getLogger(__name__)

PushKey = tuple[str, int]
"""`(transfer_id, generation)`."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Get ready to push to a peer. Answered by Connected or ConnectFailed.

    A peer with the same worker id and another uuid is the same worker before a restart: what
    was open to it fails.
    """

    peer: PeerHello


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Forget a peer; open pushes to it fail."""

    peer_uuid: str


@dataclass(frozen=True, slots=True)
class PushChunk:
    """Push these pages now. The first of an attempt opens it; it may have no pages.

    `deadline` is an instant of the mover's clock: nothing is posted from then on.
    """

    key: PushKey
    peer_uuid: str
    source_pages: Sequence[int]
    target_pages: Sequence[int]
    deadline: float


@dataclass(frozen=True, slots=True)
class FinishPush:
    """No chunk follows. When all have landed the target ranks are notified: PushComplete."""

    key: PushKey
    token_id: int
    position: int
    finished: bool


@dataclass(frozen=True, slots=True)
class AbortPush:
    """Post no more of this attempt. Always answered by Fenced, also where it is unknown."""

    key: PushKey


@dataclass(frozen=True, slots=True)
class AwaitKv:
    """Count transfers that are expected to arrive here: +1 at a grant, -1 at its end."""

    change: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Let everything that has reached this host land. Answered by Drained with the same token.

    A receiver does this between a fence that it was told of and reusing the pages: a sender's
    process can be gone while its last bytes wait in a socket here.
    """

    token: object


Command = Connect | Disconnect | PushChunk | FinishPush | AbortPush | AwaitKv | Drain


@dataclass(frozen=True, slots=True)
class Connected:
    """Pushes to this peer may begin."""

    peer_uuid: str


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """No push to this peer is possible; `error` says why (LayoutMismatch or TransferError)."""

    peer_uuid: str
    error: WorkerError


@dataclass(frozen=True, slots=True)
class PushComplete:
    """Every write of the attempt has landed and every overlapping target rank was notified."""

    key: PushKey
    num_pages: int
    num_bytes: int
    seconds: float
    """In which any write of it was under way; the gaps while chunks are computed do not count."""
    transport: str
    """What carried it."""


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The attempt has ended here. Unless `fenced`, Fenced follows once no write can land."""

    key: PushKey
    error: WorkerError
    fenced: bool


@dataclass(frozen=True, slots=True)
class Fenced:
    """No write of this attempt can still land, nor will one be posted."""

    key: PushKey


@dataclass(frozen=True, slots=True)
class Arrived:
    """A source rank of a peer says that its share has landed in this rank's pool."""

    source_uuid: str
    done: PushDone


@dataclass(frozen=True, slots=True)
class Drained:
    """What had reached this host when `Drain` was submitted has landed."""

    token: object


Event = Connected | ConnectFailed | PushComplete | PushFailed | Fenced | Arrived | Drained


@dataclass(slots=True)
class _Push:
    key: PushKey
    peer_uuid: str
    deadline: float
    open_writes: set[WriteId] = field(default_factory=set)
    num_pages: int = 0
    bytes_by_rank: dict[int, int] = field(default_factory=dict)
    """Posted bytes by target rank; every overlapping rank has an entry."""
    moving_since: float = 0.0
    """When the oldest of the open writes was posted."""
    moved_s: float = 0.0
    finish: FinishPush | None = None
    over: bool = False
    """Failed or aborted: nothing more is posted, only its fence is awaited."""
    unsettled: bool = False
    """A write ended in an error: its bytes may land for a while yet."""
    settles_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Posted:
    push: _Push
    num_bytes: int
    at: float


class KvMover:
    """Pushes of one rank. One thread; every method returns quickly."""

    def __init__(
        self,
        transport: Transport,
        layout: KvLayout,
        rank: int,
        clock: Callable[[], float],
        settle_s: float = SETTLE_S,
    ) -> None:
        self._transport = transport
        self._layout = layout
        self._rank = rank
        self._clock = clock
        self._settle_s = settle_s
        self._peers: dict[str, PeerHello] = {}
        self._pushes: dict[PushKey, _Push] = {}
        self._posted: dict[WriteId, _Posted] = {}
        self._speeds: dict[str, LinkSpeed] = {}
        """Of peers whose pools are on GPUs, which UCX may reach by a slow way."""
        self._closed: OrderedDict[str, int] = OrderedDict()
        self._awaited = 0
        self._linger_until = float("-inf")
        self._drains: list[tuple[float, object]] = []
        self._events: list[Event] = []
        self._push_done = decoder(PushDone)
        self.num_malformed = 0
        """Notifications dropped because they were not a PushDone for this rank from who sent it."""
        self.num_stale = 0
        """Chunks and finishes dropped because their attempt had ended."""
        self.num_poll_errors = 0
        """Polls in which the transport itself failed; writes it cannot see end by their deadline."""

    @property
    def num_pushes(self) -> int:
        """Attempts that have not ended, those that only await their fence included."""
        return len(self._pushes)

    def on_command(self, command: Command) -> list[Event]:
        """Do what is asked, as far as it can be done at once."""
        match command:
            case Connect(peer):
                self._connect(peer)
            case Disconnect(peer_uuid):
                self._disconnect(peer_uuid)
            case PushChunk():
                self._push_chunk(command)
            case FinishPush():
                self._finish(command)
            case AbortPush(key):
                self._abort(key)
            case AwaitKv(change):
                self._awaited += change
                assert self._awaited >= 0, "more transfers ended than were awaited"
            case Drain(token):
                self._drains.append((self._clock() + DRAIN_S, token))
            case _:
                assert_never(command)
        return self._take_events()

    def poll(self) -> list[Event]:
        """Progress the transport; end what has landed, failed or run out of time."""
        self._read_transport()
        now = self._clock()
        for push in list(self._pushes.values()):
            if not push.over and now >= push.deadline:
                self._fail(push, TransferTimeout(f"push to {push.peer_uuid} missed its deadline"))
            elif push.settles_at is not None and now >= push.settles_at:
                self._fence(push)
        for drain in [d for d in self._drains if now >= d[0]]:
            self._drains.remove(drain)
            self._events.append(Drained(drain[1]))
        return self._take_events()

    def wait_s(self) -> float | None:
        """Say how long the caller may wait for a command before it polls; None is for ever."""
        now = self._clock()
        if any(push.open_writes and now < push.deadline for push in self._pushes.values()):
            return 0.0
        if self._awaited or self._drains or now < self._linger_until:
            return AWAIT_POLL_S
        if self._posted:
            return STUCK_POLL_S
        return min((max(0.0, at - now) for at in self._alarms()), default=None)

    def _alarms(self) -> Iterator[float]:
        for push in self._pushes.values():
            if push.settles_at is not None:
                yield push.settles_at
            elif not push.over:
                yield push.deadline

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # Peers

    def _connect(self, peer: PeerHello) -> None:
        for other in list(self._peers.values()):
            if other.worker_id == peer.worker_id and other.uuid != peer.uuid:
                self._disconnect(other.uuid)
        try:
            check_hello(self._layout, peer)
            self._transport.connect(peer)
        except WorkerError as error:
            self._events.append(ConnectFailed(peer.uuid, error))
            return
        self._peers[peer.uuid] = peer
        on_gpus = any(endpoint.memory == "VRAM" for endpoint in peer.ranks)
        if on_gpus and self._transport.carrier(peer.uuid) != NCCL:  # of which UCX carries none
            self._speeds.setdefault(peer.uuid, LinkSpeed())
        self._events.append(Connected(peer.uuid))

    def _disconnect(self, peer_uuid: str) -> None:
        self._peers.pop(peer_uuid, None)
        self._speeds.pop(peer_uuid, None)
        self._transport.disconnect(peer_uuid)
        for push in list(self._pushes.values()):
            if push.peer_uuid == peer_uuid and not push.over:
                self._fail(push, LinkLost(f"peer {peer_uuid} was disconnected"))

    # Pushes

    def _push_chunk(self, chunk: PushChunk) -> None:
        if self._is_closed(chunk.key):
            self.num_stale += 1
            return
        push = self._pushes.get(chunk.key)
        if push is None:
            self._supersede(chunk.key)
            push = self._pushes[chunk.key] = _Push(chunk.key, chunk.peer_uuid, chunk.deadline)
        assert push.finish is None, "a chunk after the push was finished"
        assert push.peer_uuid == chunk.peer_uuid, "one attempt has one target"
        now = self._clock()
        if now >= push.deadline:
            self._fail(push, TransferTimeout(f"a chunk for {push.peer_uuid} came after its deadline"))
            return
        if not push.open_writes:
            push.moving_since = now
        try:
            self._post(push, chunk)
        except WorkerError as error:
            self._fail(push, error)

    def _supersede(self, key: PushKey) -> None:
        """Abort older attempts of the same transfer: a newer one has been seen."""
        for push in list(self._pushes.values()):
            if push.key[0] == key[0] and push.key[1] < key[1] and not push.over:
                self._abort(push.key)

    def _post(self, push: _Push, chunk: PushChunk) -> None:
        """Post one write a target rank. Raises with those before the failing one under way."""
        peer = self._peers.get(push.peer_uuid)
        if peer is None:
            raise LinkLost(f"peer {push.peer_uuid} is not connected")
        check_pages(chunk.target_pages, min(rank.num_pages for rank in peer.ranks), "target")
        push.num_pages += len(chunk.source_pages)
        for target_rank in self._target_ranks(peer):
            push.bytes_by_rank.setdefault(target_rank, 0)
            runs = plan_transfer(
                self._layout, self._rank, peer.layout, target_rank, chunk.source_pages, chunk.target_pages
            )
            if runs.num_runs:
                write_id = self._transport.post(Write(push.peer_uuid, target_rank, runs))
                push.bytes_by_rank[target_rank] += runs.num_bytes
                push.open_writes.add(write_id)
                self._posted[write_id] = _Posted(push, runs.num_bytes, self._clock())

    def _target_ranks(self, peer: PeerHello) -> list[int]:
        return [
            rank
            for rank in range(peer.layout.tp_size)
            if shared_heads(self._layout, self._rank, peer.layout, rank) is not None
        ]

    def _finish(self, finish: FinishPush) -> None:
        push = self._pushes.get(finish.key)
        if push is None or push.over:
            self.num_stale += 1
            return
        push.finish = finish
        self._complete_if_landed(push)

    def _abort(self, key: PushKey) -> None:
        push = self._pushes.get(key)
        if push is None:
            self._supersede(key)
            self._close(key)
            self._events.append(Fenced(key))
        elif not push.over:
            self._end(push)
            self._fence_if_landed(push)
        # Else it has failed before, and its Fenced is on the way.

    def _complete_if_landed(self, push: _Push) -> None:
        if push.finish is None or push.over or push.open_writes:
            return
        try:
            self._notify(push, push.finish)
        except WorkerError as error:
            self._fail(push, error)
            return
        self._end(push)
        del self._pushes[push.key]
        num_bytes = sum(push.bytes_by_rank.values())
        carrier = self._transport.carrier(push.peer_uuid)
        self._events.append(PushComplete(push.key, push.num_pages, num_bytes, push.moved_s, carrier))

    def _notify(self, push: _Push, finish: FinishPush) -> None:
        for target_rank, num_bytes in push.bytes_by_rank.items():
            done = PushDone(
                transfer_id=push.key[0],
                generation=push.key[1],
                source_rank=self._rank,
                target_rank=target_rank,
                num_bytes=num_bytes,
                token_id=finish.token_id,
                position=finish.position,
                finished=finish.finished,
                transport=self._transport.carrier(push.peer_uuid),
            )
            self._transport.notify(push.peer_uuid, target_rank, encode(done))
        self._linger_until = self._clock() + NOTIFY_LINGER_S

    def _fail(self, push: _Push, error: WorkerError) -> None:
        self._end(push)
        fenced = not push.open_writes and not push.unsettled
        self._events.append(PushFailed(push.key, error, fenced))
        if fenced:
            del self._pushes[push.key]
        else:
            self._fence_if_landed(push)

    def _end(self, push: _Push) -> None:
        push.over = True
        self._close(push.key)

    def _fence_if_landed(self, push: _Push) -> None:
        if push.open_writes:
            return
        if push.unsettled:
            push.settles_at = self._clock() + self._settle_s
        else:
            self._fence(push)

    def _fence(self, push: _Push) -> None:
        del self._pushes[push.key]
        self._events.append(Fenced(push.key))

    def _close(self, key: PushKey) -> None:
        transfer_id, generation = key
        self._closed[transfer_id] = max(generation, self._closed.pop(transfer_id, generation))
        if len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)

    def _is_closed(self, key: PushKey) -> bool:
        transfer_id, generation = key
        return generation <= self._closed.get(transfer_id, generation - 1)

    # What the transport says

    def _read_transport(self) -> None:
        try:
            events = self._transport.poll()
        except TransferError:
            self.num_poll_errors += 1
            log.warning("the KV transport failed to progress", exc_info=self.num_poll_errors == 1)
            return
        for event in events:
            match event:
                case WriteEnded(write_id, error):
                    self._on_write_ended(write_id, error)
                case Notified(name, payload):
                    self._on_notified(name, payload)
                case _:
                    assert_never(event)

    def _on_write_ended(self, write_id: WriteId, error: TransferError | None) -> None:
        posted = self._posted.pop(write_id)
        push = posted.push
        push.open_writes.discard(write_id)
        if not push.open_writes:
            push.moved_s += self._clock() - push.moving_since
        if error is None:
            self._watch(posted)
        else:
            push.unsettled = True
            if not push.over:
                self._fail(push, error)
                return
        if push.over:
            self._fence_if_landed(push)
        else:
            self._complete_if_landed(push)

    def _watch(self, posted: _Posted) -> None:
        """Say so, once, where a peer's GPU memory is reached by a slow way."""
        speed = self._speeds.get(posted.push.peer_uuid)
        if speed is not None and speed.on_write(posted.num_bytes, self._clock() - posted.at):
            peer = self._peers[posted.push.peer_uuid]
            log.warning(
                "KV goes to %s by %s at %.1f GB/s, for UCX has fallen back to a slow way: %s",
                peer.worker_id,
                self._transport.carrier(peer.uuid),
                speed.bytes_per_s / 1e9,
                why_slow(LinkFacts.of(host_id(), peer.host_id)),
            )

    def _on_notified(self, name: str, payload: bytes) -> None:
        sender = split_agent_name(name)
        try:
            done = self._push_done.decode(payload)
        except msgspec.DecodeError:
            done = None
        if sender is None or done is None or done.target_rank != self._rank or sender[1] != done.source_rank:
            self.num_malformed += 1
            return
        self._events.append(Arrived(sender[0], done))


def check_hello(layout: KvLayout, peer: PeerHello) -> None:
    """Make sure that pages of ours can be written into a peer's pools.

    Raises:
        LayoutMismatch: names the field that differs or contradicts the rest of the hello.
    """
    check_layouts(layout, peer.layout)
    ranks = [endpoint.rank for endpoint in peer.ranks]
    if ranks != list(range(peer.layout.tp_size)):
        raise LayoutMismatch(f"ranks are {ranks} with tp_size {peer.layout.tp_size}")
    page_bytes = PageLayout.of(peer.layout).page_bytes
    for endpoint in peer.ranks:
        if endpoint.page_bytes != page_bytes:
            raise LayoutMismatch(
                f"page_bytes of rank {endpoint.rank} is {endpoint.page_bytes}, its layout makes {page_bytes}"
            )
