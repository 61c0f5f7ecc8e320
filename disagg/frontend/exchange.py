"""One HTTP request and its answer, on ASGI's terms."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from disagg.errors import InvalidRequest
from disagg.frontend.errors import BodyTooLarge, BodyTooSlow, Headers, UnsupportedEncoding

BODY_TIMEOUT_S = 6.0
LINGER_S = 2.0
MAX_CLIENT_REQUEST_ID_CHARS = 256

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientLeft(Exception):
    """The client closed the connection; there is nobody to answer."""


class Exchange:
    """What is known of a request from its header, and the ways to answer it.

    Every answer carries `x-request-id`, which whoever makes this minted; the client's own is kept apart.
    """

    __slots__ = (
        "_receive",
        "_send",
        "authorization",
        "client_request_id",
        "content_encoding",
        "content_length",
        "decision",
        "is_last",
        "method",
        "path",
        "request_id",
        "started",
        "streaming",
        "submitted",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.request_id = request_id
        self.started = False
        """Whether the status has been sent."""
        self.streaming = False
        """Whether what has been sent is the beginning of a stream of events."""
        self.submitted = False
        """Whether the generator was given it, and so keeps its record."""
        self.is_last = False
        """Whether the connection is to close behind the answer."""
        self.authorization = b""
        self.client_request_id: str | None = None
        self.content_encoding = b"identity"
        self.content_length: bytes | None = None
        self.decision: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"content-encoding":
                self.content_encoding = value
            elif name == b"content-length":
                self.content_length = value
            elif name == b"x-request-id":
                self.client_request_id = value.decode("latin-1")[:MAX_CLIENT_REQUEST_ID_CHARS]
            elif name == b"x-disagg-decision":
                self.decision = value

    async def read_body(self, max_bytes: int) -> bytes:
        """Read the whole body, and no more than `max_bytes` of it.

        Raises:
            BodyTooLarge, BodyTooSlow, UnsupportedEncoding: It is, or would be by its own account.
            ClientLeft: The connection closed before its end.
        """
        self._check_declared(max_bytes)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await self._receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    body: bytes = message.get("body", b"")
                    _check_size(len(body), max_bytes)
                    return body
                return await self._read_rest(message, max_bytes)
        except TimeoutError as error:
            raise BodyTooSlow(f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds") from error

    async def start_stream(self) -> None:
        """Begin a stream of server-sent events."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # A proxy that buffers would undo streaming; nginx and others heed this.
            (b"x-accel-buffering", b"no"),
        ]
        self.streaming = True
        await self._start(200, headers)

    async def write(self, body: bytes) -> None:
        """Send a piece of a stream; waits only for a client that reads too slowly."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes) -> None:
        """Send the last piece of a stream."""
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def answer(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Send a whole answer of JSON."""
        await self._start_whole(status, body, headers or [])
        await self.end(body)

    async def answer_and_discard(self, status: int, body: bytes, headers: Headers) -> None:
        """Answer at once, and read away what the client still sends, for a moment.

        Closing a socket that has unread bytes resets it, and the client would lose the answer.
        """
        await self._start_whole(status, body, headers)
        await self.write(body)
        try:
            async with asyncio.timeout(LINGER_S):
                while (message := await self._receive())["type"] == "http.request":
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            pass
        await self.end(b"")

    @asynccontextmanager
    async def until_client_leaves(self) -> AsyncIterator[None]:
        """Run the block, and cancel it when the client goes away.

        Raises:
            ClientLeft: It did.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                watcher = tasks.create_task(self._wait_for_disconnect(), name="client-watch")
                yield
                watcher.cancel()
        except BaseExceptionGroup as group:
            # The block's own error if it failed first, else the watcher's.
            raise group.exceptions[0] from None

    async def send_with_id(self, message: Message) -> None:
        """An ASGI `send` for an inner application: adds the request id to its answer."""
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message.get("headers", ()), *self._own_headers()]}
        await self._send(message)

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise ClientLeft

    async def _start(self, status: int, headers: Headers) -> None:
        self.started = True
        headers.extend(self._own_headers())
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _own_headers(self) -> Headers:
        own = [(b"x-request-id", self.request_id.encode())]
        return [*own, (b"connection", b"close")] if self.is_last else own

    async def _start_whole(self, status: int, body: bytes, headers: Headers) -> None:
        await self._start(
            status,
            [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        )

    def _check_declared(self, max_bytes: int) -> None:
        if self.content_encoding != b"identity":
            raise UnsupportedEncoding(
                "the body must not be compressed; content-encoding is not supported", param="content-encoding"
            )
        if self.content_length is None:
            return
        if not self.content_length.isdigit():
            raise InvalidRequest("content-length must be a number")
        # Its length first: converting a number of a million digits takes long.
        _check_size(int(self.content_length) if len(self.content_length) <= 18 else 10**18, max_bytes)

    async def _read_rest(self, message: Message, max_bytes: int) -> bytes:
        body = bytearray()
        while True:
            if message["type"] == "http.disconnect":
                raise ClientLeft
            body += message.get("body", b"")
            _check_size(len(body), max_bytes)
            if not message.get("more_body"):
                return bytes(body)
            message = await self._receive()


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise BodyTooLarge(f"the body must be at most {max_bytes} bytes")
