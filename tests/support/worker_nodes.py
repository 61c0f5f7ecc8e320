"""Workers without processes, sockets, threads or a model: real services over a memory transport.

A `Net` of `Node`s is driven step by step: `settle()` runs everything until nothing is left to do.
Messages to peers travel at once and in order unless a link is cut; KV moves through the fabric,
whose writes a test may hold. The model is the fake runner, with its KV in real memory.
"""

from collections.abc import Iterator

import numpy as np

from disagg.engine.engine import Engine
from disagg.protocol import (
    PROTOCOL_VERSION,
    FirstToken,
    Hello,
    KvLayout,
    Load,
    PeerHello,
    Reserved,
    SamplingParams,
    Target,
    Tokens,
)
from disagg.protocol.control import Generate, Prefill, Reserve
from disagg.transfer.base import PoolMemory
from disagg.transfer.memory import MemoryFabric, MemoryTransport
from disagg.transfer.mover import KvMover
from disagg.worker.metrics import WorkerCounts
from disagg.worker.outbox import CloseLink, OnLink, OpenLink, Report, ToPeer, ToRouter, ToRouters
from disagg.worker.service import Identity, WorkerService
from disagg.worker.transfers import Transfers
from support.clock import FakeClock
from support.engines import make_cache, make_limits
from support.fake_runner import FakeRunner, expected_token

PAGE_SIZE = 4
VOCAB = 97
EOS = 96
TTL_S = 30.0
DULL = ("SummaryDelta", "SummarySnapshot", "SummaryDigest", "Load")


class _Row:
    def __init__(self, row):
        self._row = row

    def __iter__(self) -> Iterator[int]:
        return iter(self._row.tolist())

    def __setitem__(self, offset, value):
        self._row[offset] = value


class MemoryRunner(FakeRunner):
    """The fake runner with its KV in an array that a transport can write into."""

    def __init__(self, num_pages):
        super().__init__(num_pages, PAGE_SIZE, VOCAB)
        self.pool = np.zeros((num_pages, PAGE_SIZE), np.int64)
        self.kv = [_Row(row) for row in self.pool]


class DirectPort:
    """A rank's mover without its thread: commands wait until the net is settled."""

    def __init__(self, mover):
        self.mover = mover
        self.commands = []

    def submit(self, command):
        self.commands.append(command)

    def run(self):
        commands, self.commands = self.commands, []
        events = [event for command in commands for event in self.mover.on_command(command)]
        return events + self.mover.poll()


class Node:
    """One worker and what it has said to its routers."""

    def __init__(self, net, name, role, num_pages=32, pids=((1, 1),), dtype="float32", uuid=None, **limits):
        self.net = net
        self.name = name
        self.uuid = uuid or f"{name}-uuid"
        self.address = f"ipc://{name}"
        self.runner = MemoryRunner(num_pages)
        self.engine = Engine(
            runner=self.runner,
            cache=make_cache(num_pages, PAGE_SIZE),
            limits=make_limits(num_pages, PAGE_SIZE, **{"vocab_size": VOCAB, **limits}),
            eos_token_ids=[EOS],
            clock=net.clock,
        )
        # One head of one layer: a page is PAGE_SIZE values of 8 bytes, as in the runner's pool.
        layout = KvLayout(PAGE_SIZE, 1, 1, 1, dtype, 1)
        memory = PoolMemory.of_array(self.runner.pool)
        transport = MemoryTransport(net.fabric, uuid=self.uuid, rank=0, pool=memory)
        self.port = DirectPort(KvMover(transport, layout, 0, net.clock))
        self.counts = WorkerCounts()
        hello = PeerHello(
            PROTOCOL_VERSION, name, self.uuid, layout, [transport.endpoint()], "host", list(pids)
        )
        self.service = WorkerService(
            Identity(role=role, hello=hello, transport="memory"),
            engine=self.engine,
            transfers=Transfers([self.port]),
            counts=self.counts,
            clock=net.clock,
            is_gone=lambda pid, start_time: (pid, start_time) in net.dead,
        )
        self.said = {}
        self.reports = []
        self.is_paused = False
        """Its engine thread is inside a long step: nothing that arrives is handled."""
        self.inbox = []

    def post(self, work):
        self.inbox.append(work)

    def ask(self, message, router="r0"):
        """A router sends a message; its answers come with the next `settle`."""
        self.post(lambda: self.service.on_router(router, message))

    def hello(self, router="r0"):
        self.post(lambda: self.service.on_hello(router, Hello(PROTOCOL_VERSION, router, TTL_S)))

    def find(self, kind, router="r0", **fields):
        """All messages of a kind to a router, oldest first."""
        return [
            message
            for message in self.said.get(router, [])
            if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items())
        ]

    def heard(self, router="r0"):
        """What a router was told, by kind, but for loads and summaries."""
        names = [type(message).__name__ for message in self.said.get(router, [])]
        return [name for name in names if name not in DULL]

    def output(self, transfer_id, generation=0, router="r0"):
        """(token ids, finish reason) of a sequence so far; checks that positions have no gap."""
        parts = [
            part
            for message in self.find(Tokens, router)
            for part in message.sequences
            if (part.transfer_id, part.generation) == (transfer_id, generation)
        ]
        tokens = [token for part in parts for token in part.token_ids]
        if parts:
            assert [p.position for p in parts] == list(
                np.cumsum([parts[0].position, *(len(p.token_ids) for p in parts)])[:-1]
            )
        return tokens, parts[-1].finish_reason if parts else None

    @property
    def load(self) -> Load:
        self.service.report()
        self.perform()
        return self.reports[-1].load

    def perform(self):
        for effect in self.service.outbox.take():
            self.net.perform(self, effect)

    def turn(self):
        """Handle what has arrived, and run one step; whether anything was done."""
        if self.is_paused:
            return False
        work, self.inbox = self.inbox, []
        for each in work:
            each()
        events = self.port.run()
        for event in events:
            self.service.on_transfer(0, event)
        self.service.report_changes()
        self.perform()
        stepped = self.service.has_work and self.service.step()
        self.perform()
        return bool(work or events or stepped or self.port.commands)

    def assert_balanced(self):
        """Every page is free or cached, nothing is held, and the books agree."""
        self.service.audit()
        load = self.load
        assert (load.leases, load.running, load.waiting, load.pages_in_use) == (0, 0, 0, 0)
        assert load.pages_free + load.pages_cached == load.pages_total
        assert self.reports[-1].num_held == 0


class Net:
    """Nodes that reach each other."""

    def __init__(self):
        self.clock = FakeClock()
        self.fabric = MemoryFabric()
        self.nodes = {}
        self.dead = set()
        self.links = set()
        self.cut = set()
        """Addresses that nobody reaches."""

    def add(self, name, role, **fields):
        node = Node(self, name, role, **fields)
        self.nodes[node.address] = node
        return node

    def by_uuid(self, uuid):
        return next((node for node in self.nodes.values() if node.uuid == uuid), None)

    def kill(self, node):
        """Like kill -9: it says nothing more, and its links break."""
        del self.nodes[node.address]
        self.fabric.kill(f"{node.uuid}:0")
        self.dead.add((1, 1))
        for source, target in list(self.links):
            if target == node.uuid:
                self.links.discard((source, target))
                source_node = self.by_uuid(source)
                if source_node is not None:
                    source_node.post(lambda s=source_node: s.service.on_link_lost(node.uuid))

    def perform(self, node, effect):
        match effect:
            case ToRouter(router, message):
                node.said.setdefault(router, []).append(message)
            case ToRouters(message):
                for router in {"r0", *node.said}:
                    node.said.setdefault(router, []).append(message)
            case Report():
                node.reports.append(effect)
            case OpenLink(uuid, address, hello):
                target = self.nodes.get(address)
                if target is not None and address not in self.cut:
                    self.links.add((node.uuid, uuid))
                    target.post(lambda: target.service.on_peer(node.uuid, hello))
            case OnLink(uuid, message):
                target = self.by_uuid(uuid)
                if target is not None and (node.uuid, uuid) in self.links:
                    target.post(lambda: target.service.on_peer(node.uuid, message))
            case ToPeer(uuid, message):
                # Over the link that the peer opened, whomever it meant to reach.
                peer = self.by_uuid(uuid)
                meant = next((m for u, m in self.links if u == uuid and self._is(m, node)), None)
                if peer is not None and meant is not None:
                    peer.post(lambda: peer.service.on_link(meant, message))
            case CloseLink(uuid):
                self.links.discard((node.uuid, uuid))
            case _:
                raise AssertionError(effect)

    def _is(self, meant, node):
        """A link reaches an address; the process there may be another than was meant."""
        return meant == node.uuid or (
            meant not in {n.uuid for n in self.nodes.values()} and meant.startswith(node.name)
        )

    def turn(self):
        return any([node.turn() for node in list(self.nodes.values())])

    def settle(self, max_turns=500):
        """Run until nothing happens by itself."""
        for _ in range(max_turns):
            if not self.turn():
                return
        raise AssertionError("does not settle")

    def advance(self, seconds):
        """Let time pass, with a tick every half second, and settle."""
        for _ in range(round(seconds / 0.5)):
            self.clock.advance(0.5)
            for node in list(self.nodes.values()):
                node.post(node.service.on_tick)
            self.settle()


def greedy(max_tokens=8, **fields):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)


def expected_output(prompt, max_tokens=8):
    """What any worker must make of a prompt."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(expected_token(tokens, VOCAB))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def make_prompt(length=18, seed=0):
    return np.random.default_rng(seed).integers(0, EOS, length).tolist()


def reserve(prompt, transfer_id="t", generation=0, **fields):
    defaults = {"ttl_s": TTL_S, "num_prompt_tokens": len(prompt), "sampling": greedy(), "cap_match": True}
    return Reserve(
        transfer_id=transfer_id, generation=generation, token_ids=list(prompt), **{**defaults, **fields}
    )


def prefill(prompt, reserved: Reserved, to: Node, **fields):
    defaults = {
        "ttl_s": TTL_S,
        "deadline_s": 60.0,
        "num_prompt_tokens": len(prompt),
        "sampling": greedy(),
        "target": Target(to.name, to.uuid, to.address, reserved.first_missing_page, reserved.page_ids),
    }
    return Prefill(
        transfer_id=reserved.transfer_id,
        generation=reserved.generation,
        token_ids=list(prompt),
        **{**defaults, **fields},
    )


def generate(prompt, transfer_id="t", generation=0, **fields):
    defaults = {"ttl_s": TTL_S, "num_prompt_tokens": len(prompt), "sampling": greedy()}
    return Generate(
        transfer_id=transfer_id, generation=generation, token_ids=list(prompt), **{**defaults, **fields}
    )


def begin(net, p, d, prompt, transfer_id="t", generation=0, router="r0", **fields):
    """Reserve at `d` and ask `p` to prefill; nothing of the Prefill has been handled yet."""
    d.ask(reserve(prompt, transfer_id, generation, **fields), router)
    net.settle()
    reserved = d.find(Reserved, router, transfer_id=transfer_id, generation=generation)[0]
    p.ask(prefill(prompt, reserved, d, **fields), router)
    return reserved


def run_disaggregated(net, p, d, prompt, transfer_id="t", generation=0, **fields):
    """One request through both; all output tokens, and why it ended."""
    begin(net, p, d, prompt, transfer_id, generation, **fields)
    net.settle()
    first = p.find(FirstToken, transfer_id=transfer_id, generation=generation)[0]
    tokens, reason = d.output(transfer_id, generation)
    return [first.token_id, *tokens], first.finish_reason or reason
