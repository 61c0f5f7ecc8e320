"""The agent of a node other than the leader's: it starts the node's ranks and carries their streams.

    main thread   event loop: http port, signals, and the ranks' processes, which the kernel ends with it
    link thread   the link to the leader and the far ends of the ranks' socket pairs

It has no engine and no address: routers know the leader alone. Its end is the worker's, and the worker's is
its own.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import zmq
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from disagg.config import WorkerConfig
from disagg.errors import ConfigError, DisaggError, WorkerLost, ungrouped
from disagg.links import DISCONNECTED, DealerLink, LinkEvents, LinkKind
from disagg.protocol import PROTOCOL_VERSION, WorkerState
from disagg.security import KeyRing, choice_for, host_port
from disagg.telemetry import fields, set_up_logging
from disagg.transfer import prepare_environment
from disagg.worker.addresses import http_url, is_local
from disagg.worker.http import HttpServer, bind_http, make_app
from disagg.worker.loop_thread import LoopThread
from disagg.worker.nodes import (
    FromNode,
    NodeDrain,
    NodeHello,
    NodeRefused,
    NodeStart,
    NodeStarted,
    NodeState,
    Pipes,
    RankBytes,
    RankClosed,
    RankEnded,
    ToNode,
    set_heartbeat,
)
from disagg.worker.ranks import LOOPBACK, spawn_rank

log = logging.getLogger(__name__)

Ready = Callable[[dict[str, Any]], None]
RANK_END_S = 5.0
DRAIN_MARGIN_S = 10.0
"""Beyond what the leader may take to drain."""
TO_LEADER = LinkKind(
    ToNode, "message of the leader dropped", "the leader refused the handshake", prepare=set_heartbeat
)


def run_node(config: WorkerConfig, keys: KeyRing | None, *, ready: Ready) -> int:
    """Run the ranks of one node until the worker ends; return the exit status.

    `ready` is told once, when the worker is: `{"event": "ready", "http": url, "port": …, "pid": …}`.

    Raises:
        ConfigError: The leader wants no such node.
        WorkerLost: The leader is gone.
    """
    set_up_logging(config.worker_id or f"node-{config.nodes.node_rank}")
    if config.nodes.leader_address is None:
        raise ConfigError(f"leader_address is required with node_rank = {config.nodes.node_rank}")
    if config.nodes.node_rank >= config.nodes.num_nodes:
        raise ConfigError(
            f"node_rank must be below num_nodes = {config.nodes.num_nodes}, got {config.nodes.node_rank}"
        )
    prepare_environment(loopback_only=is_local(config))
    choice_for(keys, _address(config))
    return asyncio.run(_Agent(config, keys, ready).run())


def _address(config: WorkerConfig) -> str:
    assert config.nodes.leader_address is not None, "checked"
    return f"tcp://{host_port(config.nodes.leader_address, config.nodes.node_port)}"


class _Agent:
    """The main thread's side."""

    def __init__(self, config: WorkerConfig, keys: KeyRing | None, ready: Ready) -> None:
        self._config = config
        self._keys = keys
        self._ready = ready
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._state: WorkerState = "starting"
        self._num_signals = 0
        self._series = CollectorRegistry()
        ProcessCollector(registry=self._series)

    async def run(self) -> int:
        """Serve until the leader ends the worker, or this node is told to go."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal)
        with bind_http(self._config.http_host, self._config.http_port) as listener:
            host, self._http_port = listener.getsockname()[:2]
            self._http_url = http_url(host, self._http_port, self._config.advertise_host)
            http = HttpServer(make_app(self))
            self._link = _LeaderLink(self._config, self._keys, self)
            self._link.start()
            try:
                with ungrouped(DisaggError):
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(http.serve(sockets=[listener]), name="http")
                        await self._ended
                        http.stop()
            finally:
                for process in self._processes.values():
                    process.kill()
                    process.wait()
                self._link.close()
        return 0

    # --- for the http port ------------------------------------------------------------------------

    @property
    def state(self) -> WorkerState:
        """The worker's, as its leader tells it."""
        return self._state

    def metrics_text(self) -> bytes:
        """This process's series; the worker's are on its leader."""
        return generate_latest(self._series)

    async def drain(self) -> int:
        """Have the leader drain, and wait for its end; at once where this node is no part of a worker yet."""
        if not self._processes:
            return 0
        self._link.post(NodeDrain())
        with suppress(TimeoutError, DisaggError):
            async with asyncio.timeout(self._config.lease.drain_seconds + DRAIN_MARGIN_S):
                await asyncio.shield(self._ended)
        return 0

    # --- what the link tells, on the loop ---------------------------------------------------------

    def on_start(self, ranks: list[int]) -> None:
        """Start this node's ranks."""
        log.info("node joined %s", fields(ranks=ranks))
        for rank in ranks:
            process, end = spawn_rank()
            self._processes[rank] = process
            self._link.add(rank, process, end)
        self._link.post(NodeStarted({rank: process.pid for rank, process in self._processes.items()}))

    def on_state(self, state: WorkerState) -> None:
        """Note how the worker is."""
        if state == "ready" and self._state == "starting":
            log.info("worker ready %s", fields(http=self._http_url, pid=os.getpid()))
            self._ready(
                {"event": "ready", "http": self._http_url, "port": self._http_port, "pid": os.getpid()}
            )
        self._state = state

    def on_end(self, error: DisaggError | None) -> None:
        """The worker has ended, or cannot be."""
        if not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run on the loop; from any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals > 1 or not self._processes:
            for process in self._processes.values():
                process.kill()
            logging.shutdown()
            os._exit(130 if self._processes else 0)
        log.info("draining")
        self._link.post(NodeDrain())
        self._loop.call_later(
            self._config.lease.drain_seconds + DRAIN_MARGIN_S,
            self.on_end,
            WorkerLost("the leader did not end in time"),
        )


class _LeaderLink(LinkEvents[ToNode]):
    """The link thread. It owns the link and the far ends."""

    def __init__(self, config: WorkerConfig, keys: KeyRing | None, agent: _Agent) -> None:
        self._config = config
        self._keys = keys
        self._agent = agent
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = LoopThread("leader-link", self._on_thread_end)
        self._open_parts = ExitStack()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._has_joined = False

    def start(self) -> None:
        """Begin to connect, for as long as it takes."""
        self._thread.call(self._open)
        self._thread.start()

    def post(self, message: FromNode) -> None:
        """Send; from any thread."""
        self._thread.call(self._send, message)

    def add(self, rank: int, process: "subprocess.Popen[bytes]", end: socket.socket) -> None:
        """Carry a rank's stream from now on; from any thread."""
        self._thread.call(self._add, rank, process, end)

    def close(self) -> None:
        """End the thread and the link."""
        self._thread.stop()
        self._context.term()

    # --- the thread -------------------------------------------------------------------------------

    def _open(self) -> None:
        self._pipes = Pipes(self._on_bytes)
        self._open_parts.callback(self._pipes.close_all)
        address = _address(self._config)
        self._link: DealerLink[ToNode] = DealerLink(self._context, address, self, self._keys, TO_LEADER)
        self._open_parts.callback(self._link.close)

    def _on_thread_end(self, error: Exception | None) -> None:
        if error is not None:
            # Without it the ranks would wait for a leader that is not heard.
            self._end(WorkerLost(f"the link to the leader broke: {error}"))
        self._open_parts.close()

    def _add(self, rank: int, process: "subprocess.Popen[bytes]", end: socket.socket) -> None:
        self._processes[rank] = process
        self._pipes.open(rank, end)

    def _on_bytes(self, rank: int, data: bytes) -> None:
        if data:
            self._send(RankBytes(rank, data))
        else:
            self._on_ended(rank)

    def _on_ended(self, rank: int) -> None:
        process = self._processes.pop(rank, None)
        if process is None:
            return
        try:
            status = process.wait(RANK_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        self._send(RankEnded(rank, status))

    def _send(self, message: FromNode) -> None:
        self._link.send(message)  # where it cannot be sent, `on_down` ends the worker

    def _end(self, error: DisaggError | None) -> None:
        self._agent.call(self._agent.on_end, error)

    # LinkEvents

    def on_up(self) -> None:
        """Ask to join."""
        nodes = self._config.nodes
        host = self._config.advertise_host or LOOPBACK
        self._send(NodeHello(PROTOCOL_VERSION, nodes.node_rank, nodes.num_nodes, host))

    def on_message(self, message: ToNode) -> None:
        """Do what the leader says."""
        match message:
            case NodeRefused(reason):
                self._end(ConfigError(f"the leader refuses this node: {reason}"))
            case NodeStart(ranks):
                self._has_joined = True
                self._agent.call(self._agent.on_start, ranks)
            case NodeState(state):
                self._agent.call(self._agent.on_state, state)
            case RankBytes(rank, data):
                self._pipes.write(rank, data)
            case RankClosed(rank):
                self._pipes.close(rank)
                self._on_ended(rank)
                if not self._processes:
                    self._end(None)

    def on_malformed(self) -> None:
        """Nothing of a rank's stream may be missing."""
        self._end(WorkerLost("the link to the leader broke: a message is none"))

    def on_down(self, reason: str) -> None:
        """Try again until it has joined; a worker that lost a node does not take it back."""
        if self._has_joined:
            self._link.close()
            gone = reason == DISCONNECTED
            self._end(WorkerLost("the leader is gone" if gone else f"the leader {reason}"))
