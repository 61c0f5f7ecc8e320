"""A link that is dialled: a DEALER socket, and the monitor that tells what becomes of its connection.

A connection is one socket. When it breaks, the socket is thrown away with whatever it still held and a new
one connects, so nothing meant for a dead process can reach the one that takes its address. A handshake that
fails is tried again with the next transport key, on another socket too.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from disagg.errors import ConfigError
from disagg.links.reader import SocketReader
from disagg.protocol import decoder, encode
from disagg.security import HANDSHAKE_FAILED, KeyRing, choice_for, secure_client
from disagg.telemetry import fields

log = logging.getLogger(__name__)

RECONNECT_MIN_MS = 50
RECONNECT_MAX_MS = 500
REFUSED_RETRY_S = 0.5
"""Between two rounds of handshakes that fail with every key."""
REFUSALS_TO_TELL = 2
"""A process that is killed during one handshake looks the same once; told once a connection."""
GOODBYE_LINGER_MS = 200
DISCONNECTED = "disconnected"

_UP = zmq.Event.HANDSHAKE_SUCCEEDED
_DOWN = zmq.Event.DISCONNECTED

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)


class LinkEvents(Protocol[M_contra]):
    """What a link tells its owner, on the loop's thread. Who inherits it is deaf to what it leaves out."""

    def on_up(self) -> None:
        """Connected, possibly to another process than before."""

    def on_message(self, message: M_contra) -> None:
        """One message of the process that is connected now."""

    def on_malformed(self) -> None:
        """A message was dropped: it is none of the protocol."""
        return

    def on_down(self, reason: str) -> None:
        """The connection is gone, and with it all that was sent and not answered."""

    def on_batch_end(self) -> None:
        """Everything that had arrived has been told."""
        return


@dataclass(frozen=True, slots=True)
class LinkKind:
    """How links to one kind of process differ from others."""

    receives: Any
    """The type of the messages that come."""
    dropped: str
    """What the log says of a message that is none."""
    refused: str = ""
    """What the log says of handshakes that fail with every key."""
    prepare: Callable[["zmq.Socket[bytes]"], None] = lambda _: None
    """Sets further options of the socket, before it connects."""
    is_once: bool = False
    """Whether the link is over with its first connection, or when every key was refused: then `on_down` is
    told, also where it never was up. Else it tries again for as long as it is open."""


class DealerLink(Generic[M]):
    """One address. Owned by the loop that runs when it is made."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        events: LinkEvents[M],
        keys: KeyRing | None,
        kind: LinkKind,
    ) -> None:
        """Begin to connect. Raises `ConfigError` where the address is none, or needs keys and has none."""
        self._context = context
        self._address = address
        self._events = events
        self._keys = choice_for(keys, address)
        self._kind = kind
        self._decode = decoder(kind.receives).decode
        self._loop = asyncio.get_running_loop()
        self._num_refusals = 0
        self._is_up = False
        self._is_full = False
        self._is_closed = False
        self._connect()

    def send(self, message: msgspec.Struct) -> bool:
        """Queue one message and return at once; False where nobody is connected.

        Who leaves so many unread that no more can be queued loses the connection.
        """
        if not self._is_up:
            return False
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # Not from in here: the caller is in the middle of changing what on_down changes.
            self._is_up, self._is_full = False, True
            self._loop.call_soon(self._give_up, self._socket)
            return False
        self._reader.recheck()
        return True

    def reset(self, reason: str) -> None:
        """Give up this connection, tell `on_down`, and try for a new one."""
        if self._is_closed:
            return
        has_news = self._is_up or self._is_full or self._kind.is_once
        self._disconnect()
        if self._kind.is_once:
            self._is_closed = True
        else:
            self._connect()
        if has_news:
            self._events.on_down(reason)
            self._events.on_batch_end()

    def drain(self) -> None:
        """Tell what has arrived and the loop has not yet noticed."""
        self._reader.drain()

    def close(self) -> None:
        """End the link; what was sent gets a moment to leave. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._disconnect(GOODBYE_LINGER_MS)

    def _give_up(self, socket: "zmq.Socket[bytes]") -> None:
        if socket is self._socket:
            self.reset("does not read")

    def _connect(self, after_s: float = 0.0) -> None:
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        # Without it messages would queue for whoever comes to the address next.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        secure_client(self._socket, self._keys, self._address)
        self._kind.prepare(self._socket)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(_UP | _DOWN | HANDSHAKE_FAILED)
        self._reader = SocketReader(
            self._socket, self._socket.recv, self._on_payload, self._events.on_batch_end
        )
        self._watch = SocketReader(self._monitor, self._monitor.recv_multipart, self._on_event)
        if after_s:
            self._loop.call_later(after_s, self._dial, self._socket)
        else:
            self._dial(self._socket)

    def _dial(self, socket: "zmq.Socket[bytes]") -> None:
        if socket is not self._socket or self._is_closed:
            return
        try:
            socket.connect(self._address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"{self._address!r} is no address: {error.strerror}") from error

    def _disconnect(self, linger_ms: int = 0) -> None:
        self._is_up = self._is_full = False
        self._reader.close()
        self._watch.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)

    def _on_payload(self, payload: bytes) -> None:
        try:
            message = self._decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s %s", self._kind.dropped, fields(address=self._address, error=error))
            self._events.on_malformed()
        else:
            self._events.on_message(message)

    def _on_event(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)["event"]
        if event == _UP:
            self._is_up = True
            self._num_refusals = 0
            if self._keys is not None:
                self._keys.on_accepted()
            self._events.on_up()
        elif event == _DOWN:
            self.drain()  # what it said before it went still counts
            self.reset(DISCONNECTED)
        else:
            self._on_refused()

    def _on_refused(self) -> None:
        """The handshake failed: try the next key, or begin again in a moment where that was the last."""
        if self._keys is not None and not self._keys.on_refused():
            self._disconnect()
            self._connect()
            return
        tried = "with every transport key" if self._keys else "without a transport key"
        if self._kind.is_once:
            self.reset(f"its handshake failed, tried {tried}")
            return
        self._num_refusals += 1
        if self._num_refusals == REFUSALS_TO_TELL:
            log.error("%s %s", self._kind.refused, fields(address=self._address, tried=tried))
        self._disconnect()
        self._connect(after_s=REFUSED_RETRY_S)
