"""What tests of real sockets share: who takes their events, and waiting for them."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from disagg.protocol import PROTOCOL_VERSION, FromPeer, Hello, KvLayout, PeerHello, ToWorker, Welcome
from support.router import WELCOME

HELLO = PeerHello(PROTOCOL_VERSION, "p0", "p-uuid", KvLayout(16, 6, 3, 16, "float32", 1), [], "h", [])
LIMIT_S = 10.0


class Recorder:
    """Takes the events of both ends."""

    def __init__(self) -> None:
        self.hellos: list[str] = []
        self.from_routers: list[tuple[str, ToWorker]] = []
        self.from_peers: list[tuple[str, FromPeer]] = []
        self.from_links: list[tuple[str, FromPeer]] = []
        self.lost: list[str] = []

    def on_hello(self, router_id: str, hello: Hello) -> None:
        self.hellos.append(router_id)

    def welcome(self) -> Welcome:
        return WELCOME

    def on_router(self, router_id: str, message: ToWorker) -> None:
        self.from_routers.append((router_id, message))

    def on_peer(self, uuid: str, message: FromPeer) -> None:
        self.from_peers.append((uuid, message))

    def on_link(self, uuid: str, message: FromPeer) -> None:
        self.from_links.append((uuid, message))

    def on_link_lost(self, uuid: str) -> None:
        self.lost.append(uuid)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited is ZeroMQ's
            await asyncio.sleep(0.002)


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
