"""The router's process: what it is made of, how it starts, and how signals end it."""

import asyncio
import gc
import logging
import os
import signal
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

from disagg._core import PrefixIndex
from disagg.checkpoint import resolve, tokenizer_hash
from disagg.config import RouterConfig
from disagg.errors import ConfigError
from disagg.frontend import HttpServer, TextModel, create_app
from disagg.kubernetes import Discovery, follow_release
from disagg.router.dispatch import Dispatcher
from disagg.router.ledger import Ledger
from disagg.router.links import ZmqConnector, check_address
from disagg.router.membership import Membership
from disagg.router.peers import PeerServer, RouterPeers
from disagg.router.proofs import EndedPods, PodSuccessors, ProcessProof, TakeProof
from disagg.router.registry import Registry
from disagg.router.service import RouterService
from disagg.security import ApiKeys, KeyRing, admission, tls_context
from disagg.telemetry import RouterMetrics, fields, set_up_logging

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
HTTP_CLOSE_S = 5.0
"""For answers that are complete and still on their way to slow readers."""


def run_router(config: RouterConfig, *, ready: Report) -> int:
    """Serve until a signal; return the exit status.

    `ready` is called once, with `{"event": "ready", "port": …, "pid": …}`, when the port answers.
    The first SIGTERM or SIGINT drains, a second one stops at once.

    Raises:
        ConfigError: The configuration cannot work: a worker's address leaves this machine and there
            are no transport keys, the model is not found, the port is taken.
    """
    keys = KeyRing(Path(config.transport_keys)) if config.transport_keys else None
    for address in config.workers:
        check_address(address, keys)
    set_up_logging("router")
    return uvloop.run(_run(config, keys, ready))


async def _run(config: RouterConfig, keys: KeyRing | None, ready: Report) -> int:
    model = config.model
    files = resolve(model.model, config_only=model.load_format == "dummy")
    text = TextModel.from_folder(files.path, Path(model.chat_template) if model.chat_template else None)
    pods = EndedPods()
    # Without discovery nobody tells of pods, and what waits for that would wait for ever.
    proofs: tuple[TakeProof, ...] = (ProcessProof.take, PodSuccessors().take)
    if config.discover is not None:
        proofs += (pods.take,)
    with ExitStack() as stack:
        # What is frozen is not collected at exit either, and nanobind reports it as leaked.
        stack.callback(gc.unfreeze)
        connector = ZmqConnector(keys)
        stack.callback(connector.close)
        dispatcher = _make_dispatcher(config, connector, tokenizer_hash(files.path), proofs)
        peers = RouterPeers(connector)
        service = RouterService(dispatcher, Ledger(config.routing.ledger_size), ask_peers=peers.ask)
        # Before what it answers for: the sockets of `PeerServer`, the only ones that a router binds.
        asked_keys = keys if config.peer_bind is not None else None
        is_alive = stack.enter_context(admission(connector.context, asked_keys))
        app = create_app(
            service,
            text,
            model.served_model_name or model.model,
            api_keys=ApiKeys(config.api_key, Path(config.api_key_file) if config.api_key_file else None),
            max_body_bytes=config.max_body_bytes,
            is_alive=is_alive,
        )
        stack.callback(dispatcher.close)
        stack.callback(peers.close)
        if config.peer_bind is not None:
            asked = PeerServer(connector.context, config.peer_bind, keys, service.own_record)
            stack.callback(asked.close)
        discovery = _make_discovery(config, dispatcher, peers, pods)
        server = HttpServer(app, config.host, config.port, _make_tls(config))
        # What has been made until here stays: no collection looks at it again.
        gc.collect()
        gc.freeze()
        for address in config.workers:
            dispatcher.connect(address)
        if discovery is not None:
            discovery.start()
            stack.callback(discovery.stop)
        return await _Process(dispatcher, service, server, config.lease.drain_seconds).run(ready)


def _make_discovery(
    config: RouterConfig, dispatcher: Dispatcher, peers: RouterPeers, pods: EndedPods
) -> Discovery | None:
    if config.discover is None:
        return None
    on_workers = Membership(dispatcher).on_members
    namespace = config.discover_namespace
    return follow_release(config.discover, namespace, on_workers, peers.on_members, pods.add)


def _make_tls(config: RouterConfig) -> ssl.SSLContext | None:
    if config.tls_certificate is None and config.tls_key is None:
        return None
    if config.tls_certificate is None or config.tls_key is None:
        raise ConfigError("tls_certificate and tls_key go together, and one of them is missing")
    return tls_context(Path(config.tls_certificate), Path(config.tls_key))


def _make_dispatcher(
    config: RouterConfig, connector: ZmqConnector, tokenizer: str, proofs: tuple[TakeProof, ...]
) -> Dispatcher:
    series = CollectorRegistry()
    ProcessCollector(registry=series)
    # The leases are counted when asked, by what is made with the metrics in hand.
    metrics = RouterMetrics(series, lambda: dispatcher.leases_by_state())
    dispatcher = Dispatcher(
        Registry(PrefixIndex()),
        connector,
        metrics,
        router_id=token_hex(8),
        routing=config.routing,
        lease=config.lease,
        tokenizer_hash=tokenizer,
        proofs=proofs,
    )
    return dispatcher


class _Process:
    """The tasks of the process, and the signals that end them."""

    def __init__(
        self, dispatcher: Dispatcher, service: RouterService, server: HttpServer, drain_s: float
    ) -> None:
        self._dispatcher = dispatcher
        self._service = service
        self._server = server
        self._drain_s = drain_s
        self._signals = 0
        self._stop = asyncio.Event()

    async def run(self, ready: Report) -> int:
        """Serve until a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as tasks:
                clock = tasks.create_task(self._dispatcher.run(), name="clock")
                serving = tasks.create_task(self._server.run(), name="http")
                tasks.create_task(self._end(serving, clock), name="end")
                ready({"event": "ready", "port": self._server.port, "pid": os.getpid()})
                log.info("serving %s", fields(host=self._server.host, port=self._server.port))
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return 0

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._service.abort_all()  # so that there is nothing to wait for

    async def _end(self, serving: "asyncio.Task[None]", clock: "asyncio.Task[None]") -> None:
        await self._stop.wait()
        self._server.dismiss()
        await self._service.drain(self._drain_s)
        self._server.stop()
        _, slow = await asyncio.wait((serving,), timeout=HTTP_CLOSE_S)
        if slow:
            self._server.abort()
            serving.cancel()
        clock.cancel()
