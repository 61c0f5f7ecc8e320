"""Rolled, scaled, drained and lost under steady streaming load, and no request is lost."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from e2e.cluster import CommandFailed, Pod, Release, get, installed, kubectl, run, wait_until

REQUESTS = int(os.environ.get("DISAGG_E2E_REQUESTS", "90"))
"""At least so many in each test: six tests make more than 500."""
CLIENTS = 4
COMPONENTS = ("router", "prefill", "decode")
API_AWAY_S = float(os.environ.get("DISAGG_E2E_API_AWAY_S", "30"))
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


@pytest.fixture(scope="module")
def release() -> Iterator[Release]:
    replicas = {"replicas": 2}
    with installed("busy", router=replicas, prefill=replicas, decode=replicas) as release:
        yield release
    kubectl("delete", "secret", "busy-keys")


@contextmanager
def load(release: Release) -> Iterator[None]:
    """Steady load around a block; afterwards nothing is lost, and nothing is held any more."""
    pod = Pod("load", "load_client.py", release.url, str(CLIENTS), str(REQUESTS))
    try:
        wait_until("load has started", lambda: any(e["event"] == "started" for e in pod.events()), 180)
        yield
        kubectl("exec", "load", "--", "touch", "/tmp/stop")
        events = pod.wait(400 + 2 * REQUESTS)
        _note(events[-1])
        assert events[-1]["lost"] == 0, events
        assert events[-1]["sent"] >= REQUESTS
    finally:
        pod.remove()
    wait_until("no lease and no page in use", lambda: _is_idle(release), 60)


def _note(counts: dict[str, Any]) -> None:
    """Print what was counted, and add it to a file of figures where one is asked for."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    line = json.dumps({"name": test.removeprefix("test_"), **counts})
    print(line)
    if path := os.environ.get("DISAGG_E2E_FIGURES"):
        with open(path, "a") as figures:
            figures.write(f"{line}\n")


def _is_idle(release: Release) -> bool:
    workers = [w for w in release.call("/disagg/workers") if w["state"] == "ready"]
    return bool(workers) and all(w["leases"] == 0 and w["pages"]["in_use"] == 0 for w in workers)


@pytest.mark.parametrize("component", COMPONENTS)
def test_rolling_upgrade(release: Release, component: str) -> None:
    with load(release):
        release.roll(component)


def test_scale_down(release: Release) -> None:
    """The pod that goes moves or finishes what it has."""
    for component in ("prefill", "decode"):
        kubectl("scale", f"deploy/busy-{component}", "--replicas=3")
        kubectl("rollout", "status", f"deploy/busy-{component}", "--timeout=180s")
    with load(release):
        for component in ("prefill", "decode"):
            kubectl("scale", f"deploy/busy-{component}", "--replicas=2")
        for component in ("prefill", "decode"):
            release.wait_rolled(component)


def test_changed_key(release: Release) -> None:
    """By the documented steps, where the roll is an upgrade: Helm keeps what the Secret holds by then."""
    old, new = _keys()["current"], base64.b64encode(os.urandom(32)).decode()
    with load(release):
        _set_keys(release, current=old, next=new)
        _set_keys(release, current=new, previous=old)
        release.apply(**{component: {"env": [{"name": "KEY", "value": "new"}]} for component in COMPONENTS})
        for component in COMPONENTS:
            release.wait_rolled(component)
        assert _keys() == {"current": new, "previous": old}
        _set_keys(release, current=new)


def _keys() -> dict[str, str]:
    keys: dict[str, str] = json.loads(kubectl("get", "secret", "busy-keys", "-o", "json"))["data"]
    return keys


def _set_keys(release: Release, **keys: str) -> None:
    """Have the Secret hold these, and wait until every pod's folder does."""
    data = dict.fromkeys(_keys()) | keys
    kubectl("patch", "secret", "busy-keys", "--type=merge", "--patch", json.dumps({"data": data}))
    # A pod that changes is looked at at once, others within a minute or two.
    kubectl("annotate", "pods", "--all", "--overwrite", f"keys={'-'.join(keys)}")
    expected = "".join(f"{name} {keys[name]}\n" for name in sorted(keys))
    shown = ("sh", "-c", "cd /etc/disagg/keys && for k in *; do echo $k $(base64 -w0 $k); done")
    for component in COMPONENTS:
        for pod in release.pods(component):
            command = ("exec", pod["metadata"]["name"], "--", *shown)
            wait_until("the kubelet has brought the keys", lambda: kubectl(*command) == expected, 180)  # noqa: B023


def _other_nodes() -> list[str]:
    nodes = [node["metadata"]["name"] for node in get("nodes")]
    return [name for name in nodes if name != os.environ.get("DISAGG_E2E_CLIENT_NODE", nodes[0])]


def test_drained_node(release: Release) -> None:
    nodes = _other_nodes()
    if not nodes:
        pytest.skip("needs two nodes")
    try:
        with load(release):
            run(
                "kubectl",
                "drain",
                nodes[0],
                "--ignore-daemonsets",
                "--delete-emptydir-data",
                "--timeout=240s",
            )
            for component in COMPONENTS:
                release.wait_rolled(component)
    finally:
        run("kubectl", "uncordon", nodes[0])


def test_api_server_away(release: Release) -> None:
    """Routers and workers go on with what they know, for as long as it takes."""
    pause, resume = os.environ.get("DISAGG_E2E_PAUSE_API"), os.environ.get("DISAGG_E2E_RESUME_API")
    if not pause or not resume:
        pytest.skip("DISAGG_E2E_PAUSE_API and DISAGG_E2E_RESUME_API name no commands")
    with load(release):
        subprocess.run(pause.split(), check=True)
        try:
            time.sleep(API_AWAY_S)
        finally:
            subprocess.run(resume.split(), check=True)
        wait_until("the API server answers", _api_answers, 60)


def _api_answers() -> bool:
    try:
        run("kubectl", "version", timeout_s=10)
    except (CommandFailed, subprocess.TimeoutExpired):
        return False
    return True


def test_lost_node(release: Release) -> None:
    """All processes of a node end at once; it holds workers of both pools, and no router."""
    lose, restore = os.environ.get("DISAGG_E2E_LOSE_NODE"), os.environ.get("DISAGG_E2E_RESTORE_NODES")
    if not lose or not restore:
        pytest.skip("DISAGG_E2E_LOSE_NODE and DISAGG_E2E_RESTORE_NODES name no commands")
    keep = os.environ["DISAGG_E2E_CLIENT_NODE"]
    release.apply(router={"nodeSelector": {"kubernetes.io/hostname": keep}})
    for component in ("prefill", "decode"):
        release.roll(component)  # spread them over the nodes again
    places = [pod["spec"]["nodeName"] for c in ("prefill", "decode") for pod in release.pods(c)]
    victim = max(_other_nodes(), key=places.count)
    assert places.count(victim) > 0, "the node that is lost must hold workers"
    try:
        with load(release):
            subprocess.run([*lose.split(), victim], check=True, capture_output=True)
            wait_until("the router has noticed", lambda: _num_ready(release) <= 4 - places.count(victim), 60)
            # Somebody's word that the machine is off: proof for pages that its prefill worker was writing.
            run("kubectl", "taint", "nodes", victim, f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute")
    finally:
        subprocess.run(restore.split(), check=True, capture_output=True, timeout=120)
        run("kubectl", "taint", "nodes", victim, f"{OUT_OF_SERVICE}-")


def _num_ready(release: Release) -> int:
    return sum(worker["state"] == "ready" for worker in release.call("/disagg/workers"))
