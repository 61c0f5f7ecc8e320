"""The cluster of the current kubeconfig, through kubectl and helm."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "charts" / "disagg"
IMAGE = os.environ.get("DISAGG_E2E_IMAGE", "disagg:dev")
NAMESPACE = "disagg-e2e"

SMALL = {
    # What leaves room for several workers on a small machine, and promises the same text everywhere.
    "extraArgs": ["--num-threads=1", "--dtype=float32", "--kv-cache-memory-bytes=134217728"],
    "drainSeconds": 60,
}


class CommandFailed(Exception):
    """A command's status was not 0."""


def run(*command: str, stdin: str | None = None, timeout_s: float = 300) -> str:
    """Run a command; its output, or `CommandFailed` with it."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise CommandFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def kubectl(*arguments: str, stdin: str | None = None, timeout_s: float = 300) -> str:
    """`kubectl` in the tests' namespace."""
    return run("kubectl", "--namespace", NAMESPACE, *arguments, stdin=stdin, timeout_s=timeout_s)


def helm(*arguments: str, timeout_s: float = 600) -> str:
    """`helm` in the tests' namespace."""
    return run("helm", "--namespace", NAMESPACE, *arguments, timeout_s=timeout_s)


def helm_test(release: str) -> str:
    """What `helm test` prints; its pod's log comes on stderr."""
    command = ["helm", "--namespace", NAMESPACE, "test", release]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def get(kind: str, *arguments: str) -> list[dict[str, Any]]:
    """Objects of a kind."""
    found: list[dict[str, Any]] = json.loads(kubectl("get", kind, "-o", "json", *arguments))["items"]
    return found


def wait_until(what: str, test: Callable[[], bool], timeout_s: float) -> None:
    """Ask again until it is so: a cluster has no one event for it."""
    end = time.monotonic() + timeout_s
    while not test():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {timeout_s:.0f} s: {what}")
        time.sleep(0.5)


def everything() -> str:
    """Logs, events and objects of all pods, for people."""
    parts = []
    for command in (
        ("get", "all,networkpolicies,endpointslices,persistentvolumeclaims", "-o", "wide"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("describe", "pods"),
    ):
        parts.append(_output(*command))
    for pod in (line for line in _output("get", "pods", "-o", "name").splitlines() if line[:4] == "pod/"):
        parts.append(_output("logs", pod, "--tail=200"))
        parts.append(_output("logs", pod, "--tail=200", "--previous"))
    return "\n".join(parts)


def _output(*arguments: str) -> str:
    try:
        return f"--- kubectl {' '.join(arguments)}\n{kubectl(*arguments)}"
    except (CommandFailed, subprocess.TimeoutExpired) as error:
        return f"--- {error}"


class Release:
    """An installed chart."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values
        self.headers: dict[str, str] = {}
        self.url = f"http://{name}-router.{NAMESPACE}:8000"

    def apply(self, *, wait: bool = True, **values: Any) -> None:
        """Install or upgrade, and wait until all is ready."""
        self.values = _merged(self.values, values)
        repository, _, tag = IMAGE.rpartition(":")
        whole = _merged({"image": {"repository": repository, "tag": tag}}, self.values)
        path = Path(f"/tmp/{self.name}-e2e-values.json")
        path.write_text(json.dumps(whole))
        waiting = ["--wait", "--timeout", "300s"] if wait else []
        helm("upgrade", "--install", self.name, str(CHART), "-f", str(path), *waiting)

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of one component, those that are ending too."""
        labels = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}"
        return get("pods", "-l", labels)

    def call(self, path: str) -> Any:
        """JSON of the router, asked from within one of its pods."""
        scheme = "https" if self.values.get("router", {}).get("tls") else "http"
        code = (
            "import httpx;"
            f"print(httpx.get('{scheme}://127.0.0.1:8000{path}', headers={self.headers}, verify=False).text)"
        )
        return json.loads(kubectl("exec", f"deploy/{self.name}-router", "--", "python", "-c", code))

    def roll(self, component: str) -> None:
        """Replace every pod of a component, as a new version does."""
        kubectl("rollout", "restart", f"deploy/{self.name}-{component}")
        self.wait_rolled(component)

    def wait_rolled(self, component: str) -> None:
        """Wait until no old pod is left."""
        name = f"deploy/{self.name}-{component}"
        kubectl("rollout", "status", name, "--timeout=300s", timeout_s=320)
        replicas = self.values.get(component, {}).get("replicas", 1)
        wait_until(f"old pods of {name} gone", lambda: len(self.pods(component)) == replicas, 180)


@contextmanager
def installed(name: str, *, wait: bool = True, **values: Any) -> Iterator[Release]:
    """A release that is there for a block, and leaves what the documents say."""
    release = Release(name, {"prefill": SMALL, "decode": SMALL, "unified": SMALL})
    try:
        try:
            release.apply(wait=wait, **values)
        except CommandFailed:
            print(everything())  # while it is there
            raise
        yield release
    finally:
        helm("uninstall", name, "--wait", "--ignore-not-found")
        labels = f"app.kubernetes.io/instance={name}"
        wait_until(f"pods of {name} gone", lambda: not get("pods", "-l", labels), 180)


class Pod:
    """A pod of ours beside the release, running a script from this folder."""

    def __init__(self, name: str, script: str, *arguments: str, claim: str | None = None) -> None:
        """Start it; `claim` is mounted at /claim, for root to write."""
        self.name = name
        container = {
            "name": "main",
            "image": IMAGE,
            "imagePullPolicy": "IfNotPresent",
            "command": ["python", "-u", "-c", (HERE / script).read_text(), *arguments],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        spec: dict[str, Any] = {
            "restartPolicy": "Never",
            "containers": [container],
            "enableServiceLinks": False,
        }
        spec |= {"volumes": [{"name": "tmp", "emptyDir": {}}], "terminationGracePeriodSeconds": 1}
        if claim is not None:
            container["securityContext"] = {"runAsUser": 0}
            container["volumeMounts"].append({"name": "claim", "mountPath": "/claim"})
            spec["volumes"].append({"name": "claim", "persistentVolumeClaim": {"claimName": claim}})
        spec["automountServiceAccountToken"] = False
        if node := os.environ.get("DISAGG_E2E_CLIENT_NODE"):
            spec["nodeSelector"] = {"kubernetes.io/hostname": node}  # one that no test drains or loses
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubectl("apply", "-f", "-", stdin=json.dumps(pod))

    def events(self) -> list[dict[str, Any]]:
        """What it has printed."""
        lines = kubectl("logs", self.name, "--tail=-1").splitlines() if self.has_begun() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def phase(self) -> str:
        """As Kubernetes calls it."""
        return kubectl("get", "pod", self.name, "-o", "jsonpath={.status.phase}")

    def has_begun(self) -> bool:
        """Whether there can be a log."""
        return self.phase() in ("Running", "Succeeded", "Failed")

    def wait(self, timeout_s: float) -> list[dict[str, Any]]:
        """What it printed until its end, which must be a success."""
        wait_until(f"{self.name} has ended", lambda: self.phase() in ("Succeeded", "Failed"), timeout_s)
        assert self.phase() == "Succeeded", kubectl("logs", self.name)
        return self.events()

    def remove(self) -> None:
        """Delete it."""
        kubectl("delete", "pod", self.name, "--ignore-not-found", "--grace-period=1")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
