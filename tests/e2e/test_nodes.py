"""A worker over several pods, as a LeaderWorkerSet makes them."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.cluster import NAMESPACE, Release, get, helm_test, installed, kubectl, wait_until

SIZE = 3
"""The default model has three KV heads."""
PREFIX = "leaderworkerset.sigs.k8s.io"


def _pods_of(workload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods of its first group, with the names, labels and variables that its controller gives them."""
    name = workload["metadata"]["name"]
    template = workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    for index in range(workload["spec"]["leaderWorkerTemplate"]["size"]):
        pod = copy.deepcopy(template)
        own = f"{name}-0" if index == 0 else f"{name}-0-{index}"
        labels = {f"{PREFIX}/name": name, f"{PREFIX}/group-index": "0", f"{PREFIX}/worker-index": str(index)}
        pod |= {"apiVersion": "v1", "kind": "Pod"}
        pod["metadata"] = {"name": own, "labels": {**template["metadata"]["labels"], **labels}}
        pod["spec"] |= {"hostname": own, "subdomain": name}
        variables = {
            "LWS_LEADER_ADDRESS": f"{name}-0.{name}.{NAMESPACE}",
            "LWS_GROUP_SIZE": str(SIZE),
            "LWS_WORKER_INDEX": str(index),
        }
        for container in pod["spec"]["containers"]:
            given = [{"name": key, "value": value} for key, value in variables.items()]
            container["env"] = given + container.get("env", [])
        yield pod


@pytest.fixture
def release() -> Iterator[Release]:
    """With a decode worker of three pods: made by the controller if there is one, else as it would."""
    wide = {"nodesPerWorker": SIZE, "parallelism": {"tensor": SIZE}}
    with installed("wide", wait=False, decode=wide) as release:
        (workload,) = get("leaderworkersets", "-l", "app.kubernetes.io/instance=wide")
        made = [] if workload.get("status") else list(_pods_of(workload))
        for pod in made:
            kubectl("apply", "-f", "-", stdin=json.dumps(pod))
        try:
            kubectl(
                "wait",
                "pods",
                "-l",
                "app.kubernetes.io/instance=wide",
                "--for=condition=Ready",
                "--timeout=240s",
            )
            yield release
        finally:
            for pod in made:
                kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", "--ignore-not-found")
            wait_until("its pods are gone", lambda: not made or not release.pods("decode"), 120)
    kubectl("delete", "secret", "wide-keys")


def test_pods_of_one_worker_are_one_worker(release: Release) -> None:
    """Behind the chart's network policies, and in nobody's list but as one."""
    assert "decode worker wide-decode-0," in helm_test(release.name)
    (decode,) = [worker for worker in release.call("/disagg/workers") if worker["role"] == "decode"]
    assert (decode["tensor_parallel_size"], len(decode["rank_pids"])) == (SIZE, SIZE)
    kubectl("delete", "pod", "wide-decode-0-2", "--grace-period=0", "--force")
    wait_until(
        "the worker has ended with its node",
        lambda: all(
            worker["state"] != "ready"
            for worker in release.call("/disagg/workers")
            if worker["role"] == "decode"
        ),
        60,
    )
