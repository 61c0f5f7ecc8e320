"""The control socket, to which routers and prefill workers connect.

Owned by the loop thread.
"""

import logging
from typing import Protocol

import msgspec
import zmq

from disagg.errors import ConfigError
from disagg.links import SocketReader
from disagg.protocol import (
    PROTOCOL_VERSION,
    FromPeer,
    FromWorker,
    Goodbye,
    Hello,
    ToWorker,
    Welcome,
    decoder,
    encode,
)
from disagg.security import KeyRing, secure_server
from disagg.telemetry import fields

log = logging.getLogger(__name__)

PEER_PREFIX = b"peer:"
SEND_QUEUE_MESSAGES = 100_000
"""A router this far behind is treated as gone; its leases end by expiry."""


class ControlEvents(Protocol):
    """What the endpoint tells its owner, on the loop thread."""

    def on_hello(self, router_id: str, hello: Hello) -> None:
        """A router has connected, or connected again."""

    def welcome(self) -> Welcome:
        """Say who this worker is, for a router that is refused: it shows whom it cannot use."""

    def on_router(self, router_id: str, message: ToWorker) -> None:
        """A message of a router that has said Hello."""

    def on_peer(self, uuid: str, message: FromPeer) -> None:
        """A message of a prefill worker; `uuid` is the one in its routing identity."""


class ControlEndpoint:
    """Receives, checks and routes control messages; remembers which routers are connected."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, keys: KeyRing | None = None
    ) -> None:
        """Bind; raises `ConfigError` where the address is taken."""
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        # A send to a router that has gone fails instead of vanishing: that is how we learn of it.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        secure_server(self._socket, keys, address)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise ConfigError(f"control cannot be bound to {address!r}: {error.strerror}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._identities: dict[str, bytes] = {}
        self._router_ids: dict[bytes, str] = {}
        self._from_router = decoder(ToWorker)
        self._from_peer = decoder(FromPeer)
        self._events: ControlEvents | None = None
        self._reader: SocketReader[list[bytes]] | None = None
        self.num_malformed = 0
        """Messages dropped: undecodable, of no known sender, or before Hello."""

    @property
    def router_ids(self) -> list[str]:
        """Routers that have said Hello and can still be reached."""
        return list(self._identities)

    def start(self, events: ControlEvents) -> None:
        """Begin to receive. What arrived since `__init__` comes first."""
        self._events = events
        self._reader = SocketReader(self._socket, self._socket.recv_multipart, self._on_frames)

    def send(self, router_id: str, message: FromWorker) -> None:
        """Send to one router; nothing happens where it is not connected."""
        self._send_encoded([router_id], encode(message))

    def send_all(self, message: FromWorker) -> None:
        """Send to every connected router."""
        if self._identities:
            self._send_encoded(self.router_ids, encode(message))

    def send_peer(self, uuid: str, message: FromPeer) -> None:
        """Send to a prefill worker that has connected to us."""
        self._send_frames(PEER_PREFIX + uuid.encode(), encode(message))
        self._recheck()

    def forget(self, router_id: str) -> None:
        """Send nothing more to this router unless it says Hello again."""
        identity = self._identities.pop(router_id, None)
        if identity is not None:
            self._router_ids.pop(identity, None)

    def close(self) -> None:
        """Close the socket; messages already sent get a moment to leave. Idempotent."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._socket.close()

    def _send_encoded(self, router_ids: list[str], payload: bytes) -> None:
        for router_id in router_ids:
            identity = self._identities.get(router_id)
            if identity is not None and not self._send_frames(identity, payload):
                log.info("router is gone %s", fields(router_id=router_id))
                self.forget(router_id)
        self._recheck()

    def _send_frames(self, identity: bytes, payload: bytes) -> bool:
        try:
            self._socket.send_multipart((identity, payload), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def _recheck(self) -> None:
        if self._reader is not None:
            self._reader.recheck()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            identity, payload = frames
            if identity.startswith(PEER_PREFIX):
                self._on_peer(identity.removeprefix(PEER_PREFIX).decode(), self._from_peer.decode(payload))
            else:
                self._on_router(identity, self._from_router.decode(payload))
        except (ValueError, msgspec.DecodeError) as error:
            # ValueError: not two frames, or an identity that is not UTF-8.
            self.num_malformed += 1
            log.warning("control message dropped %s", fields(error=error))

    def _on_peer(self, uuid: str, message: FromPeer) -> None:
        assert self._events is not None
        self._events.on_peer(uuid, message)

    def _on_router(self, identity: bytes, message: ToWorker) -> None:
        assert self._events is not None
        if isinstance(message, Hello):
            self._on_hello(identity, message)
            return
        router_id = self._router_ids.get(identity)
        if router_id is None:
            self.num_malformed += 1
            log.warning("control message before hello dropped %s", fields(kind=type(message).__name__))
            return
        self._events.on_router(router_id, message)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        assert self._events is not None
        if hello.protocol_version != PROTOCOL_VERSION:
            reason = f"protocol version {PROTOCOL_VERSION} here, {hello.protocol_version} there"
            log.error("router refused %s", fields(router_id=hello.router_id, reason=reason))
            self._send_frames(identity, encode(self._events.welcome()))
            self._send_frames(identity, encode(Goodbye(reason)))
            return
        self.forget(hello.router_id)
        self._identities[hello.router_id] = identity
        self._router_ids[identity] = hello.router_id
        self._events.on_hello(hello.router_id, hello)
