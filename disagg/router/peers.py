"""Ledger records of the other routers of a release.

Each router binds a socket where the others ask, and holds a link to each of theirs: the same links as to
workers, with the same keys. A client may so ask any router for any record. Owned by the loop thread.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import zmq

from disagg.errors import ConfigError
from disagg.links import LinkEvents, SocketReader
from disagg.protocol import AskRecord, RecordAnswer, decoder, encode
from disagg.router.links import Link
from disagg.security import KeyRing, choice_for, secure_server
from disagg.telemetry import fields

log = logging.getLogger(__name__)

ANSWER_S = 1.0
"""A router that has not answered by then has not got the record, as far as the client is told."""

Find = Callable[[str], bytes | None]
"""One of our own records as JSON."""


class PeerConnector(Protocol):
    """Opens links to routers."""

    def open_peer(self, address: str, events: LinkEvents[RecordAnswer]) -> Link:
        """Begin to connect; raises `ConfigError` for an address that links do not take."""


class RouterPeers:
    """The other routers, as discovery tells of them. Itself is among them, which does no harm."""

    def __init__(self, connector: PeerConnector) -> None:
        self._connector = connector
        self._peers: dict[str, _Peer] = {}

    def on_members(self, addresses: Iterable[str]) -> None:
        """Take in who is there now; one that is ending still has its records."""
        wanted = set(addresses)
        for address in self._peers.keys() - wanted:
            self._peers.pop(address).close()
        for address in sorted(wanted - self._peers.keys()):
            try:
                self._peers[address] = _Peer(address, self._connector)
            except ConfigError as error:
                log.error("router cannot be connected %s", fields(address=address, error=error))

    async def ask(self, request_id: str) -> bytes | None:
        """Return the record of whoever has it; None where nobody says so in time."""
        asked = [answer for peer in self._peers.values() if (answer := peer.ask(request_id)) is not None]
        try:
            async with asyncio.timeout(ANSWER_S):
                for answer in asyncio.as_completed(asked):
                    if (record := await answer) is not None:
                        return record
        except TimeoutError:
            log.info("a router did not answer %s", fields(request=request_id))
        finally:
            for answer in asked:
                answer.cancel()
        return None

    @property
    def num_up(self) -> int:
        """Routers that can be asked."""
        return sum(peer.is_up for peer in self._peers.values())

    def close(self) -> None:
        """Close every link. Idempotent."""
        self.on_members(())


class _Peer(LinkEvents[RecordAnswer]):
    """One router, and who waits for its answers."""

    def __init__(self, address: str, connector: PeerConnector) -> None:
        self.is_up = False
        self._waiting: dict[str, list[asyncio.Future[bytes | None]]] = {}
        self._link = connector.open_peer(address, self)

    def ask(self, request_id: str) -> "asyncio.Future[bytes | None] | None":
        """Ask; None where it is not connected."""
        if not self._link.send(AskRecord(request_id)):
            return None
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(request_id, []).append(answer)
        answer.add_done_callback(lambda _: self._forget(request_id, answer))
        return answer

    def close(self) -> None:
        self._link.close()
        self.on_down("closed")

    def _forget(self, request_id: str, answer: "asyncio.Future[bytes | None]") -> None:
        waiting = self._waiting.get(request_id, [])
        if answer in waiting:
            waiting.remove(answer)
        if not waiting:
            self._waiting.pop(request_id, None)

    def on_up(self) -> None:
        """Nothing is to be said first."""
        self.is_up = True

    def on_message(self, message: RecordAnswer) -> None:
        """Pass an answer on to all who asked for it."""
        for answer in self._waiting.pop(message.request_id, []):
            if not answer.done():
                answer.set_result(message.record)

    def on_down(self, reason: str) -> None:
        """It will not answer what it was asked."""
        self.is_up = False
        for request_id in list(self._waiting):
            self.on_message(RecordAnswer(request_id, None))


class PeerServer:
    """The socket where other routers ask."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, keys: KeyRing | None, find: Find
    ) -> None:
        """Bind; raises `ConfigError` where the address is taken, or leaves this machine without keys."""
        choice_for(keys, address)
        self._find = find
        self._decode = decoder(AskRecord).decode
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        secure_server(self._socket, keys, address)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"peer_bind cannot be bound to {address!r}: {error.strerror}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._reader = SocketReader(self._socket, self._socket.recv_multipart, self._answer)

    def close(self) -> None:
        """Answer no more. Idempotent."""
        self._reader.close()
        self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        try:
            identity, payload = frames
            ask = self._decode(payload)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("message of a router dropped %s", fields(error=error))
            return
        answer = encode(RecordAnswer(ask.request_id, self._find(ask.request_id)))
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart((identity, answer), zmq.NOBLOCK)
