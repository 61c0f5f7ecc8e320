"""Proof that the very processes of a worker are gone."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disagg.router.fences import ProcessProof

LISTENER = """
import os, socket, sys
kind, address = sys.argv[1:]
if kind == "ipc":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
else:
    listener = socket.create_server(("127.0.0.1", 0))
listener.listen()
child = os.fork() or os.read(0, 1) or os._exit(0)
print(listener.getsockname()[1] if kind == "tcp" else 0, child, flush=True)
os.read(0, 1)
os.kill(child, 9)
os.waitpid(child, 0)
"""


@contextmanager
def listener(kind: str, address: str = "") -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A process that listens, with one child: process, port, child's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, kind, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port, child = process.stdout.readline().split()
        yield process, port, int(child)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_the_end_of_every_process_is_the_proof(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "worker.sock")
    with listener(kind, path) as (process, port, child):
        address = f"ipc://{path}" if kind == "ipc" else f"tcp://127.0.0.1:{port}"
        proof = ProcessProof.take(address, [process.pid, child])
        assert proof is not None
        assert not proof.is_gone()
    assert proof.is_gone()


def test_a_process_that_does_not_listen_there_is_not_taken_for_the_worker(tmp_path: Path) -> None:
    """In another pid namespace the same number may be anybody."""
    with socket.create_server(("127.0.0.1", 0)) as ours, listener("tcp") as (process, _, _):
        port = ours.getsockname()[1]
        assert ProcessProof.take(f"tcp://127.0.0.1:{port}", [process.pid]) is None
        assert ProcessProof.take(f"ipc://{tmp_path}/none", [process.pid]) is None


def test_a_process_here_is_not_taken_for_the_worker_at_another_machines_address() -> None:
    """Both may have the same number and listen on the same port; a false proof lets two write one page."""
    with listener("tcp") as (process, port, child):
        assert ProcessProof.take(f"tcp://192.0.2.254:{port}", [process.pid, child]) is None
        assert ProcessProof.take(f"tcp://worker.example.com:{port}", [process.pid, child]) is None


def test_ranks_must_descend_from_the_one_that_listens() -> None:
    with listener("tcp") as (process, port, _), listener("tcp") as (stranger, _, _):
        assert ProcessProof.take(f"tcp://127.0.0.1:{port}", [process.pid, stranger.pid]) is None


def test_a_process_that_is_gone_already_proves_nothing_of_an_address() -> None:
    with listener("tcp") as (process, port, _):
        pass
    assert ProcessProof.take(f"tcp://127.0.0.1:{port}", [process.pid]) is None
    assert ProcessProof.take(f"tcp://127.0.0.1:{port}", []) is None
