"""Starts a real `disagg serve` and looks at it from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def eventually(condition: Callable[[], Any], what: str, within_s: float = 10.0) -> Any:
    """Return the first true value of `condition`, or fail with what was awaited."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)
    return value


class System:
    """One running `disagg serve`."""

    def __init__(self, process: subprocess.Popen[str], base: str) -> None:
        self.process = process
        self.base = base
        self.http = httpx.Client(base_url=base, timeout=120, trust_env=False)

    def workers(self) -> list[dict[str, Any]]:
        """`/disagg/workers`."""
        return self.http.get("/disagg/workers").json()

    def worker(self, name: str) -> dict[str, Any]:
        """One worker by its id."""
        return next(worker for worker in self.workers() if worker["id"] == name)

    def record(self, request_id: str) -> dict[str, Any]:
        """The ledger record of one request, once it has ended."""
        return eventually(
            lambda: (r := self.http.get(f"/disagg/requests/{request_id}").json()).get("release") and r,
            f"the ledger record of {request_id} is closed",
        )

    def complete(self, prompt: str | list[int], **fields: Any) -> httpx.Response:
        """One `/v1/completions` call; greedy unless told otherwise."""
        body = {"model": DEFAULT_MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 32} | fields
        return self.http.post("/v1/completions", json=body)

    def stream(self, prompt: str, **fields: Any) -> "Stream":
        """Open a streaming completion."""
        body = {"model": DEFAULT_MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 32} | fields
        return Stream(self.http, body | {"stream": True})

    def processes(self) -> list[psutil.Process]:
        """Every process of the system, `disagg serve` first."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def assert_nothing_held(self) -> None:
        """No page is in use and no lease is open, on any worker; `free + cached = total`."""

        def settled() -> bool:
            return all(
                w["pages"]["in_use"] == 0
                and w["leases"] == 0
                and w["pages"]["free"] + w["pages"]["cached"] == w["pages"]["total"]
                for w in self.workers()
            )

        eventually(settled, f"every page and lease is given back: {self.workers()}")


class Stream:
    """An open SSE stream: iterate over its events' texts."""

    def __init__(self, http: httpx.Client, body: dict[str, Any]) -> None:
        self._request = http.stream("POST", "/v1/completions", json=body)

    def __enter__(self) -> "Stream":
        self.response = self._request.__enter__()
        assert self.response.status_code == 200, self.response.read()
        self.request_id = self.response.headers["x-request-id"]
        return self

    def __exit__(self, *exc: Any) -> None:
        self._request.__exit__(*exc)

    def __iter__(self) -> Iterator[str]:
        for line in self.response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    yield choice["text"]


@contextmanager
def running(*flags: str, env: dict[str, str] | None = None, log: Path | None = None) -> Iterator[System]:
    """Start `disagg serve`, wait for its Ready line; afterwards stop it and see that nothing is left."""
    with (log or Path(os.devnull)).open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "disagg", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **(env or {})},
        )
    started: list[psutil.Process] = []
    try:
        system = System(process, _wait_for_ready_line(process))
        started = system.processes()
        with system.http:
            yield system
        started = system.processes() if process.poll() is None else started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        assert process.stdout is not None
        process.stdout.close()
        _, alive = psutil.wait_procs(started, timeout=5)
        for left in alive:
            left.kill()
        assert not alive, f"processes outlived disagg serve: {alive}"
        if log:
            said = log.read_text()
            assert not any(word in said for word in ("Traceback", "leaked")), said


def _wait_for_ready_line(process: subprocess.Popen[str]) -> str:
    killer = threading.Timer(120, process.kill)
    killer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.match(r"Ready: (http://\S+)/v1", line):
                return found[1]
    finally:
        killer.cancel()
    raise AssertionError(f"disagg serve ended with status {process.wait()} before its Ready line")
