"""Leases, movers and a faulty network, driven at random: no write ever lands on a page of another.

Real `LeaseTable`s and `KvMover`s of two decode and two prefill workers with different
tensor-parallel sizes, over the memory transport. Between them messages are lost, delayed,
duplicated and reordered; writes land late, or break and land all the same; processes are killed,
routers die. Only two things are kept in order, as a TCP connection keeps them: what a decode worker
tells one prefill worker, and time.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg.errors import LinkLost
from disagg.protocol import PeerFence, PeerFenced, PeerHello
from disagg.transfer import (
    AbortPush,
    Arrived,
    AwaitKv,
    Command,
    Connect,
    Connected,
    Drain,
    Drained,
    Event,
    FinishPush,
    PushChunk,
    PushComplete,
    PushFailed,
)
from disagg.transfer import Fenced as PushFenced
from disagg.transfer.base import PoolMemory
from disagg.transfer.memory import FabricWrite, MemoryFabric, MemoryTransport
from disagg.transfer.mover import SETTLE_S, KvMover
from disagg.worker.leases import (
    AskFence,
    DrainRanks,
    Effect,
    Freed,
    Key,
    KvComplete,
    LeaseTable,
    Pushed,
    Quarantined,
    SayFenced,
    StopPush,
)
from support.clock import FakeClock
from support.transfer import make_hello, make_layout, make_pool

TTL_S = 10.0
DEADLINE_S = 6.0
NUM_PAGES = 6
MAX_LEASE_PAGES = 3
TRANSFERS = 8
MAX_DEATHS = 3

# Messages: the facts of those in `protocol` that matter here.


@dataclass(frozen=True)
class Reserve:
    key: Key
    router: str
    num_pages: int


@dataclass(frozen=True)
class Reserved:
    key: Key
    decode: str
    page_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prefill:
    key: Key
    router: str
    decode: str
    page_ids: tuple[int, ...]


@dataclass(frozen=True)
class Abort:
    key: Key
    router: str


@dataclass(frozen=True)
class Release:
    key: Key


@dataclass(frozen=True)
class Fenced:
    key: Key
    sender: str = ""


@dataclass(frozen=True)
class Renew:
    router: str


Message = Reserve | Reserved | Prefill | Abort | Release | Fenced | Renew | PeerHello | PeerFence | PeerFenced


@dataclass(frozen=True)
class Envelope:
    sender: str
    receiver: str
    message: Message


class World:
    """The clock, the wires, and what is known only to an onlooker."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.fabric = MemoryFabric(hold_writes=True)
        self.network: list[Envelope] = []
        self.workers: dict[str, Worker] = {}
        self.key_of: dict[int, Key] = {}
        """Of each held write, by identity."""
        self.broken_at: dict[int, float] = {}
        """When the sender of a held write was told of an error, or died."""

    def send(self, sender: str, receiver: str, message: Message) -> None:
        self.network.append(Envelope(sender, receiver, message))

    def notice_writes(self) -> None:
        """Attribute new writes, and find those whose senders no longer wait for them."""
        for write in self.fabric.writes:
            mover = self.mover_of(write)
            posted = mover._posted.get(write.write_id)
            if id(write) not in self.key_of:
                assert posted is not None
                self.key_of[id(write)] = posted.push.key
            if write.write_id not in write.sender._open:
                self.broken_at.setdefault(id(write), self.clock())

    def mover_of(self, write: FabricWrite) -> KvMover:
        return next(
            mover
            for worker in self.workers.values()
            for mover, transport in zip(worker.movers, worker.transports, strict=True)
            if transport is write.sender
        )

    def target_of(self, write: FabricWrite) -> "Decode":
        worker = self.workers[write.write.peer_uuid]
        assert isinstance(worker, Decode)
        return worker

    def land(self, write: FabricWrite) -> None:
        """Copy the bytes, after a look at whom they hit."""
        key, target = self.key_of[id(write)], self.target_of(write)
        page_bytes = target.pools[write.write.target_rank].shape[1]
        if target.alive:
            for offset, length in zip(
                write.write.runs.target_offsets.tolist(), write.write.runs.lengths.tolist(), strict=True
            ):
                for page in range(offset // page_bytes, (offset + length - 1) // page_bytes + 1):
                    owner = target.owner.get(page)
                    assert owner == key, f"a write of {key} landed on page {page} of {owner}"
                    assert key not in target.complete, f"a write of {key} landed after its end"
        self.forget(write)
        self.fabric.land(self.fabric.writes.index(write))

    def vanish(self, write: FabricWrite) -> None:
        self.forget(write)
        self.fabric.fail(self.fabric.writes.index(write))

    def forget(self, write: FabricWrite) -> None:
        del self.key_of[id(write)]
        self.broken_at.pop(id(write), None)

    def broken_writes(self) -> list[FabricWrite]:
        return [write for write in self.fabric.writes if id(write) in self.broken_at]

    def advance(self, seconds: float) -> None:
        """Let time pass; what broke too long ago has landed by then."""
        for write in self.broken_writes():
            sender = self.mover_of(write)
            is_process_alive = any(w.alive and sender in w.movers for w in self.workers.values())
            if is_process_alive and self.broken_at[id(write)] + SETTLE_S <= self.clock() + seconds:
                self.land(write)
        self.clock.advance(seconds)


class Worker:
    """What every worker has. Subclasses carry out effects and answer messages."""

    def __init__(self, world: World, worker_id: str, uuid: str, tp_size: int) -> None:
        self.world, self.uuid, self.alive = world, uuid, True
        self.layout = make_layout(tp_size=tp_size)
        self.pools = [make_pool(self.layout, NUM_PAGES) for _ in range(tp_size)]
        self.transports = [
            MemoryTransport(world.fabric, uuid=uuid, rank=rank, pool=PoolMemory.of_array(pool))
            for rank, pool in enumerate(self.pools)
        ]
        self.movers = [KvMover(t, self.layout, rank, world.clock) for rank, t in enumerate(self.transports)]
        self.hello = make_hello(worker_id, uuid, self.layout, list(self.transports))
        self.leases = LeaseTable(self.layout, world.clock)
        self.free = list(range(NUM_PAGES))
        self.num_granted = 0
        self.num_freed = 0
        world.workers[uuid] = self

    def command(self, command: Command) -> None:
        for rank, mover in enumerate(self.movers):
            for event in mover.on_command(command):
                self.on_event(rank, event)
        self.world.notice_writes()

    def poll(self) -> None:
        for rank, mover in enumerate(self.movers):
            for event in mover.poll():
                self.on_event(rank, event)

    def expire(self) -> None:
        self.apply(self.leases.expire())

    def kill(self) -> None:
        """End as by kill -9: what is under way from here may land until somebody drains."""
        self.alive = False
        for transport in self.transports:
            self.world.fabric.kill(transport.endpoint().agent_name)
        for write in self.world.fabric.writes:
            if write.sender in self.transports:
                self.world.broken_at.setdefault(id(write), self.world.clock())

    def take(self, num_pages: int) -> tuple[int, ...] | None:
        """The most recently freed pages first: what is reused too early is hit at once."""
        if num_pages > len(self.free):
            return None
        return tuple(self.free.pop() for _ in range(num_pages))

    def apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            self.carry_out(effect)

    def carry_out(self, effect: Effect) -> None:
        raise NotImplementedError

    def on_event(self, rank: int, event: Event) -> None:
        raise NotImplementedError

    def on_message(self, sender: str, message: Message) -> None:
        raise NotImplementedError


class Decode(Worker):
    """Grants pages, waits for KV, gives pages back."""

    def __init__(self, world: World, worker_id: str, uuid: str, tp_size: int) -> None:
        super().__init__(world, worker_id, uuid, tp_size)
        self.owner: dict[int, Key] = {}
        self.complete: set[Key] = set()
        self.drained: defaultdict[Key, int] = defaultdict(int)
        self.awaited = 0

    def on_message(self, sender: str, message: Message) -> None:
        match message:
            case Reserve():
                self.reserve(message)
            case Abort(key, _):
                self.apply(self.leases.abort(key))
            case Release(key):
                self.apply(self.leases.release(key))
            case Fenced(key):
                self.apply(self.leases.on_fenced(key))
            case Renew(router):
                self.leases.renew(router, TTL_S)
            case PeerHello():
                self.apply(self.leases.on_peer(message.uuid, message.layout))
                self.world.send(self.uuid, message.uuid, self.hello)
            case PeerFenced(transfer_id, generation):
                self.apply(self.leases.on_peer_fenced((transfer_id, generation), sender))
            case _:
                raise AssertionError(message)
        self.follow_awaited()

    def reserve(self, message: Reserve) -> None:
        effects = self.leases.admit(message.key)
        if effects is None:
            return
        self.apply(effects)
        page_ids = self.take(message.num_pages)
        if page_ids is None:
            return
        self.num_granted += 1
        assert not self.leases.grant(
            message.key, kind="incoming", owner=message.router, ttl_s=TTL_S, page_ids=page_ids
        )
        self.owner.update(dict.fromkeys(page_ids, message.key))
        self.world.send(self.uuid, "router", Reserved(message.key, self.uuid, page_ids))

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case KvComplete():
                self.check_kv(effect)
                self.complete.add(effect.key)
            case Quarantined():
                assert effect.kind == "incoming"
            case Freed(key, _, page_ids, _):
                self.num_freed += 1
                self.complete.discard(key)
                for page in page_ids:
                    assert self.owner.pop(page) == key
                self.free.extend(page_ids)
            case AskFence(key, peer_uuid):
                self.world.send(self.uuid, peer_uuid, PeerFence(*key))
            case DrainRanks(key):
                self.command(Drain(key))
            case _:
                raise AssertionError(effect)

    def check_kv(self, effect: KvComplete) -> None:
        pages = [page for page, key in self.owner.items() if key == effect.key]
        assert len(pages) == effect.num_pages
        for pool in self.pools:
            assert (pool[pages] == effect.token_id).all(), "decode would start on wrong KV"

    def on_event(self, rank: int, event: Event) -> None:
        match event:
            case Arrived(source_uuid, done):
                self.apply(self.leases.on_arrived(source_uuid, done))
            case Drained(token):
                self.on_drained(token)
            case _:
                raise AssertionError(event)

    def on_drained(self, key: object) -> None:
        assert isinstance(key, tuple)
        # What the dead and the broken had sent here has landed by the end of a drain, at the latest.
        for write in self.world.broken_writes():
            if self.world.target_of(write) is self:
                self.world.land(write)
        self.drained[key] += 1
        if self.drained[key] == len(self.movers):
            del self.drained[key]
            self.apply(self.leases.on_drained(key))

    def follow_awaited(self) -> None:
        change = self.leases.num_awaited - self.awaited
        self.awaited += change
        if change:
            self.command(AwaitKv(change))

    def notice_death(self, uuid: str) -> None:
        self.apply(self.leases.on_peer_gone(uuid))

    def finish(self, key: Key) -> None:
        self.apply(self.leases.release(key))


@dataclass
class Job:
    """A prompt that a prefill worker computes: its bytes are `stamp` everywhere."""

    message: Prefill
    source_pages: tuple[int, ...]
    stamp: int
    num_pushed: int = 0
    finished: bool = False


class PrefillWorker(Worker):
    """Computes pages, pushes them, stops when told."""

    def __init__(self, world: World, worker_id: str, uuid: str, tp_size: int) -> None:
        super().__init__(world, worker_id, uuid, tp_size)
        self.jobs: dict[Key, Job] = {}
        self.kept: dict[Key, tuple[int, ...]] = {}
        self.connected: set[str] = set()
        self.next_stamp = 1

    def on_message(self, sender: str, message: Message) -> None:
        match message:
            case Prefill():
                self.prefill(message)
            case Abort(key, router):
                self.apply(self.leases.abort(key, asker=router))
            case Release(key):
                self.apply(self.leases.release(key))
            case Renew(router):
                self.leases.renew(router, TTL_S)
            case PeerHello():
                self.command(Connect(message))
            case PeerFence(transfer_id, generation):
                self.apply(self.leases.on_peer_fence((transfer_id, generation), sender))
            case _:
                raise AssertionError(message)

    def prefill(self, message: Prefill) -> None:
        effects = self.leases.admit(message.key)
        if effects is None:
            return
        self.apply(effects)
        pages = self.take(len(message.page_ids))
        if pages is None:
            return
        self.num_granted += 1
        assert not self.leases.grant(
            message.key,
            kind="outgoing",
            owner=message.router,
            ttl_s=TTL_S,
            page_ids=pages,
            target_uuid=message.decode,
        )
        self.jobs[message.key] = Job(message, pages, self.next_stamp)
        self.next_stamp = self.next_stamp % 255 + 1
        self.world.send(self.uuid, message.decode, self.hello)

    def compute(self, job: Job, num_pages: int) -> None:
        """Compute a chunk and push it; after the last one comes the token."""
        key, target = job.message.key, job.message.decode
        pages = job.source_pages[job.num_pushed : job.num_pushed + num_pages]
        for pool in self.pools:
            pool[list(pages)] = job.stamp
        targets = job.message.page_ids[job.num_pushed : job.num_pushed + num_pages]
        job.num_pushed += len(pages)
        job.finished = job.num_pushed == len(job.source_pages)
        self.command(PushChunk(key, target, pages, targets, self.world.clock() + DEADLINE_S))
        if job.finished:
            self.command(FinishPush(key, token_id=job.stamp, position=0, finished=False))

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case Pushed():
                pass
            case Quarantined(key):
                self.jobs.pop(key, None)
            case StopPush(key):
                self.command(AbortPush(key))
            case Freed(key, _, page_ids, _):
                self.num_freed += 1
                self.jobs.pop(key, None)
                for pool in self.pools:
                    pool[list(page_ids)] = 0
                self.free.extend(page_ids)
            case SayFenced(key, asker) if asker.startswith("router"):
                self.world.send(self.uuid, "router", Fenced(key, self.uuid))
            case SayFenced(key, asker):
                self.world.send(self.uuid, asker, PeerFenced(*key))
            case _:
                raise AssertionError(effect)

    def on_event(self, rank: int, event: Event) -> None:
        match event:
            case Connected(peer_uuid):
                self.connected.add(peer_uuid)
            case PushComplete(key, num_pages, num_bytes, seconds, transport):
                self.apply(self.leases.on_push_complete(key, rank, num_pages, num_bytes, seconds, transport))
            case PushFailed(key, error, _):
                self.apply(self.leases.on_push_failed(key, rank, str(error)))
            case PushFenced(key):
                self.apply(self.leases.on_rank_fenced(key, rank))
            case _:
                raise AssertionError(event)


@dataclass
class Attempt:
    """What the router knows of one attempt."""

    key: Key
    decode: str
    reserved: tuple[int, ...] | None = None
    prefill: str | None = None
    over: bool = False


@dataclass
class Router:
    """Begins, retries and ends attempts."""

    world: World
    name: str
    attempts: dict[Key, Attempt] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)

    def reserve(self, transfer_id: str, decode: str, num_pages: int) -> None:
        key = (transfer_id, self.newest.get(transfer_id, 0) + 1)
        self.newest[transfer_id] = key[1]
        self.attempts[key] = Attempt(key, decode)
        self.world.send("router", decode, Reserve(key, self.name, num_pages))

    def on_message(self, message: Message) -> None:
        match message:
            case Reserved(key, _, page_ids) if key in self.attempts:
                self.attempts[key].reserved = page_ids
            case Fenced(key, sender) if key in self.attempts and self.attempts[key].prefill == sender:
                self.world.send("router", self.attempts[key].decode, Fenced(key))
            case Reserved() | Fenced():
                pass
            case _:
                raise AssertionError(message)

    def prefill(self, attempt: Attempt, prefill: str) -> None:
        assert attempt.reserved is not None
        attempt.prefill = prefill
        self.world.send("router", prefill, Prefill(attempt.key, self.name, attempt.decode, attempt.reserved))

    def end(self, attempt: Attempt, message: Abort | Release) -> None:
        attempt.over = True
        self.world.send("router", attempt.decode, message)
        if attempt.prefill is not None:
            self.world.send("router", attempt.prefill, message)
        elif isinstance(message, Abort):
            # It never will be sent to anybody: that is the fence.
            self.world.send("router", attempt.decode, Fenced(attempt.key))


indices = st.integers(min_value=0, max_value=10_000)


class LeaseMachine(RuleBasedStateMachine):
    """Any order of events. Safety is asserted where writes land, the rest at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.num_routers = 0
        self.num_processes = 0
        self.num_deaths = 0
        self.gone: set[tuple[str, str]] = set()
        """(decode, dead prefill process) pairs that the former has noticed."""
        self.router = self.new_router()
        for tp_size in (2, 1):
            self.start(Decode, f"decode-{tp_size}", tp_size)
        for tp_size in (3, 1):
            self.start(PrefillWorker, f"prefill-{tp_size}", tp_size)

    def new_router(self) -> Router:
        self.num_routers += 1
        newest = {} if self.num_routers == 1 else dict(self.router.newest)
        return Router(self.world, f"router-{self.num_routers}", newest=newest)

    def start(self, kind: type[Worker], worker_id: str, tp_size: int) -> None:
        self.num_processes += 1
        kind(self.world, worker_id, f"{worker_id}#{self.num_processes}", tp_size)

    @property
    def decodes(self) -> list[Decode]:
        return [w for w in self.world.workers.values() if isinstance(w, Decode) and w.alive]

    @property
    def prefills(self) -> list[PrefillWorker]:
        return [w for w in self.world.workers.values() if isinstance(w, PrefillWorker) and w.alive]

    # The router

    @rule(wanted=st.lists(st.tuples(st.integers(0, TRANSFERS - 1), indices), min_size=1, max_size=4))
    def reserve(self, wanted: list[tuple[int, int]]) -> None:
        """Begin transfers, or try them again with the next generation."""
        for transfer, i in wanted:
            decode = self.decodes[i % len(self.decodes)]
            self.router.reserve(f"t{transfer}", decode.uuid, num_pages=1 + i // 7 % MAX_LEASE_PAGES)

    def reserved(self) -> list[Attempt]:
        return [a for a in self.router.attempts.values() if a.reserved and a.prefill is None and not a.over]

    def prefill(self, i: int) -> None:
        attempts, prefills = self.reserved(), self.prefills
        if attempts:
            self.router.prefill(attempts[i % len(attempts)], prefills[i // 7 % len(prefills)].uuid)

    @precondition(lambda self: self.router.attempts)
    @rule(i=indices, releases=st.booleans())
    def end(self, i: int, releases: bool) -> None:
        """Also again, and also what was ended before."""
        attempt = list(self.router.attempts.values())[i % len(self.router.attempts)]
        key = attempt.key
        self.router.end(attempt, Release(key) if releases else Abort(key, self.router.name))

    # The network

    def deliverable(self) -> list[Envelope]:
        """All but those that another on the same connection must precede."""
        seen: set[tuple[str, str]] = set()
        found = []
        for envelope in self.world.network:
            link = (envelope.sender, envelope.receiver)
            if not isinstance(self.world.workers.get(envelope.sender), Decode) or link not in seen:
                found.append(envelope)
            seen.add(link)
        return found

    def deliver_one(self, envelope: Envelope) -> None:
        if envelope.receiver == "router":
            self.router.on_message(envelope.message)
        elif self.world.workers[envelope.receiver].alive:
            self.world.workers[envelope.receiver].on_message(envelope.sender, envelope.message)

    def take_envelope(self, i: int) -> Envelope:
        envelopes = self.deliverable()
        envelope = envelopes[i % len(envelopes)]
        self.world.network.remove(envelope)
        return envelope

    @rule(seed=st.integers(0, 2**32), num_moves=st.integers(5, 50), lands=st.booleans())
    def progress(self, seed: int, num_moves: int, lands: bool) -> None:
        """Some good fortune in a row, for what goes wrong to hit transfers at every stage."""
        rng = random.Random(seed)
        moves = [*3 * [self.deliver], self.prefill, self.compute, self.poll]
        moves.append(self.land if lands else self.tick)
        for _ in range(num_moves):
            rng.choice(moves)(rng.randrange(10_000))

    def tick(self, i: int) -> None:
        """Let fences and drains come to an end while writes are still on their way."""
        self.advance(0.03, renews=i % 2 == 0)

    def deliver(self, i: int) -> None:
        if self.world.network:
            self.deliver_one(self.take_envelope(i))

    @precondition(lambda self: self.world.network)
    @rule(i=indices)
    def deliver_twice(self, i: int) -> None:
        envelope = self.take_envelope(i)
        self.deliver_one(envelope)
        self.deliver_one(envelope)

    @precondition(lambda self: self.world.network)
    @rule(i=indices)
    def lose(self, i: int) -> None:
        """A connection that breaks loses everything after the first loss, hello included."""
        lost = self.take_envelope(i)
        if isinstance(self.world.workers.get(lost.sender), Decode):
            link = (lost.sender, lost.receiver)
            self.world.network = [e for e in self.world.network if (e.sender, e.receiver) != link]

    # Workers

    def computable(self) -> list[tuple[PrefillWorker, Job]]:
        return [
            (worker, job)
            for worker in self.prefills
            for job in worker.jobs.values()
            if not job.finished and job.message.decode in worker.connected
        ]

    def compute(self, i: int) -> None:
        computable = self.computable()
        if computable:
            worker, job = computable[i % len(computable)]
            worker.compute(job, num_pages=1 + i // 7 % MAX_LEASE_PAGES)

    def poll(self, i: int) -> None:
        workers = [*self.decodes, *self.prefills]
        workers[i % len(workers)].poll()

    @precondition(lambda self: any(d.complete for d in self.decodes))
    @rule(i=indices)
    def finish(self, i: int) -> None:
        finished = [(d, key) for d in self.decodes for key in sorted(d.complete)]
        decode, key = finished[i % len(finished)]
        decode.finish(key)

    @precondition(lambda self: self.num_deaths < MAX_DEATHS)
    @rule(i=indices, victim=st.sampled_from(["router", "prefill", "prefill for good", "decode"]))
    def kill(self, i: int, victim: str) -> None:
        """One that takes the place of a dead router or worker knows nothing."""
        self.num_deaths += 1
        if victim == "router":
            self.router = self.new_router()
        elif victim == "decode":
            self.restart(self.decodes[i % len(self.decodes)])
        elif victim == "prefill" or len(self.prefills) == 1:
            self.restart(self.prefills[i % len(self.prefills)])
        else:
            self.prefills[i % len(self.prefills)].kill()

    def restart(self, worker: Worker) -> None:
        worker.kill()
        self.start(type(worker), worker.hello.worker_id, worker.layout.tp_size)

    def unnoticed(self) -> Iterator[tuple[Decode, str]]:
        for decode in self.decodes:
            for worker in self.world.workers.values():
                if not worker.alive and (decode.uuid, worker.uuid) not in self.gone:
                    yield decode, worker.uuid

    @precondition(lambda self: any(self.unnoticed()))
    @rule(i=indices)
    def notice_death(self, i: int) -> None:
        pairs = list(self.unnoticed())
        decode, uuid = pairs[i % len(pairs)]
        self.gone.add((decode.uuid, uuid))
        decode.notice_death(uuid)

    # Writes and time

    def land(self, i: int) -> None:
        if self.world.fabric.writes:
            self.world.land(self.world.fabric.writes[i % len(self.world.fabric.writes)])

    @precondition(lambda self: self.world.fabric.writes)
    @rule(i=indices, lands_later=st.booleans())
    def break_write(self, i: int, lands_later: bool) -> None:
        """Its sender is told of an error; the bytes are gone, or land later."""
        write = self.world.fabric.writes[i % len(self.world.fabric.writes)]
        if lands_later:
            write.sender.on_ended(write.write_id, LinkLost("the link broke"))
            self.world.notice_writes()
        else:
            self.world.vanish(write)

    @rule(seconds=st.sampled_from([0.05, 0.1, 0.2, 0.5, SETTLE_S, 2.0, DEADLINE_S]), renews=st.booleans())
    def advance(self, seconds: float, renews: bool) -> None:
        """Time passes, and the router keeps its leases alive or does not get to it."""
        if renews:
            for worker in [*self.decodes, *self.prefills]:
                self.world.send("router", worker.uuid, Renew(self.router.name))
        self.world.advance(seconds)
        for worker in [*self.decodes, *self.prefills]:
            worker.expire()

    # What must hold

    @invariant()
    def pages_add_up(self) -> None:
        for worker in [*self.decodes, *self.prefills]:
            worker.leases.audit()
        for decode in self.decodes:
            decode.follow_awaited()
            assert sorted([*decode.free, *decode.owner]) == list(range(NUM_PAGES))
            assert decode.leases.quarantined_pages.isdisjoint(decode.free)
            assert decode.num_granted - decode.num_freed == (
                decode.leases.num_leases + decode.leases.num_quarantined
            )

    def teardown(self) -> None:
        """Without a router everything ends, and nothing has leaked."""
        self.router = self.new_router()
        for _ in range(200):
            if self.is_quiet():
                break
            self.settle()
        for worker in [*self.decodes, *self.prefills]:
            assert worker.leases.num_leases == worker.leases.num_quarantined == 0, worker.uuid
            assert worker.leases.num_awaited == 0
            assert sorted(worker.free) == list(range(NUM_PAGES)), worker.uuid
            assert worker.num_granted == worker.num_freed
            assert all(mover.num_pushes == 0 for mover in worker.movers)
        assert not self.world.fabric.writes

    def is_quiet(self) -> bool:
        return not (
            self.world.network
            or self.world.fabric.writes
            or any(w.leases.num_leases + w.leases.num_quarantined for w in [*self.decodes, *self.prefills])
            or any(mover.num_pushes for w in self.prefills for mover in w.movers)
        )

    def settle(self) -> None:
        """A second in which nothing goes wrong."""
        for decode, uuid in list(self.unnoticed()):
            self.gone.add((decode.uuid, uuid))
            decode.notice_death(uuid)
        while self.world.network:
            self.deliver_one(self.take_envelope(0))
        while self.world.fabric.writes:
            self.world.land(self.world.fabric.writes[0])
        for worker in [*self.decodes, *self.prefills]:
            worker.poll()
        self.pages_add_up()
        self.advance(1.0, renews=False)


LeaseMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLeases = LeaseMachine.TestCase
