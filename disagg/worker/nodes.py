"""A worker over several nodes: what the leader, which has rank 0, and the agents of other nodes say.

    agent → leader  NodeHello; NodeStarted; RankBytes and RankEnded as they come; NodeDrain
    leader → agent  NodeRefused | NodeStart; RankBytes and RankClosed as they come; NodeState every second

Rank 0 and its ranks talk as if all were on one machine: over socket pairs (`rank_link.py`). Where a rank is
elsewhere, a thread on each side carries the bytes between the pair's far end and one ZeroMQ link a node,
which is encrypted and authenticated with the release's key. ZeroMQ finds a dead node by its heartbeats.
"""

import asyncio
import contextlib
import logging
import socket
import subprocess
import threading
from collections.abc import Callable

import msgspec
import zmq
from msgspec import Struct

from disagg.config import WorkerConfig
from disagg.errors import ConfigError
from disagg.links import SocketReader
from disagg.protocol import PROTOCOL_VERSION, WorkerState, decoder, encode
from disagg.security import KeyRing, secure_server
from disagg.telemetry import fields
from disagg.worker.loop_thread import LoopThread

log = logging.getLogger(__name__)

BEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 5_000
"""A node that is silent for so long is lost."""
STILL_WAITING_BEATS = 30
PIECE_BYTES = 1 << 16
LOST_STATUS = -1


class NodeHello(Struct, frozen=True, array_like=True, tag="hello"):
    """First of an agent, and again until it is answered."""

    protocol_version: int
    node_rank: int
    num_nodes: int
    host: str
    """Where this node's ranks listen for the others."""


class NodeRefused(Struct, frozen=True, array_like=True, tag="refused"):
    """This node can be no part of the worker."""

    reason: str


class NodeStart(Struct, frozen=True, array_like=True, tag="start"):
    """Start these ranks."""

    ranks: list[int]


class NodeStarted(Struct, frozen=True, array_like=True, tag="started"):
    """Their processes."""

    pids: dict[int, int]


class NodeState(Struct, frozen=True, array_like=True, tag="state"):
    """How the worker is, every second."""

    state: WorkerState


class NodeDrain(Struct, frozen=True, array_like=True, tag="drain"):
    """This node is to go, and the worker with it."""


class RankBytes(Struct, frozen=True, array_like=True, tag="bytes"):
    """A piece of the stream between rank 0 and a rank."""

    rank: int
    data: bytes


class RankClosed(Struct, frozen=True, array_like=True, tag="closed"):
    """Rank 0 has closed its end: the rank is to end."""

    rank: int


class RankEnded(Struct, frozen=True, array_like=True, tag="ended"):
    """A rank's process has ended."""

    rank: int
    status: int


FromNode = NodeHello | NodeStarted | RankBytes | RankEnded | NodeDrain
ToNode = NodeRefused | NodeStart | NodeState | RankBytes | RankClosed

_FROM_NODE = decoder(FromNode)


def set_heartbeat(end: "zmq.Socket[bytes]") -> None:
    """Have ZeroMQ's own thread find out that the other node is gone. Before bind or connect."""
    end.setsockopt(zmq.HEARTBEAT_IVL, BEAT_MS)
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def bind_nodes(
    context: "zmq.Context[zmq.Socket[bytes]]", keys: KeyRing | None, address: str
) -> "zmq.Socket[bytes]":
    """Open the leader's socket. Raises `ConfigError` where the address is taken."""
    bound: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    # A send to a node that has gone fails: that is how we learn of it.
    bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
    secure_server(bound, keys, address)
    set_heartbeat(bound)  # last: keys bring slower ones
    try:
        bound.bind(address)
    except zmq.ZMQError as error:
        bound.close(linger=0)
        raise ConfigError(f"node_port cannot be bound at {address}: {error.strerror}") from error
    return bound


def ranks_of(node_rank: int, num_nodes: int, size: int) -> range:
    """The ranks of one node: as many on each, in order.

    Raises:
        ConfigError: They cannot be shared out.
    """
    if size % num_nodes:
        raise ConfigError(
            f"tensor_parallel_size must be a multiple of num_nodes, got {size} ranks on {num_nodes} nodes"
        )
    share = size // num_nodes
    return range(node_rank * share, (node_rank + 1) * share)


class Pipes:
    """The far ends of the socket pairs by rank. Owned by the loop that runs when they are made."""

    def __init__(self, on_bytes: Callable[[int, bytes], None]) -> None:
        """`on_bytes` is told a rank and what it says; empty bytes where the near end was closed."""
        self._on_bytes = on_bytes
        self._loop = asyncio.get_running_loop()
        self._ends: dict[int, socket.socket] = {}

    def open(self, rank: int, end: socket.socket) -> None:
        """Begin to carry a rank's stream."""
        self._loop.add_reader(end, self._read, rank)
        self._ends[rank] = end

    def write(self, rank: int, data: bytes) -> None:
        """Pass on a piece; nothing happens where the near end is closed."""
        end = self._ends.get(rank)
        if end is not None:
            with contextlib.suppress(OSError):
                end.sendall(data)

    def close(self, rank: int) -> None:
        """End a rank's stream. Idempotent."""
        end = self._ends.pop(rank, None)
        if end is not None:
            self._loop.remove_reader(end)
            end.close()

    def close_all(self) -> None:
        """End every stream. Idempotent."""
        for rank in list(self._ends):
            self.close(rank)

    def _read(self, rank: int) -> None:
        try:
            data = self._ends[rank].recv(PIECE_BYTES)
        except OSError:
            data = b""
        if not data:
            self.close(rank)
        self._on_bytes(rank, data)


class DistantProcess:
    """A rank's process on another node, as `subprocess.Popen` shows one of this."""

    def __init__(self) -> None:
        self.pid = 0
        self._status: int | None = None
        self._ended = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; -1 where its node was lost. Raises `subprocess.TimeoutExpired`."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        assert self._status is not None
        return self._status

    @property
    def is_running(self) -> bool:
        """Whether its end has not been told."""
        return not self._ended.is_set()

    def kill(self) -> None:
        """Count on it no more: its agent ends it when the link closes."""
        self.on_ended(LOST_STATUS)

    def on_ended(self, status: int) -> None:
        """Note how it ended. The first status counts."""
        if not self._ended.is_set():
            self._status = status
            self._ended.set()


class NodeLinks:
    """The leader's side. Its thread owns the socket and the far ends."""

    def __init__(
        self,
        socket_: "zmq.Socket[bytes]",
        config: WorkerConfig,
        *,
        state: Callable[[], WorkerState],
        on_drain: Callable[[], None],
    ) -> None:
        """Take over a bound ROUTER socket.

        Args:
            socket_: Where agents connect.
            config: How many nodes and ranks.
            state: How the worker is; called in the thread.
            on_drain: Told, in the thread, that a node is to go.
        """
        self._socket = socket_
        self._config = config
        self._state = state
        self._on_drain = on_drain
        self._ends: dict[int, socket.socket] = {}
        self._processes: dict[int, DistantProcess] = {}
        self._hosts: dict[int, str] = {}
        self._nodes: dict[int, bytes] = {}
        """Identities of the nodes that have joined, by node rank."""
        self._lost: set[int] = set()
        self._num_beats = 0
        self._all_joined = threading.Event()
        self._thread = LoopThread("nodes", self._on_end)

    def add(self, rank: int) -> tuple[DistantProcess, socket.socket]:
        """Expect a rank on its node, before `start`; its process and our end of the link to it."""
        ours, far = socket.socketpair()
        self._ends[rank] = far
        self._processes[rank] = DistantProcess()
        return self._processes[rank], ours

    def start(self) -> None:
        """Let nodes join."""
        self._thread.call(self._open)
        self._thread.start()

    def wait_joined(self) -> dict[int, str]:
        """Wait for every node, as long as it takes; the host of each rank that is elsewhere."""
        self._all_joined.wait()
        return dict(self._hosts)

    def close(self) -> None:
        """End the thread and the link: nodes that still run end. Idempotent."""
        self._all_joined.set()
        self._thread.stop()
        self._socket.close(linger=200)

    # --- the thread ---------------------------------------------------------------------------------

    def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipes = Pipes(self._on_bytes)
        self._reader = SocketReader(self._socket, self._socket.recv_multipart, self._on_frames)
        self._loop.call_later(BEAT_MS / 1000, self._beat)

    def _on_end(self, error: Exception | None) -> None:
        if error is not None:
            log.error("links to nodes broke %s", fields(error=error), exc_info=error)
        self._reader.close()
        self._pipes.close_all()
        for rank in self._processes:
            self._end_rank(rank, LOST_STATUS)

    def _on_bytes(self, rank: int, data: bytes) -> None:
        self._send(self._node_of(rank), RankBytes(rank, data) if data else RankClosed(rank))

    def _beat(self) -> None:
        self._loop.call_later(BEAT_MS / 1000, self._beat)
        for node in list(self._nodes):
            self._send(node, NodeState(self._state()))
        self._num_beats += 1
        missing = self._config.nodes.num_nodes - 1 - len(self._nodes)
        if missing and self._num_beats % STILL_WAITING_BEATS == 1:
            log.info("waiting for nodes %s", fields(missing=missing, of=self._config.nodes.num_nodes))

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            identity, payload = frames
            message = _FROM_NODE.decode(payload)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("message of a node dropped %s", fields(error=error))
            return
        if isinstance(message, NodeHello):
            self._on_hello(identity, message)
            return
        node = next((node for node, known in self._nodes.items() if known == identity), None)
        if node is None:
            log.warning("message of an unknown node dropped %s", fields(kind=type(message).__name__))
            return
        match message:
            case NodeStarted(pids):
                self._on_started(pids)
            case RankBytes(rank, data):
                self._pipes.write(rank, data)
            case RankEnded(rank, status):
                self._end_rank(rank, status)
            case NodeDrain():
                self._on_drain()

    def _on_hello(self, identity: bytes, hello: NodeHello) -> None:
        refusal = self._refusal(hello)
        if refusal is not None:
            log.error("node refused %s", fields(node=hello.node_rank, host=hello.host, reason=refusal))
            self._deliver(identity, NodeRefused(refusal))
            return
        ranks = list(self._ranks_of(hello.node_rank))
        self._nodes[hello.node_rank] = identity
        self._hosts.update(dict.fromkeys(ranks, hello.host))
        log.info("node joined %s", fields(node=hello.node_rank, host=hello.host, ranks=ranks))
        self._send(hello.node_rank, NodeStart(ranks))

    def _on_started(self, pids: dict[int, int]) -> None:
        """Its ranks are there to read what they are sent."""
        for rank, pid in pids.items():
            end = self._ends.pop(rank, None)
            if end is not None:  # else its node was lost meanwhile
                self._processes[rank].pid = pid
                self._pipes.open(rank, end)
        if not self._ends:
            self._all_joined.set()

    def _refusal(self, hello: NodeHello) -> str | None:
        num_nodes = self._config.nodes.num_nodes
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"protocol version {PROTOCOL_VERSION} here, {hello.protocol_version} there"
        if hello.num_nodes != num_nodes:
            return f"num_nodes is {num_nodes} here, {hello.num_nodes} there"
        if not 1 <= hello.node_rank < num_nodes:
            return f"node_rank must be from 1 to {num_nodes - 1}, got {hello.node_rank}"
        if hello.node_rank in self._nodes:
            return f"node {hello.node_rank} has joined before; a worker that lost a node starts anew"
        return None

    def _send(self, node: int, message: ToNode) -> None:
        if node in self._lost or self._deliver(self._nodes[node], message):
            return
        self._lost.add(node)
        running = [rank for rank in self._ranks_of(node) if self._processes[rank].is_running]
        if running:
            log.error("node lost %s", fields(node=node, ranks=running))
        for rank in running:
            self._end_rank(rank, LOST_STATUS)

    def _deliver(self, identity: bytes, message: ToNode) -> bool:
        """Send; False where nobody is there any more, or does not read."""
        try:
            self._socket.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        self._reader.recheck()
        return True

    def _end_rank(self, rank: int, status: int) -> None:
        self._processes[rank].on_ended(status)
        self._pipes.close(rank)
        # A rank that never started has its far end here still: closed, the near one hears of the loss.
        end = self._ends.pop(rank, None)
        if end is not None:
            end.close()

    def _ranks_of(self, node: int) -> range:
        return ranks_of(node, self._config.nodes.num_nodes, self._config.engine.tensor_parallel_size)

    def _node_of(self, rank: int) -> int:
        return rank // len(self._ranks_of(0))
