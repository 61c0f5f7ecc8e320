"""Claim: the router costs half of what Dynamo's Rust frontend does, and delays no first token.

The router alone in its process, with fake workers that speak the protocol and emit tokens on a
clock, driven by the light load client of the comparison: CPU of the router's process for 1,000
streamed tokens at full speed (half of Dynamo's 17 to 23 ms) and paced, each token its own event
(60 ms), for a request with a 300-token prompt (1.8 ms) and one with 4,000 tokens (20 ms); idle
cores, memory, and how long after the worker's an ordinary client has the first token (2 ms).

    python benchmarks/router.py --load-generator load.py [--peer DIR] [--cases fast,paced,…]

With `--peer`, the folder that `measure.py setup DIR` made, Dynamo runs in the same call, by the
`measure.py` beside the load generator; it needs root for a network namespace.
"""

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from disagg.checkpoint import resolve

TESTS = Path(__file__).parent.parent / "tests"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "smol"
STREAMS = ("--concurrency", "256", "--prompt-tokens", "30", "--max-tokens", "128")
FULL_SPEED_S = 0.0
PACE_S = 0.06
"""Between two tokens of a stream when paced; Dynamo's mock engine paces about like that."""
ROUTER = """
import json, os, sys, msgspec
from disagg.config import RouterConfig
from disagg.router.app import run_router
ready = lambda event: os.write(int(sys.argv[2]), json.dumps(event).encode())
run_router(msgspec.json.decode(sys.argv[1], type=RouterConfig), ready=ready)
"""

Result = dict[str, Any]


class Setup:
    """A router process and its fake workers."""

    def __init__(self, port: int, process: psutil.Popen, first_log: Path) -> None:
        self.port = port
        self.process = process
        self.first_log = first_log

    def load(self, generator: Path, words: Path, *flags: str) -> Result:
        """Run the load client once."""
        command = [
            *(sys.executable, str(generator), "--port", str(self.port), "--model", NAME),
            *("--words", str(words), "--pids", str(self.process.pid), *flags),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout
        result: Result = json.loads(output)
        assert not result["errors"], result
        return result


@contextlib.contextmanager
def running(folder: Path, *, step_s: float, prefill_s: float = 0.0) -> Iterator[Setup]:
    """Start one prefill and two decode workers and the router over them."""
    addresses = []
    workers = []
    first_log = folder / "first"
    for role, number in (("prefill", 0), ("decode", 0), ("decode", 1)):
        address = f"ipc://{folder}/{role}{number}.sock"
        addresses.append(address)
        options = {
            "address": address,
            "role": role,
            "worker_id": f"{role}-{number}",
            "step_s": step_s,
            "max_num_batched_tokens": 1_000_000,
            "prefill_s": prefill_s,
            "first_log": str(first_log),
        }
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "support.fake_worker", json.dumps(options)],
                env={**os.environ, "PYTHONPATH": str(TESTS)},
                stdout=subprocess.DEVNULL,
            )
        )
    reading, writing = os.pipe()
    config = {"port": 0, "workers": addresses, "model": {"model": MODEL, "served_model_name": NAME}}
    with (folder / "router.log").open("wb") as log:
        router = psutil.Popen(
            [sys.executable, "-c", ROUTER, json.dumps(config), str(writing)],
            pass_fds=[writing],
            stderr=log,
        )
    os.close(writing)
    try:
        port = json.loads(os.read(reading, 4096))["port"]
        wait_for_workers(port, len(addresses))
        yield Setup(port, router, first_log)
    finally:
        os.close(reading)
        router.terminate()
        router.wait(30)
        for worker in workers:
            worker.kill()
            worker.wait()


def wait_for_workers(port: int, count: int) -> None:
    """Wait until the router can use every worker."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/disagg/workers")
        workers = json.loads(connection.getresponse().read())
        connection.close()
        if sum(worker["state"] == "ready" for worker in workers) == count:
            return
        time.sleep(0.05)
    raise SystemExit("the workers did not become ready")


def make_words(folder: Path) -> Path:
    """Write the vocabulary's plain words, one token each."""
    vocabulary = json.loads((resolve(MODEL).path / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(
        word[1:]
        for word in vocabulary
        if word[0] == "\u0120" and len(word) > 3 and word[1:].isascii() and word[1:].isalpha()
    )
    path = folder / "words"
    path.write_text("\n".join(word for word in words if word.islower()))
    return path


def median(run: Callable[[], Result], repeat: int) -> Result:
    """Return the run of median CPU."""
    return sorted((run() for _ in range(repeat)), key=lambda result: result["server_cpu_s"])[repeat // 2]


def measure_idle(setup: Setup, seconds: float = 5.0) -> tuple[float, float]:
    """Return cores used while nothing is asked, and resident memory in MB."""
    before = sum(setup.process.cpu_times()[:2])
    time.sleep(seconds)
    used = sum(setup.process.cpu_times()[:2]) - before
    return used / seconds, setup.process.memory_info().rss / 1e6


def measure_first_token_ms(setup: Setup, requests: int = 50) -> list[float]:
    """Return delays from the worker's first token to an ordinary client's first event, sorted."""
    delays = []
    for number in range(requests):
        connection = http.client.HTTPConnection("127.0.0.1", setup.port)
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": f"question {number}"}],
            "max_tokens": 4,
            "stream": True,
        }
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        response = connection.getresponse()
        while not (line := response.readline()).startswith(b"data: {"):
            assert line, "the stream ended without an event"
        arrived = time.monotonic()
        made = float(setup.first_log.read_text().split()[-1])
        delays.append((arrived - made) * 1e3)
        response.read()
        connection.close()
    return sorted(delays)


def show(what: str, ours: str, peer: str, target: str) -> None:
    print(f"{what:<58} {ours:>12} {peer:>14} {target:>10}", flush=True)


def peer_results(load: Path, folder: str) -> dict[str, Result]:
    """Run Dynamo's cases; by their name."""
    output = subprocess.run(
        [sys.executable, str(load.with_name("measure.py")), "run", folder],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    results = {}
    for line in output.splitlines():
        name, _, result = line.partition(": {")
        results[name] = json.loads("{" + result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load-generator", type=Path, required=True)
    parser.add_argument("--peer", help="folder made by `measure.py setup`")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cases", default="fast,one,prompt300,prompt4000,idle,paced,first")
    args = parser.parse_args()
    cases = set(args.cases.split(","))
    peer = peer_results(args.load_generator, args.peer) if args.peer else {}

    def peers(name: str, key: str, otherwise: str) -> str:
        return str(peer[name][key]) if name in peer else otherwise

    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as name:
        folder = Path(name)
        words = make_words(folder)
        show("", "disagg", "dynamo", "to reach")

        def load(setup: Setup, *flags: str) -> Result:
            return median(lambda: setup.load(args.load_generator, words, *flags), args.repeat)

        with running(folder, step_s=FULL_SPEED_S) as setup:
            setup.load(args.load_generator, words, "--concurrency", "32", "--requests", "100")
            if "fast" in cases:
                result = load(setup, *STREAMS, "--requests", "1024")
                theirs = peers("fastest: 256 streams x 128 tokens", "server_cpu_ms_per_1k_tokens", "17-23")
                ours = str(result["server_cpu_ms_per_1k_tokens"])
                show("full speed, 256 streams: CPU ms per 1,000 tokens", ours, theirs, "9")
                print("   ", json.dumps(result))
            if "one" in cases:
                result = load(setup)
                key = "fastest: one stream, 300-token prompt, 16 tokens"
                ours, theirs = str(result["ttft_ms"][0]), peers(key, "ttft_ms", "48")
                show("one stream, 300-token prompt: first token, ms", ours, theirs, "")
                print("   ", json.dumps(result))
            for tokens, requests, target in ((300, 2000, "1.8"), (4000, 300, "20")):
                if f"prompt{tokens}" in cases:
                    flags = f"--concurrency 32 --max-tokens 1 --requests {requests}".split()
                    result = load(setup, "--prompt-tokens", str(tokens), *flags)
                    key = f"fastest: 32 streams, {tokens}-token prompt, 1 token"
                    theirs = peers(key, "server_cpu_ms_per_request", "1.8-2.1" if tokens == 300 else "20")
                    ours = str(result["server_cpu_ms_per_request"])
                    show(f"{tokens:,}-token prompt: CPU ms per request", ours, theirs, target)
                    print("   ", json.dumps(result))
            if "idle" in cases:
                idle, memory = measure_idle(setup)
                show("idle: cores", f"{idle:.4f}", "", "0.02")
                show("resident memory, MB", f"{memory:.0f}", "", "")
        if "paced" in cases:
            with running(folder, step_s=PACE_S) as setup:
                result = load(setup, *STREAMS, "--requests", "512")
                theirs = peers("paced: 256 streams x 128 tokens", "server_cpu_ms_per_1k_tokens", "60")
                ours = str(result["server_cpu_ms_per_1k_tokens"])
                show("paced, a token an event: CPU ms per 1,000 tokens", ours, theirs, "60")
                print("   ", json.dumps(result))
        if "first" in cases:
            with running(folder, step_s=0.02, prefill_s=0.05) as setup:
                delays = measure_first_token_ms(setup)
                ours = f"{statistics.median(delays):.2f}"
                show("first token after the worker's, ordinary client: ms, median", ours, "48", "2")
                show("  the slowest of fifty", f"{delays[-1]:.2f}", "", "")


if __name__ == "__main__":
    main()
