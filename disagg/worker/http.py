"""The worker's http port: /health, /live, /metrics, and /drain for loopback peers."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from disagg.errors import ConfigError
from disagg.protocol import WorkerState
from disagg.security import is_own_call, listen

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class WorkerView(Protocol):
    """What the http port shows of a worker."""

    @property
    def state(self) -> WorkerState:
        """Starting, ready or draining."""

    def metrics_text(self) -> bytes:
        """All series in Prometheus' text format."""

    async def drain(self) -> int:
        """Begin to drain and wait for its end; leases left when the deadline passed, else 0."""


def make_app(worker: WorkerView, is_alive: Callable[[], bool] = lambda: True) -> Starlette:
    """Build the routes over `worker`; where `is_alive` is false only another process could serve."""

    async def health(request: Request) -> Response:
        del request
        status = 200 if worker.state == "ready" else 503
        return JSONResponse({"state": worker.state}, status)

    async def live(request: Request) -> Response:
        del request
        alive = is_alive()
        return JSONResponse({"live": alive}, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        del request
        return Response(worker.metrics_text(), media_type=METRICS_MEDIA_TYPE)

    async def drain(request: Request) -> Response:
        if not is_own_call(request.client and request.client.host, request.headers):
            return JSONResponse({"error": "drain is answered to loopback peers only"}, 403)
        return JSONResponse({"leases": await worker.drain()})

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/live", live),
            Route("/metrics", metrics),
            Route("/drain", drain, methods=["POST"]),
        ]
    )


def bind_http(host: str, port: int) -> socket.socket:
    """Listen on `host:port`; raises `ConfigError` where that is not possible."""
    try:
        listener = listen(host, port, 128)
    except socket.gaierror as error:
        raise ConfigError(f"http_host {host!r} cannot be used: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(f"http_port {port} of {host!r} cannot be bound: {error.strerror}") from error
    listener.setblocking(False)
    return listener


class HttpServer(uvicorn.Server):
    """Uvicorn as one task among others: it takes no signals and does not wake ten times a second."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                http="h11",  # the other parser keeps a header that never ends, for anybody who sends one
                log_config=None,
                access_log=False,
                date_header=False,  # uvicorn renews it in the loop that we do without
                server_header=False,
                ws="none",
                proxy_headers=False,  # who is a loopback peer is the socket's word, not a header's
                timeout_graceful_shutdown=2,
            )
        )
        self._stop = asyncio.Event()

    async def main_loop(self) -> None:
        """Wait for `stop()`."""
        await self._stop.wait()

    def stop(self) -> None:
        """Have `serve()` finish the answers it is writing and return."""
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the worker."""
        yield
