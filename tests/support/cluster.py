"""The router's process over real ZeroMQ and HTTP, with fake workers in processes that can be killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from support.system import eventually

TESTS = Path(__file__).parents[1]
MODEL = "tiny"
STEP_S = 0.02
ROUTER = """
import json, os, sys, msgspec
from disagg.config import RouterConfig
from disagg.router.app import run_router
ready = lambda event: os.write(int(sys.argv[2]), json.dumps(event).encode())
raise SystemExit(run_router(msgspec.json.decode(sys.argv[1], type=RouterConfig), ready=ready))
"""


class Cluster:
    """A router and its fake workers."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.router_env: dict[str, str] = {}
        self._options: dict[str, dict[str, Any]] = {}

    def start_worker(self, name: str, **options: Any) -> None:
        """Start a worker, at the address of its name, with the options it had before."""
        self._options.setdefault(name, {}).update(options)
        role = name.partition("-")[0]
        merged = {
            "address": self.address(name),
            "role": role,
            "worker_id": name,
            "step_s": STEP_S,
            "first_token_id": 33,
            "num_token_ids": 90,
            "keeps_prefixes": True,
        } | self._options[name]
        self.workers[name] = subprocess.Popen(
            [sys.executable, "-m", "support.fake_worker", json.dumps(merged)],
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            stdout=subprocess.PIPE,
        )
        stdout = self.workers[name].stdout
        assert stdout is not None
        assert stdout.readline() == b"ready\n"
        stdout.close()

    def start_router(self, **config: Any) -> None:
        """Start the router over every worker that has been started."""
        values = {
            "port": 0,
            "workers": [self.address(name) for name in self.workers],
            "model": {"model": str(self.checkpoint), "served_model_name": MODEL},
        } | config
        reading, writing = os.pipe()
        self.log = (self.folder / "router.log").open("w+")
        self.router = subprocess.Popen(
            [sys.executable, "-c", ROUTER, json.dumps(values), str(writing)],
            pass_fds=[writing],
            env=os.environ | self.router_env,
            stderr=self.log,
        )
        os.close(writing)
        ready = json.loads(os.read(reading, 4096))
        os.close(reading)
        assert ready["event"] == "ready"
        assert ready["pid"] == self.router.pid
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{ready['port']}", timeout=60, trust_env=False)
        self.wait_ready(*self.workers)

    def address(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}.sock"

    def kill(self, name: str) -> None:
        self.workers[name].kill()
        self.workers[name].wait()

    def states(self) -> dict[str, str]:
        return {w["id"]: w["state"] for w in self.http.get("/disagg/workers").json()}

    def wait_ready(self, *names: str) -> None:
        eventually(
            lambda: all(self.states().get(name) == "ready" for name in names), f"{names} are ready", 20
        )

    def complete(self, prompt: str = "the quick brown fox", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 20, "seed": 1, "ignore_eos": True} | fields
        return self.http.post("/v1/completions", json=body, headers=headers)

    def stream(self, on_event: Callable[[int], None] = lambda _: None, **fields: Any) -> tuple[str, str]:
        """Stream a completion; return its text and request id."""
        body = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 40, "seed": 1, "stream": True}
        texts = []
        with self.http.stream(
            "POST", "/v1/completions", json=body | {"ignore_eos": True} | fields
        ) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    texts.append(event["choices"][0]["text"])
                    on_event(len(texts))
        return "".join(texts), response.headers["x-request-id"]

    def record(self, request_id: str) -> dict[str, Any]:
        record: dict[str, Any] = self.http.get(f"/disagg/requests/{request_id}").json()
        return record

    def assert_nothing_held(self) -> None:
        def settled() -> bool:
            workers = self.http.get("/disagg/workers").json()
            return all(w["leases"] == 0 and w["pages"]["in_use"] == 0 for w in workers)

        eventually(settled, "every lease and page is given back")

    def stop(self) -> int:
        """SIGTERM, and the router's status."""
        self.http.close()
        self.router.send_signal(signal.SIGTERM)
        return self.router.wait(20)

    def close(self) -> None:
        self.close_router()
        self.close_workers()

    def close_router(self) -> None:
        self.http.close()
        self.router.kill()
        self.router.wait()
        self.log.close()

    def close_workers(self) -> None:
        for name in self.workers:
            self.kill(name)
