"""The worker process: threads and their lives.

    main thread      the event loop: control socket, links to peers, http port, signals
    engine thread    engine, KV cache, leases, and what is done with each message (`service.py`)
    transfer thread  this rank's KV transfers
    rank threads     one for each other rank, hearing what its transfers do (`ranks.py`)

They hand over through one queue each way and share nothing else.
"""

import asyncio
import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, assert_never

import zmq

from disagg.checkpoint import resolve
from disagg.config import WorkerConfig
from disagg.errors import DisaggError, ungrouped
from disagg.models import check_tensor_parallel, load_spec
from disagg.protocol import (
    PROTOCOL_VERSION,
    FromPeer,
    Hello,
    Load,
    ToWorker,
    Welcome,
    WorkerState,
)
from disagg.security import KeyRing, admission, host_port
from disagg.telemetry import Stages, fields, set_up_logging
from disagg.transfer import Event, prepare_environment
from disagg.worker.addresses import advertised_address, check_addresses, http_url, is_local
from disagg.worker.endpoint import ControlEndpoint
from disagg.worker.engine_thread import EngineThread
from disagg.worker.http import HttpServer, bind_http, make_app
from disagg.worker.kv_thread import TRANSPORT
from disagg.worker.links import PeerLinks
from disagg.worker.load import Loaded, load_worker, whole_percents
from disagg.worker.metrics import MetricLabels, WorkerCounts, WorkerMetrics
from disagg.worker.node import run_node
from disagg.worker.nodes import NodeLinks, bind_nodes, ranks_of
from disagg.worker.outbox import (
    Batch,
    CloseLink,
    Effect,
    OnLink,
    OpenLink,
    Report,
    ToPeer,
    ToRouter,
    ToRouters,
)
from disagg.worker.ranks import LOOPBACK, RankGroup
from disagg.worker.service import WorkerService

log = logging.getLogger(__name__)

NOTHING_YET = Load("starting", 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
BEAT_S = 0.5
"""Between two Loads; a router takes a worker for lost after a few of them."""
STOP_STEP_S = 5.0
"""How long the end waits for a step under way."""

Ready = Callable[[dict[str, Any]], None]


def run_worker(config: WorkerConfig, *, ready: Ready) -> int:
    """Be a worker until a signal; return the exit status.

    Args:
        config: Role, model, addresses.
        ready: Told `{"event": "progress", "done": bytes, "total": bytes}` while weights load, then once
            `{"event": "ready", "control": address, "http": url, "port": http port, "pid": pid}`.
            May be called from any thread.

    Raises:
        ConfigError: the configuration cannot work.
    """
    stages = Stages()
    stages.end("imports")
    set_up_logging(config.worker_id or config.role)
    check_addresses(config)
    keys = KeyRing(Path(config.transport_keys)) if config.transport_keys else None
    if config.nodes.node_rank > 0:
        return run_node(config, keys, ready=ready)
    size = config.engine.tensor_parallel_size
    if size > 1:
        # Before any rank is started, for one that cannot work would leave the others waiting.
        ranks_of(0, config.nodes.num_nodes, size)
        files = resolve(config.model.model, config_only=config.model.load_format == "dummy")
        check_tensor_parallel(load_spec(files.path), size)
    prepare_environment(loopback_only=is_local(config))
    return asyncio.run(_Worker(config, keys, stages, ready).run())


class _Worker:
    """The loop's side of a worker: everything with a descriptor."""

    def __init__(self, config: WorkerConfig, keys: KeyRing | None, stages: Stages, ready: Ready) -> None:
        self._config = config
        self._keys = keys
        self._stages = stages
        self._ready = ready
        self._uuid = uuid.uuid4().hex
        self._worker_id = config.worker_id or f"{config.role}-{socket.gethostname()}"
        self._model_name = config.model.served_model_name or config.model.model
        self._counts = WorkerCounts()
        self._load = NOTHING_YET
        self._loaded: Loaded | None = None
        self._tick_is_pending = False
        self._drain_until: float | None = None
        self._num_signals = 0

    async def run(self) -> int:
        """Serve until told to stop; everything opened here is closed in the opposite order."""
        self._loop = asyncio.get_running_loop()
        self._built: asyncio.Future[None] = self._loop.create_future()
        self._stopping = asyncio.Event()
        self._drained = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal)
        with ExitStack() as stack:
            listener = stack.enter_context(bind_http(self._config.http_host, self._config.http_port))
            host, self._http_port = listener.getsockname()[:2]
            self._http_url = http_url(host, self._http_port, self._config.advertise_host)
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            # Waits until what was sent has left, as long as the sockets linger.
            stack.callback(context.term)
            self._is_alive = stack.enter_context(admission(context, self._keys))
            # Bound before the model loads, so that a taken address is told at once; whoever connects
            # is heard as soon as there is something to answer.
            self._endpoint = ControlEndpoint(context, self._config.control, self._keys)
            stack.callback(self._endpoint.close)
            self._links = PeerLinks(context, self._uuid, self, self._keys)
            stack.callback(self._links.close_all)
            self._ranks = RankGroup(
                self._config,
                self._uuid,
                on_event=self._on_transfer,
                on_lost=self._on_crash,
                nodes=self._node_links(context),
            )
            stack.callback(self._ranks.kill)
            await self._serve(listener)
        return 0

    def _node_links(self, context: "zmq.Context[zmq.Socket[bytes]]") -> NodeLinks | None:
        nodes = self._config.nodes
        if nodes.num_nodes == 1:
            return None
        address = f"tcp://{host_port(self._config.advertise_host or LOOPBACK, nodes.node_port)}"
        return NodeLinks(
            bind_nodes(context, self._keys, address),
            self._config,
            state=lambda: self.state,
            on_drain=self._on_node_drain,
        )

    async def _serve(self, listener: socket.socket) -> None:
        self._engine = EngineThread(
            self._make_service, on_ready=self._on_ready, deliver=self._deliver, on_crash=self._on_crash
        )
        self._metrics = WorkerMetrics(
            MetricLabels(self._config.role, self._model_name, self._worker_id),
            self._counts,
            block_size=self._config.engine.block_size,
            load=lambda: self._load,
            malformed=lambda: self._endpoint.num_malformed,
        )
        http = HttpServer(make_app(self, self._is_alive))
        with ungrouped(DisaggError):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(http.serve(sockets=[listener]), name="http")
                await self._live(tasks)
                http.stop()

    async def _live(self, tasks: asyncio.TaskGroup) -> None:
        self._engine.start()
        await self._built
        self._open()
        beat = tasks.create_task(self._beat(), name="beat")
        await self._stopping.wait()
        log.info("draining")
        await self.drain()
        beat.cancel()
        await self._end()

    # --- for the http port ------------------------------------------------------------------------

    @property
    def state(self) -> WorkerState:
        """Starting, ready or draining."""
        if self._drain_until is not None:
            return "draining"
        return "starting" if self._loaded is None else "ready"

    def metrics_text(self) -> bytes:
        """All series in Prometheus' text format."""
        return self._metrics.text()

    async def drain(self) -> int:
        """Take no new work and wait for what runs; leases left when the deadline passed, else 0."""
        if not self._built.done():
            return 0  # nobody has been told of this worker yet
        if self._drain_until is None:
            self._drain_until = self._loop.time() + self._config.lease.drain_seconds
            self._engine.post(WorkerService.begin_drain)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._drain_until):
                await self._drained.wait()
        return self._load.leases

    # --- beginning --------------------------------------------------------------------------------

    def _make_service(self) -> WorkerService:
        """Load the model; runs on the engine thread."""
        self._loaded = load_worker(
            self._config,
            worker_id=self._worker_id,
            uuid=self._uuid,
            ranks=self._ranks,
            counts=self._counts,
            stages=self._stages,
            progress=whole_percents(
                lambda done, total: self._ready({"event": "progress", "done": done, "total": total})
            ),
            on_transfer=partial(self._on_transfer, 0),
            on_crash=self._on_crash,
        )
        return self._loaded.service

    def _open(self) -> None:
        """Let routers and peers in, and say so."""
        self._endpoint.start(self)
        log.info(
            "worker ready %s",
            fields(
                control=self._endpoint.address,
                http=self._http_url,
                pid=os.getpid(),
                **self._stages.fields(),
            ),
        )
        self._ready(
            {
                "event": "ready",
                "control": self._endpoint.address,
                "http": self._http_url,
                "port": self._http_port,
                "pid": os.getpid(),
            }
        )

    def welcome(self) -> Welcome:
        """Say who this worker is."""
        loaded = self._loaded
        assert loaded is not None, "nobody is heard before"
        return Welcome(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self._worker_id,
            uuid=self._uuid,
            role=self._config.role,
            state=self.state,
            model_name=self._model_name,
            pid=os.getpid(),
            rank_pids=[os.getpid(), *self._ranks.pids],
            metrics_url=f"{self._http_url}/metrics",
            peer_address=advertised_address(self._endpoint.address, self._config.advertise_host),
            max_model_len=loaded.limits.max_model_len,
            max_num_seqs=loaded.limits.max_num_seqs,
            max_num_batched_tokens=loaded.limits.max_num_batched_tokens,
            num_pages=loaded.limits.num_pages,
            layout=loaded.hello.layout,
            eos_token_ids=loaded.eos_token_ids,
            dtype=loaded.dtype,
            transport=TRANSPORT,
            model_hash=loaded.model_hash,
            tokenizer_hash=loaded.tokenizer_hash,
            # One pod's end is not that of ranks in others.
            pod_uid=(self._config.pod_uid or "") if self._config.nodes.num_nodes == 1 else "",
        )

    # --- what the sockets tell --------------------------------------------------------------------

    def on_hello(self, router_id: str, hello: Hello) -> None:
        """Welcome a router."""
        self._endpoint.send(router_id, self.welcome())
        self._engine.post(lambda service: service.on_hello(router_id, hello))

    def on_router(self, router_id: str, message: ToWorker) -> None:
        """Pass on what a router asks."""
        self._engine.post(lambda service: service.on_router(router_id, message))

    def on_peer(self, uuid: str, message: FromPeer) -> None:
        """Pass on what a prefill worker says."""
        self._engine.post(lambda service: service.on_peer(uuid, message))

    def on_link(self, uuid: str, message: FromPeer) -> None:
        """Pass on what a decode worker says."""
        self._engine.post(lambda service: service.on_link(uuid, message))

    def on_link_lost(self, uuid: str) -> None:
        """Pass on that a decode worker cannot be reached."""
        self._engine.post(lambda service: service.on_link_lost(uuid))

    async def _beat(self) -> None:
        """Show routers that this process lives, also while a step takes long."""
        while True:
            await asyncio.sleep(BEAT_S)
            if not self._tick_is_pending:
                self._tick_is_pending = True
                # Last: no lease expires whose renewal has arrived during a long step.
                self._engine.post_last(WorkerService.on_tick)
            else:
                self._endpoint.send_all(self._load)

    # --- what other threads tell ------------------------------------------------------------------

    def _on_ready(self) -> None:
        self._loop.call_soon_threadsafe(self._built.set_result, None)

    def _deliver(self, batch: Batch) -> None:
        self._loop.call_soon_threadsafe(self._perform, batch)

    def _on_transfer(self, rank: int, event: Event) -> None:
        self._engine.post(lambda service: service.on_transfer(rank, event))

    def _on_crash(self, error: Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: this process ends for an earlier reason
            self._loop.call_soon_threadsafe(self._fail, error)

    def _on_node_drain(self) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)

    def _perform(self, batch: Batch) -> None:
        for effect in batch:
            self._do(effect)

    def _do(self, effect: Effect) -> None:
        endpoint, links = self._endpoint, self._links
        match effect:
            case ToRouter(router_id, message):
                endpoint.send(router_id, message)
            case ToRouters(message):
                endpoint.send_all(message)
            case ToPeer(peer, answer):
                endpoint.send_peer(peer, answer)
            case OpenLink(peer, address, hello):
                links.open(peer, address, hello)
            case OnLink(peer, answer):
                links.send(peer, answer)
            case CloseLink(peer):
                links.close(peer)
            case Report(load, num_held):
                self._on_report(load, num_held)
            case _:
                assert_never(effect)

    def _on_report(self, load: Load, num_held: int) -> None:
        self._load, self._tick_is_pending = load, False
        self._endpoint.send_all(load)
        if load.state == "draining" and num_held == 0:
            self._drained.set()

    # --- end --------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            log.warning("stopped at once")
            self._leave(130)
        if not self._built.done():
            self._leave(0)  # nobody has been told of this worker yet
        self._stopping.set()

    def _fail(self, error: Exception) -> None:
        """A thread or a rank has ended by itself. Before the worker was up that is why it will not be."""
        if not self._built.done():
            self._built.set_exception(error)
        elif self._built.exception() is None:
            log.error("worker ends %s", fields(error=error), exc_info=error)
            self._leave(1)
        # Else it fails already, and one rank's failure brings others with it.

    async def _end(self) -> None:
        """Say goodbye and stop every thread and rank, the one that feeds the others first."""
        self._engine.post(WorkerService.say_goodbye)
        if not await asyncio.to_thread(self._engine.stop, STOP_STEP_S):
            log.warning("a step did not end within %.0f s", STOP_STEP_S)
            self._leave(1)
        assert self._loaded is not None
        await asyncio.to_thread(self._loaded.transfers.stop)
        await asyncio.to_thread(self._ranks.stop)

    def _leave(self, status: int) -> NoReturn:
        """End the process now, whatever its threads are doing."""
        self._ranks.kill()
        logging.shutdown()
        os._exit(status)
