"""Routers that ask each other for ledger records, over real sockets with the release's keys."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from disagg.errors import ConfigError
from disagg.protocol import AskRecord, encode
from disagg.router import ZmqConnector
from disagg.router import peers as peers_module
from disagg.router.peers import PeerServer, RouterPeers
from disagg.security import KeyRing, admission
from support.sockets import until

RECORD = b'{"request_id":"r1"}'


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine answers late; tests of the limit set their own."""
    monkeypatch.setattr(peers_module, "ANSWER_S", 20.0)


class Bench:
    """Two routers' ends: `a` asks, `b` has the record `r1`. What it is made of ends with `stack`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "current").write_bytes(bytes(range(32)))
        self.ring = KeyRing(folder)
        self.connector = ZmqConnector(self.ring)
        stack.callback(self.connector.close)
        self.peers = RouterPeers(self.connector)
        stack.callback(self.peers.close)
        stack.enter_context(admission(self.connector.context, self.ring))
        self.asked: list[str] = []
        self.server = PeerServer(self.connector.context, "tcp://127.0.0.1:*", self.ring, self._find)
        stack.callback(self.server.close)
        self.address = self.server.address

    def _find(self, request_id: str) -> bytes | None:
        self.asked.append(request_id)
        return RECORD if request_id == "r1" else None

    async def connected(self) -> None:
        self.peers.on_members([self.address])
        await until(lambda: self.peers.num_up)


def run(folder: Path, test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        with ExitStack() as stack:
            await test(Bench(folder / "keys", stack))

    asyncio.run(main())


def test_a_record_is_found_at_another_router(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.connected()
        assert await bench.peers.ask("r1") == RECORD
        assert await bench.peers.ask("r2") is None
        assert await asyncio.gather(*[bench.peers.ask("r1") for _ in range(300)]) == [RECORD] * 300

    run(tmp_path, test)


def test_without_other_routers_there_is_no_wait(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        assert await bench.peers.ask("r1") is None
        bench.peers.on_members(["tcp://127.0.0.1:1"])
        assert await bench.peers.ask("r1") is None

    run(tmp_path, test)


def test_a_router_that_does_not_answer_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs must not hide the record that another has, nor the answer that nobody has it."""
    monkeypatch.setattr(peers_module, "ANSWER_S", 0.2)

    async def test(bench: Bench) -> None:
        await bench.connected()
        bench.server._reader.close()  # it hears nothing
        assert await bench.peers.ask("r1") is None

    run(tmp_path, test)


def test_a_router_that_goes_answers_with_no(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.connected()
        bench.server._reader.close()  # it hears nothing
        asking = asyncio.create_task(bench.peers.ask("r1"))
        await asyncio.sleep(0)
        bench.peers.on_members([])
        assert await asking is None

    run(tmp_path, test)


def test_a_stranger_is_not_answered(tmp_path: Path) -> None:
    """A ledger says who asked for how much and when."""

    async def test(bench: Bench) -> None:
        await bench.connected()
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(bench.address)
            stranger.send(encode(AskRecord("r1")))
            assert await bench.peers.ask("r1") == RECORD
            assert not stranger.poll(200)
        assert bench.asked == ["r1"]

    run(tmp_path, test)


def test_junk_is_dropped_and_the_next_ask_answered(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.connected()
        pair = bench.ring.own
        with bench.connector.context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, pair.public)
            socket.connect(bench.address)
            for frames in ([b"\xc1"], [b"a", b"b"], [encode(AskRecord("r1"))]):
                socket.send_multipart(frames)
            await until(lambda: socket.poll(0))

    run(tmp_path, test)


def test_an_address_that_leaves_the_machine_needs_keys() -> None:
    async def test() -> None:
        with zmq.Context() as context, pytest.raises(ConfigError, match="transport_keys are needed"):
            PeerServer(context, "tcp://0.0.0.0:0", None, lambda _: None)

    asyncio.run(test())
