"""The worker's http port, mostly without a socket."""

import asyncio
import contextlib
from typing import Any

import httpx

from disagg.protocol import WorkerState
from disagg.worker.http import HttpServer, bind_http, make_app


class View:
    def __init__(self, state: WorkerState) -> None:
        self.state: WorkerState = state
        self.drained = 0

    def metrics_text(self) -> bytes:
        return b"disagg_worker_pages 1\n"

    async def drain(self) -> int:
        self.drained += 1
        return 3


async def ask(view: View, method: str, path: str, peer: str = "127.0.0.1") -> httpx.Response:
    transport = httpx.ASGITransport(make_app(view), client=(peer, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        return await client.request(method, path)


async def _health(state: WorkerState) -> int:
    return (await ask(View(state), "GET", "/health")).status_code


def test_health_is_200_only_when_ready() -> None:
    assert asyncio.run(_health("ready")) == 200
    assert asyncio.run(_health("starting")) == 503
    assert asyncio.run(_health("draining")) == 503


def test_live_is_200_in_every_state() -> None:
    """A liveness probe that failed while draining would have the drain killed."""
    for state in ("starting", "ready", "draining"):
        assert asyncio.run(ask(View(state), "GET", "/live")).status_code == 200


def test_live_is_503_where_only_another_process_could_serve() -> None:
    async def live(is_alive: bool) -> tuple[int, Any]:
        transport = httpx.ASGITransport(make_app(View("ready"), lambda: is_alive))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            answer = await client.get("/live")
            return answer.status_code, answer.json()

    assert asyncio.run(live(True)) == (200, {"live": True})
    assert asyncio.run(live(False)) == (503, {"live": False})


def test_drain_is_answered_to_loopback_only() -> None:
    view = View("ready")
    assert asyncio.run(ask(view, "POST", "/drain", peer="10.0.0.7")).status_code == 403
    assert view.drained == 0
    answer = asyncio.run(ask(view, "POST", "/drain"))
    assert (answer.status_code, answer.json(), view.drained) == (200, {"leases": 3}, 1)


def test_drain_by_get_is_refused() -> None:
    """A crawler or a browser's prefetch must not stop a worker."""
    assert asyncio.run(ask(View("ready"), "GET", "/drain")).status_code == 405


def test_metrics_are_prometheus_text() -> None:
    answer = asyncio.run(ask(View("ready"), "GET", "/metrics"))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text == "disagg_worker_pages 1\n"


def test_no_header_makes_a_peer_a_loopback_one() -> None:
    """Uvicorn believes the `x-forwarded-for` of whom FORWARDED_ALLOW_IPS names: anybody could drain then."""
    assert HttpServer(make_app(View("ready"))).config.proxy_headers is False


def test_a_header_without_end_is_refused() -> None:
    """Anybody who reaches the port could fill the memory of a worker."""

    async def bytes_taken() -> int:
        server = HttpServer(make_app(View("ready")))
        listener = bind_http("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET /live HTTP/1.1\r\nhost: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 32 << 20 and not reader.at_eof():
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()
        writer.close()
        server.stop()
        await serving
        return sent

    assert asyncio.run(bytes_taken()) < 32 << 20
