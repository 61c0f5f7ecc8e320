"""A dispatcher with a clock that tests move and links that end in lists, or in fake engines."""

import asyncio
import contextlib
from collections import deque
from typing import Any, TypeVar

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from disagg._core import PrefixIndex
from disagg.config import LeaseConfig, RoutingConfig
from disagg.frontend import Delta, GenerateRequest
from disagg.links import LinkEvents
from disagg.protocol import (
    PROTOCOL_VERSION,
    Accepted,
    FinishReason,
    FirstToken,
    FromWorker,
    Hello,
    KvLayout,
    KvReceived,
    Load,
    PrefillDone,
    Rejected,
    RejectReason,
    Renew,
    Reserve,
    Reserved,
    Role,
    SamplingParams,
    SequenceTokens,
    SummarySnapshot,
    Tokens,
    ToWorker,
    Welcome,
)
from disagg.router.dispatch import Dispatcher
from disagg.router.ledger import Ledger
from disagg.router.proofs import EndedPods, PodSuccessors, Proof
from disagg.router.registry import Registry
from disagg.router.service import RouterService
from disagg.router.ticket import RequestTicket
from disagg.telemetry import RouterMetrics
from support.clock import FakeClock

PAGE_SIZE = 16
M = TypeVar("M")

WELCOME = Welcome(
    protocol_version=PROTOCOL_VERSION,
    worker_id="",
    uuid="",
    role="decode",
    state="ready",
    model_name="fake",
    pid=1,
    rank_pids=[1],
    metrics_url="http://127.0.0.1:1/metrics",
    peer_address="",
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=1024,
    num_pages=1000,
    layout=KvLayout(PAGE_SIZE, 4, 2, 8, "bfloat16", 1),
    eos_token_ids=[0],
    dtype="bfloat16",
    transport="fake",
)
LOAD = Load(
    state="ready",
    running=0,
    waiting=0,
    leases=0,
    queued_tokens=0,
    pages_total=1000,
    pages_free=1000,
    pages_cached=0,
    pages_in_use=0,
    prefill_tokens_per_s=10_000.0,
    decode_step_s=0.01,
)


class FakeProof:
    """A process that is gone when the test says so."""

    def __init__(self) -> None:
        self.gone = False

    def is_gone(self) -> bool:
        return self.gone


class FakeLink:
    """A link whose messages are kept. The test speaks for the worker."""

    def __init__(self, address: str, events: LinkEvents, clock: FakeClock) -> None:
        self.address = address
        self.events = events
        self.clock = clock
        self.sent: deque[ToWorker] = deque()
        self.inbox: deque[FromWorker] = deque()
        """What has arrived and the loop has not noticed."""
        self.is_up = False
        self.num_renews = 0
        self.resets: list[str] = []
        self.closed = False

    # Link

    def send(self, message: ToWorker) -> bool:
        if self.is_up and isinstance(message, Renew):
            self.num_renews += 1  # would be in the way of every test that lets time pass
        elif self.is_up:
            self.sent.append(message)
        return self.is_up

    def reset(self, reason: str) -> None:
        self.resets.append(reason)
        self.down(reason)

    def drain(self) -> None:
        while self.inbox:
            self.events.on_message(self.inbox.popleft())
        self.events.on_batch_end()

    def close(self) -> None:
        self.closed = True

    # the worker's side

    def up(self) -> None:
        self.is_up = True
        self.events.on_up()

    def down(self, reason: str = "disconnected") -> None:
        if self.is_up:
            self.is_up = False
            self.sent.clear()
            self.events.on_down(reason)
            self.events.on_batch_end()

    def say(self, *messages: FromWorker) -> None:
        """Have messages arrive in one batch."""
        for message in messages:
            self.events.on_message(message)
        self.events.on_batch_end()

    def take(self, kind: type[M]) -> M:
        """Return the oldest message that was sent, which must be of that kind."""
        assert self.sent, f"no {kind.__name__} was sent"
        message = self.sent.popleft()
        assert isinstance(message, kind), message
        return message


class FakeConnector:
    """Makes fake links."""

    def __init__(self, clock: FakeClock) -> None:
        self.links: dict[str, FakeLink] = {}
        self._clock = clock

    def open(self, address: str, events: LinkEvents) -> FakeLink:
        link = self.links[address] = FakeLink(address, events, self._clock)
        return link


class Actor:
    """A worker played by the test, message by message."""

    def __init__(self, harness: "Harness", role: Role, name: str, link: FakeLink) -> None:
        self.harness = harness
        self.link = link
        self.incarnation = 0
        self.proof = FakeProof()
        self.welcome = replace(WELCOME, worker_id=name, role=role, uuid=f"{name}.0", peer_address=name)
        self.load = LOAD

    @property
    def uuid(self) -> str:
        return self.welcome.uuid

    def join(self) -> None:
        """Connect and introduce itself."""
        self.link.up()
        self.link.take(Hello)
        self.link.say(self.welcome, SummarySnapshot(1, 0, b"", True), self.load)

    def die(self) -> None:
        self.link.down()

    def restart(self, **welcome: Any) -> None:
        """A new process at the same address."""
        self.incarnation += 1
        uuid = f"{self.welcome.worker_id}.{self.incarnation}"
        self.welcome = replace(self.welcome, uuid=uuid, **welcome)
        self.proof = FakeProof()
        self.join()

    def tell_load(self, **changes: Any) -> None:
        self.link.say(replace(self.load, **changes))

    def say(self, *messages: FromWorker) -> None:
        self.link.say(*messages)

    def take(self, kind: type[M]) -> M:
        return self.link.take(kind)

    def sent(self) -> list[ToWorker]:
        """All that was sent and not taken; takes it."""
        messages = list(self.link.sent)
        self.link.sent.clear()
        return messages

    # what a worker would say

    def reserve(self, first_missing_page: int = 0) -> Reserve:
        """Grant the Reserve that was sent."""
        message = self.take(Reserve)
        num_pages = -(-len(message.token_ids) // PAGE_SIZE)
        pages = list(range(num_pages))
        key = (message.transfer_id, message.generation)
        self.say(Reserved(*key, first_missing_page, pages, first_missing_page * PAGE_SIZE))
        return message

    def reject(self, kind: type[Any], reason: RejectReason) -> Any:
        message = self.take(kind)
        self.say(Rejected(message.transfer_id, message.generation, reason))
        return message

    def accept(self, message: Any, cached_tokens: int = 0) -> None:
        self.say(Accepted(message.transfer_id, message.generation, cached_tokens))

    def first(self, message: Any, token_id: int, finish: FinishReason | None = None, cached: int = 0) -> None:
        position = len(message.token_ids) - message.num_prompt_tokens
        key = (message.transfer_id, message.generation)
        self.say(FirstToken(*key, position, token_id, finish, cached, 0.001, 0.002))

    def done(self, message: Any, num_bytes: int = 100) -> None:
        self.say(PrefillDone(message.transfer_id, message.generation, 1, num_bytes, 0.003, "fake"))

    def received(self, message: Any, num_bytes: int = 100) -> None:
        key = (message.transfer_id, message.generation)
        self.say(KvReceived(*key, 1, num_bytes, num_bytes, 0.004, "fake"))

    def tokens(
        self,
        message: Any,
        position: int,
        *token_ids: int,
        finish: FinishReason | None = None,
        cached: int | None = None,
    ) -> None:
        key = (message.transfer_id, message.generation)
        self.say(Tokens([SequenceTokens(*key, position, list(token_ids), finish, cached)]))


class Harness:
    """A router below its frontend, with nothing real around it but the prefix index."""

    def __init__(
        self,
        *,
        routing: RoutingConfig | None = None,
        lease: LeaseConfig | None = None,
        tokenizer_hash: str | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.connector = FakeConnector(self.clock)
        self.actors: dict[str, Actor] = {}
        series = CollectorRegistry()
        self.series = series
        self.metrics = RouterMetrics(series, lambda: self.dispatcher.leases_by_state())
        self.pods = EndedPods()
        self.dispatcher = Dispatcher(
            Registry(PrefixIndex()),
            self.connector,
            self.metrics,
            router_id="router",
            routing=routing or RoutingConfig(),
            lease=lease or LeaseConfig(),
            clock=self.clock,
            tokenizer_hash=tokenizer_hash,
            proofs=(self._prove, self.pods.take, PodSuccessors().take),
        )
        self.service = RouterService(self.dispatcher, Ledger(100), unix_time=lambda: 1.0)
        self.runner = asyncio.Runner()
        self.unproven: set[str] = set()
        """Addresses behind which processes cannot be told apart from here."""
        self.clients: list[Client] = []
        self._requests = 0

    def _prove(self, address: str, welcome: Welcome) -> Proof | None:
        del welcome
        return None if address in self.unproven else self.actors[address].proof

    def add(self, role: Role, name: str | None = None, **welcome: Any) -> Actor:
        """Add a worker and have it join."""
        actor = self.add_absent(role, name, **welcome)
        actor.join()
        return actor

    def add_absent(self, role: Role, name: str | None = None, **welcome: Any) -> Actor:
        """Add a worker's address."""
        name = name or f"{role}-{sum(a.welcome.role == role for a in self.actors.values())}"
        self.dispatcher.connect(name)
        actor = self.actors[name] = Actor(self, role, name, self.connector.links[name])
        actor.welcome = replace(actor.welcome, **welcome)
        return actor

    def submit(
        self, prompt: list[int] | int = 40, max_tokens: int = 4, n: int = 1, **fields: Any
    ) -> "Client":
        """Submit a request of one prompt."""
        self._requests += 1
        tokens = prompt if isinstance(prompt, list) else list(range(1, prompt + 1))
        request = GenerateRequest(
            request_id=fields.pop("request_id", f"r{self._requests}"),
            client_request_id=None,
            prompts=fields.pop("prompts", [tokens]),
            n=n,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=7),
            decision_override=fields.pop("override", None),
            cache_salt=fields.pop("cache_salt", ""),
        )
        assert not fields
        return Client(request, self)

    def advance(self, seconds: float, *, heard: bool = True) -> None:
        """Let time pass and the clock tick; workers keep talking unless told otherwise."""
        self.clock.advance(seconds)
        if heard:
            for actor in self.actors.values():
                if actor.link.is_up:
                    actor.link.say(actor.load)
        self.dispatcher.on_tick()

    def sample(self, name: str, **labels: str) -> float:
        """The value of one series."""
        return self.series.get_sample_value(name, labels) or 0.0

    def assert_nothing_left(self) -> None:
        """Nothing is running, waiting or counted."""
        assert self.dispatcher.num_running == 0
        assert len(self.dispatcher.queue) == 0
        assert self.dispatcher.queue.num_tokens == 0
        assert self.service.num_open == 0
        for worker in self.dispatcher.registry:
            assert not worker.decodes
            assert not worker.prefills
            assert worker.backlog.ours == 0


class Client:
    """A client that takes what has come, without an event loop."""

    def __init__(self, request: GenerateRequest, harness: Harness) -> None:
        self.request = request
        self.ticket: RequestTicket = harness.runner.run(harness.service.submit(request))
        self.output: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.cached: dict[int, int] = {}
        self.error: BaseException | None = None
        self._harness = harness
        harness.clients.append(self)

    @property
    def tokens(self) -> list[int]:
        """Output so far of the only sequence."""
        self.read()
        return self.output.get(0, [])

    @property
    def finish_reason(self) -> FinishReason | None:
        self.read()
        return self.finish.get(0)

    def read(self) -> list[Delta]:
        """Take what is waiting."""
        deltas: list[Delta] = []
        while True:
            try:
                batch = self._harness.runner.run(_poll(self.ticket))
            except Exception as error:
                self.error = error
                break
            if batch is None:
                break
            deltas += batch
        for delta in deltas:
            assert delta.index not in self.finish, "tokens after the end"
            self.output.setdefault(delta.index, []).extend(delta.token_ids)
            if delta.cached_tokens is not None:
                assert delta.index not in self.cached, "cached tokens told twice"
                self.cached[delta.index] = delta.cached_tokens
            if delta.finish_reason is not None:
                self.finish[delta.index] = delta.finish_reason
        return deltas

    def leave(self) -> None:
        """Go away."""
        self._harness.runner.run(self.ticket.__aexit__(None, None, None))

    def record(self) -> dict[str, Any]:
        record = self._harness.runner.run(self._harness.service.record(self.request.request_id))
        assert record is not None
        return record


async def _poll(ticket: RequestTicket) -> list[Delta] | None:
    """Return the next batch; None where there is none yet or no more."""
    waiting = asyncio.ensure_future(anext(ticket))
    await asyncio.sleep(0)
    if not waiting.done():
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        return None
    try:
        return waiting.result()
    except StopAsyncIteration:
        return None
