"""A system of separate processes with transport keys, on an address of this machine that is not loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from disagg.security import host_port
from support.keys import KeyFolder
from support.system import eventually

MODEL = "tiny"


def host_address() -> str:
    """An IPv4 address of this machine that others could reach."""
    for addresses in psutil.net_if_addrs().values():
        for own in addresses:
            if own.family == socket.AF_INET and not own.address.startswith("127."):
                return own.address
    raise AssertionError("this machine has no address but loopback")


class Process:
    """One `disagg worker` or `disagg router`, and what it said when it was ready."""

    def __init__(self, name: str, folder: Path, arguments: list[str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        reading, writing = os.pipe()
        follow = ["--ready-fd", str(writing), "--parent-pid", str(os.getpid())]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "disagg", *arguments, *follow],
                pass_fds=[writing],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        os.close(writing)
        self._events = os.fdopen(reading, "rb")
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> "Process":
        for line in self._events:
            if (event := json.loads(line))["event"] == "ready":
                self.ready = event
                return self
        raise AssertionError(f"{self.name} ended: {self.log.read_text()}")

    def terminate(self) -> None:
        """Ask it to drain, and wait for its end."""
        self.popen.send_signal(signal.SIGTERM)
        assert self.popen.wait(60) == 0

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._events.close()


class KeyedSystem:
    """Workers on fixed ports and routers over them, all with one folder of keys."""

    def __init__(self, folder: Path, checkpoint: Path, host: str, **names: str) -> None:
        self.folder = folder
        self.host = host
        self.keys = KeyFolder(folder / "keys", **names)
        self._model = ["--model", str(checkpoint), "--served-model-name", MODEL]
        self._controls: dict[str, str] = {}
        self.processes: dict[str, Process] = {}

    def start_worker(self, name: str) -> Process:
        """Start it on every interface, at the port that it had before."""
        port = self._controls.get(name, "tcp://:0").rpartition(":")[2]
        flags = ["worker", "--role", name.partition("-")[0], "--worker-id", name]
        flags += ["--control", f"tcp://*:{port}", "--advertise-host", self.host]
        flags += ["--http-host", "*", "--http-port", "0"]
        flags += ["--transport-keys", str(self.keys.path), "--dtype", "float32", "--device", "cpu"]
        flags += ["--num-threads", "1", "--kv-cache-memory-bytes", str(4 << 20), "--max-num-seqs", "8"]
        flags += ["--block-size", "4", *self._model]
        return self._start(name, flags)

    def wait_worker(self, name: str) -> None:
        port = self.processes[name].wait_ready().ready["control"].rpartition(":")[2]
        self._controls[name] = f"tcp://{host_port(self.host, port)}"

    def start_router(self, name: str, *flags: str, host: str = "127.0.0.1") -> str:
        """Start a router over every worker there has been; return its address when all are ready."""
        workers = [flag for control in self._controls.values() for flag in ("--workers", control)]
        keys = ["--transport-keys", str(self.keys.path)]
        process = self._start(
            name, ["router", "--host", host, "--port", "0", *workers, *keys, *self._model, *flags]
        )
        return f"{host}:{process.wait_ready().ready['port']}"

    def control(self, name: str) -> str:
        return self._controls[name]

    def close(self) -> None:
        for process in self.processes.values():
            process.close()
        for process in self.processes.values():
            print(process.name, process.log.read_text(), file=sys.stderr)

    def _start(self, name: str, arguments: list[str]) -> Process:
        if name in self.processes:
            self.processes[name].close()
        self.processes[name] = Process(name, self.folder, arguments)
        return self.processes[name]


def workers_of(http: httpx.Client) -> dict[str, dict[str, Any]]:
    """`/disagg/workers` by id."""
    return {worker["id"]: worker for worker in http.get("/disagg/workers").json()}


def wait_for_workers(http: httpx.Client, *names: str) -> None:
    """Wait until the router finds them ready."""
    eventually(
        lambda: all(workers_of(http).get(name, {}).get("state") == "ready" for name in names),
        f"{names} are ready",
        30,
    )


@contextmanager
def keyed_system(
    folder: Path, checkpoint: Path, *workers: str, host: str | None = None, **names: str
) -> Iterator[KeyedSystem]:
    """Start the workers; afterwards nothing of the system is left."""
    system = KeyedSystem(folder, checkpoint, host or host_address(), **names)
    try:
        for name in workers:
            system.start_worker(name)
        for name in workers:
            system.wait_worker(name)
        yield system
    finally:
        system.close()
