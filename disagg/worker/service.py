"""What a worker does with each message, and with each thing its engine and transfer threads tell.

The one place where engine, leases and pushes meet. Runs on the engine thread, which alone touches
them; it performs the effects of the lease table and collects messages in the outbox. It knows no
socket and no thread, so a test can drive it message by message.
"""

import logging
import time
from collections.abc import Callable
from typing import assert_never

from msgspec import Struct

from disagg.engine import ChunkDone, Engine, EngineRequest, Refused, SequenceOutput
from disagg.errors import LayoutMismatch
from disagg.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    Failed,
    Fenced,
    FirstToken,
    FromPeer,
    Generate,
    Goodbye,
    Hello,
    KvReceived,
    Load,
    PeerBye,
    PeerFence,
    PeerFenced,
    PeerHello,
    Prefill,
    PrefillDone,
    Rejected,
    Release,
    Renew,
    Reserve,
    Reserved,
    Role,
    SequenceTokens,
    SnapshotRequest,
    ToWorker,
    WorkerState,
)
from disagg.telemetry import fields
from disagg.transfer import (
    AbortPush,
    Arrived,
    AwaitKv,
    Connected,
    ConnectFailed,
    Drained,
    Event,
    PushComplete,
    PushFailed,
    check_layouts,
    is_process_gone,
)
from disagg.transfer import Fenced as RankFenced
from disagg.worker import leases
from disagg.worker.attempts import Attempt, engine_id
from disagg.worker.leases import (
    AskFence,
    DrainRanks,
    Freed,
    Key,
    KvComplete,
    LeaseTable,
    Pushed,
    Quarantined,
    SayFenced,
    StopPush,
)
from disagg.worker.metrics import WorkerCounts
from disagg.worker.outbox import OnLink, Outbox, Report, ToPeer, ToRouters
from disagg.worker.prefix import SummaryPublisher, peek_cached_tokens
from disagg.worker.pushes import Pushes
from disagg.worker.reasons import failure_reason, reject_reason
from disagg.worker.sources import IsGone, Sources
from disagg.worker.targets import Targets
from disagg.worker.transfers import Transfers

log = logging.getLogger(__name__)


class Identity(Struct, frozen=True, kw_only=True):
    """What this worker is, for as long as its process lives."""

    role: Role
    hello: PeerHello
    """What it tells peers: its uuid, its layout and how each rank is reached."""
    transport: str


class WorkerService:
    """One worker's behaviour. Engine thread only."""

    def __init__(
        self,
        identity: Identity,
        *,
        engine: Engine,
        transfers: Transfers,
        counts: WorkerCounts,
        clock: Callable[[], float] = time.monotonic,
        is_gone: IsGone = is_process_gone,
    ) -> None:
        self.outbox = Outbox()
        self.state: WorkerState = "ready"
        self._identity = identity
        self._engine = engine
        self._transfers = transfers
        self._counts = counts
        self._clock = clock
        self._table = LeaseTable(identity.hello.layout, clock)
        self._targets = Targets(identity.hello, transfers, self.outbox, clock)
        self._sources = Sources(identity.hello.host_id, is_gone)
        self._pushes = Pushes(transfers, self._targets, clock)
        self._summaries = SummaryPublisher(engine.cache, self.outbox, clock)
        self._attempts: dict[Key, Attempt] = {}
        self._by_engine_id: dict[str, Attempt] = {}
        self._num_awaited = 0
        self._has_news = False
        """The engine may have an event to tell without having anything to compute."""
        self._is_load_old = False
        """Attempts have come in since the last Load."""

    # --- what arrives ---------------------------------------------------------------------------

    def on_hello(self, router_id: str, hello: Hello) -> None:
        """A router has connected; it has been welcomed and wants to know the rest."""
        self._table.renew(router_id, hello.lease_ttl_s)
        self._summaries.send_snapshot(router_id)
        self.report()

    def on_router(self, router_id: str, message: ToWorker) -> None:
        """A router asks for something."""
        match message:
            case Reserve() | Prefill() | Generate():
                self._begin(router_id, message)
            case Abort(transfer_id, generation):
                self._abort(router_id, (transfer_id, generation))
            case Release(transfer_id, generation):
                self._do(self._table.release((transfer_id, generation)))
            case Fenced(transfer_id, generation):
                self._do(self._table.on_fenced((transfer_id, generation)))
            case Renew(ttl_s):
                self._table.renew(router_id, ttl_s)
            case SnapshotRequest():
                self._summaries.send_snapshot(router_id)
            case Goodbye():
                self._do(self._table.end_owner(router_id))
            case Hello():
                self.on_hello(router_id, message)
            case _:
                assert_never(message)

    def on_peer(self, uuid: str, message: FromPeer) -> None:
        """A prefill worker says something over the link that it opened."""
        match message:
            case PeerHello():
                self._on_source_hello(uuid, message)
            case PeerFenced(transfer_id, generation):
                self._do(self._table.on_peer_fenced((transfer_id, generation), uuid))
            case PeerBye(reason):
                log.info("prefill worker said goodbye %s", fields(uuid=uuid, reason=reason))
                self._sources.forget(uuid)
                self._do(self._table.on_peer_gone(uuid))
            case PeerFence():
                # Only the side that is written into asks for fences.
                log.warning("fence asked for over a prefill worker's own link %s", fields(uuid=uuid))
            case _:
                assert_never(message)

    def on_link(self, uuid: str, message: FromPeer) -> None:
        """A decode worker says something over the link that we opened to it."""
        match message:
            case PeerHello():
                refused = self._targets.on_hello(uuid, message)
                if refused is not None:
                    self._lose_target(uuid, refused)
            case PeerFence(transfer_id, generation):
                self._do(self._table.on_peer_fence((transfer_id, generation), uuid))
            case PeerBye(reason):
                self._targets.on_bye(uuid, reason)
                self._lose_target(uuid, reason or "peer_unreachable: it said goodbye")
            case PeerFenced():
                log.warning("fence told over our own link %s", fields(uuid=uuid))
            case _:
                assert_never(message)

    def on_link_lost(self, uuid: str) -> None:
        """The link to a decode worker broke."""
        self._lose_target(uuid, "peer_lost: its link broke")

    def on_transfer(self, rank: int, event: Event) -> None:
        """One rank's transfer thread tells of KV."""
        match event:
            case Connected(peer_uuid):
                if self._transfers.connected(rank, event):
                    self._targets.on_connected(peer_uuid)
                    self._pushes.on_target_ready(peer_uuid)
            case ConnectFailed(peer_uuid, error):
                if self._transfers.connect_failed(event):
                    self._lose_target(peer_uuid, failure_reason(error))
            case PushComplete(key, num_pages, num_bytes, seconds, transport):
                self._do(self._table.on_push_complete(key, rank, num_pages, num_bytes, seconds, transport))
            case PushFailed(key, error):
                self._fail_push(key, failure_reason(error), rank)
            case RankFenced(key):
                self._do(self._table.on_rank_fenced(key, rank))
            case Arrived(source_uuid, done):
                self._counts.received_bytes += done.num_bytes
                self._do(self._table.on_arrived(source_uuid, done))
            case Drained():
                drained = self._transfers.drained(rank, event)
                if drained is not None:
                    self._do(self._table.on_drained(drained))
            case _:
                assert_never(event)

    def on_tick(self) -> None:
        """Twice a second: deadlines, expiry, peers that have died, what routers are told regularly."""
        for key in self._pushes.overdue():
            self._fail_push(key, "timeout: its deadline passed before anything could be sent")
        for uuid in self._targets.overdue():
            self._lose_target(uuid, "peer_unreachable: it does not answer")
        if self._table.num_quarantined:
            for uuid in self._sources.gone():
                self._sources.forget(uuid)
                self._do(self._table.on_peer_gone(uuid))
        self._do(self._table.expire())
        self._summaries.on_tick()
        self.report()

    # --- steps ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step may do something now."""
        return self._engine.has_work or self._has_news

    def step(self) -> bool:
        """Run one step of the engine and pass on what came of it.

        False where it had nothing to do: all that waits lacks pages.
        """
        self._has_news = False
        output = self._engine.step()
        if output is None:
            return False
        if output.step_s:
            self._counts.step_s.observe(output.step_s)
        for event in output.events:
            attempt = self._by_engine_id.get(event.request_id)
            if attempt is None or attempt.ended:
                continue
            match event:
                case SequenceOutput():
                    self._on_output(attempt, event)
                case ChunkDone():
                    self._pushes.on_chunk(attempt.key, event)
                case _:
                    assert_never(event)
        is_idle = not self._engine.has_work
        self._summaries.publish(at_once=is_idle)
        if is_idle:
            self.report()
        return True

    def begin_drain(self) -> None:
        """Take no new work from now on; what runs goes on."""
        if self.state == "ready":
            self.state = "draining"
            self.report()

    def say_goodbye(self) -> None:
        """Tell everybody that this process ends."""
        self.outbox.put(ToRouters(Goodbye("drained" if not self._attempts else "drain deadline passed")))
        if not self._pushes_under_way:
            # Decode workers take it for the fence of everything that we pushed.
            for uuid in self._targets.uuids:
                self.outbox.put(OnLink(uuid, PeerBye("the prefill worker ends")))
        for uuid in self._sources.uuids:
            self.outbox.put(ToPeer(uuid, PeerBye("peer_lost: the decode worker ends")))

    def report_changes(self) -> None:
        """Report what has come in since the last report: the step that follows may take long."""
        if self._is_load_old:
            self.report()

    def report(self) -> None:
        """Tell the loop thread how this worker is."""
        self._is_load_old = False
        stats = self._engine.stats()
        self._counts.take(stats)
        self._counts.leases = {"held": self._num_leases, "quarantined": self._table.num_quarantined}
        self._counts.stale_messages = self._table.num_stale
        load = Load(
            state=self.state,
            running=stats.running,
            waiting=stats.waiting,
            leases=self._num_leases + self._table.num_quarantined,
            queued_tokens=stats.queued_tokens,
            pages_total=stats.pages_total,
            pages_free=stats.pages_free,
            pages_cached=stats.pages_cached,
            pages_in_use=stats.pages_in_use,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_step_s=stats.decode_step_s,
            transfer_bytes_per_s=self._pushes.bytes_per_s,
        )
        self.outbox.put(Report(load, len(self._attempts)))

    def audit(self) -> None:
        """Raise InvariantBroken where the books do not balance."""
        self._engine.audit()
        self._table.audit()

    # --- beginnings -----------------------------------------------------------------------------

    def _begin(self, router_id: str, message: Reserve | Prefill | Generate) -> None:
        """Admit a new attempt, or drop it as stale, or refuse it."""
        key = (message.transfer_id, message.generation)
        if self.state != "ready":
            self._do(self._table.abort(key))
            self.outbox.to_router(router_id, Rejected(*key, "draining"))
            return
        effects = self._table.admit(key)
        if effects is None:
            log.info(
                "stale message dropped %s",
                fields(kind=type(message).__name__, transfer_id=key[0], generation=key[1]),
            )
            return
        self._do(effects)
        match message:
            case Reserve():
                rejected = self._reserve(router_id, key, message)
            case Prefill():
                rejected = self._prefill(router_id, key, message)
            case Generate():
                rejected = self._generate(router_id, key, message)
        if rejected is not None:
            self.outbox.to_router(router_id, rejected)

    def _reserve(self, router_id: str, key: Key, message: Reserve) -> Rejected | None:
        outcome = self._engine.reserve(to_engine(key, message), message.cap_match)
        if isinstance(outcome, Refused):
            return Rejected(*key, reject_reason(outcome), outcome.detail)
        self._grant(router_id, key, "incoming", message.ttl_s, outcome.page_ids[outcome.first_missing_page :])
        self.outbox.to_router(
            router_id,
            Reserved(*key, outcome.first_missing_page, outcome.page_ids, outcome.cached_tokens),
        )
        return None

    def _prefill(self, router_id: str, key: Key, message: Prefill) -> Rejected | None:
        target = message.target
        if target.uuid in self._targets.mismatched:
            return Rejected(*key, "layout_mismatch", self._targets.mismatched[target.uuid])
        num_pages = self._engine.limits.pages_of(len(message.token_ids))
        if len(target.page_ids) != num_pages or not 0 <= target.first_missing_page <= num_pages:
            return Rejected(
                *key,
                "layout_mismatch",
                f"{len(message.token_ids)} tokens fill {num_pages} pages here, the target names "
                f"{len(target.page_ids)}, missing from {target.first_missing_page} on",
            )
        rejected = self._add(router_id, key, message)
        if rejected is None:
            self._grant(router_id, key, "outgoing", message.ttl_s, target_uuid=target.uuid)
            self._pushes.begin(key, target, message.deadline_s)
        return rejected

    def _generate(self, router_id: str, key: Key, message: Generate) -> Rejected | None:
        rejected = self._add(router_id, key, message)
        if rejected is None:
            self._grant(router_id, key, "local", message.ttl_s)
        return rejected

    def _add(self, router_id: str, key: Key, message: Prefill | Generate) -> Rejected | None:
        outcome = self._engine.add(to_engine(key, message))
        if isinstance(outcome, Refused):
            return Rejected(*key, reject_reason(outcome), outcome.detail)
        # Not before: token ids that the engine refuses need not fit the array that this makes.
        cached_tokens = peek_cached_tokens(self._engine.cache, message.token_ids, message.cache_salt)
        self.outbox.to_router(router_id, Accepted(*key, cached_tokens))
        return None

    def _grant(
        self,
        router_id: str,
        key: Key,
        kind: leases.Kind,
        ttl_s: float,
        page_ids: list[int] | None = None,
        target_uuid: str | None = None,
    ) -> None:
        attempt = Attempt(key=key, kind=kind, router_id=router_id, begun_at=self._clock())
        self._attempts[key] = self._by_engine_id[engine_id(key)] = attempt
        self._is_load_old = True
        self._do(
            self._table.grant(
                key, kind=kind, owner=router_id, ttl_s=ttl_s, page_ids=page_ids or (), target_uuid=target_uuid
            )
        )

    def _abort(self, router_id: str, key: Key) -> None:
        # A decode worker must not answer: the router would take it for the prefill worker's word.
        asker = router_id if self._identity.role == "prefill" else None
        self._do(self._table.abort(key, asker))

    # --- what the engine made -------------------------------------------------------------------

    def _on_output(self, attempt: Attempt, output: SequenceOutput) -> None:
        if attempt.kind == "outgoing":
            self._on_first_token(attempt, output)
            return
        self._observe_tokens(attempt, output)
        self.outbox.add_tokens(
            attempt.router_id,
            SequenceTokens(
                *attempt.key,
                position=output.position,
                token_ids=output.token_ids,
                finish_reason=output.finish_reason,
                cached_tokens=output.cached_tokens,
            ),
        )
        if output.finish_reason is not None:
            self._finish(attempt, output.finish_reason)

    def _on_first_token(self, attempt: Attempt, output: SequenceOutput) -> None:
        if not output.token_ids:
            self._fail_push(attempt.key, f"the engine ended it: {output.finish_reason}")
            return
        self._observe_tokens(attempt, output)
        self._pushes.on_first_token(attempt.key, output)
        self.outbox.to_router(
            attempt.router_id,
            FirstToken(
                *attempt.key,
                position=output.position,
                token_id=output.token_ids[0],
                finish_reason=output.finish_reason,
                cached_tokens=output.cached_tokens or 0,
                queue_s=output.queue_s,
                compute_s=output.compute_s,
            ),
        )

    def _observe_tokens(self, attempt: Attempt, output: SequenceOutput) -> None:
        if not output.token_ids:
            return
        now = self._clock()
        if attempt.token_at is not None:
            self._counts.itl_s.observe(now - attempt.token_at)
        elif attempt.kind != "incoming":
            self._counts.ttft_s.observe(now - attempt.begun_at)
        attempt.token_at = now

    def _finish(self, attempt: Attempt, reason: str) -> None:
        """Count an attempt that came to its own end, and let go of its lease."""
        self._counts.finished[reason] += 1
        self._counts.e2e_s.observe(self._clock() - attempt.begun_at)
        self._do(self._table.release(attempt.key))

    # --- what the leases want -------------------------------------------------------------------

    def _do(self, effects: list[leases.Effect]) -> None:
        for effect in effects:
            match effect:
                case KvComplete():
                    self._on_kv_complete(effect)
                case Pushed():
                    self._on_pushed(effect)
                case Quarantined():
                    self._on_quarantined(effect)
                case Freed():
                    self._on_freed(effect)
                case StopPush(key):
                    self._transfers.submit(AbortPush(key))
                case AskFence(key, uuid):
                    self.outbox.put(ToPeer(uuid, PeerFence(*key)))
                case SayFenced(key, asker):
                    self._say_fenced(key, asker)
                case DrainRanks(key):
                    self._transfers.drain(key)
                case _:
                    assert_never(effect)
        self._await_kv()

    def _on_kv_complete(self, event: KvComplete) -> None:
        attempt = self._attempts[event.key]
        self.outbox.to_router(
            attempt.router_id,
            KvReceived(
                *event.key,
                num_pages=event.num_pages,
                bytes_expected=event.bytes_expected,
                bytes_received=event.bytes_received,
                wait_s=event.wait_s,
                transport=event.transport or self._identity.transport,
            ),
        )
        self._engine.start(engine_id(event.key), event.token_id, event.finished)
        self._has_news = True
        if event.finished:
            self._finish(attempt, "stop")

    def _on_pushed(self, event: Pushed) -> None:
        attempt = self._attempts[event.key]
        self._counts.sent_bytes += event.num_bytes
        self.outbox.to_router(
            attempt.router_id,
            PrefillDone(*event.key, event.num_pages, event.num_bytes, event.seconds, event.transport),
        )
        self._pushes.on_pushed(event)
        self._finish(attempt, "length")

    def _on_quarantined(self, event: Quarantined) -> None:
        """Stop the request at once; its pages stay until Freed."""
        attempt = self._attempts[event.key]
        self._end(attempt, event.reason)
        if event.kind == "outgoing":
            self._pushes.end(event.key)
            self._engine.abort(engine_id(event.key), keep_pages=True)
        else:
            self._engine.quarantine(engine_id(event.key))
        if event.reason in ("broken", "expired"):
            reason = attempt.failure or (f"broken: {event.detail}" if event.detail else event.reason)
            self.outbox.to_router(attempt.router_id, Failed(*event.key, reason, fenced=False))

    def _on_freed(self, event: Freed) -> None:
        attempt = self._attempts.pop(event.key)
        del self._by_engine_id[engine_id(event.key)]
        self._free(attempt, event)
        if not self._attempts:
            self.report()

    def _free(self, attempt: Attempt, event: Freed) -> None:
        if attempt.ended and event.kind == "incoming":
            self._engine.unquarantine(list(event.page_ids))
            return
        self._pushes.end(event.key)
        if not attempt.ended:
            self._end(attempt, event.reason)
            if event.reason == "expired":
                self.outbox.to_router(attempt.router_id, Failed(*event.key, event.reason, fenced=True))
        self._engine.release(engine_id(event.key))

    def _end(self, attempt: Attempt, reason: leases.EndReason) -> None:
        attempt.ended = True
        if reason != "released":
            self._counts.finished["error" if reason == "broken" else "abort"] += 1

    def _say_fenced(self, key: Key, asker: str) -> None:
        if self._targets.has_link(asker):
            self.outbox.put(OnLink(asker, PeerFenced(*key)))
        else:
            self.outbox.to_router(asker, Fenced(*key))

    def _await_kv(self) -> None:
        """Have the ranks progress transfers exactly while writes may arrive."""
        num_awaited = self._table.num_awaited
        if num_awaited != self._num_awaited:
            self._transfers.submit(AwaitKv(num_awaited - self._num_awaited))
            self._num_awaited = num_awaited

    @property
    def _pushes_under_way(self) -> bool:
        return any(attempt.kind == "outgoing" for attempt in self._attempts.values())

    @property
    def _num_leases(self) -> int:
        return sum(attempt.kind != "local" and not attempt.ended for attempt in self._attempts.values())

    # --- peers ----------------------------------------------------------------------------------

    def _on_source_hello(self, uuid: str, hello: PeerHello) -> None:
        refused = self._refuse_source(uuid, hello)
        if refused is not None:
            log.warning("prefill worker refused %s", fields(worker_id=hello.worker_id, reason=refused))
            self.outbox.put(ToPeer(uuid, PeerBye(refused)))
            return
        for predecessor in self._sources.add(hello):
            self._do(self._table.on_peer_gone(predecessor))
        # The fences first: the peer must know which attempts are over before it can reach our pool.
        self._do(self._table.on_peer(uuid, hello.layout))
        self.outbox.put(ToPeer(uuid, self._identity.hello))

    def _refuse_source(self, uuid: str, hello: PeerHello) -> str | None:
        if hello.uuid != uuid:
            return f"peer_unreachable: a hello of {hello.uuid} over the link of {uuid}"
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"peer_unreachable: protocol version {PROTOCOL_VERSION} here, {hello.protocol_version} there"
            )
        try:
            check_layouts(hello.layout, self._identity.hello.layout)
        except LayoutMismatch as error:
            return f"layout_mismatch: {error}"
        return None

    def _lose_target(self, uuid: str, reason: str) -> None:
        """Fail what has not begun to move to a target; the transfer threads fail the rest."""
        stranded = self._pushes.stranded(uuid)
        self._targets.forget(uuid)
        for key in stranded:
            self._fail_push(key, reason)

    def _fail_push(self, key: Key, reason: str, rank: int = 0) -> None:
        attempt = self._attempts.get(key)
        if attempt is None or attempt.ended:
            return
        attempt.failure = reason
        self._counts.transfer_failures[reason.partition(":")[0]] += 1
        self._do(self._table.on_push_failed(key, rank, reason))


def to_engine(key: Key, message: Reserve | Prefill | Generate) -> EngineRequest:
    """Say to the engine what a router asks."""
    return EngineRequest(
        request_id=engine_id(key),
        token_ids=message.token_ids,
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=message.sampling,
        cache_salt=message.cache_salt,
        prefill_only=isinstance(message, Prefill),
    )
