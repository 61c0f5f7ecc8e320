"""Speaks ASGI to an app, message by message, without a socket."""

import asyncio
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from disagg.frontend import App

TIMEOUT_S = 10.0


class Call:
    """One request. Enter it to send it; leaving it waits for the app to be done with it."""

    def __init__(
        self,
        app: App,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._app = app
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(b"content-length", b"%d" % len(raw))]
            + [(name.lower().encode(), value.encode()) for name, value in headers],
        }
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._to_app.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        self.status: int | None = None
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._app(self._scope, self._to_app.get, self._from_app.put))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._task.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(self._task, return_exceptions=kind is not None)

    def disconnect(self) -> None:
        """Close the connection."""
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def next_body(self) -> bytes:
        """Wait for the next piece of the answer's body; empty when it has ended."""
        while True:
            async with asyncio.timeout(TIMEOUT_S):
                message = await self._from_app.get()
            if message["type"] == "http.response.body":
                return bytes(message.get("body", b""))
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}

    async def next_events(self) -> list[Any]:
        """Wait for the next piece of a stream, as its events; `[DONE]` is a string."""
        return events_of(await self.next_body())

    def nothing_sent(self) -> bool:
        """Whether nothing of the answer waits to be read."""
        return self._from_app.empty()


def events_of(body: bytes) -> list[Any]:
    """Parse server-sent events, strictly: each is one `data:` line and an empty one."""
    texts = body.decode().split("\n\n")
    assert texts.pop() == "", "the last event is not terminated"
    assert all(text.startswith("data: ") and "\n" not in text for text in texts), texts
    return [text if (text := entry[6:]) == "[DONE]" else json.loads(text) for entry in texts]
