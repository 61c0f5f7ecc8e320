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
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import msgspec
import zmq
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from zmq.utils.monitor import recv_monitor_message

from disagg.config import WorkerConfig
from disagg.errors import ConfigError, DisaggError, WorkerLost
from disagg.protocol import PROTOCOL_VERSION, WorkerState
from disagg.security import HANDSHAKE_FAILED, KeyChoice, KeyRing, choice_for, host_port, secure_client
from disagg.telemetry import fields, set_up_logging
from disagg.transfer import prepare_environment
from disagg.worker.addresses import http_url, is_local
from disagg.worker.http import HttpServer, bind_http, make_app
from disagg.worker.nodes import (
    BEAT_MS,
    TO_NODE,
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
    set_heartbeat,
)
from disagg.worker.ranks import LOOPBACK, spawn_rank

log = logging.getLogger(__name__)

Ready = Callable[[dict[str, Any]], None]
RANK_END_S = 5.0
DRAIN_MARGIN_S = 10.0
"""Beyond what the leader may take to drain."""


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
    choice = choice_for(keys, _address(config))
    return asyncio.run(_Agent(config, choice, ready).run())


def _address(config: WorkerConfig) -> str:
    assert config.nodes.leader_address is not None, "checked"
    return f"tcp://{host_port(config.nodes.leader_address, config.nodes.node_port)}"


class _Agent:
    """The main thread's side."""

    def __init__(self, config: WorkerConfig, keys: KeyChoice | None, ready: Ready) -> None:
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
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(http.serve(sockets=[listener]), name="http")
                    await self._ended
                    http.stop()
            except* DisaggError as group:
                raise group.exceptions[0] from None
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


class _LeaderLink:
    """The link thread. It owns the sockets and the far ends."""

    def __init__(self, config: WorkerConfig, keys: KeyChoice | None, agent: _Agent) -> None:
        self._config = config
        self._keys = keys
        self._agent = agent
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="leader-link", daemon=True)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._has_joined = False
        self._was_refused = False
        self._is_open = True

    def start(self) -> None:
        """Begin to connect, for as long as it takes."""
        self._thread.start()

    def post(self, message: FromNode) -> None:
        """Send; from any thread."""
        self._do(lambda: self._send(message))

    def add(self, rank: int, process: "subprocess.Popen[bytes]", end: socket.socket) -> None:
        """Carry a rank's stream from now on; from any thread."""

        def add() -> None:
            self._processes[rank] = process
            self._pipes.open(rank, end)

        self._do(add)

    def close(self) -> None:
        """End the thread and the link."""

        def close() -> None:
            self._is_open = False

        self._do(close)
        self._thread.join()
        self._context.term()
        self._wake.close()
        self._woken.close()

    def _do(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)
        self._wake.send(b"x")

    def _run(self) -> None:
        self._poller = zmq.Poller()
        self._pipes = Pipes(self._poller)
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self._connect()
        try:
            while self._is_open:
                ready = dict(self._poller.poll())
                if self._woken.fileno() in ready:
                    self._woken.recv(1)
                    self._inbox.get()()
                if self._socket in ready:
                    self._receive()
                if self._monitor in ready:
                    self._on_monitor()
                for rank, data in self._pipes.read(ready):
                    if data:
                        self._send(RankBytes(rank, data))
                    else:
                        self._on_ended(rank)
        except Exception as error:
            # The edge of this thread: without it the ranks would wait for a leader that is not heard.
            self._end(WorkerLost(f"the link to the leader broke: {error}"))
        finally:
            self._pipes.close_all()
            self._disconnect()

    def _connect(self) -> None:
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        set_heartbeat(self._socket)
        secure_client(self._socket, self._keys, _address(self._config))
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | HANDSHAKE_FAILED
        )
        self._socket.connect(_address(self._config))
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _disconnect(self) -> None:
        self._poller.unregister(self._socket)
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()

    def _on_monitor(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            if self._keys is not None:
                self._keys.on_accepted()
            nodes = self._config.nodes
            host = self._config.advertise_host or LOOPBACK
            self._send(NodeHello(PROTOCOL_VERSION, nodes.node_rank, nodes.num_nodes, host))
        elif self._has_joined:
            self._end(WorkerLost("the leader is gone"))
        elif event & HANDSHAKE_FAILED:
            self._disconnect()
            if self._keys is None or self._keys.on_refused():
                if not self._was_refused:
                    tried = "with every transport key" if self._keys else "without a transport key"
                    log.error(
                        "the leader refused the handshake %s",
                        fields(address=_address(self._config), tried=tried),
                    )
                self._was_refused = True
                self._poller.poll(BEAT_MS)  # before the next round, unless there is something to do
            self._connect()

    def _receive(self) -> None:
        message = TO_NODE.decode(self._socket.recv())
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
        try:
            self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # Nothing of a rank's stream may be missing.
            self._end(WorkerLost("the leader does not read"))

    def _end(self, error: DisaggError | None) -> None:
        self._agent.call(self._agent.on_end, error)
