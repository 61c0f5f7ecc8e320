"""Links that this worker opens to decode workers' control sockets, one a process (uuid), not one an address.

A process that comes back on the same address has a new uuid and gets a new link; what the old
one was told does not hold for it. Owned by the loop thread.
"""

import contextlib
import logging
from typing import Protocol

import msgspec
import zmq

from disagg.protocol import FromPeer, decoder, encode
from disagg.telemetry import fields
from disagg.worker.endpoint import PEER_PREFIX, SocketReader

log = logging.getLogger(__name__)


class LinkEvents(Protocol):
    """What links tell their owner, on the loop thread."""

    def on_link(self, uuid: str, message: FromPeer) -> None:
        """A message of the decode worker that the link to `uuid` reached."""

    def on_link_lost(self, uuid: str) -> None:
        """The connection broke; on loopback that means its process has ended or closed it."""


class PeerLinks:
    """DEALER sockets by the uuid of the process they are meant for."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", own_uuid: str, events: LinkEvents) -> None:
        self._context = context
        self._identity = PEER_PREFIX + own_uuid.encode()
        self._events = events
        self._links: dict[str, _Link] = {}

    def open(self, uuid: str, address: str, hello: FromPeer) -> None:
        """Connect and send `hello` as soon as the other side is there; nothing where a link exists."""
        if uuid in self._links:
            return
        try:
            link = _Link(self._context, self._identity, uuid, address, self._events)
        except zmq.ZMQError as error:
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
    """One DEALER socket and the monitor that tells when its connection breaks."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        identity: bytes,
        uuid: str,
        address: str,
        events: LinkEvents,
    ) -> None:
        self._uuid = uuid
        self._events = events
        self._decoder = decoder(FromPeer)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.IPV6, 1 if "[" in address else 0)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._socket.connect(address)
        except zmq.ZMQError:
            self._close_sockets()
            raise
        self._reader = SocketReader(self._socket, self._on_frames)
        self._monitor_reader = SocketReader(self._monitor, self._on_monitor)

    def send(self, message: FromPeer) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK)
        self._reader.recheck()

    def close(self) -> None:
        self._reader.close()
        self._monitor_reader.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            (payload,) = frames
            message = self._decoder.decode(payload)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("peer message dropped %s", fields(uuid=self._uuid, error=error))
            return
        self._events.on_link(self._uuid, message)

    def _on_monitor(self, frames: list[bytes]) -> None:
        del frames  # the one event that is subscribed to
        self._events.on_link_lost(self._uuid)
