"""The HTTP server on a real socket: what no ASGI test can see."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagg.frontend import App, TextModel, create_app, exchange, server
from disagg.security import listen
from support.checkpoints import write_tokenizer
from support.generator import FakeGenerator, FakeTicket
from support.http_server import RunningServer, serving
from support.sockets import needs_ipv6

MAX_BODY_BYTES = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def running(folder: Path) -> Iterator[RunningServer]:
    def make_app(generator: FakeGenerator) -> App:
        return create_app(
            generator, TextModel.from_folder(folder), "m", max_body_bytes=MAX_BODY_BYTES, retire_s=0.1
        )

    with serving(make_app) as running:
        yield running


@pytest.fixture
def connection(running: RunningServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        yield connection


def post(body: Any, *headers: str, path: str = "/v1/completions") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(raw)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", **fields}


def read_until(connection: socket.socket, marker: bytes) -> bytes:
    data = b""
    while marker not in data:
        piece = connection.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.lower().count(b"x-request-id: ") == 1
    error: dict[str, Any] = json.loads(body)["error"]
    return error


def is_broken(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"more\r\n")
    except OSError:
        return True
    return False


def finish(running: RunningServer, ticket: FakeTicket) -> None:
    running.call(lambda: ticket.push(5, finish="stop"))


def test_small_writes_go_out_at_once(running: RunningServer, connection: socket.socket) -> None:
    """Without TCP_NODELAY the second event of a stream waits 40 ms for the client's acknowledgement."""
    connection.sendall(post(completion(stream=True)))
    ticket = running.ticket()
    running.call(lambda: ticket.push(40))
    read_until(connection, b"data: ")
    waits = []
    for _ in range(20):
        began = time.perf_counter()
        running.call(lambda: ticket.push(40))
        read_until(connection, b"data: ")
        waits.append(time.perf_counter() - began)
    finish(running, ticket)
    read_until(connection, b"[DONE]")
    assert sorted(waits)[10] < 0.02


def test_a_connection_is_kept_for_the_next_request(running: RunningServer, connection: socket.socket) -> None:
    for path in ("/v1/nope", "/v1/completions", "/v1/completions"):
        connection.sendall(post({"model": "m"}, path=path))
        answer = read_until(connection, b'"error"')
        assert answer.startswith(b"HTTP/1.1 40")


def test_a_client_that_vanishes_aborts_its_request(running: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(post(completion(stream=True)))
        ticket = running.ticket()
        running.call(lambda: ticket.push(40))
        read_until(connection, b"data: ")
    wait_for(ticket.left.is_set)
    assert ticket.aborted


def test_a_body_that_is_too_large_is_answered_while_it_is_sent(
    running: RunningServer, connection: socket.socket
) -> None:
    """Its client is still writing: a reset would throw the answer away."""
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n" % 65536 + b"x" * 65536 + b"\r\n"
    for _ in range(40):
        connection.sendall(chunk)
    answer = read_until(connection, b"}}")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer
    assert error_of(answer)["code"] == "request_too_large"
    connection.sendall(b"0\r\n\r\n")
    assert read_all(connection) == b""
    assert running.generator.tickets == []


def test_a_body_that_says_it_is_too_large_is_not_waited_for(connection: socket.socket) -> None:
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
    assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413")


def test_100_continue_is_sent_only_where_the_body_is_wanted(
    running: RunningServer, connection: socket.socket
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    connection.sendall(head % 10_000_000)
    assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as other:
        body = json.dumps({"model": "m"}).encode()
        other.sendall(head % len(body))
        assert read_until(other, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        other.sendall(body)
        assert read_until(other, b"}}").startswith(b"HTTP/1.1 400")


def test_a_body_that_does_not_come_is_a_408(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "BODY_TIMEOUT_S", 0.2)
    connection.sendall(post(b"x" * 100)[:-50])
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer)["code"] == "request_timeout"


def test_a_header_that_does_not_end_is_a_408(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.2)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: ")
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer)["code"] == "request_timeout"


def test_the_timeouts_answer_within_ten_seconds() -> None:
    assert server.HEADER_TIMEOUT_S + exchange.BODY_TIMEOUT_S < 10


def test_a_header_without_end_is_a_431(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client may go on writing: closing on bytes that were not read would lose the answer."""
    monkeypatch.setattr(server, "LINGER_S", 30.0)
    connection.sendall(b"GET /health HTTP/1.1\r\n")
    for index in range(2000):
        connection.sendall(b"x-%d: " % index + b"y" * 1000 + b"\r\n")
    answer = read_until(connection, b"}}")
    assert answer.startswith(b"HTTP/1.1 431")
    assert error_of(answer)["code"] == "header_too_large"


def test_what_comes_after_a_refusal_is_read_for_a_moment_only(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LINGER_S", 0.1)
    connection.sendall(b"garbage\r\n\r\n")
    wait_for(lambda: is_broken(connection))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"garbage\r\n\r\n",
        b"GET /v1/\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a client that speaks TLS
    ],
)
def test_what_is_not_http_is_a_400_in_shape(connection: socket.socket, request_bytes: bytes) -> None:
    connection.sendall(request_bytes)
    answer = read_until(connection, b"}}")
    assert answer.startswith(b"HTTP/1.1 400")
    assert error_of(answer)["type"] == "invalid_request_error"
    assert read_all(connection) == b""


def test_garbage_behind_a_request_takes_nothing_from_its_answer(
    running: RunningServer, connection: socket.socket
) -> None:
    """The answer comes whole and is the last; no error stands in its middle."""
    connection.sendall(post(completion(stream=True)))
    ticket = running.ticket()
    running.call(lambda: ticket.push(40))
    read_until(connection, b"data: ")
    connection.sendall(b"garbage\r\n\r\n")
    finish(running, ticket)
    answer = read_all(connection)
    assert b"HTTP/1.1" not in answer
    assert b"[DONE]" in answer


def test_a_body_of_undeclared_length_is_refused_with_an_answer(connection: socket.socket) -> None:
    """Such a request ends with its header, and its body is garbage behind it."""
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n" + json.dumps(completion()).encode()
    )
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("cut", [60, 200, 10_000])
def test_an_offered_protocol_is_declined_and_the_body_kept(
    running: RunningServer, connection: socket.socket, cut: int
) -> None:
    """Java's HTTP client offers h2c with every first request, also with a body."""
    offer = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAAAAIAAAAB")
    request = post(completion(), *offer)
    connection.sendall(request[:cut])
    connection.sendall(request[cut:])
    finish(running, running.ticket())
    assert read_until(connection, b"}").startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order(connection: socket.socket) -> None:
    connection.sendall(post({"model": "m"}) + post({"prompt": "x"}))
    data = b""
    while data.count(b'"error"') < 2:
        data += connection.recv(65536)
    assert data.index(b'"param":"prompt"') < data.index(b'"param":"model"')


def test_a_stopping_server_ends_its_streams_first(running: RunningServer, connection: socket.socket) -> None:
    connection.sendall(post(completion(stream=True)))
    ticket = running.ticket()
    running.call(lambda: ticket.push(40))
    read_until(connection, b"data: ")
    running.call(running.server.stop)
    finish(running, ticket)
    assert b"[DONE]" in read_all(connection)
    assert not ticket.aborted


def test_a_retiring_server_answers_and_then_lets_go_of_its_clients(
    running: RunningServer, connection: socket.socket
) -> None:
    """A kept connection must not lead to a pod that no Service names any more."""
    connection.sendall(post(completion(stream=True)))
    ticket = running.ticket()
    answer = httpx.post(f"{running.base}/drain")
    assert (answer.status_code, answer.json()) == (200, {"status": "retired"})
    assert httpx.get(f"{running.base}/health").status_code == 503
    finish(running, ticket)
    assert b"connection: close" not in read_until(connection, b"[DONE]")
    connection.sendall(post(completion()))
    finish(running, running.ticket())
    answer_bytes = read_all(connection)
    assert b"200 OK" in answer_bytes
    assert b"connection: close" in answer_bytes.lower()
    assert answer_bytes.endswith(b"}")


def test_dismissed_clients_lose_no_answer_and_keep_no_connection(
    running: RunningServer, connection: socket.socket
) -> None:
    """A stream that began before /drain promised to keep its connection; what comes next there is refused."""
    connection.sendall(post(completion(stream=True)))
    ticket = running.ticket()
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as idle:
        idle.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(idle, b"}")
        running.call(running.server.dismiss)
        assert read_all(idle) == b""
    finish(running, ticket)
    answer = read_all(connection)
    assert b"200 OK" in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_an_aborted_server_ends_at_once(folder: Path) -> None:
    def make_app(generator: FakeGenerator) -> App:
        return create_app(generator, TextModel.from_folder(folder), "m")

    with (
        serving(make_app) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection,
    ):
        connection.sendall(post(completion(stream=True)))
        ticket = running.ticket()
        running.call(lambda: ticket.push(40))
        read_until(connection, b"data: ")
        running.call(running.server.abort)
        assert b"[DONE]" not in read_all(connection)
        wait_for(ticket.left.is_set)
        assert ticket.aborted


def test_a_thousand_requests_leave_nothing(running: RunningServer) -> None:
    running.generator.reply = lambda request, index: [[40], [41]]
    with httpx.Client(base_url=running.base, trust_env=False) as http:
        for index in range(1000):
            kind = index % 4
            body = (
                completion(stream=kind == 1) if kind < 2 else {"model": "m"} if kind == 2 else completion(n=0)
            )
            assert http.post("/v1/completions", json=body).status_code == (200 if kind < 2 else 400)
    connections = running.server._server.server_state.connections
    wait_for(lambda: not running.call(lambda: len(connections)))
    assert running.call(lambda: len(running.server._server.server_state.tasks)) == 0
    assert all(ticket.left.is_set() and not ticket.aborted for ticket in running.generator.tickets)


@needs_ipv6
def test_every_interface_is_of_ipv4_alone_where_the_system_has_no_ipv6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes may boot with `ipv6.disable=1`, and then have no such sockets."""
    with listen("*", 0, 1) as both, listen("localhost", 0, 1) as named:
        assert (both.family, named.family) == (socket.AF_INET6, socket.AF_INET)
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listen("*", 0, 1) as only:
        assert only.getsockname()[0] == "0.0.0.0"
