"""Links to workers: one ZeroMQ DEALER for each control address.

ZeroMQ shows in this file and in `security/` alone.

Raw sockets with a reader on ZeroMQ's descriptor, not `zmq.asyncio`: one wake of the loop takes
every message that has arrived, and no future is made for any. Sends never wait.

A connection is one socket. When it breaks, the socket is thrown away with whatever it still
held and a new one connects, so nothing meant for a dead process can reach the one that takes
its address. Owned by the loop thread.
"""

import asyncio
import logging
from typing import Any, Protocol, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from disagg.errors import ConfigError
from disagg.protocol import AskRecord, FromWorker, RecordAnswer, ToWorker, decoder, encode
from disagg.security import HANDSHAKE_FAILED, KeyRing, choice_for, is_loopback, secure_client
from disagg.telemetry import fields

log = logging.getLogger(__name__)

SEND_QUEUE_MESSAGES = 10_000
"""A worker that leaves this many messages unread is lost."""
RECEIVE_QUEUE_MESSAGES = 100_000
"""As many as a worker queues for us; past that its own sends fail and it drops this router."""
MESSAGES_A_WAKE = 2_000
"""Others on the loop get a turn after this many messages."""
RECONNECT_MIN_MS = 50
RECONNECT_MAX_MS = 500
REFUSED_RETRY_S = 0.5
"""Between two rounds of handshakes that fail with every key."""
REFUSALS_TO_TELL = 2
"""A process that is killed during one handshake looks the same once; told once a connection."""
GOODBYE_LINGER_MS = 200

_UP = zmq.Event.HANDSHAKE_SUCCEEDED
_DOWN = zmq.Event.DISCONNECTED


M_contra = TypeVar("M_contra", contravariant=True)


class LinkEvents(Protocol[M_contra]):
    """What a link tells its owner, on the loop thread."""

    def on_up(self) -> None:
        """Connected, possibly to another process than before."""

    def on_message(self, message: M_contra) -> None:
        """One message of the process that is connected now."""

    def on_malformed(self) -> None:
        """A message was dropped: it is none of the protocol."""

    def on_down(self, reason: str) -> None:
        """The connection is gone, and with it all that was sent and not answered."""

    def on_batch_end(self) -> None:
        """Everything that had arrived has been told."""


class Link(Protocol):
    """Where messages to one worker go."""

    def send(self, message: ToWorker | AskRecord) -> bool:
        """Queue one message and return at once; False where nobody is connected."""

    def reset(self, reason: str) -> None:
        """Give up this connection, tell `on_down`, and try for a new one."""

    def drain(self) -> None:
        """Handle what has arrived and the loop has not yet noticed."""

    def close(self) -> None:
        """End the link; what was sent gets a moment to leave. Idempotent."""


class Connector(Protocol):
    """Opens links; the tests have one without sockets."""

    def open(self, address: str, events: LinkEvents[FromWorker]) -> Link:
        """Begin to connect to `address`, for as long as it takes."""


def check_address(address: str, keys: KeyRing | None = None) -> str:
    """Return `address`; raises `ConfigError` where it is none, or leaves this machine without keys."""
    scheme, separator, rest = address.partition("://")
    if scheme == "ipc" and rest:
        return address
    host, colon, port = rest.rpartition(":")
    if not separator or scheme != "tcp" or not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"workers must be tcp://HOST:PORT or ipc://PATH, got {address!r}")
    if keys is None and not is_loopback(host):
        raise ConfigError(f"workers must be loopback addresses without transport_keys, got {address!r}")
    return address


class ZmqConnector:
    """Opens links on the running loop; owns the ZeroMQ context."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys = keys

    def open(self, address: str, events: LinkEvents[FromWorker]) -> "ZmqLink":
        """Begin to connect; raises `ConfigError` for what `check_address` refuses."""
        return ZmqLink(self.context, check_address(address, self._keys), events, self._keys)

    def open_peer(self, address: str, events: LinkEvents[RecordAnswer]) -> "ZmqLink":
        """Begin to connect to another router; see `open`."""
        return ZmqLink(self.context, check_address(address, self._keys), events, self._keys, RecordAnswer)

    def close(self) -> None:
        """End ZeroMQ's threads. Call it after every link is closed; waits out their linger."""
        self.context.term()


class ZmqLink:
    """One worker address; see `Link` for what its methods promise."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        events: LinkEvents[Any],
        keys: KeyRing | None = None,
        kind: Any = FromWorker,
    ) -> None:
        self._context = context
        self._address = address
        self._keys = choice_for(keys, address)
        self._num_refusals = 0
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._decode = decoder(kind).decode
        self._drain_is_scheduled = False
        self._is_up = False
        self._is_full = False
        self._is_closed = False
        self._connect()

    def send(self, message: ToWorker | AskRecord) -> bool:
        """Queue one message; a worker whose queue is full is reset, since it does not read."""
        if not self._is_up:
            return False
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # Not from in here: the caller is in the middle of changing what on_down changes.
            self._is_up, self._is_full = False, True
            self._loop.call_soon(self._give_up, self._socket)
            return False
        # A send may consume the edge that announces what has arrived.
        self._schedule_drain()
        return True

    def reset(self, reason: str) -> None:
        """Throw the socket away and connect anew."""
        if self._is_closed:
            return
        was_up, self._is_up, self._is_full = self._is_up or self._is_full, False, False
        self._close_socket(linger_ms=0)
        self._connect()
        if was_up:
            self._events.on_down(reason)
            self._events.on_batch_end()

    def _give_up(self, socket: "zmq.Socket[bytes]") -> None:
        if socket is self._socket:
            self.reset("does not read")

    def close(self) -> None:
        """Close the socket; a Goodbye already sent gets a moment to leave."""
        if not self._is_closed:
            self._is_closed = True
            self._is_up = False
            self._close_socket(linger_ms=GOODBYE_LINGER_MS)

    def drain(self) -> None:
        """Tell all that has arrived, in order, up to a fair share of the loop's time."""
        self._drain_is_scheduled = False
        socket, events, decode = self._socket, self._events, self._decode
        for _ in range(MESSAGES_A_WAKE):
            try:
                payload = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("message of a worker dropped %s", fields(address=self._address, error=error))
                events.on_malformed()
                continue
            events.on_message(message)
            if socket is not self._socket or self._is_closed:
                break  # a handler gave this connection up
        else:
            self._schedule_drain()
        events.on_batch_end()

    def _connect(self, after_s: float = 0.0) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        # Without it messages would queue for whoever comes to the address next.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        secure_client(socket, self._keys, self._address)
        self._socket = socket
        self._monitor: zmq.Socket[bytes] = socket.get_monitor_socket(_UP | _DOWN | HANDSHAKE_FAILED)
        self._fd = int(socket.getsockopt(zmq.FD))
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.drain)
        self._loop.add_reader(self._monitor_fd, self._on_monitor)
        if after_s:
            self._loop.call_later(after_s, self._dial, socket)
        else:
            self._dial(socket)

    def _dial(self, socket: "zmq.Socket[bytes]") -> None:
        if socket is self._socket and not self._is_closed:
            socket.connect(self._address)
            # ZeroMQ announces nothing on a queue that nobody has yet found empty.
            self._loop.call_soon(self._on_monitor)

    def _close_socket(self, linger_ms: int) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)

    def _schedule_drain(self) -> None:
        if not self._drain_is_scheduled:
            self._drain_is_scheduled = True
            self._loop.call_soon(self._drain_once)

    def _drain_once(self) -> None:
        if not self._is_closed:
            self.drain()

    def _on_monitor(self) -> None:
        monitor = self._monitor
        while monitor is self._monitor and not self._is_closed:
            try:
                event = recv_monitor_message(monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            if event["event"] == _UP:
                self._is_up = True
                self._num_refusals = 0
                if self._keys is not None:
                    self._keys.on_accepted()
                self._events.on_up()
            elif event["event"] == _DOWN:
                self.drain()  # what it said before it went still counts
                self.reset("disconnected")
            else:
                self._on_refused()

    def _on_refused(self) -> None:
        """The handshake failed: try the next key, or begin again in a moment where that was the last."""
        self._close_socket(linger_ms=0)
        if self._keys is not None and not self._keys.on_refused():
            self._connect()
            return
        self._num_refusals += 1
        if self._num_refusals == REFUSALS_TO_TELL:
            reason = "with every transport key" if self._keys else "without a transport key"
            log.error("no handshake with the worker %s", fields(address=self._address, tried=reason))
        self._connect(after_s=REFUSED_RETRY_S)
