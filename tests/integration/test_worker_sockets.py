"""The control socket and the links to peers, over real ZeroMQ in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from disagg.errors import ConfigError
from disagg.protocol import (
    PROTOCOL_VERSION,
    FromWorker,
    Goodbye,
    Hello,
    Load,
    PeerBye,
    PeerFence,
    PeerFenced,
    Renew,
    decoder,
    encode,
)
from disagg.worker.endpoint import ControlEndpoint
from disagg.worker.links import PeerLinks
from support.router import WELCOME
from support.sockets import HELLO, Recorder, until

LOAD = Load("ready", 0, 0, 0, 0, 10, 10, 0, 0, 0.0, 0.0)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/d.sock"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.heard = Recorder()
        self.endpoint = self.bind()

    def bind(self) -> ControlEndpoint:
        endpoint = ControlEndpoint(self.context, self.address)
        endpoint.start(self.heard)
        return endpoint

    def dealer(self, *messages: bytes, identity: bytes | None = None) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        if identity is not None:
            socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(self.address)
        for message in messages:
            socket.send(message)
        return socket

    async def receive(self, socket: "zmq.Socket[bytes]") -> FromWorker:
        await until(lambda: socket.poll(0))
        message: FromWorker = decoder(FromWorker).decode(socket.recv())
        return message


@asynccontextmanager
async def bench_in(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.endpoint.close()
        bench.context.destroy(linger=0)


def run(folder: Path, test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with bench_in(folder) as bench:
            await test(bench)

    asyncio.run(main())


def hello(router_id: str = "r0", version: int = PROTOCOL_VERSION) -> bytes:
    return encode(Hello(version, router_id, 30.0))


def test_messages_reach_their_owner_after_hello(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with bench.dealer(hello(), encode(Renew(5.0))) as socket:
            await until(lambda: bench.heard.from_routers)
            assert bench.heard.hellos == ["r0"]
            assert bench.heard.from_routers == [("r0", Renew(5.0))]
            bench.endpoint.send("r0", LOAD)
            bench.endpoint.send("nobody", LOAD)
            assert await bench.receive(socket) == LOAD

    run(tmp_path, test)


def test_whatever_is_not_the_protocol_is_counted(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        wrong = (b"", b"\xff", encode(LOAD), encode(HELLO))
        with (
            bench.dealer(hello(), *wrong),
            bench.dealer(encode(Renew(1.0))),
            bench.dealer(hello("peer"), identity=b"peer:x"),
            bench.dealer(encode(HELLO), identity=b"peer:\xff"),
        ):
            await until(lambda: bench.endpoint.num_malformed == len(wrong) + 3)
            assert bench.heard.hellos == ["r0"]
            assert bench.heard.from_routers == bench.heard.from_peers == []

    run(tmp_path, test)


def test_another_version_is_told_why(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with bench.dealer(hello(version=99)) as socket:
            assert await bench.receive(socket) == WELCOME, "for the router's list of workers"
            answer = await bench.receive(socket)
            assert isinstance(answer, Goodbye)
            assert "99" in answer.reason
            assert bench.endpoint.router_ids == []

    run(tmp_path, test)


def test_a_router_that_has_gone_is_forgotten(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        socket = bench.dealer(hello())
        await until(lambda: bench.endpoint.router_ids == ["r0"])
        socket.close()

        def gone() -> bool:
            bench.endpoint.send_all(LOAD)
            return not bench.endpoint.router_ids

        await until(gone)

    run(tmp_path, test)


def test_a_router_that_connects_again_is_reached_on_its_new_connection(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with bench.dealer(hello()) as old:
            await until(lambda: bench.heard.hellos == ["r0"])
            with bench.dealer(hello()) as new:
                await until(lambda: bench.heard.hellos == ["r0", "r0"])
                bench.endpoint.send_all(LOAD)
                assert await bench.receive(new) == LOAD
                assert not old.poll(0)
                # What still comes over the old one is nobody's.
                old.send(encode(Renew(1.0)))
                await until(lambda: bench.endpoint.num_malformed == 1)

    run(tmp_path, test)


def test_no_message_lies_unread_while_others_are_sent(tmp_path: Path) -> None:
    """ZeroMQ's descriptor tells of an edge, and a send may consume it."""

    async def test(bench: Bench) -> None:
        with bench.dealer(hello()) as socket:
            await until(lambda: bench.heard.hellos)
            for number in range(3000):
                socket.send(encode(Renew(float(number))))
                bench.endpoint.send_all(LOAD)
                if number % 100 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(bench.heard.from_routers) == 3000)
            assert [message.ttl_s for _, message in bench.heard.from_routers] == list(range(3000))

    run(tmp_path, test)


def test_an_address_in_use_is_a_wrong_configuration(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        first = ControlEndpoint(bench.context, "tcp://127.0.0.1:0")
        with pytest.raises(ConfigError, match=r"control cannot be bound to 'tcp://127.0.0.1:\d+': Address"):
            ControlEndpoint(bench.context, first.address)
        first.close()

    run(tmp_path, test)


def test_peers_say_hello_and_talk_both_ways(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        ours = Recorder()
        links = PeerLinks(bench.context, "p-uuid", ours)
        links.open("d-uuid", bench.address, HELLO)
        links.open("d-uuid", bench.address, HELLO)
        links.send("d-uuid", PeerFenced("t", 0))
        links.send("nobody", PeerFenced("t", 0))
        await until(lambda: len(bench.heard.from_peers) == 2)
        assert bench.heard.from_peers == [("p-uuid", HELLO), ("p-uuid", PeerFenced("t", 0))]
        bench.endpoint.send_peer("p-uuid", PeerFence("t", 0))
        bench.endpoint.send_peer("nobody", PeerFence("t", 0))
        await until(lambda: ours.from_links)
        assert ours.from_links == [("d-uuid", PeerFence("t", 0))]
        links.close_all()
        links.close("d-uuid")

    run(tmp_path, test)


def test_a_broken_link_is_told_once_and_a_new_process_gets_a_new_one(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        ours = Recorder()
        links = PeerLinks(bench.context, "p-uuid", ours)
        links.open("d-uuid", bench.address, HELLO)
        await until(lambda: bench.heard.from_peers)
        bench.endpoint.close()
        await until(lambda: ours.lost == ["d-uuid"])
        links.close("d-uuid")
        bench.heard = Recorder()
        bench.endpoint = bench.bind()
        links.open("d-again", bench.address, HELLO)
        await until(lambda: bench.heard.from_peers == [("p-uuid", HELLO)])
        bench.endpoint.send_peer("p-uuid", PeerBye("x"))
        await until(lambda: ours.from_links == [("d-again", PeerBye("x"))])
        links.close_all()

    run(tmp_path, test)


def test_a_peer_that_does_not_read_is_a_lost_link(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What no longer fits in its queue must not vanish without a word: it may be that pages are fenced."""

    async def test(bench: Bench) -> None:
        address = f"ipc://{tmp_path}/wedged.sock"
        with bench.context.socket(zmq.ROUTER) as wedged:
            wedged.setsockopt(zmq.RCVHWM, 1)
            wedged.bind(address)
            ours = Recorder()
            links = PeerLinks(bench.context, "p-uuid", ours)
            links.open("d-uuid", address, HELLO)
            for _ in range(5000):
                links.send("d-uuid", PeerBye("x" * 10_000))
                await asyncio.sleep(0)
            await until(lambda: ours.lost)
            links.send("d-uuid", PeerBye("x"))
            assert ours.lost == ["d-uuid"]
            assert [message for message in caplog.messages if "reason='does not read'" in message]
            links.close_all()

    run(tmp_path, test)


def test_an_address_that_is_none_is_a_lost_link(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        ours = Recorder()
        links = PeerLinks(bench.context, "p-uuid", ours)
        links.open("d-uuid", "nonsense", HELLO)
        assert ours.lost == ["d-uuid"]
        links.close_all()

    run(tmp_path, test)
