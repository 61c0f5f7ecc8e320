"""Proof that the very processes of a worker are gone, or the pod they ran in."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from disagg.kubernetes import PodEnd
from disagg.router import proofs
from disagg.router.proofs import EndedPods, ProcessProof
from support.router import WELCOME


def take(address: str, pids: list[int]) -> ProcessProof | None:
    return ProcessProof.take(address, replace(WELCOME, rank_pids=pids))


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
        proof = take(address, [process.pid, child])
        assert proof is not None
        assert not proof.is_gone()
    assert proof.is_gone()


def test_a_process_that_does_not_listen_there_is_not_taken_for_the_worker(tmp_path: Path) -> None:
    """In another pid namespace the same number may be anybody."""
    with socket.create_server(("127.0.0.1", 0)) as ours, listener("tcp") as (process, _, _):
        port = ours.getsockname()[1]
        assert take(f"tcp://127.0.0.1:{port}", [process.pid]) is None
        assert take(f"ipc://{tmp_path}/none", [process.pid]) is None


def test_a_process_here_is_not_taken_for_the_worker_at_another_machines_address() -> None:
    """Both may have the same number and listen on the same port; a false proof lets two write one page."""
    with listener("tcp") as (process, port, child):
        assert take(f"tcp://192.0.2.254:{port}", [process.pid, child]) is None
        assert take(f"tcp://worker.example.com:{port}", [process.pid, child]) is None


def test_ranks_must_descend_from_the_one_that_listens() -> None:
    with listener("tcp") as (process, port, _), listener("tcp") as (stranger, _, _):
        assert take(f"tcp://127.0.0.1:{port}", [process.pid, stranger.pid]) is None


def test_a_process_that_is_gone_already_proves_nothing_of_an_address() -> None:
    with listener("tcp") as (process, port, _):
        pass
    assert take(f"tcp://127.0.0.1:{port}", [process.pid]) is None
    assert take(f"tcp://127.0.0.1:{port}", []) is None


# --- pods ----------------------------------------------------------------------------------------


def end(name: str, *ips: str) -> PodEnd:
    return PodEnd(name, frozenset(ips))


@pytest.mark.parametrize(
    ("address", "ended", "is_gone"),
    [
        ("tcp://10.0.0.7:5600", end("p", "10.0.0.7"), True),
        ("tcp://10.0.0.7:5600", end("p", "fd00::7", "10.0.0.7"), True),
        ("tcp://[fd00::7]:5600", end("p", "fd00::7", "10.0.0.7"), True),
        ("tcp://10.0.0.7:5600", end("p", "10.0.0.8"), False),  # a name that came again
        ("tcp://10.0.0.7:5600", end("q", "10.0.0.7"), False),  # an address that is used again
        ("tcp://10.0.0.77:5600", end("p", "10.0.0.7"), False),
    ],
)
def test_name_and_address_say_whose_end_it_is(address: str, ended: PodEnd, is_gone: bool) -> None:
    pods = EndedPods()
    proof = pods.take(address, replace(WELCOME, worker_id="p"))
    assert proof is not None
    assert not proof.is_gone()
    pods.add([ended])
    assert proof.is_gone() == is_gone


def test_who_speaks_after_the_end_is_another() -> None:
    """Its end cannot be told from the earlier one."""
    pods = EndedPods()
    pods.add([end("p", "10.0.0.7")])
    assert pods.take("tcp://10.0.0.7:5600", replace(WELCOME, worker_id="p")) is None
    assert pods.take("tcp://10.0.0.8:5600", replace(WELCOME, worker_id="p")) is not None


def test_a_socket_file_is_in_no_pod() -> None:
    assert EndedPods().take("ipc:///run/worker.sock", WELCOME) is None


def test_ended_pods_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten: their links were found broken long ago."""
    monkeypatch.setattr(proofs, "MAX_ENDED", 2)
    pods = EndedPods()
    for name in "abc":
        pods.add([end(name, "10.0.0.7")])
    assert [pods.has(name, "10.0.0.7") for name in "abc"] == [False, True, True]
