"""Links that this worker opens to decode workers' control sockets, one a process (uuid), not one an address.

A process that comes back on the same address has a new uuid and gets a new link; what the old
one was told does not hold for it. A link whose handshake fails tries the other transport keys before it is
lost. Owned by the loop thread.
"""

import contextlib
import logging
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from disagg.errors import ConfigError
from disagg.protocol import FromPeer, decoder, encode
from disagg.security import HANDSHAKE_FAILED, KeyChoice, KeyRing, choice_for, secure_client
from disagg.telemetry import fields
from disagg.worker.endpoint import PEER_PREFIX, SocketReader

log = logging.getLogger(__name__)


class LinkEvents(Protocol):
    """What links tell their owner, on the loop thread."""

    def on_link(self, uuid: str, message: FromPeer) -> None:
        """A message of the decode worker that the link to `uuid` reached."""

    def on_link_lost(self, uuid: str) -> None:
        """The connection broke, or the process there refuses every key; told once a link."""


class PeerLinks:
    """DEALER sockets by the uuid of the process they are meant for."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        own_uuid: str,
        events: LinkEvents,
        keys: KeyRing | None = None,
    ) -> None:
        self._context = context
        self._keys = keys
        self._identity = PEER_PREFIX + own_uuid.encode()
        self._events = events
        self._links: dict[str, _Link] = {}

    def open(self, uuid: str, address: str, hello: FromPeer) -> None:
        """Connect and send `hello` as soon as the other side is there; nothing where a link exists."""
        if uuid in self._links:
            return
        try:
            keys = choice_for(self._keys, address)
            link = _Link(self._context, self._identity, uuid, address, self._events, keys)
        except (ConfigError, zmq.ZMQError) as error:
            log.warning("peer address refused %s", fields(uuid=uuid, address=address, error=error))
            self._events.on_link_lost(uuid)
            return
        self._links[uuid] = link
        link.send(hello)

    def send(self, uuid: str, message: FromPeer) -> None:
        """Send over an open link; nothing happens where it has been closed."""
        link = self._links.get(uuid)
        if link is not None:
            link.send(message)

    def close(self, uuid: str) -> None:
        """Close one link. Idempotent."""
        link = self._links.pop(uuid, None)
        if link is not None:
            link.close()

    def close_all(self) -> None:
        """Close every link. Idempotent."""
        for uuid in list(self._links):
            self.close(uuid)


class _Link:
    """One DEALER socket a try, and the monitor that tells what becomes of its connection."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        identity: bytes,
        uuid: str,
        address: str,
        events: LinkEvents,
        keys: KeyChoice | None,
    ) -> None:
        self._context = context
        self._identity = identity
        self._uuid = uuid
        self._address = address
        self._events = events
        self._keys = keys
        self._decoder = decoder(FromPeer)
        self._unsent: list[bytes] = []
        """What was sent before the connection stood; a socket thrown away would take it along."""
        self._is_up = False
        self._is_lost = False
        self._connect()

    def send(self, message: FromPeer) -> None:
        if self._is_up:
            self._send(encode(message))
        elif not self._is_lost:
            self._unsent.append(encode(message))

    def close(self) -> None:
        self._reader.close()
        self._monitor_reader.close()
        self._close_sockets()

    def _connect(self) -> None:
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.IDENTITY, self._identity)
        secure_client(self._socket, self._keys, self._address)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | HANDSHAKE_FAILED
        )
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError:
            self._close_sockets()
            raise
        self._reader = SocketReader(self._socket, self._on_frames)
        self._monitor_reader = SocketReader(self._monitor, self._on_monitor)

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()

    def _send(self, payload: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send(payload, zmq.NOBLOCK)
        self._reader.recheck()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            (payload,) = frames
            message = self._decoder.decode(payload)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("peer message dropped %s", fields(uuid=self._uuid, error=error))
            return
        self._events.on_link(self._uuid, message)

    def _on_monitor(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)["event"]
        if self._is_lost:
            return
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._on_up()
        elif event == zmq.Event.DISCONNECTED:
            self._lose("its connection broke")
        elif self._keys is None:
            self._lose("its handshake failed, tried without a transport key")
        elif self._keys.on_refused():
            self._lose("its handshake failed, tried with every transport key")
        else:
            self.close()
            self._connect()

    def _on_up(self) -> None:
        self._is_up = True
        if self._keys is not None:
            self._keys.on_accepted()
        unsent, self._unsent = self._unsent, []
        for payload in unsent:
            self._send(payload)

    def _lose(self, reason: str) -> None:
        self._is_up, self._is_lost = False, True
        log.warning("link to peer lost %s", fields(uuid=self._uuid, address=self._address, reason=reason))
        self._events.on_link_lost(self._uuid)
