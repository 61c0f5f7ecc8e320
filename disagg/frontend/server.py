"""The HTTP server: uvicorn on httptools, with what it lacks at the level of the connection."""

import asyncio
import socket
import ssl
from asyncio import TimerHandle
from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from disagg.errors import ConfigError, InvalidRequest, RequestError
from disagg.frontend.app import App
from disagg.frontend.errors import BodyTooSlow, HeadersTooLarge, reply_to
from disagg.frontend.exchange import LINGER_S
from disagg.security import host_port, listen

HEADER_TIMEOUT_S = 3.0
"""From its first byte. The body may take twice as long; all are answered within ten seconds."""
KEEP_ALIVE_S = 75
DEAD_CLIENT_MS = 120_000
"""A client that acknowledges nothing for so long is gone, and so is what runs for it."""
MAX_HEADER_BYTES = 64 * 1024
BACKLOG = 2048
ABORT_S = 1.0


class HttpServer:
    """Serves one app on one address, in the running loop. Leaves signals to the process.

    The port is known from the start, also where 0 picked it.
    """

    def __init__(self, app: App, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Bind. With `tls` the port speaks HTTPS alone.

        Raises:
            ConfigError: The address cannot be bound.
        """
        try:
            self._socket = listen(host, port, BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host_port(host, port)}: {error}") from error
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self._app = app
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                # Who the client is matters to nobody here, and forged headers would change it.
                proxy_headers=False,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_context_factory=(lambda *_: tls) if tls is not None else None,
            )
        )

    async def run(self) -> None:
        """Serve until `stop` is called and open requests have ended; cancelling closes at once."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            await self._server.close()
            self._app.close()

    def dismiss(self) -> None:
        """Close the connections that are idle, and each other one behind the answer that it has in progress.

        Whoever kept one, perhaps since a long stream began, asks again by another, of another server.
        """
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    def stop(self) -> None:
        """Accept no more connections; `run` returns when the open requests have been answered."""
        self._server.should_exit = True

    def abort(self) -> None:
        """Wait for nothing any more."""
        self._server.should_exit = True
        self._server.force_exit = True


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process decides what signals mean."""
        yield

    async def close(self) -> None:
        """Break off what is still open, and wait for its tasks: nothing outlives `run`."""
        for server in getattr(self, "servers", ()):  # absent where it never started
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        tasks = list(self.server_state.tasks)
        if tasks:
            # They see their clients gone; whoever does not is cancelled.
            _, stuck = await asyncio.wait(tasks, timeout=ABORT_S)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)


class _Protocol(HttpToolsProtocol):
    """Also bounds the header in time and size, and puts errors below HTTP in our shape."""

    _header_timer: TimerHandle | None = None
    _header_bytes = 0
    _lingering: TimerHandle | None = None
    _deaf = False
    """Set once what comes cannot be read as a request: what still comes is dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        # A host that vanished sends no FIN. TCP_NODELAY is uvloop's default.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_CLIENT_MS)
        # As between requests: a pool may open connections ahead of their use.
        self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        self._unset_keepalive_if_required()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self.send_400_response(str(error))
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(HeadersTooLarge(f"the header must be at most {MAX_HEADER_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._on_slow_header)

    def on_headers_complete(self) -> None:
        self._stop_awaiting()
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("the request is not valid HTTP"))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read the request again as one that offers no other protocol.

        The parser takes a request that does for one without a body. Java's HTTP client offers h2c with
        every first request, and its body must not be lost.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT")
            return
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [
            b"%b: %b" % header for header in self.headers if header[0] not in (b"connection", b"upgrade")
        ]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _stop_awaiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_slow_header(self) -> None:
        self._header_timer = None
        self._refuse(BodyTooSlow(f"the header did not arrive within {HEADER_TIMEOUT_S:g} seconds"))

    def _refuse(self, error: RequestError) -> None:
        self._stop_awaiting()
        if self.transport.is_closing() or self._deaf:
            return
        self._deaf = True
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started or not self.cycle.more_body:
                # An answer is on its way. It is the last, and this must not come out in the middle of it.
                self.cycle.keep_alive = False
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        request_id = token_hex(16)
        reply = reply_to(error, request_id)
        lines = [
            b"HTTP/1.1 %d \r\n" % reply.status,
            b"content-type: application/json\r\nconnection: close\r\n",
            b"content-length: %d\r\nx-request-id: %b\r\n\r\n" % (len(reply.body), request_id.encode()),
            reply.body,
        ]
        self.transport.write(b"".join(lines))
        # Closing now, with bytes of the client unread, would reset the connection and lose the answer.
        if self.transport.can_write_eof():  # not with TLS, which has no half-closed connection
            self.transport.write_eof()
        self._lingering = self.loop.call_later(LINGER_S, self.transport.close)
