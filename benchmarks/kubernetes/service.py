"""Claim: installed in seconds, no request lost in its life, and Services and CURVE cost milliseconds.

Installs the chart on the cluster of the current kubeconfig (see `make e2e`) and prints

- how long `helm install --wait` takes with the image present, and where a worker's start goes,
- what P/D through Services, CURVE and pods adds to the time to first token, against `disagg serve` on
  loopback without keys, on the same machine right afterwards,
- with `--losses`: the requests lost of at least so many under steady load, in each of `--events`.

    python benchmarks/kubernetes/service.py [--requests 40] [--prompt-tokens 256] [--losses 500]
    python benchmarks/kubernetes/service.py --requests 0 --losses 500 --events drain,node-loss   # these alone
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from e2e.cluster import NAMESPACE, Pod, installed, kubectl, run

from support.system import running

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EVENTS = {
    "roll-router": "test_rolling_upgrade[router]",
    "roll-prefill": "test_rolling_upgrade[prefill]",
    "roll-decode": "test_rolling_upgrade[decode]",
    "scale-down": "test_scale_down",
    "change-key": "test_changed_key",
    "drain": "test_drained_node",
    "api-server-away": "test_api_server_away",
    "node-loss": "test_lost_node",
}
"""By name, the end-to-end test that makes it happen."""
FLAGS = ["--num-threads=1", "--dtype=float32", "--kv-cache-memory-bytes=134217728"]


def installing() -> tuple[float, dict[str, Any], list[str]]:
    """Seconds of the install, a worker's pod, and the lines in which workers say where their start went."""
    began = time.monotonic()
    with installed("figures") as release:
        took_s = time.monotonic() - began
        pod = release.pods("decode")[0]
        lines = [
            line.partition("worker ready")[2]
            for component in ("prefill", "decode")
            for line in kubectl("logs", f"deploy/figures-{component}").splitlines()
            if "worker ready" in line
        ]
        return took_s, pod, lines


def in_cluster(requests: int, prompt_tokens: int) -> dict[str, Any]:
    """Times to first token through the router's Service."""
    with installed("figures") as release:
        pod = Pod("ttft", str(HERE / "ttft.py"), release.url, str(requests), str(prompt_tokens))
        try:
            return pod.wait(600)[-1]
        finally:
            pod.remove()


def on_loopback(requests: int, prompt_tokens: int) -> dict[str, Any]:
    """The same of the same processes on one machine, in the clear."""
    with running("--prefill", "1", "--decode", "1", *FLAGS) as system:
        command = [sys.executable, str(HERE / "ttft.py"), system.base, str(requests), str(prompt_tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def losses(requests: int, events: list[str]) -> int:
    """Run the end-to-end tests of these events with so many requests each; print what they counted."""
    tests = [f"{ROOT / 'tests/e2e/test_no_request_lost.py'}::{EVENTS[event]}" for event in events]
    with tempfile.NamedTemporaryFile("r") as figures:
        asked = {"DISAGG_E2E_REQUESTS": str(requests), "DISAGG_E2E_FIGURES": figures.name}
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=3600", *tests]
        status = subprocess.run(command, env=os.environ | asked, stdout=sys.stderr, check=False).returncode
        for event in map(json.loads, figures):
            counts = f"{event['lost']} lost of {event['sent']}, slowest {event['slowest_s']:.1f} s"
            print(f"{event['name']}: {counts}")
    return status


def stages(pod: dict[str, Any], lines: list[str]) -> None:
    """Print where a start went: what the log says, and what Kubernetes does, in whole seconds."""
    for line in lines:
        print("  worker's log:", " ".join(re.findall(r"\w+_s=\S+", line)))
    at = {c["type"]: c["lastTransitionTime"] for c in pod["status"]["conditions"]}
    state = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    print(f"  pod: scheduled {at['PodScheduled']}, container started {state}, ready {at['Ready']}")


def latency(requests: int, prompt_tokens: int) -> None:
    """Print how long the install takes, and what the cluster adds to the time to first token."""
    run("kubectl", "create", "namespace", NAMESPACE)
    try:
        took_s, pod, lines = installing()
        print(f"helm install --wait, image present: {took_s:.1f} s")
        stages(pod, lines)
        cluster = in_cluster(requests, prompt_tokens)
        loopback = on_loopback(requests, prompt_tokens)
        for name, figures in (("Services and CURVE", cluster), ("loopback, in the clear", loopback)):
            quantiles = statistics.quantiles(figures["seconds"], n=20)
            middle, slow = 1e3 * statistics.median(figures["seconds"]), 1e3 * quantiles[-1]
            moved = f"{figures['kv_bytes'] / 1e6:.0f} MB of KV moved"
            print(f"TTFT, {prompt_tokens} tokens, {name}: median {middle:.1f} ms, p95 {slow:.1f} ms, {moved}")
    finally:
        run("kubectl", "delete", "namespace", NAMESPACE, "--timeout=300s", timeout_s=320)


def events_of(text: str) -> list[str]:
    """Read `drain,node-loss`."""
    names = text.split(",")
    for name in names:
        if name not in EVENTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(EVENTS)}")
    return names


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--losses", type=int, default=0, metavar="REQUESTS", help="requests per event")
    parser.add_argument("--events", type=events_of, default=list(EVENTS), help=f"of {','.join(EVENTS)}; all")
    a = parser.parse_args()
    version = run("kubectl", "version").splitlines()[-1]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {version}")
    if a.requests:
        latency(a.requests, a.prompt_tokens)
    if a.losses:
        sys.exit(losses(a.losses, a.events))


if __name__ == "__main__":
    main()
