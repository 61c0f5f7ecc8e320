"""Links to workers and to other routers: one ZeroMQ DEALER for each address (`disagg.links`)."""

from typing import Protocol

import zmq

from disagg.errors import ConfigError
from disagg.links import DealerLink, LinkEvents, LinkKind
from disagg.protocol import AskRecord, FromWorker, RecordAnswer, ToWorker
from disagg.security import KeyRing, is_loopback

SEND_QUEUE_MESSAGES = 10_000
"""A worker that leaves this many messages unread is lost."""
RECEIVE_QUEUE_MESSAGES = 100_000
"""As many as a worker queues for us; past that its own sends fail and it drops this router."""


def _set_queues(socket: "zmq.Socket[bytes]") -> None:
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)


TO_WORKER = LinkKind(
    FromWorker, "message of a worker dropped", "no handshake with the worker", prepare=_set_queues
)
TO_ROUTER = LinkKind(
    RecordAnswer, "message of a router dropped", "no handshake with the router", prepare=_set_queues
)


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

    def open(self, address: str, events: LinkEvents[FromWorker]) -> DealerLink[FromWorker]:
        """Begin to connect; raises `ConfigError` for what `check_address` refuses."""
        return DealerLink(self.context, check_address(address, self._keys), events, self._keys, TO_WORKER)

    def open_peer(self, address: str, events: LinkEvents[RecordAnswer]) -> DealerLink[RecordAnswer]:
        """Begin to connect to another router; see `open`."""
        return DealerLink(self.context, check_address(address, self._keys), events, self._keys, TO_ROUTER)

    def close(self) -> None:
        """End ZeroMQ's threads. Call it after every link is closed; waits out their linger."""
        self.context.term()
