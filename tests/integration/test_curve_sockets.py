"""Transport keys on real sockets in this process: who is let in, and how clients find the key that works."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth.thread
from zmq.utils.monitor import recv_monitor_message

from disagg.links import DealerLink
from disagg.protocol import PROTOCOL_VERSION, FromWorker, Hello, Load, PeerFence, encode
from disagg.router.links import ZmqConnector
from disagg.security import HANDSHAKE_FAILED, KeyPair, KeyRing, admission, secure_server
from disagg.worker.endpoint import ControlEndpoint
from disagg.worker.links import PeerLinks
from support.clock import FakeClock
from support.keys import KeyFolder, secret
from support.sockets import HELLO, Recorder, until

LOAD = Load("ready", 0, 0, 0, 0, 10, 10, 0, 0, 0.0, 0.0)
GREETING_BYTES = 64


class Bench:
    """One worker's endpoint with the keys `a`, and clients that may have others."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.server_keys = KeyFolder(folder / "server", current="a")
        self.ring = KeyRing(self.server_keys.path, self.clock)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(self.context.destroy, linger=0)
        self.is_alive = stack.enter_context(admission(self.context, self.ring))
        self.heard = Recorder()
        self.endpoint = self.bind("tcp://127.0.0.1:0")
        stack.callback(lambda: self.endpoint.close())
        self.address = self.endpoint.address

    def bind(self, address: str) -> ControlEndpoint:
        endpoint = ControlEndpoint(self.context, address, self.ring)
        endpoint.start(self.heard)
        return endpoint

    def keys(self, name: str, **names: str) -> KeyRing:
        """Another process's ring, read every time."""
        return KeyRing(KeyFolder(self.folder / name, **names).path, self.clock)


def test_a_zap_thread_that_is_late_to_start_leaves_no_socket_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine; to end the context would then wait for ever."""

    class NeverSeen(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            del timeout
            return False

    monkeypatch.setattr(zmq.auth.thread, "Event", NeverSeen)
    ring = KeyRing(KeyFolder(tmp_path / "keys", current="a").path)
    with zmq.Context() as context:  # noqa: SIM117 - warns of what is left open, after the rest
        with pytest.raises(RuntimeError, match="failed to start"), admission(context, ring):
            pytest.fail("nobody answers for the servers")


@asynccontextmanager
async def bench_in(folder: Path) -> AsyncIterator[Bench]:
    with ExitStack() as stack:
        yield Bench(folder, stack)


def run(folder: Path, test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with bench_in(folder) as bench:
            await test(bench)

    asyncio.run(main())


class RouterSide:
    """What a router's link tells it; answers the connection with a Hello."""

    def __init__(self) -> None:
        self.link: DealerLink[FromWorker] | None = None
        self.ups = 0
        self.downs: list[str] = []
        self.messages: list[FromWorker] = []

    def on_up(self) -> None:
        self.ups += 1

    def on_message(self, message: FromWorker) -> None:
        self.messages.append(message)

    def on_malformed(self) -> None:
        raise AssertionError

    def on_down(self, reason: str) -> None:
        self.downs.append(reason)

    def on_batch_end(self) -> None:
        pass


def open_link(stack: ExitStack, address: str, ring: KeyRing | None) -> RouterSide:
    side = RouterSide()
    connector = ZmqConnector(ring)
    stack.callback(connector.close)
    side.link = connector.open(address, side)
    stack.callback(side.link.close)
    return side


def test_a_router_and_a_peer_with_the_key_are_heard(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with ExitStack() as stack:
            router = open_link(stack, bench.address, bench.keys("router", current="a"))
            await until(lambda: router.ups)
            assert router.link is not None
            router.link.send(Hello(PROTOCOL_VERSION, "r0", 30.0))
            await until(lambda: bench.heard.hellos == ["r0"])
            bench.endpoint.send("r0", LOAD)
            await until(lambda: router.messages == [LOAD])
            ours = Recorder()
            links = PeerLinks(bench.context, "p-uuid", ours, bench.keys("peer", current="a"))
            links.open("d-uuid", bench.address, HELLO)
            await until(lambda: bench.heard.from_peers == [("p-uuid", HELLO)])
            bench.endpoint.send_peer("p-uuid", PeerFence("t", 0))
            await until(lambda: ours.from_links == [("d-uuid", PeerFence("t", 0))])
            links.close_all()

    run(tmp_path, test)


STRANGERS: dict[str, tuple[str, str] | None] = {
    "without CURVE": None,
    "with a key of its own that it believes to be ours": ("x", "x"),
    "with a key of its own that knows the server's public key": ("x", "a"),
    "with our key and another server key": ("a", "x"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_told_nothing_and_not_heard(tmp_path: Path, stranger: str) -> None:
    async def test(bench: Bench) -> None:
        with bench.context.socket(zmq.DEALER) as client:
            client.setsockopt(zmq.LINGER, 0)
            if (names := STRANGERS[stranger]) is not None:
                own, server = (KeyPair.from_secret(secret(name)) for name in names)
                client.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
                client.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
                client.setsockopt(zmq.CURVE_SERVERKEY, server.public)
            with client.get_monitor_socket(HANDSHAKE_FAILED) as monitor:
                client.connect(bench.address)
                client.send(encode(Hello(PROTOCOL_VERSION, "rogue", 30.0)))
                await until(lambda: monitor.poll(0))
                recv_monitor_message(monitor)
                client.disable_monitor()
            # Behind whatever it may have sent: one who is let in is heard, it still is not.
            with ExitStack() as stack:
                router = open_link(stack, bench.address, bench.keys("router", current="a"))
                await until(lambda: router.ups)
                assert router.link is not None
                router.link.send(Hello(PROTOCOL_VERSION, "r0", 30.0))
                await until(lambda: bench.heard.hellos)
            assert bench.heard.hellos == ["r0"]
            assert bench.endpoint.num_malformed == 0
            assert not client.poll(0)

    run(tmp_path, test)


def test_whoever_speaks_no_curve_sees_the_greeting_alone(tmp_path: Path) -> None:
    """A plain TCP client that goes on as the NULL mechanism would."""

    async def test(bench: Bench) -> None:
        def talk() -> bytes:
            host, port = bench.address.removeprefix("tcp://").split(":")
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
            heard = b""
            with (
                socket.create_connection((host, int(port)), timeout=10) as client,
                suppress(ConnectionResetError),
            ):
                client.sendall(greeting[:11])
                while len(heard) < GREETING_BYTES:
                    heard += client.recv(4096)
                client.sendall(greeting[11:] + b"\x04\x06\x05READY")
                while piece := client.recv(4096):
                    heard += piece
            return heard

        heard = await asyncio.to_thread(talk)
        assert len(heard) == GREETING_BYTES
        assert b"CURVE" in heard

    run(tmp_path, test)


def test_a_server_without_its_zap_thread_lets_nobody_in(tmp_path: Path) -> None:
    """ZeroMQ's own default is to let everybody in."""

    async def test(bench: Bench) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with ExitStack() as stack:
            stack.callback(context.destroy, linger=0)
            server = context.socket(zmq.ROUTER)
            secure_server(server, bench.ring, "tcp://127.0.0.1:0")
            server.bind("tcp://127.0.0.1:0")
            with server.get_monitor_socket(HANDSHAKE_FAILED | zmq.Event.HANDSHAKE_SUCCEEDED) as monitor:
                address = server.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
                router = open_link(stack, address, bench.keys("router", current="a"))
                await until(lambda: monitor.poll(0))
                assert recv_monitor_message(monitor)["event"] != zmq.Event.HANDSHAKE_SUCCEEDED
                server.disable_monitor()
            assert router.ups == 0

    run(tmp_path, test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_zap_thread_that_breaks_fails_liveness_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To whoever connects it looks like a wrong key; and the process must still end, this test too."""

    async def test(bench: Bench) -> None:
        assert bench.is_alive()
        monkeypatch.setattr(bench.ring, "accepts", lambda public: 1 // 0)
        with ExitStack() as stack:
            open_link(stack, bench.address, bench.keys("router", current="a"))
            await until(lambda: not bench.is_alive())
        assert not bench.is_alive()
        assert len([message for message in caplog.messages if "the ZAP thread has ended" in message]) == 1

    run(tmp_path, test)


CLIENT_FOLDERS = [
    {"current": "a"},
    {"current": "a", "next": "b"},
    {"current": "b", "previous": "a"},
]


@pytest.mark.parametrize("kind", ["router", "peer"])
def test_clients_find_the_key_that_works_at_every_step(tmp_path: Path, kind: str) -> None:
    """The server started with `a`; each side's folder may be a step ahead of the other's."""

    async def test(bench: Bench) -> None:
        for number, (theirs, ours) in enumerate(product(range(3), range(3))):
            if abs(theirs - ours) > 1:
                continue
            bench.server_keys.write(**CLIENT_FOLDERS[theirs])
            bench.clock.advance(5.0)
            ring = bench.keys(f"client-{number}", **CLIENT_FOLDERS[ours])
            bench.heard.from_peers.clear()
            with ExitStack() as stack:
                if kind == "router":
                    router = open_link(stack, bench.address, ring)
                    await until(lambda router=router: router.ups)
                    assert router.downs == []
                    continue
                recorder = Recorder()
                links = PeerLinks(bench.context, f"p-{number}", recorder, ring)
                stack.callback(links.close_all)
                links.open("d-uuid", bench.address, HELLO)
                await until(lambda: bench.heard.from_peers)
                assert recorder.lost == []

    run(tmp_path, test)


def test_a_router_reaches_the_restarted_server_with_the_new_key(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with ExitStack() as stack:
            folder = KeyFolder(bench.folder / "router", current="a")
            router = open_link(stack, bench.address, KeyRing(folder.path, bench.clock))
            await until(lambda: router.ups == 1)
            for keys in (bench.server_keys, folder):
                keys.write(current="b", previous="a")
            bench.clock.advance(5.0)
            bench.endpoint.close()
            await until(lambda: router.downs == ["disconnected"])
            bench.ring = KeyRing(bench.server_keys.path, bench.clock)
            assert bench.ring.own == KeyPair.from_secret(secret("b"))
            bench.endpoint = bench.bind(bench.address)
            await until(lambda: router.ups == 2)

    run(tmp_path, test)


def test_a_refused_router_says_so_once_and_gets_in_when_its_keys_are_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.links.dealer.REFUSED_RETRY_S", 0.01)

    async def test(bench: Bench) -> None:
        with ExitStack() as stack:
            folder = KeyFolder(bench.folder / "router", current="x", next="y")
            ring = KeyRing(folder.path, bench.clock)
            rounds = count_rounds(monkeypatch)
            router = open_link(stack, bench.address, ring)
            await until(lambda: len(rounds) >= 5)
            said = [message for message in caplog.messages if bench.address in message]
            assert len(said) == 1
            assert "no handshake with the worker" in said[0]
            folder.write(current="a")
            bench.clock.advance(5.0)
            await until(lambda: router.ups == 1)

    run(tmp_path, test)


def count_rounds(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    rounds: list[None] = []
    connect = DealerLink._connect

    def counting(link: DealerLink, after_s: float = 0.0) -> None:
        if after_s:
            rounds.append(None)
        connect(link, after_s)

    monkeypatch.setattr(DealerLink, "_connect", counting)
    return rounds


def test_a_peer_link_tries_every_key_before_it_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(bench: Bench) -> None:
        ours = Recorder()
        links = PeerLinks(bench.context, "p-uuid", ours, bench.keys("peer", current="x", next="y"))
        links.open("d-uuid", bench.address, HELLO)
        await until(lambda: ours.lost)
        assert ours.lost == ["d-uuid"]
        said = [message for message in caplog.messages if bench.address in message]
        assert len(said) == 1
        assert "every transport key" in said[0]
        links.close_all()
        assert bench.heard.from_peers == []

    run(tmp_path, test)


def test_a_client_without_keys_ends_at_a_server_with_keys(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        ours = Recorder()
        links = PeerLinks(bench.context, "p-uuid", ours)
        links.open("d-uuid", bench.address, HELLO)
        links.open("e-uuid", "tcp://10.0.0.1:1", HELLO)
        await until(lambda: len(ours.lost) == 2)
        assert ours.lost == ["e-uuid", "d-uuid"], "what leaves this machine is not even tried"
        links.close_all()

    run(tmp_path, test)


def test_what_is_sent_before_the_connection_stands_arrives_in_order(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        links = PeerLinks(bench.context, "p-uuid", Recorder(), bench.keys("peer", current="x", next="a"))
        links.open("d-uuid", bench.address, HELLO)
        fences = [PeerFence("t", number) for number in range(5)]
        for fence in fences:
            links.send("d-uuid", fence)
        await until(lambda: len(bench.heard.from_peers) == 6)
        assert [message for _, message in bench.heard.from_peers] == [HELLO, *fences]
        links.close_all()

    run(tmp_path, test)


VANISHING_SERVER = """
import sys, zmq
from pathlib import Path
from disagg.security import KeyRing, admission, secure_server
ring, context = KeyRing(Path(sys.argv[1])), zmq.Context()
with admission(context, ring):
    server = context.socket(zmq.ROUTER)
    secure_server(server, ring, "tcp://127.0.0.1:0")
    server.bind("tcp://127.0.0.1:0")
    print(server.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    while True:
        server.recv_multipart()
        print("heard", flush=True)
"""


def test_a_machine_that_vanishes_breaks_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends no FIN: a link with nothing to send would be taken for open for ever."""
    monkeypatch.setattr("disagg.security.curve.HEARTBEAT_MS", 50)
    monkeypatch.setattr("disagg.security.curve.SILENT_MS", 1000)

    async def test(bench: Bench) -> None:
        ours = Recorder()
        links = PeerLinks(bench.context, "p-uuid", ours, bench.keys("peer", current="a"))
        with vanishing_server(bench.server_keys.path) as (server, read_line):
            address = await asyncio.to_thread(read_line)
            links.open("d-uuid", address, HELLO)
            assert await asyncio.to_thread(read_line) == "heard"
            assert ours.lost == []
            server.send_signal(signal.SIGSTOP)
            await until(lambda: ours.lost == ["d-uuid"])
            links.close_all()

    run(tmp_path, test)


@contextmanager
def vanishing_server(keys: Path) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], str]]]:
    """A server in a process of its own that can be stopped, and what reads a line of what it prints."""
    server = subprocess.Popen(
        [sys.executable, "-c", VANISHING_SERVER, str(keys)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield server, lambda: server.stdout.readline().strip() if server.stdout else ""
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_ipc_stays_in_the_clear(tmp_path: Path) -> None:
    """Only this user can reach it. A client that sent CURVE there would be refused."""

    async def test(bench: Bench) -> None:
        endpoint = bench.bind(f"ipc://{tmp_path}/w.sock")
        with ExitStack() as stack:
            stack.callback(endpoint.close)
            for name, ring in (("keyed", bench.keys("router", current="x")), ("keyless", None)):
                router = open_link(stack, endpoint.address, ring)
                await until(lambda router=router: router.ups)
                assert router.link is not None
                router.link.send(Hello(PROTOCOL_VERSION, name, 30.0))
                await until(lambda name=name: name in bench.heard.hellos)

    run(tmp_path, test)
