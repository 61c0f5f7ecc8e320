"""CURVE on ZeroMQ sockets, and the ZAP thread that decides who may connect.

A stranger sees ZeroMQ's greeting and no more: a client without CURVE is refused by the library, one that
does not know the server's key cannot say anything that the server can read, and one whose own key is not on
the ring is refused by ZAP. Without ZAP, CURVE lets any client in; so a server whose ZAP thread is missing
lets nobody in.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from disagg.errors import ConfigError
from disagg.security.addresses import host_of, is_loopback, may_be_ipv6
from disagg.security.keys import KeyChoice, KeyRing
from disagg.telemetry import fields

log = logging.getLogger(__name__)

HANDSHAKE_FAILED = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)
"""Monitor events after which a client tries its next key, on another socket: after some of them ZeroMQ
never connects this one again."""
HANDSHAKE_MS = 5_000
"""A try without an answer ends after this long, as a failure."""
HEARTBEAT_MS = 5_000
SILENT_MS = 15_000
"""A machine that vanished ends no connection: without an answer for so long, the link is broken. ZeroMQ's own
thread answers, also while a step takes long."""
LOG_REFUSALS_EVERY_S = 10.0
DOMAIN = "disagg"


def secure_server(socket: "zmq.Socket[bytes]", ring: KeyRing | None, address: str) -> None:
    """Let in only clients with a key of the ring, if `address` is tcp. Before the bind."""
    socket.setsockopt(zmq.IPV6, may_be_ipv6(address))
    if ring is None or host_of(address) is None:
        return
    _watch(socket)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, ring.own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, ring.own.secret)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def choice_for(ring: KeyRing | None, address: str) -> KeyChoice | None:
    """Make the choice of keys for a server; None where the link stays in the clear, as ipc always does.

    Raises:
        ConfigError: there are no keys, and `address` leaves this machine.
    """
    host = host_of(address)
    if host is None:
        return None
    if ring is None and not is_loopback(host):
        raise ConfigError(f"transport_keys are needed for addresses that are not loopback, got {address!r}")
    return KeyChoice(ring) if ring is not None else None


def secure_client(socket: "zmq.Socket[bytes]", keys: KeyChoice | None, address: str) -> None:
    """Give the socket the key to try next. Before the connect."""
    socket.setsockopt(zmq.IPV6, may_be_ipv6(address))
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if keys is not None:
        _watch(socket)
        pair = keys.take()
        socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, pair.public)


def _watch(socket: "zmq.Socket[bytes]") -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)


@contextmanager
def admission(context: "zmq.Context[Any]", ring: KeyRing | None) -> Iterator[Callable[[], bool]]:
    """Answer for all servers of a context whether a client may connect; one thread, idle in between.

    Yields:
        What tells, from any thread, whether it still does; the first time that it does not, the log says so.
        Nobody new gets in then, and only another process would let them.
    """
    if ring is None:
        yield lambda: True
        return
    authenticator = ThreadAuthenticator(context)
    told: list[str] = []

    def is_alive() -> bool:
        if not authenticator.is_alive() and not told:
            told.append("the ZAP thread has ended: nobody can connect to this process any more, restart it")
            log.error(told[0])
        return not told

    try:
        authenticator.start()
        authenticator.configure_curve_callback(DOMAIN, _Doorkeeper(ring))
        yield is_alive
    finally:
        # Also after a start that failed: to end the context would wait for its sockets for ever.
        if authenticator.pipe is not None and not authenticator.is_alive():
            # Its own stop() would wait for ever to tell a thread that is no more.
            authenticator.pipe.close()
            authenticator.pipe = None  # type: ignore[assignment]
        authenticator.stop()


class _Doorkeeper:
    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring
        self._quiet_until = 0.0

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client that proved to have `key` is let in; on the ZAP thread."""
        del domain
        if self._ring.accepts(key):
            return True
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + LOG_REFUSALS_EVERY_S
            log.warning(
                "client refused, its transport key is none of ours %s", fields(public_key=key.decode())
            )
        return False
