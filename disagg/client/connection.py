"""An HTTP/1.1 client as lean as load generation needs it: it shares the machine with what it measures.

One event costs about a tenth of what a general client's does, and its time of arrival is taken when
the bytes come, before anything else is done with them.
"""

import asyncio
import ssl
from collections.abc import Callable
from time import perf_counter
from urllib.parse import urlsplit

import httptools

from disagg.client.server import ServerError, ServerUnreachable, unreachable

OnBody = Callable[[bytes, float], None]
"""Takes a piece of a body and when it came, on `perf_counter`."""


class Connections:
    """Kept connections to one server. Closes them on leaving the block."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._url = url
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        lines = [f"host: {parts.netloc.rpartition('@')[2]}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._headers = "".join(f"{line}\r\n" for line in lines).encode()
        self._base_path = parts.path.rstrip("/").encode()
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()

    async def post(self, path: str, body: bytes, on_body: OnBody) -> int:
        """Send a request and hand its answer's body over as it comes; return the status.

        Raises:
            ServerUnreachable: There is no connection, or it broke.
        """
        request = b"POST %b%b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (
            self._base_path,
            path.encode(),
            self._headers,
            len(body),
            body,
        )
        kept = self._take_idle()
        if kept is not None:
            try:
                return await self._exchange(kept, request, on_body)
            except ServerUnreachable:
                if kept.has_answered:
                    raise
                # The server closed it, as it may between requests, before this one came.
        return await self._exchange(await self._connect(), request, on_body)

    async def _exchange(self, connection: "_Connection", request: bytes, on_body: OnBody) -> int:
        try:
            return await connection.exchange(request, on_body)
        except OSError as error:
            raise unreachable(self._url, error) from error
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()

    def _take_idle(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except OSError as error:
            raise unreachable(self._url, error) from error
        return connection


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[int] | None = None
        self._on_body: OnBody | None = None
        self._now = 0.0
        self._open = False
        self._complete = True
        self._sized = True
        self._in_body = False
        self.has_answered = False
        """Whether anything of the running answer has come."""

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self._open and self._complete

    async def exchange(self, request: bytes, on_body: OnBody) -> int:
        """Send a request, and wait for the end of its answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._on_body = on_body
        self._complete = self._sized = self._in_body = self.has_answered = False
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Break off what is running."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open = True

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        self.has_answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            # What the body's reader raised is the answer's outcome.
            self._end(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._end(ServerError(f"the answer is not valid HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._open = False
        if self._in_body and not self._sized:
            # Without a length, the end of the connection is the end of the body.
            self._end(exc)
        else:
            self._end(exc or ConnectionResetError("the connection was closed"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._sized = True

    def on_headers_complete(self) -> None:
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None:
            self._on_body(body, self._now)

    def on_message_complete(self) -> None:
        self._complete = True
        self._open = self._open and self._parser.should_keep_alive()
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        answer, self._answer, self._on_body = self._answer, None, None
        if error is not None:
            self._open = False
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(self._parser.get_status_code())
        else:
            answer.set_exception(error)
