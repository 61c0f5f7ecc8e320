"""Links that this worker opens to decode workers' control sockets, one a process (uuid), not one an address.

A process that comes back on the same address has a new uuid and gets a new link; what the old
one was told does not hold for it. A link whose handshake fails tries the other transport keys before it is
lost. Owned by the loop thread.
"""

import logging
from typing import Protocol

import zmq

from disagg.errors import ConfigError
from disagg.links import DealerLink, LinkEvents, LinkKind
from disagg.protocol import FromPeer
from disagg.security import KeyRing
from disagg.telemetry import fields
from disagg.worker.endpoint import PEER_PREFIX

log = logging.getLogger(__name__)


class PeerEvents(Protocol):
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
        events: PeerEvents,
        keys: KeyRing | None = None,
    ) -> None:
        self._context = context
        self._keys = keys
        self._events = events
        self._links: dict[str, _PeerLink] = {}
        identity = PEER_PREFIX + own_uuid.encode()
        self._kind = LinkKind(
            FromPeer,
            "peer message dropped",
            prepare=lambda socket: socket.setsockopt(zmq.IDENTITY, identity),
            is_once=True,
        )

    def open(self, uuid: str, address: str, hello: FromPeer) -> None:
        """Connect and send `hello` as soon as the other side is there; nothing where a link exists."""
        if uuid in self._links:
            return
        try:
            link = _PeerLink(self._context, self._kind, uuid, address, self._events, self._keys)
        except ConfigError as error:
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


class _PeerLink(LinkEvents[FromPeer]):
    """One process, and what it is to be told once the connection stands."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        kind: LinkKind,
        uuid: str,
        address: str,
        events: PeerEvents,
        keys: KeyRing | None,
    ) -> None:
        self._uuid = uuid
        self._address = address
        self._events = events
        self._unsent: list[FromPeer] | None = []
        self._link: DealerLink[FromPeer] = DealerLink(context, address, self, keys, kind)

    def send(self, message: FromPeer) -> None:
        if self._unsent is None:
            self._link.send(message)
        else:
            self._unsent.append(message)

    def close(self) -> None:
        self._link.close()

    def on_up(self) -> None:
        """Say what has waited."""
        unsent, self._unsent = self._unsent or (), None
        for message in unsent:
            self._link.send(message)

    def on_message(self, message: FromPeer) -> None:
        """One message."""
        self._events.on_link(self._uuid, message)

    def on_down(self, reason: str) -> None:
        """It is over."""
        log.warning("link to peer lost %s", fields(uuid=self._uuid, address=self._address, reason=reason))
        self._events.on_link_lost(self._uuid)
