"""The real HTTP server over a fake generator, in a thread with a loop of its own."""

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import uvloop

from disagg.frontend import App, HttpServer
from support.generator import FakeGenerator, FakeTicket

T = TypeVar("T")


class RunningServer:
    """What a test may do with it from outside its thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: HttpServer, generator: FakeGenerator) -> None:
        self._loop = loop
        self.server = server
        self.generator = generator
        self.port = server.port
        self.base = f"http://127.0.0.1:{server.port}"

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the server's loop and return its result."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def wait_for(self, event: asyncio.Event) -> None:
        """Wait until the server's side has set it."""
        asyncio.run_coroutine_threadsafe(event.wait(), self._loop).result(10)

    def stop(self) -> None:
        """Let it end what is open, if it has not stopped before."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.server.stop)

    def ticket(self) -> FakeTicket:
        """Wait for the next submitted request."""
        return asyncio.run_coroutine_threadsafe(self.generator.ticket(), self._loop).result(10)


@contextmanager
def serving(
    make_app: Callable[[FakeGenerator], App], tls: ssl.SSLContext | None = None
) -> Iterator[RunningServer]:
    """Serve on a free port; afterwards stop gracefully and see that no task is left."""
    ready = threading.Event()
    running: list[RunningServer] = []
    left: list[str] = []

    async def main() -> None:
        generator = FakeGenerator()
        server = HttpServer(make_app(generator), "127.0.0.1", 0, tls)
        running.append(RunningServer(asyncio.get_running_loop(), server, generator))
        ready.set()
        await server.run()
        left.extend(repr(task) for task in asyncio.all_tasks() - {asyncio.current_task()})

    thread = threading.Thread(target=uvloop.run, args=(main(),), name="http-server")
    thread.start()
    try:
        assert ready.wait(10)
        yield running[0]
    finally:
        running[0].stop()
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
        assert left == []
