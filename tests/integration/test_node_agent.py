"""The agent of a node, in this process, with a leader whose side of the link the test plays."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import zmq

from disagg.config import NodesConfig, WorkerConfig
from disagg.errors import WorkerLost
from disagg.protocol import decoder, encode
from disagg.security import KeyRing, choice_for, secure_client
from disagg.worker import node as node_module
from disagg.worker.node import TO_LEADER, _Agent
from disagg.worker.nodes import (
    BEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    FromNode,
    NodeHello,
    NodeStart,
    NodeStarted,
    bind_nodes,
)
from support.keys import KeyFolder
from support.sockets import LIMIT_S, until

RANK_SAYS_BYTES = 256 << 20
"""More than the link and the kernel hold for a leader that does not read."""


class Rank:
    """A process that is none, and its end of the stream to rank 0."""

    pid = 4711
    is_killed = False

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)

    def kill(self) -> None:
        self.is_killed = True

    def wait(self, timeout: float | None = None) -> int:
        return 0


class Leader:
    """Its ROUTER."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.identity = b""

    async def receive(self) -> FromNode:
        await until(lambda: self.socket.poll(0))
        self.identity, payload = self.socket.recv_multipart()
        message: FromNode = decoder(FromNode).decode(payload)
        return message

    def send(self, payload: bytes) -> None:
        self.socket.send_multipart((self.identity, payload))


@pytest.fixture
def leader() -> Iterator[Leader]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield Leader(context)
    context.destroy(linger=0)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    rank = Rank()
    monkeypatch.setattr(node_module, "spawn_rank", lambda: (rank, rank.far))
    yield rank
    rank.near.close()
    rank.far.close()


@asynccontextmanager
async def agent_of(leader: Leader) -> AsyncIterator["asyncio.Task[int]"]:
    """Run an agent that has been told to start its rank."""
    nodes = NodesConfig(num_nodes=2, node_rank=1, leader_address="127.0.0.1", node_port=leader.port)
    agent = _Agent(WorkerConfig(role="decode", http_port=0, nodes=nodes), None, lambda _: None)
    async with asyncio.timeout(LIMIT_S):
        running = asyncio.create_task(agent.run())
        assert isinstance(await leader.receive(), NodeHello)
        leader.send(encode(NodeStart([1])))
        yield running


def test_an_agent_whose_leader_does_not_read_ends(leader: Leader, rank: Rank) -> None:
    """Its rank would wait for ever, and rank 0 with it; the leader's process may well be alive."""

    async def test() -> None:
        async with agent_of(leader) as running:
            assert await leader.receive() == NodeStarted({1: rank.pid})
            saying = asyncio.create_task(say())
            with pytest.raises(WorkerLost, match=r"^the leader does not read$"):
                await running
            await saying
        assert rank.is_killed

    async def say() -> None:
        with suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(rank.near, bytes(RANK_SAYS_BYTES))
            pytest.fail("somebody has read it all")

    asyncio.run(test())


def test_an_agent_whose_leader_is_gone_ends(leader: Leader, rank: Rank) -> None:
    async def test() -> None:
        async with agent_of(leader) as running:
            assert await leader.receive() == NodeStarted({1: rank.pid})
            leader.socket.close(linger=0)
            with pytest.raises(WorkerLost, match=r"^the leader is gone$"):
                await running
        assert rank.is_killed

    asyncio.run(test())


def test_an_agent_whose_link_thread_breaks_ends(leader: Leader, rank: Rank) -> None:
    """Without the thread nobody would hear the leader, nor tell that."""
    rank.far.close()

    async def test() -> None:
        async with agent_of(leader) as running:
            with pytest.raises(WorkerLost, match=r"^the link to the leader broke: Invalid file descriptor"):
                await running
        assert rank.is_killed

    asyncio.run(test())


def test_an_agent_that_is_told_nonsense_ends(leader: Leader, rank: Rank) -> None:
    """Part of a rank's stream may be what was lost."""

    async def test() -> None:
        async with agent_of(leader) as running:
            assert await leader.receive() == NodeStarted({1: rank.pid})
            leader.send(b"\xc1")
            with pytest.raises(WorkerLost, match=r"^the link to the leader broke: a message is none$"):
                await running
        assert rank.is_killed

    asyncio.run(test())


def test_nodes_beat_as_fast_with_keys(tmp_path: Path) -> None:
    """Keys bring a heartbeat of their own, by which a lost node would be noticed after 15 s."""
    ring = KeyRing(KeyFolder(tmp_path / "keys", current="a").path)
    with (
        zmq.Context() as context,
        bind_nodes(context, ring, "tcp://127.0.0.1:*") as bound,
        context.socket(zmq.DEALER) as dealer,
    ):
        secure_client(dealer, choice_for(ring, "tcp://127.0.0.1:1"), "tcp://127.0.0.1:1")
        TO_LEADER.prepare(dealer)
        for end in (bound, dealer):
            assert end.getsockopt(zmq.HEARTBEAT_IVL) == BEAT_MS
            assert end.getsockopt(zmq.HEARTBEAT_TIMEOUT) == HEARTBEAT_TIMEOUT_MS
