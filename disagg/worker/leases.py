"""Who may touch which pages, and until when: the leases of one worker, for every kind of attempt.

A *lease* is what a worker holds for one attempt, `(transfer_id, generation)`, of one router:

    incoming   a decode worker's pages that a prefill worker elsewhere writes into
    outgoing   a prefill worker's pages that its own ranks read from while they push
    local      a sequence that is prefilled and decoded here; nobody else touches its pages

It is *held*, *landed* once its transfer is complete, and then ends: released, aborted, expired,
superseded by a newer generation, or broken. A lease that ends before it has landed is
*quarantined*: its pages are given to nobody until no write can reach them, which is known when

    its transfer completes after all              every pair of ranks has notified
    the router passes on that it is fenced        `on_fenced`
    every process that knows this pool says so,   `on_peer_fenced`, `on_peer_gone`
      or is proven gone
    each of its own ranks says so (outgoing)      `on_rank_fenced`

Expiry ends a lease but never a quarantine. Decisions only: every method returns effects for the
caller to carry out, in order; none blocks, and the clock is the caller's. One thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from disagg.errors import InvariantBroken
from disagg.protocol import KvLayout, PushDone
from disagg.transfer.plan import expected_bytes

ASK_AGAIN_S = 1.0
"""A fence that was asked for and did not come is asked for again after this long, then twice as long."""
ASK_AGAIN_MAX_S = 60.0
"""A process that hangs is not buried in questions."""
MAX_REMEMBERED = 65_536
"""Transfers whose newest generation is remembered, so that stale messages are known as such."""
MAX_BARRED = 4_096
"""Ended attempts that newly connected prefill workers are told not to write for."""
MAX_GONE = 1_024
"""Ended processes that are remembered, and their layouts."""

Key = tuple[str, int]
"""`(transfer_id, generation)`."""
Kind = Literal["incoming", "outgoing", "local"]
EndReason = Literal["released", "aborted", "expired", "superseded", "broken"]


@dataclass(frozen=True, slots=True)
class KvComplete:
    """Every pair of ranks has notified: decode may start with this token. The lease has landed."""

    key: Key
    source_uuid: str
    token_id: int
    position: int
    finished: bool
    num_pages: int
    bytes_expected: int
    """What the pages of this lease take on every rank here."""
    bytes_received: int
    """What the notifications told. Where it is not as expected the lease is broken instead."""
    wait_s: float
    """From the grant to the last notification."""
    transport: str
    """What carried it; empty from an old worker."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """Every rank's push of an outgoing lease is complete: it has landed, and is fenced by that."""

    key: Key
    num_pages: int
    num_bytes: int
    seconds: float
    """The slowest rank's."""
    transport: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The lease has ended and its pages are still in reach: stop the request, keep the pages."""

    key: Key
    kind: Kind
    page_ids: tuple[int, ...]
    reason: EndReason
    detail: str = ""
    """Where `reason` is `broken`: what was wrong."""


@dataclass(frozen=True, slots=True)
class Freed:
    """The lease is over and nobody can reach its pages: stop the request if it runs, give them back.

    Comes exactly once for every grant, with or without a Quarantined before it.
    """

    key: Key
    kind: Kind
    page_ids: tuple[int, ...]
    reason: EndReason
    """Why it ended; as in Quarantined where that came before."""


@dataclass(frozen=True, slots=True)
class StopPush:
    """Submit AbortPush to every rank's transfer thread; each answer goes to `on_rank_fenced`."""

    key: Key


@dataclass(frozen=True, slots=True)
class AskFence:
    """Send PeerFence to this prefill worker; its answer goes to `on_peer_fenced`.

    Without a link to it nothing can be sent, and this comes again: look whether its process is
    gone (`on_peer_gone`).
    """

    key: Key
    peer_uuid: str


@dataclass(frozen=True, slots=True)
class SayFenced:
    """Tell `asker` that no write of this attempt can still arrive."""

    key: Key
    asker: str


@dataclass(frozen=True, slots=True)
class DrainRanks:
    """Submit Drain to every rank's transfer thread; call `on_drained` once all of them have answered."""

    key: Key


Effect = KvComplete | Pushed | Quarantined | Freed | StopPush | AskFence | SayFenced | DrainRanks


class _State(Enum):
    HELD = "held"
    LANDED = "landed"
    QUARANTINED = "quarantined"
    DRAINING = "draining"
    """Fenced; what has already reached this host is landing."""


@dataclass(slots=True)
class _Lease:
    key: Key
    kind: Kind
    owner: str
    page_ids: tuple[int, ...]
    target_uuid: str | None
    granted_at: float
    expires_at: float
    state: _State
    reason: EndReason = "released"
    source_uuid: str | None = None
    """Whose notifications count; the first one's sender."""
    arrived: dict[tuple[int, int], PushDone] = field(default_factory=dict)
    pushed: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    """Complete ranks of an outgoing lease: pages, bytes, seconds."""
    is_fenced: bool = False
    """The router said so while the lease was still held."""
    is_broken: bool = False
    """Its notifications contradict each other: they prove nothing."""
    writers: set[str | int] = field(default_factory=set)
    """Of a quarantined lease: uuids of peers, or ranks of ours, that have yet to say that they are done."""
    askers: set[str] = field(default_factory=set)
    ask_again_s: float = ASK_AGAIN_S
    ask_again_at: float = 0.0


class LeaseTable:
    """Every lease of one worker. One thread; each method returns what is to be done, in order.

    A decode worker's use of it, messages on the left:

        Reserve             `admit`, reserve pages, `grant(kind="incoming", page_ids=the missing ones)`
        Arrived             `on_arrived` of any rank's notification → KvComplete: start decoding
        PeerHello           `on_peer`; send its effects *before* this worker's own PeerHello
        PeerFenced          `on_peer_fenced`
        Fenced              `on_fenced`
        a process is gone   `on_peer_gone`
        finished            `release`

    A prefill worker's: `admit` and `grant(kind="outgoing", target_uuid=…)` for Prefill, then
    `on_push_complete`, `on_push_failed` and `on_rank_fenced` for each rank's transfer events, and
    `on_peer_fence` for PeerFence. Both: `renew`, `abort`, `release`, `end_owner`, and `expire`
    a few times a second.
    """

    def __init__(self, layout: KvLayout, clock: Callable[[], float]) -> None:
        """Make an empty table.

        Args:
            layout: This worker's own KV layout.
            clock: Monotonic.
        """
        self._layout = layout
        self._clock = clock
        self._leases: dict[Key, _Lease] = {}
        self._live: dict[str, Key] = {}
        """Held and landed leases by transfer: at most one each."""
        self._newest: OrderedDict[str, tuple[int, bool]] = OrderedDict()
        """Newest generation of each recent transfer, and whether it has ended."""
        self._peers: set[str] = set()
        """Prefill workers that have been told where this pool is, and are not proven gone."""
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Processes that are proven gone: a hello of theirs may come late."""
        self._layouts: OrderedDict[str, KvLayout] = OrderedDict()
        """Theirs, and of those that are gone: a notification may outlive its sender."""
        self._barred: OrderedDict[Key, None] = OrderedDict()
        """Incoming attempts that ended with nobody's word that no further process may write for them."""
        self._holder: dict[int, Key] = {}
        """Which lease awaits writes on a page."""
        self.num_stale = 0
        """Messages dropped so far because their attempt was over, older than the newest, or unknown."""

    # Router: begin, renew, end

    def admit(self, key: Key) -> list[Effect] | None:
        """Take note of a new attempt, before anything is taken for it. Ends older ones of its transfer.

        Returns:
            What ending an older attempt asks for; None if this one is not newer than all that were
            seen, ended or not: drop the message.
        """
        transfer_id, generation = key
        newest, _ = self._newest.get(transfer_id, (-1, True))
        if generation <= newest or key in self._leases:
            self.num_stale += 1
            return None
        effects = self._end_live(transfer_id, "superseded")
        self._remember(key, ended=False)
        return effects

    def grant(
        self,
        key: Key,
        *,
        kind: Kind,
        owner: str,
        ttl_s: float,
        page_ids: Sequence[int] = (),
        target_uuid: str | None = None,
    ) -> list[Effect]:
        """Begin the lease of an admitted attempt.

        Args:
            key: `admit` did not return None for it.
            kind: What touches its pages.
            owner: The router; `renew` and `end_owner` name it.
            ttl_s: It expires so long from now unless it is renewed.
            page_ids: Of an incoming lease, the pages that await KV. Of others they are only
                handed back in Quarantined and Freed.
            target_uuid: Of an outgoing lease, the process that is pushed to.

        Returns:
            Nothing; or Freed, where the attempt was ended or superseded since it was admitted, and
            nobody may be told of its pages.

        Raises:
            InvariantBroken: another lease awaits writes on one of the pages.
        """
        if self._newest.get(key[0]) != (key[1], False):
            return [Freed(key, kind, tuple(page_ids), "aborted")]
        assert key[0] not in self._live, "an attempt is granted once"
        if kind == "incoming":
            self._expose(key, page_ids)
        now = self._clock()
        lease = _Lease(
            key=key,
            kind=kind,
            owner=owner,
            page_ids=tuple(page_ids),
            target_uuid=target_uuid,
            granted_at=now,
            expires_at=now + ttl_s,
            state=_State.LANDED if kind == "local" else _State.HELD,
        )
        self._leases[key] = lease
        self._live[key[0]] = key
        return []

    def renew(self, owner: str, ttl_s: float) -> None:
        """Let every lease of this router that has not ended expire `ttl_s` from now."""
        expires_at = self._clock() + ttl_s
        for key in self._live.values():
            lease = self._leases[key]
            if lease.owner == owner:
                lease.expires_at = expires_at

    def release(self, key: Key) -> list[Effect]:
        """End this attempt and older ones: nothing of them is needed. Any state, idempotent."""
        return self._end_through(key, "released")

    def abort(self, key: Key, asker: str | None = None) -> list[Effect]:
        """Stop this attempt and older ones. Any state, idempotent.

        Args:
            key: May be unknown: it is not admitted later.
            asker: Told by SayFenced when no write of this worker's can still arrive for it, at once
                where none is known. Incoming leases are not this worker's to answer for.
        """
        effects = self._end_through(key, "aborted")
        return effects + ([] if asker is None else self._answer(key, asker))

    def end_owner(self, owner: str) -> list[Effect]:
        """Release every lease of a router that said Goodbye, or whose messages may have been lost."""
        keys = [key for key in self._live.values() if self._leases[key].owner == owner]
        return [effect for key in keys for effect in self.release(key)]

    def expire(self) -> list[Effect]:
        """End the leases whose time is up, and ask again for fences that did not come."""
        now = self._clock()
        effects: list[Effect] = []
        for lease in list(self._leases.values()):
            if lease.key == self._live.get(lease.key[0]):
                if now >= lease.expires_at:
                    effects += self._end(lease, "expired")
            elif self._awaits_peers(lease) and now >= lease.ask_again_at:
                effects += self._ask(lease)
        return effects

    # Peers and ranks

    def on_peer(self, uuid: str, layout: KvLayout) -> list[Effect]:
        """A prefill worker said hello, perhaps again. Call before it is told where this pool is.

        The fences that are asked for here must reach it before this worker's own PeerHello does:
        then it cannot begin to write for an attempt that ended before the two met.
        """
        if uuid in self._gone:
            return []
        self._peers.add(uuid)
        self._layouts[uuid] = layout
        self._layouts.move_to_end(uuid)
        if len(self._layouts) > MAX_GONE and (oldest := next(iter(self._layouts))) not in self._peers:
            del self._layouts[oldest]
        return [AskFence(key, uuid) for key in self._barred]

    def on_peer_gone(self, uuid: str) -> list[Effect]:
        """This process writes no more. What it had sent may still land: the drain that follows waits for it.

        Its end is proven, or it said PeerBye after its last push had ended. A broken link alone
        proves nothing. It does not come back under this uuid; what it notified still counts.
        """
        self._peers.discard(uuid)
        self._gone[uuid] = None
        if len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)
        return self._on_done(uuid, list(self._leases.values()))

    def on_arrived(self, source_uuid: str, done: PushDone) -> list[Effect]:
        """One rank of ours was notified by one of a prefill worker's; duplicates change nothing."""
        key = (done.transfer_id, done.generation)
        lease = self._leases.get(key)
        layout = self._layouts.get(source_uuid)
        pair = (done.source_rank, done.target_rank)
        if (
            lease is None
            or layout is None
            or lease.kind != "incoming"
            or lease.state is _State.LANDED
            or lease.is_broken
            or lease.arrived.get(pair) == done
        ):
            self.num_stale += 1
            return []
        expected = expected_bytes(layout, self._layout, len(lease.page_ids))
        wrong = _contradiction(lease, source_uuid, done, expected)
        if wrong is not None:
            lease.is_broken = True
            return self._end(lease, "broken", wrong) if lease.state is _State.HELD else []
        lease.source_uuid = source_uuid
        lease.arrived[pair] = done
        return self._land(lease, done, sum(expected.values())) if len(lease.arrived) == len(expected) else []

    def on_fenced(self, key: Key) -> list[Effect]:
        """The router passes on that no write of this attempt can still be posted or under way."""
        self._barred.pop(key, None)
        lease = self._leases.get(key)
        if lease is None or lease.kind != "incoming":
            return []
        lease.is_fenced = True
        lease.writers.clear()
        return self._settle(lease)

    def on_peer_fenced(self, key: Key, uuid: str) -> list[Effect]:
        """A prefill worker answers AskFence: it neither writes for this attempt nor ever will."""
        lease = self._leases.get(key)
        return [] if lease is None else self._on_done(uuid, [lease])

    def on_drained(self, key: Key) -> list[Effect]:
        """Every rank has let land what had reached this host when DrainRanks was returned."""
        lease = self._leases.get(key)
        return self._free(lease) if lease is not None and lease.state is _State.DRAINING else []

    def on_peer_fence(self, key: Key, uuid: str) -> list[Effect]:
        """A decode worker asks when no write of this attempt can reach it; answered by SayFenced to `uuid`.

        Ends the attempt where it is that worker's pages that it writes.
        """
        lease = self._leases.get(key)
        if lease is not None and lease.target_uuid != uuid:
            return [SayFenced(key, uuid)]
        return self.abort(key, uuid)

    def on_push_complete(
        self, key: Key, rank: int, num_pages: int, num_bytes: int, seconds: float, transport: str
    ) -> list[Effect]:
        """One of our ranks has pushed its share and notified."""
        lease = self._leases.get(key)
        if lease is None or lease.kind != "outgoing":
            return []
        lease.pushed[rank] = (num_pages, num_bytes, seconds)
        if lease.state is not _State.HELD:
            return self._on_done(rank, [lease])
        if len(lease.pushed) < self._layout.tp_size:
            return []
        lease.state = _State.LANDED
        pages, sizes, durations = zip(*lease.pushed.values(), strict=True)
        return [Pushed(key, max(pages), sum(sizes), max(durations), transport)]

    def on_push_failed(self, key: Key, rank: int, detail: str) -> list[Effect]:
        """One of our ranks cannot push: the lease is broken. Whether it is fenced is asked of every rank."""
        lease = self._leases.get(key)
        if lease is None or lease.state is not _State.HELD:
            return []
        return self._end(lease, "broken", f"rank {rank}: {detail}")

    def on_rank_fenced(self, key: Key, rank: int) -> list[Effect]:
        """One of our ranks has no write of this attempt under way, nor will it post one."""
        lease = self._leases.get(key)
        return [] if lease is None else self._on_done(rank, [lease])

    # What there is

    @property
    def num_leases(self) -> int:
        """Leases that have not ended."""
        return len(self._live)

    @property
    def num_quarantined(self) -> int:
        """Leases that have ended and are not fenced yet, or not drained."""
        return len(self._leases) - len(self._live)

    @property
    def num_awaited(self) -> int:
        """Incoming leases that writes may still reach: while there is one, ranks must progress transfers."""
        return sum(
            lease.kind == "incoming" and lease.state is not _State.LANDED for lease in self._leases.values()
        )

    @property
    def quarantined_pages(self) -> frozenset[int]:
        """Pages that belong to nobody until their old writer is fenced."""
        return frozenset(
            page
            for lease in self._leases.values()
            if lease.key != self._live.get(lease.key[0])
            for page in lease.page_ids
        )

    def is_live(self, key: Key) -> bool:
        """Whether this attempt has a lease that has not ended."""
        return self._live.get(key[0]) == key

    def audit(self) -> None:
        """Raise InvariantBroken unless every page that awaits writes has exactly one holder."""
        exposed = {
            page: lease.key
            for lease in self._leases.values()
            if lease.kind == "incoming" and lease.state is not _State.LANDED
            for page in lease.page_ids
        }
        if exposed != self._holder:
            raise InvariantBroken(f"pages that await writes: {exposed}, recorded: {self._holder}")
        for transfer_id, key in self._live.items():
            if key[0] != transfer_id or self._leases[key].state not in (_State.HELD, _State.LANDED):
                raise InvariantBroken(f"lease {key} has ended and is listed as live")

    # How leases end

    def _end_through(self, key: Key, reason: EndReason) -> list[Effect]:
        transfer_id, generation = key
        newest, _ = self._newest.get(transfer_id, (-1, True))
        if generation >= newest:
            self._remember(key, ended=True)
        live = self._live.get(transfer_id)
        return [] if live is None or live[1] > generation else self._end(self._leases[live], reason)

    def _end_live(self, transfer_id: str, reason: EndReason) -> list[Effect]:
        live = self._live.get(transfer_id)
        return [] if live is None else self._end(self._leases[live], reason)

    def _end(self, lease: _Lease, reason: EndReason, detail: str = "") -> list[Effect]:
        del self._live[lease.key[0]]
        self._remember(lease.key, ended=True)
        lease.reason = reason
        if lease.state is _State.LANDED or (lease.kind == "incoming" and not lease.page_ids):
            return self._free(lease)
        lease.state = _State.QUARANTINED
        effects: list[Effect] = [Quarantined(lease.key, lease.kind, lease.page_ids, reason, detail)]
        if lease.kind == "outgoing":
            return effects + self._stop(lease)
        if not lease.is_fenced:
            self._bar(lease.key)
            lease.writers.update(self._peers)
        return effects + self._ask(lease) + self._settle(lease)

    def _stop(self, lease: _Lease) -> list[Effect]:
        lease.writers.update(range(self._layout.tp_size))
        if lease.reason != "released":
            # Who minted the attempt passes the fence on to the decode worker, asked or not.
            lease.askers.add(lease.owner)
        return [StopPush(lease.key)]

    def _ask(self, lease: _Lease) -> list[Effect]:
        lease.ask_again_at = self._clock() + lease.ask_again_s
        lease.ask_again_s = min(2 * lease.ask_again_s, ASK_AGAIN_MAX_S)
        return [AskFence(lease.key, str(uuid)) for uuid in lease.writers]

    def _answer(self, key: Key, asker: str) -> list[Effect]:
        lease = self._leases.get(key)
        if lease is None:
            return [SayFenced(key, asker)]
        if lease.kind == "outgoing":
            lease.askers.add(asker)
        return []

    def _on_done(self, writer: str | int, leases: Sequence[_Lease]) -> list[Effect]:
        effects: list[Effect] = []
        for lease in leases:
            if writer in lease.writers:
                lease.writers.discard(writer)
                effects += self._settle(lease)
        return effects

    def _settle(self, lease: _Lease) -> list[Effect]:
        """Go on where the last writer of a quarantined lease is done."""
        if lease.state is not _State.QUARANTINED or lease.writers:
            return []
        if lease.kind == "outgoing":
            return self._free(lease)
        lease.state = _State.DRAINING
        return [DrainRanks(lease.key)]

    def _land(self, lease: _Lease, done: PushDone, bytes_expected: int) -> list[Effect]:
        self._barred.pop(lease.key, None)
        if lease.state is not _State.HELD:
            return self._free(lease)
        lease.state = _State.LANDED
        self._cover(lease)
        return [
            KvComplete(
                key=lease.key,
                source_uuid=str(lease.source_uuid),
                token_id=done.token_id,
                position=done.position,
                finished=done.finished,
                num_pages=len(lease.page_ids),
                bytes_expected=bytes_expected,
                bytes_received=sum(each.num_bytes for each in lease.arrived.values()),
                wait_s=self._clock() - lease.granted_at,
                transport=done.transport,
            )
        ]

    def _free(self, lease: _Lease) -> list[Effect]:
        del self._leases[lease.key]
        if lease.kind == "incoming" and lease.state is not _State.LANDED:
            self._cover(lease)
        freed = Freed(lease.key, lease.kind, lease.page_ids, lease.reason)
        return [freed, *(SayFenced(lease.key, asker) for asker in sorted(lease.askers))]

    def _expose(self, key: Key, page_ids: Sequence[int]) -> None:
        for page in page_ids:
            if page in self._holder:
                raise InvariantBroken(
                    f"page {page} was given to {key}, and {self._holder[page]} awaits writes on it"
                )
        self._holder.update(dict.fromkeys(page_ids, key))

    def _cover(self, lease: _Lease) -> None:
        for page in lease.page_ids:
            del self._holder[page]

    def _bar(self, key: Key) -> None:
        self._barred[key] = None
        if len(self._barred) > MAX_BARRED:
            self._barred.popitem(last=False)

    def _remember(self, key: Key, *, ended: bool) -> None:
        transfer_id, generation = key
        newest, _ = self._newest.get(transfer_id, (-1, True))
        if generation >= newest:
            self._newest[transfer_id] = (generation, ended)
            self._newest.move_to_end(transfer_id)
        if len(self._newest) > MAX_REMEMBERED:
            self._newest.popitem(last=False)

    def _awaits_peers(self, lease: _Lease) -> bool:
        return lease.kind == "incoming" and bool(lease.writers)


def _contradiction(
    lease: _Lease, source_uuid: str, done: PushDone, expected: dict[tuple[int, int], int]
) -> str | None:
    """Say what is wrong with a notification, given those before it; None where nothing is."""
    pair = (done.source_rank, done.target_rank)
    if lease.source_uuid not in (None, source_uuid):
        return f"both {lease.source_uuid} and {source_uuid} wrote"
    if pair not in expected:
        return f"rank {pair[0]} of {source_uuid} shares no head with rank {pair[1]}"
    if done.num_bytes != expected[pair]:
        return f"{done.num_bytes} bytes came from rank {pair[0]} to rank {pair[1]}, expected {expected[pair]}"
    for other in lease.arrived.values():
        if (other.token_id, other.position, other.finished) != (done.token_id, done.position, done.finished):
            return (
                f"ranks {other.source_rank} and {done.source_rank} of {source_uuid} sampled different tokens"
            )
    return None
