"""The HTTP server with TLS on a real socket."""

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from disagg.frontend import App, TextModel, create_app
from disagg.security import tls_context
from support.certificates import Certificate, trusted
from support.checkpoints import write_tokenizer
from support.generator import FakeGenerator
from support.http_server import RunningServer, serving


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningServer]:
    write_tokenizer(tmp_path)
    files = Certificate(tmp_path, "one")

    def make_app(generator: FakeGenerator) -> App:
        return create_app(generator, TextModel.from_folder(tmp_path), "m")

    with serving(make_app, tls_context(files.certificate, files.key)) as running:
        yield running


@pytest.fixture
def connection(running: RunningServer) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=trusted("one"))
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        yield connection


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def test_requests_are_answered(running: RunningServer) -> None:
    context = ssl.create_default_context(cafile=trusted("one"))
    with httpx.Client(base_url=f"https://127.0.0.1:{running.port}", verify=context, trust_env=False) as http:
        assert http.get("/live").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == "m"


def test_what_is_not_http_gets_its_answer_and_then_the_end(
    connection: ssl.SSLSocket, caplog: pytest.LogCaptureFixture
) -> None:
    """TLS has no half-closed connection to linger on."""
    connection.sendall(b"nonsense\r\n\r\n")
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["message"] == "the request is not valid HTTP"
    assert caplog.messages == []


def test_a_body_too_large_is_answered(connection: ssl.SSLSocket) -> None:
    size = 9 << 20
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size
    )
    connection.sendall(bytes(1 << 20))
    assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_client_that_leaves_ends_its_request(running: RunningServer, connection: ssl.SSLSocket) -> None:
    body = json.dumps({"model": "m", "prompt": "hi", "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    connection.sendall(head % len(body) + body)
    ticket = running.ticket()
    connection.close()
    running.wait_for(ticket.left)
    assert ticket.aborted


def test_who_does_not_speak_tls_gets_nothing(running: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as plain:
        plain.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP" not in read_all(plain)
