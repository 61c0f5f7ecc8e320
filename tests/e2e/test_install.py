"""What a user does first: install, test, call, upgrade, remove."""

import json
from collections.abc import Iterator

import pytest

from e2e.cluster import Release, get, helm_test, installed, kubectl, wait_until

ROLES = {"prefill": "prefill", "decode": "decode"}


@pytest.fixture(scope="module")
def release() -> Iterator[Release]:
    with installed("chat", auth={"apiKeys": ["sesame"]}) as release:
        yield release
    left = {(o["kind"], o["metadata"]["name"]) for o in _objects("chat")}
    assert left == {("Secret", "chat-keys")}, "helm uninstall leaves the key, and nothing else"
    kubectl("delete", "secret", "chat-keys")


def _objects(name: str) -> list[dict]:
    kinds = "all,secrets,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets"
    return get(f"{kinds},persistentvolumeclaims", "-l", f"app.kubernetes.io/instance={name}")


def test_helm_test_moves_kv(release: Release) -> None:
    """A chat completion forced through both pools, with the API key of the release."""
    printed = helm_test(release.name)
    pods = {role: release.pods(role)[0]["metadata"]["name"] for role in ROLES}
    assert f"prefill worker {pods['prefill']} and decode worker {pods['decode']}, which got" in printed
    assert not get(
        "pods", "-l", f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component=test"
    )


def test_every_object_has_the_labels(release: Release) -> None:
    """Dashboards and policies of others pick by them."""
    for found in _objects(release.name):
        if found["kind"] in ("ReplicaSet", "Pod") and "hook" in json.dumps(
            found["metadata"].get("annotations")
        ):
            continue
        labels = found["metadata"]["labels"]
        component = labels["app.kubernetes.io/component"]
        assert labels["app.kubernetes.io/name"] == "disagg", found["metadata"]
        if found["kind"] != "ReplicaSet" and found["kind"] != "Pod":
            assert found["metadata"]["name"] == f"{release.name}-{component}"
        assert labels["app.kubernetes.io/part-of"] == "disagg"
        assert labels["app.kubernetes.io/version"]
        assert labels.get("llm-d.ai/role") == ROLES.get(component)


def test_a_call_without_the_key_is_refused(release: Release) -> None:
    script = "import httpx; print(httpx.get('http://127.0.0.1:8000/v1/models').status_code)"
    command = ["exec", f"deploy/{release.name}-router", "--", "python", "-c", script]
    assert kubectl(*command).strip() == "401"


def test_pods_run_as_the_chart_says(release: Release) -> None:
    """Non-root on a read-only root, without a token where none is needed; nothing has restarted."""
    for component in ("router", "prefill", "decode"):
        (pod,) = release.pods(component)
        name = pod["metadata"]["name"]
        assert kubectl("exec", name, "--", "id", "-u").strip() == "65532"
        written = kubectl("exec", name, "--", "sh", "-c", "touch /x 2>&1 || true")
        assert "Read-only file system" in written
        token = kubectl(
            "exec", name, "--", "sh", "-c", "ls /var/run/secrets/kubernetes.io 2>/dev/null || true"
        )
        assert bool(token) == (component == "router")
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_an_upgrade_keeps_the_key(release: Release) -> None:
    """With another key, pods of the old and the new version could not talk."""
    before = get("secret", "--field-selector=metadata.name=chat-keys")[0]["data"]
    release.apply(router={"env": [{"name": "UPGRADED", "value": "1"}]})
    assert get("secret", "--field-selector=metadata.name=chat-keys")[0]["data"] == before
    helm_test(release.name)


def test_an_impossible_tensor_size_is_told_by_the_pod() -> None:
    """In one line that `kubectl logs`, its status and its events show: the model has 9 heads, 3 KV heads."""
    with installed("odd", wait=False, decode={"parallelism": {"tensor": 2}}) as release:

        def told() -> list[str]:
            statuses = release.pods("decode")[0]["status"].get("containerStatuses", [])
            ends = [status["lastState"].get("terminated", {}) for status in statuses]
            return [end["message"] for end in ends if end.get("exitCode") == 2]

        wait_until("the pod has ended with a message", lambda: bool(told()), 60)
        (message,) = told()
        assert message.startswith("disagg: ")
        assert "heads" in message
        assert len(message.splitlines()) == 1
        name = release.pods("decode")[0]["metadata"]["name"]
        # The kubelet removes all ended containers but the last, at any moment between two questions.
        wait_until("its log says it", lambda: message.strip() in kubectl("logs", name, "--previous"), 60)
        wait_until(
            "an event says it", lambda: message.strip() in kubectl("events", "--for", f"pod/{name}"), 60
        )
        assert message.strip() in kubectl("describe", "pod", name).partition("Events:")[2]
    kubectl("delete", "secret", "odd-keys")


def test_process_1_reaps_what_others_leave(release: Release) -> None:
    """A rank that outlives its parent must not stay as a zombie."""
    (pod,) = release.pods("decode")
    name = pod["metadata"]["name"]
    kubectl("exec", name, "--", "sh", "-c", "sleep 0.1 & exit 0")
    script = "cat /proc/[0-9]*/stat | cut -d' ' -f3 | grep -c Z || true"
    wait_until(
        "no zombie is left", lambda: kubectl("exec", name, "--", "sh", "-c", script).strip() == "0", 20
    )
    assert kubectl("exec", name, "--", "cat", "/proc/1/comm").strip() == "tini"
