"""A thread that is an event loop, for links that must not wait for the process's own."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any


class LoopThread:
    """Runs callbacks one after another. The first that raises ends it, for then its state is not sound."""

    def __init__(self, name: str, on_end: Callable[[Exception | None], None]) -> None:
        """Make it; at its end, in the thread, `on_end` is told what a callback raised, None after `stop`."""
        self._on_end = on_end
        self._error: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._on_error)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin, with what has been called already."""
        self._thread.start()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run in the thread, after what was called before; not at all once it has ended. From any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        """End it after what was called before, and wait. Idempotent."""
        if self._thread.ident is None:
            self._loop.close()
        else:
            self.call(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        with closing(self._loop):
            self._loop.run_forever()
            self._on_end(self._error)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._error = self._error or context.get("exception") or RuntimeError(context["message"])
        loop.stop()
