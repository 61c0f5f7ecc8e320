"""The dispatcher: links to all workers, the queue before them, and the clock over both.

A worker's messages come in here and go to the sequence they name. When something has changed that
may let the queue move (`poke`), the head is placed at the end of the batch of messages, on all the
facts that it brought. Everything runs on the loop thread; nothing here waits.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import assert_never

from disagg.config import LeaseConfig, RoutingConfig
from disagg.errors import ConfigError
from disagg.protocol import (
    PROTOCOL_VERSION,
    Accepted,
    Failed,
    Fenced,
    FirstToken,
    FromWorker,
    Goodbye,
    Hello,
    KvReceived,
    Load,
    PrefillDone,
    Rejected,
    Renew,
    Reserved,
    SnapshotRequest,
    SummaryDelta,
    SummaryDigest,
    SummarySnapshot,
    Tokens,
    Welcome,
)
from disagg.router.fences import FenceBook
from disagg.router.hashes import PromptHashes
from disagg.router.links import Connector
from disagg.router.pairing import why_refused
from disagg.router.policy import Impossible, Placement, Stranded, Wait, decide, with_held
from disagg.router.proofs import ProcessProof, Proof, TakeProof
from disagg.router.queue import WaitQueue
from disagg.router.registry import Registry, Worker
from disagg.router.sequence import Sequence
from disagg.telemetry import RouterMetrics, fields

log = logging.getLogger(__name__)

TICK_S = 0.1
SLOW_TICK_S = 1.0
"""Deadlines of attempts, which are seconds, are looked at this often."""
HELLO_AGAIN_S = 5.0
"""A worker that is connected and has not said who it is, is asked again: it may be starting."""
LATE_FACTS_S = 5.0
"""How long a sequence that has ended is still known, for what its prefill worker has yet to tell."""

Clock = Callable[[], float]


class Dispatcher:
    """Runs sequences on workers. `run` keeps its clock; without it nothing times out."""

    def __init__(
        self,
        registry: Registry,
        connector: Connector,
        metrics: RouterMetrics,
        *,
        router_id: str,
        routing: RoutingConfig,
        lease: LeaseConfig,
        clock: Clock = time.monotonic,
        tokenizer_hash: str | None = None,
        proofs: tuple[TakeProof, ...] = (ProcessProof.take,),
    ) -> None:
        self.registry = registry
        self.metrics = metrics
        self.lease = lease
        self.max_attempts = routing.max_attempts
        self.queue = WaitQueue(routing.max_queued_tokens)
        self.fences = FenceBook()
        self._connector = connector
        self._router_id = router_id
        self._routing = routing
        self._clock = clock
        self._tokenizer_hash = tokenizer_hash
        self._take_proofs = proofs
        self._sequences: dict[str, Sequence] = {}
        self._stranded: dict[str, tuple[float, Sequence]] = {}
        """By transfer id: since when, and who waits for a worker of the model that began it."""
        self._late: dict[str, tuple[float, Sequence]] = {}
        self._turn = 0
        self._num_connections = 0
        self._is_poked = False
        self._could_decode_at = -math.inf
        self._slow_tick_at = 0.0
        self._proofs: dict[str, list[Proof]] = {}
        """By the uuid of a process that has said who it is."""

    # --- life --------------------------------------------------------------------------------

    def connect(self, address: str) -> None:
        """Begin to talk to the worker at `address`; raises `ConfigError` for one that links do not take."""
        worker = self.registry.add(address)
        try:
            worker.link = self._connector.open(address, WorkerEvents(self, worker))
        except ConfigError:
            self.registry.remove(worker)
            raise

    def disconnect(self, worker: Worker) -> None:
        """Let go of a worker that holds nothing for us."""
        worker.tell(Goodbye("gone from discovery"))
        if worker.link is not None:
            worker.link.close()
        worker.on_lost()
        self._proofs.pop(worker.uuid, None)
        self.registry.remove(worker)
        log.info("worker removed %s", fields(worker=worker.name, address=worker.address))

    async def run(self) -> None:
        """Keep time until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.on_tick()

    def close(self) -> None:
        """Say goodbye to every worker, which frees what is held there for us."""
        for worker in self.registry:
            worker.tell(Goodbye("the router ends"))
            if worker.link is not None:
                worker.link.close()

    def now(self) -> float:
        """Read the clock."""
        return self._clock()

    # --- sequences ---------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue what has been checked, and place what can begin."""
        for sequence in sequences:
            self._sequences[sequence.transfer_id] = sequence
            self.queue.add(sequence)
        self._place()

    def requeue(self, sequence: Sequence) -> None:
        """Place a sequence again, from where its output is."""
        if sequence.output:
            sequence.hashes = PromptHashes(sequence.prompt + sequence.output, sequence.cache_salt)
        self.queue.add_again(sequence)
        self._is_poked = True

    def unqueue(self, sequence: Sequence) -> None:
        """Place it no more."""
        self.queue.remove(sequence)
        self._stranded.pop(sequence.transfer_id, None)

    def on_ended(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._sequences.pop(sequence.transfer_id, None)
        if sequence.late_generation is not None:
            self._late[sequence.transfer_id] = (self._clock() + LATE_FACTS_S, sequence)
        self._is_poked = True

    def expect_fence(self, transfer_id: str, generation: int, prefill: Worker, decode: Worker) -> None:
        """Tell `decode` once `prefill` can write no more."""
        self.fences.expect((transfer_id, generation), prefill, decode, self._clock())

    def ask_snapshot(self, worker: Worker) -> None:
        """Have a worker tell all that its cache holds."""
        if worker.follower.ask_again(self._clock()):
            worker.tell(SnapshotRequest())

    def poke(self) -> None:
        """Look at the queue at the end of this batch of messages."""
        self._is_poked = True

    def place_if_poked(self) -> None:
        """Place what can begin, if something has changed."""
        if self._is_poked:
            self._place()

    def leases_by_state(self) -> dict[str, int]:
        """Count attempts that hold pages, by how far they are."""
        counts = dict.fromkeys(("reserve", "prefill", "transfer", "decode", "local"), 0)
        for sequence in self._sequences.values():
            if sequence.attempt is not None:
                counts[sequence.attempt.stage] += 1
        return counts

    def may_decode(self) -> bool:
        """Whether somebody can decode, or could so lately that another may be about to.

        A pool that rolls, or whose only worker starts again, is empty for a moment: what waits then is not
        given up before `lease_ttl_s`, and so what is new waits with it.
        """
        can_decode = any(worker.can_decode for worker in self.registry)
        return can_decode or self._clock() - self._could_decode_at <= self.lease.lease_ttl_s

    def prefill_tokens_per_s(self) -> float:
        """What all workers that prefill compute together, as far as they have measured it."""
        ready = [w for w in self.registry.ready() if w.load is not None and w.welcome is not None]
        pool = [w for w in ready if w.welcome and w.welcome.role != "decode"] or ready
        return sum(worker.load.prefill_tokens_per_s for worker in pool if worker.load is not None)

    def _place(self) -> None:
        """Place from the head for as long as the head can begin."""
        self._is_poked = False
        queue = self.queue
        while (sequence := queue.head()) is not None:
            now = self._clock()
            facts = self.registry.facts(sequence.hashes, now)
            if (held := sequence.held()) is not None:
                facts = [with_held(worker, held) for worker in facts]
            decided = decide(
                sequence.override or self._routing.disaggregate,
                self._routing.routing_policy,
                facts,
                sequence.job(),
                turn=self._turn,
                is_override=sequence.override is not None,
            )
            if isinstance(decided, Wait):
                return
            if isinstance(decided, Stranded):
                # Aside: what can begin must not wait for a worker that may never come.
                self.queue.remove(sequence)
                self._stranded[sequence.transfer_id] = (now, sequence)
                continue
            if isinstance(decided, Impossible):
                sequence.give_up(decided.reason, now)
                continue
            self._begin(sequence, decided, now)

    def _begin(self, sequence: Sequence, placement: Placement, now: float) -> None:
        decode = self.registry.by_uuid(placement.decode_uuid)
        prefill = self.registry.by_uuid(placement.prefill_uuid) if placement.prefill_uuid else None
        assert decode is not None, "decided on the facts of this moment"
        self._turn += 1
        self.queue.remove(sequence)
        sequence.begin(placement, decode, prefill, now)

    # --- workers -----------------------------------------------------------------------------

    def on_up(self, worker: Worker) -> None:
        """Ask who is there."""
        self._num_connections += 1
        # Another id each time: what a broken link swallowed, an Abort perhaps, is then not renewed by
        # what comes after it, and ends by expiry.
        worker.router_id = f"{self._router_id}.{self._num_connections}"
        self._say_hello(worker, self._clock())

    def _say_hello(self, worker: Worker, now: float) -> None:
        assert worker.link is not None
        worker.hello_at = now
        worker.link.send(Hello(PROTOCOL_VERSION, worker.router_id, self.lease.lease_ttl_s))

    def on_down(self, worker: Worker, reason: str) -> None:
        """A worker cannot be reached any more: what it had goes on elsewhere."""
        worker.hello_at = None
        if not worker.is_up:
            worker.on_lost()  # one that was refused is not there any more
            return
        now = self._clock()
        worker.on_lost()
        log.warning("worker lost %s", fields(worker=worker.name, address=worker.address, reason=reason))
        self.metrics.workers_lost.labels(worker.welcome.role if worker.welcome else "").inc()
        for sequence in [*worker.decodes, *worker.prefills]:
            sequence.on_worker_lost(worker, now)
        assert not worker.decodes
        assert not worker.prefills
        self.fences.on_lost(worker, self._proofs.get(worker.uuid, []))
        self._is_poked = True

    def on_message(self, worker: Worker, message: FromWorker) -> None:
        """Take in one message."""
        now = worker.heard_at = self._clock()
        if isinstance(message, Tokens):
            sequences = self._sequences
            for part in message.sequences:
                sequence = sequences.get(part.transfer_id)
                if sequence is not None:
                    sequence.on_tokens(worker, part, now)
        elif isinstance(message, Welcome):
            self._on_welcome(worker, message, now)
        elif not worker.is_up:
            pass  # not before it has said who it is
        elif isinstance(message, Load):
            worker.on_load(message, now)
            if worker.can_decode:
                self._could_decode_at = now
            self._is_poked = True
        elif isinstance(message, SummaryDelta | SummarySnapshot | SummaryDigest):
            self._on_summary(worker, message, now)
        elif isinstance(message, Goodbye):
            assert worker.link is not None
            worker.link.reset(f"goodbye: {message.reason}")
        else:
            self._on_answer(worker, message, now)

    def _on_answer(
        self,
        worker: Worker,
        message: Reserved | Rejected | Accepted | FirstToken | PrefillDone | KvReceived | Failed | Fenced,
        now: float,
    ) -> None:
        if isinstance(message, Fenced):
            self.fences.on_fenced(message)
            return
        sequence = self._sequences.get(message.transfer_id)
        if sequence is None:
            if isinstance(message, PrefillDone) and message.transfer_id in self._late:
                self._late.pop(message.transfer_id)[1].on_prefill_done(worker, message, now)
            return
        match message:
            case Reserved():
                sequence.on_reserved(worker, message, now)
            case Rejected():
                sequence.on_rejected(worker, message, now)
            case Accepted():
                sequence.on_accepted(worker, message, now)
            case FirstToken():
                sequence.on_first_token(worker, message, now)
            case PrefillDone():
                sequence.on_prefill_done(worker, message, now)
            case KvReceived():
                sequence.on_kv_received(worker, message, now)
            case Failed():
                sequence.on_failed(worker, message, now)
            case _:
                assert_never(message)

    def _on_welcome(self, worker: Worker, welcome: Welcome, now: float) -> None:
        if worker.uuid == welcome.uuid and (worker.is_up or worker.state != "lost"):
            return  # it has answered more than one Hello
        old_uuid, refused = worker.uuid, why_refused(welcome, self._tokenizer_hash)
        if refused is not None:
            log.error("worker is not used %s", fields(worker=welcome.worker_id, reason=refused))
        if welcome.uuid != old_uuid:
            self._proofs.pop(old_uuid, None)
            self.fences.on_replaced(old_uuid)
        if refused is not None and welcome.protocol_version != PROTOCOL_VERSION:
            worker.refuse(welcome, refused, now)  # whatever else it says may mean something else
            return
        if worker.on_welcome(welcome, now, refused):
            taken = [take(worker.address, welcome) for take in self._take_proofs]
            self._proofs[welcome.uuid] = [proof for proof in taken if proof is not None]
            log.info(
                "worker found %s",
                fields(worker=worker.name, role=welcome.role, pid=welcome.pid, state=welcome.state),
            )
            return
        log.info("worker back %s", fields(worker=worker.name, pid=welcome.pid))
        self.fences.on_back(welcome.uuid)
        for message in worker.take_orphans():
            worker.tell(message)

    def _on_summary(
        self, worker: Worker, message: SummaryDelta | SummarySnapshot | SummaryDigest, now: float
    ) -> None:
        follower = worker.follower
        match message:
            case SummaryDelta():
                ask = follower.on_delta(message, now)
            case SummarySnapshot():
                ask = follower.on_snapshot(message, now)
            case SummaryDigest():
                ask = follower.on_digest(message, now)
            case _:
                assert_never(message)
        if ask:
            worker.tell(SnapshotRequest())

    # --- time --------------------------------------------------------------------------------

    def on_tick(self) -> None:
        """Renew leases, notice silence, pass on proven fences, and place what time has made room for."""
        now = self._clock()
        for worker in list(self.registry):
            if worker.standing == "gone" and self._is_let_go(worker):
                self.disconnect(worker)
            elif worker.is_up:
                self._check_worker(worker, now)
            elif worker.hello_at is not None and now - worker.hello_at > HELLO_AGAIN_S:
                self._say_hello(worker, now)
        self.fences.check(now)
        self._check_stranded(now)
        if now >= self._slow_tick_at:
            self._slow_tick_at = now + SLOW_TICK_S
            self._check_sequences(now)
        self._check_queue(now)
        self.metrics.queued_requests.set(len(self.queue))
        self.metrics.queued_tokens.set(self.queue.num_tokens)
        self._place()

    def _is_let_go(self, worker: Worker) -> bool:
        """Whether nothing is held there, as far as it can be told; a dead one is past telling."""
        return not worker.is_up or not (worker.decodes or worker.prefills or self.fences.concerns(worker))

    def _check_worker(self, worker: Worker, now: float) -> None:
        link = worker.link
        assert link is not None
        if now - worker.heard_at > self._routing.worker_timeout_s:
            link.drain()  # it may have spoken while this loop was busy
            if worker.is_up and now - worker.heard_at > self._routing.worker_timeout_s:
                link.reset(f"silent for {now - worker.heard_at:.1f} s")
                return
        if now - worker.renewed_at >= self.lease.lease_ttl_s / 3:
            worker.renewed_at = now
            worker.tell(Renew(self.lease.lease_ttl_s))

    def _check_sequences(self, now: float) -> None:
        for sequence in list(self._sequences.values()):
            sequence.on_tick(now)
        for transfer_id in [key for key, (until, _) in self._late.items() if until <= now]:
            del self._late[transfer_id]

    def _check_stranded(self, now: float) -> None:
        """Place again what a worker has come back for, and give up what none did."""
        if not self._stranded:
            return
        models = {w.welcome.model_hash for w in self.registry if w.can_decode and w.welcome is not None}
        for key, (since, sequence) in list(self._stranded.items()):
            if sequence.model_hash in models:
                del self._stranded[key]
                self.queue.add_again(sequence)
            elif now - since > self.lease.lease_ttl_s:
                sequence.give_up("no worker of the model that began it came back", now)

    def _check_queue(self, now: float) -> None:
        """Give up what waits where nobody is left who could decode it."""
        if not self.may_decode():
            for sequence in self.queue.all():
                sequence.give_up("no decode worker came back", now)


class WorkerEvents:
    """What one link tells the dispatcher; see `LinkEvents`."""

    def __init__(self, dispatcher: Dispatcher, worker: Worker) -> None:
        self._dispatcher = dispatcher
        self._worker = worker

    def on_up(self) -> None:
        """Connected."""
        self._dispatcher.on_up(self._worker)

    def on_message(self, message: FromWorker) -> None:
        """One message."""
        self._dispatcher.on_message(self._worker, message)

    def on_malformed(self) -> None:
        """One that is none."""
        self._dispatcher.metrics.bad_messages.inc()

    def on_down(self, reason: str) -> None:
        """The connection is gone."""
        self._dispatcher.on_down(self._worker, reason)

    def on_batch_end(self) -> None:
        """All that had arrived is told."""
        self._dispatcher.place_if_poked()
