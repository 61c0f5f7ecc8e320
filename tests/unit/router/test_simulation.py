"""Whole systems of fake engines under random faults, in virtual time.

Messages take random times, in order on each link and in any order between links. Workers die, come
back, lose their links, refuse, fail, hand back, and messages are lost. Whatever happens: every
client gets exactly the tokens that one undisturbed worker would have made, or an error; nothing is
held anywhere afterwards; and the router never breaks the protocol.
"""

import heapq
import random
from collections.abc import Callable
from itertools import count

import pytest

from disagg.config import LeaseConfig, RoutingConfig
from disagg.protocol import FromWorker, PushDone, Role, Target, ToWorker, decoder, encode
from support.fake_worker import FakeEngine, FakeWorkerOptions, expected_tokens
from support.router import Client, Harness

MakeRouter = Callable[..., Harness]


class Net:
    """Messages and timers under way."""

    def __init__(self, harness: Harness, rng: random.Random) -> None:
        self.clock = harness.clock
        self.rng = rng
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._last: dict[object, float] = {}

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.clock() + delay_s, next(self._numbers), action))

    def deliver(self, link: object, action: Callable[[], None]) -> None:
        """Do it after a random time, and after all that was sent on that link before."""
        at = max(self.clock() + self.rng.choice((0.0, 0.0005, 0.003, 0.02)), self._last.get(link, 0.0))
        self._last[link] = at
        heapq.heappush(self._due, (at, next(self._numbers), action))

    def run_until(self, at: float) -> None:
        while self._due and self._due[0][0] <= at:
            when, _, action = heapq.heappop(self._due)
            self.clock.now = max(self.clock.now, when)
            action()
        self.clock.now = at


class SimWorker:
    """A fake engine behind a link of the harness."""

    def __init__(self, system: "System", role: Role, name: str) -> None:
        self.system = system
        self.role = role
        self.name = name
        self.connection = 0
        system.harness.dispatcher.connect(name)
        self.link = system.harness.connector.links[name]
        self.link.send = self._send  # type: ignore[method-assign]
        self.link.reset = self._reset  # type: ignore[method-assign]
        self.start()

    def start(self) -> None:
        """A new process."""
        options = FakeWorkerOptions(
            address=self.name,
            role=self.role,
            worker_id=self.name,
            num_pages=60,
            max_num_seqs=6,
            step_s=0.01,
            prefill_tokens_per_s=2000.0,
            kv_s=0.01,
            load_s=0.5,
            keeps_prefixes=True,
        )
        self.engine = FakeEngine(options, send=self._say, push=self._push, clock=self.system.clock)
        self.system.by_uuid[self.engine.uuid] = self
        self.proof = Proof()
        self.system.proofs[self.name] = self.proof
        self.connect()

    def connect(self) -> None:
        self.connection += 1
        self.link.is_up = True
        self.link.events.on_up()

    def cut(self, restart_s: float | None) -> None:
        """Break the link; with `restart_s` the process dies too, and another comes after so long."""
        if not self.link.is_up:
            return
        if restart_s is not None:
            self.proof.gone = True
            self.system.dead.append(self.engine)
            del self.system.by_uuid[self.engine.uuid]
        self.connection += 1  # what is under way is lost
        self.link.down()
        again = self.connect if restart_s is None else self.start
        self.system.net.later(0.3 if restart_s is None else restart_s, again)

    def _reset(self, reason: str) -> None:
        del reason
        self.cut(None)

    def _send(self, message: ToWorker) -> bool:
        if not self.link.is_up:
            return False
        connection, payload = self.connection, encode(message)

        def arrive() -> None:
            if connection == self.connection:
                self.engine.on_router(b"%d" % connection, TO_WORKER.decode(payload))
                self.engine.advance(self.system.clock())

        self.system.net.deliver((self.name, "in"), arrive)
        return True

    def _say(self, router: bytes, message: FromWorker) -> None:
        connection, payload = self.connection, encode(message)
        if router != b"%d" % connection:
            return

        def arrive() -> None:
            if connection == self.connection:
                self.link.say(FROM_WORKER.decode(payload))

        self.system.net.deliver((self.name, "out"), arrive)

    def _push(self, target: Target, message: PushDone) -> None:
        def arrive() -> None:
            receiver = self.system.by_uuid.get(target.uuid)
            if receiver is not None:
                receiver.engine.on_push_done(message)

        self.system.net.deliver((self.name, target.uuid), arrive)


LOST = ("Tokens", "Accepted", "FirstToken", "KvReceived", "Reserved", "PrefillDone")
FROM_WORKER = decoder(FromWorker)
TO_WORKER = decoder(ToWorker)


class Proof:
    def __init__(self) -> None:
        self.gone = False

    def is_gone(self) -> bool:
        return self.gone


class System:
    """A router and its workers."""

    def __init__(self, harness: Harness, seed: int, roles: str) -> None:
        self.rng = random.Random(seed)
        self.harness = harness
        self.clock = harness.clock
        self.net = Net(harness, self.rng)
        self.by_uuid: dict[str, SimWorker] = {}
        self.proofs: dict[str, Proof] = {}
        self.dead: list[FakeEngine] = []
        harness.dispatcher._take_proofs = (lambda address, _: self.proofs[address],)
        names: dict[str, Role] = {"p": "prefill", "d": "decode", "u": "unified"}
        self.workers = [
            SimWorker(self, names[letter], f"{names[letter]}-{i}") for i, letter in enumerate(roles)
        ]
        self.clients: list[Client] = []
        self.run(1.0)

    def run(self, seconds: float) -> None:
        """Let time pass in steps of a millisecond or so."""
        end = self.clock() + seconds
        next_tick = self.clock()
        while self.clock() < end:
            self.net.run_until(self.clock() + 0.002)
            for worker in list(self.by_uuid.values()):
                worker.engine.advance(self.clock())
            if self.clock() >= next_tick:
                next_tick += 0.1
                self.harness.dispatcher.on_tick()

    def submit(self) -> None:
        rng = self.rng
        if not self.harness.dispatcher.may_decode():
            return
        prompt = [rng.randrange(3) for _ in range(rng.choice((5, 16, 50, 130)))]
        override = rng.choice((None, None, None, "always", "never"))
        self.clients.append(
            self.harness.submit(prompt, max_tokens=rng.choice((1, 2, 9, 40)), override=override)
        )

    def disturb(self) -> None:
        """Do something bad to some worker."""
        rng = self.rng
        worker = rng.choice(self.workers)
        options = worker.engine.options
        match rng.randrange(9):
            case 0 | 1:
                worker.cut(restart_s=rng.choice((0.2, 2.0)))
            case 2:
                worker.cut(restart_s=None)
            case 3:
                options.reject.append(rng.choice(("no_pages", "queue_full", "draining", "peer_unreachable")))
            case 4:
                options.fail.append(rng.choice(("deadline passed", "peer_lost")))
            case 5:
                options.hand_back_after.append(rng.randrange(1, 6))
            case 6:
                kind = rng.choice(
                    ("Tokens", "Accepted", "FirstToken", "KvReceived", "Reserved", "PrefillDone")
                )
                options.lose[kind] = 1
            case 7 if self.clients:
                rng.choice(self.clients).leave()
            case _:
                worker.engine.options.mute = True
                self.net.later(1.0, lambda: setattr(options, "mute", False))

    def check_clients(self, *, may_fail: bool) -> None:
        for client in self.clients:
            client.read()
            record = client.record()
            expected = expected_tokens(client.request.prompts[0], client.request.sampling)
            output = client.output.get(0, [])
            assert output == expected[: len(output)], record
            assert record["finish_reason"], record
            if record["finish_reason"] == "length":
                assert output == expected or record["release"] == "aborted"
            else:
                assert record["finish_reason"] == "abort" or may_fail, record
                assert record["finish_reason"] in ("abort", "error"), record

    def check_nothing_held(self) -> None:
        for worker in self.workers:
            engine = worker.engine
            assert engine.num_held == 0, (worker.name, engine._running, engine._prefilling, engine._reserved)
        for engine in [*self.dead, *(w.engine for w in self.workers)]:
            assert engine.violations == []


@pytest.mark.parametrize("roles", ["pd", "ppdd", "ppddu", "uu"])
@pytest.mark.parametrize("seed", range(8))
def test_no_fault_loses_repeats_or_changes_a_token(make_router: MakeRouter, roles: str, seed: int) -> None:
    harness = make_router(
        routing=RoutingConfig(max_attempts=1000),
        lease=LeaseConfig(lease_ttl_s=30.0, transfer_timeout_s=5.0),
    )
    system = System(harness, seed, roles)
    for _ in range(25):
        for _ in range(system.rng.randrange(3)):
            system.submit()
        if system.rng.random() < 0.6:
            system.disturb()
        system.run(system.rng.choice((0.02, 0.1, 0.5)))
    for worker in system.workers:
        worker.engine.options.reject.clear()
        worker.engine.options.fail.clear()
        worker.engine.options.hand_back_after.clear()
    for _ in range(40):
        if harness.service.num_open == 0:
            break
        system.run(5.0)
    system.check_clients(may_fail=False)
    system.run(35.0)  # leases whose ends were lost expire
    system.check_nothing_held()
    assert len(harness.dispatcher.fences) == 0
