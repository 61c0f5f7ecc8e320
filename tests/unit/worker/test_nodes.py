"""The leader's side of a worker over several nodes, with agents that end where they should not."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from disagg.config import EngineConfig, NodesConfig, WorkerConfig
from disagg.protocol import PROTOCOL_VERSION, WorkerState, decoder
from disagg.worker.nodes import (
    LOST_STATUS,
    FromNode,
    NodeHello,
    NodeLinks,
    NodeStart,
    NodeStarted,
    NodeState,
    RankBytes,
    ToNode,
)

ADDRESS = "inproc://nodes"
WAIT_S = 5.0
CONFIG = WorkerConfig(
    role="decode", engine=EngineConfig(tensor_parallel_size=2), nodes=NodesConfig(num_nodes=2)
)


class Agent:
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], num_nodes: int = 2) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        self.socket.connect(ADDRESS)
        self.send(NodeHello(PROTOCOL_VERSION, 1, num_nodes, "10.0.0.2"))

    def send(self, message: FromNode) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> ToNode:
        message: ToNode = decoder(ToNode).decode(self.socket.recv())
        return message

    def close(self) -> None:
        self.socket.close(linger=0)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


@contextmanager
def leader(
    context: zmq.Context[zmq.Socket[bytes]], state: Callable[[], WorkerState] = lambda: "ready"
) -> Iterator[NodeLinks]:
    bound = context.socket(zmq.ROUTER)
    bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
    bound.bind(ADDRESS)
    links = NodeLinks(bound, CONFIG, state=state, on_drain=lambda: None)
    try:
        yield links
    finally:
        links.close()


def test_a_node_lost_before_its_ranks_started_is_told(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """The near end must close: else rank 0 waits for ever for a rank that nobody will start."""
    with leader(context) as links:
        process, end = links.add(1)
        end.settimeout(WAIT_S)
        links.start()
        agent = Agent(context)
        assert agent.receive() == NodeStart([1])
        agent.close()
        assert end.recv(1) == b""
        assert process.wait(WAIT_S) == LOST_STATUS
        end.close()


def test_a_refused_node_that_is_gone_already_harms_nobody(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    """The answer cannot be sent: that is no reason to give up the nodes that have joined."""
    with leader(context) as links:
        process, end = links.add(1)
        stranger = Agent(context, num_nodes=3)
        stranger.close()
        links.start()
        agent = Agent(context)
        assert agent.receive() == NodeStart([1])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.0)
        agent.close()
        end.close()


def test_nodes_hear_of_the_state_also_while_much_is_sent(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """A worker that drains under load must not stay ready on its other nodes."""
    with leader(context) as links:
        _, end = links.add(1)
        links.start()
        agent = Agent(context)
        assert agent.receive() == NodeStart([1])
        agent.send(NodeStarted({1: 4711}))
        links.wait_joined()
        until, message = time.monotonic() + WAIT_S, None
        while message != NodeState("ready") and time.monotonic() < until:
            end.send(b"plan")
            message = agent.receive()
            assert isinstance(message, RankBytes | NodeState)
        assert message == NodeState("ready")
        agent.close()
        end.close()


def test_ranks_are_lost_where_the_link_thread_breaks(
    context: zmq.Context[zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    """Else rank 0 would wait for ranks that nobody hears."""

    def state() -> WorkerState:
        raise ZeroDivisionError

    with leader(context, state) as links:
        process, end = links.add(1)
        links.start()
        agent = Agent(context)
        assert agent.receive() == NodeStart([1])
        assert process.wait(WAIT_S) == LOST_STATUS
        assert [message for message in caplog.messages if message.startswith("links to nodes broke")]
        agent.close()
        end.close()
