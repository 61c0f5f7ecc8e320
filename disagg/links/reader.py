"""Draining a ZeroMQ socket whenever something has arrived."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import zmq

MESSAGES_A_WAKE = 2_000
"""Others on the loop get a turn after this many messages of one socket."""

T = TypeVar("T")


class SocketReader(Generic[T]):
    """Hands over what a socket receives, in order. Owned by the loop that runs when it is made.

    The descriptor is edge-triggered and a send may consume its edge, so who sends calls `recheck()`
    afterwards; without it a message can lie unread until the next one arrives.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        receive: Callable[[int], T],
        on_message: Callable[[T], None],
        on_batch_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to read; what lies there already is handed over soon.

        Args:
            socket: Stays the caller's to close, after this reader.
            receive: Its `recv`, or its `recv_multipart` where a message has frames; takes ZeroMQ's flags.
            on_message: Told each message. What it raises goes to the loop's exception handler.
            on_batch_end: Told after each batch of messages, also after one of none.
        """
        self._receive = receive
        self._on_message = on_message
        self._on_batch_end = on_batch_end
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._is_scheduled = False
        self._is_closed = False
        self._loop.add_reader(self._fd, self.drain)
        self.recheck()

    def recheck(self) -> None:
        """Drain soon."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def drain(self) -> None:
        """Hand over what has arrived, up to a fair share of the loop's time."""
        for _ in range(MESSAGES_A_WAKE):
            if self._is_closed:
                break
            try:
                message = self._receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._on_message(message)
        else:
            self.recheck()
        self._on_batch_end()

    def close(self) -> None:
        """Stop reading, also from within `on_message`. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._fd)

    def _drain_scheduled(self) -> None:
        self._is_scheduled = False
        if not self._is_closed:
            self.drain()
