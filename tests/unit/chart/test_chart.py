"""The chart as it renders; skipped where no helm is on the path."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "disagg"
GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "default": None,
    **{path.name.removesuffix("-values.yaml"): path for path in sorted(CHART.glob("ci/*-values.yaml"))},
    **{path.stem: path for path in sorted(CHART.glob("examples/*.yaml"))},
}

needs_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="no helm on PATH")


def helm_template(*arguments: str, release: str = "chat") -> subprocess.CompletedProcess[str]:
    command = ["helm", "template", release, str(CHART), "--namespace", "serving", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rendered(case: str) -> str:
    path = CASES[case]
    result = helm_template(*(["--values", str(path)] if path else []))
    assert result.returncode == 0, result.stderr
    text = re.sub(r'(current: )"?[A-Za-z0-9+/]{43}="?', r"\1" + "A" * 43 + "=", result.stdout)
    return re.sub("\n+", "\n", text)  # Helm 3 and 4 differ in blank lines


def objects(*arguments: str) -> list[dict]:
    result = helm_template(*arguments)
    assert result.returncode == 0, result.stderr
    return [found for found in yaml.safe_load_all(result.stdout) if found]


def leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from leaves(below)
    else:
        yield value


def only(found: list[dict], kind: str, name: str) -> dict:
    (match,) = [o for o in found if o["kind"] == kind and o["metadata"]["name"] == name]
    return match


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_render_is_the_kept_one(case: str) -> None:
    """A change of what users install shows in review; `make chart-docs` keeps the new ones."""
    assert rendered(case) == (GOLDEN / f"{case}.yaml").read_text()


def test_every_golden_render_has_its_values() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


def test_readme_and_schema_are_those_of_the_values() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "chart_readme.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@needs_helm
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("router.replica=2", "additional properties 'replica' not allowed"),
        ("decode.parallelism.pipeline=2", "additional properties 'pipeline' not allowed"),
        ("prefill.parallelism.tensor=0", "'/prefill/parallelism/tensor': minimum: got 0, want 1"),
        ("modelArtifacts.uri=s3://bucket", "must be image://, hf://ORG/NAME or pvc://CLAIM/PATH"),
        ("modelArtifacts.authSecretName=token", "is for a modelArtifacts.uri of hf://ORG/NAME only"),
        ("decode.replicas=0", "set decode.replicas or unified.replicas to at least 1"),
        ("prefill.replicas=0", "decode workers without prefill workers"),
        ("decode.nodesPerWorker=2", "decode.nodesPerWorker 2 does not divide decode.parallelism.tensor 1"),
        ("auth.apiKeys={a},auth.existingSecret=b", "exclude each other"),
        ("httpRoute.enabled=true", "needs httpRoute.parentRefs"),
        ("auth.apiKeys={a b}", "'/auth/apiKeys/0': 'a b' does not match pattern"),
        ("auth.apiKeys={#a}", "'/auth/apiKeys/0': '#a' does not match pattern"),
        ("decode.strategy.maxSurge=0", "decode.strategy: maxSurge and maxUnavailable are both 0"),
        ("router.strategy.maxSurge=0%", "router.strategy: maxSurge and maxUnavailable are both 0"),
        ("shmSize=lots", "'/shmSize': 'lots' does not match pattern"),
        ("modelArtifacts.size=50 GB", "'/modelArtifacts/size': '50 GB' does not match pattern"),
        ("modelArtifacts.mountPath=models", "'/modelArtifacts/mountPath': 'models' does not match pattern"),
        ("image.repository=", "'/image/repository': minLength: got 0, want 1"),
        ("decode=null", "missing property 'decode'"),
        ("networkPolicy.enabled=null", "'/networkPolicy': missing property 'enabled'"),
    ],
)
def test_wrong_values_end_in_a_sentence(value: str, sentence: str) -> None:
    result = helm_template("--set", value)
    assert result.returncode != 0
    assert sentence in result.stderr


@needs_helm
def test_selectors_hold_no_version() -> None:
    """A selector cannot be changed, so an upgrade to another version would be refused."""
    for found in objects():
        if found["kind"] == "Deployment":
            assert set(found["spec"]["selector"]["matchLabels"]) == {
                f"app.kubernetes.io/{name}" for name in ("name", "instance", "component")
            }


@needs_helm
def test_pods_may_do_nothing_they_need_not() -> None:
    for found in objects():
        if found["kind"] != "Deployment":
            continue
        pod = found["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        is_router = found["metadata"]["name"] == "chat-router"
        assert pod["automountServiceAccountToken"] is is_router
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@needs_helm
def test_grace_is_longer_than_draining() -> None:
    """The kubelet kills what has not ended by itself, with the requests in it."""
    decode = only(objects("--set", "decode.drainSeconds=300"), "Deployment", "chat-decode")
    pod = decode["spec"]["template"]["spec"]
    assert "--drain-seconds=300" in pod["containers"][0]["args"]
    assert pod["terminationGracePeriodSeconds"] == 315


@needs_helm
def test_a_long_release_s_name_ends_in_a_sentence() -> None:
    """Helm allows 53 characters and dots; Services named after it would be refused one by one."""
    for name in ("a" * 51, "1chat", "my.chat"):
        result = helm_template(release=name)
        assert "must begin with a letter, hold no dot and have at most 50 characters" in result.stderr
    assert helm_template(release="a" * 50).returncode == 0


@needs_helm
def test_no_peers_are_nobody() -> None:
    """A rule of a NetworkPolicy whose list of peers is empty lets everybody through."""
    empty = '{"scrapers": [], "apiServer": [], "clients": [{"podSelector": {}}]}'
    found = objects("--set-json", f"networkPolicy={empty}")
    router, worker = (only(found, "NetworkPolicy", f"chat-{name}")["spec"] for name in ("router", "worker"))
    assert not [rule for rule in worker["ingress"] if {"port": "http", "protocol": "TCP"} in rule["ports"]]
    assert all(rule.get("from") for rule in router["ingress"])
    assert not [rule for rule in router["egress"] if {"port": 6443, "protocol": "TCP"} in rule["ports"]]


@needs_helm
@pytest.mark.parametrize(("secret", "protocol"), [("", None), ("router-tls", "https")])
def test_proxies_are_told_that_the_router_speaks_https(secret: str, protocol: str | None) -> None:
    service = only(objects("--set", f"router.tls.secretName={secret}"), "Service", "chat-router")
    assert service["spec"]["ports"][0].get("appProtocol") == protocol


@needs_helm
@pytest.mark.parametrize(("host", "hosts"), [("", {}), ("chat.example.com", {"hosts": ["chat.example.com"]})])
def test_a_certificate_without_a_host_is_every_host_s(host: str, hosts: dict[str, list[str]]) -> None:
    """The API server takes an empty name among the hosts for one, and refuses it."""
    values = f"ingress.enabled=true,ingress.tlsSecretName=chat-tls,ingress.host={host}"
    ingress = only(objects("--set", values), "Ingress", "chat-router")
    assert ingress["spec"]["tls"] == [{"secretName": "chat-tls", **hosts}]


@needs_helm
@pytest.mark.parametrize("name", ["router", "worker"])
def test_names_are_looked_up_where_dns_pods_listen(name: str) -> None:
    """53 of the Service is another port of the pod on OpenShift, and a policy sees that one."""
    egress = only(objects(), "NetworkPolicy", f"chat-{name}")["spec"]["egress"]
    open_to_all = [rule["ports"] for rule in egress if "to" not in rule]
    assert open_to_all == [[{"port": n, "protocol": p} for n in (53, 5353) for p in ("UDP", "TCP")]]


@needs_helm
@pytest.mark.parametrize("key", ["router.startupSeconds", "decode.strategy", "accelerator", "shmSize"])
def test_a_value_that_is_missing_ends_in_a_sentence(key: str) -> None:
    """`helm upgrade --reuse-values` leaves out what is new in a chart; it would render as nothing."""
    result = helm_template("--set", f"{key}=null")
    assert result.returncode != 0
    assert f"missing property '{key.rpartition('.')[2]}'" in result.stderr
    assert "takes --reset-then-reuse-values, not --reuse-values" in result.stderr


@needs_helm
@pytest.mark.parametrize("scheme", ["hf://a/b", "pvc://123/123"])
def test_names_stay_names_whatever_they_look_like(scheme: str) -> None:
    """`123` names a namespace, a Secret or a claim, and YAML reads a number: the API server refuses it."""
    names = "router.tls.secretName", "auth.existingSecret", "transport.existingSecret", "priorityClassName"
    names += "ingress.tlsSecretName", "ingress.className", "ingress.host", "modelArtifacts.storageClassName"
    values = ",".join((*(f"{name}=123" for name in names), f"modelArtifacts.uri={scheme}"))
    model = "modelArtifacts.name=a: b"
    found = objects(
        "--namespace", "123", "--set-string", values, "--set", "ingress.enabled=true", "--set", model
    )
    assert 123 not in set(leaves(found))
    assert "--served-model-name=a: b" in set(leaves(found))


@needs_helm
def test_switches_are_off_too() -> None:
    kinds = {found["kind"] for found in objects("--values", str(CASES["open"]))}
    assert not kinds & {"NetworkPolicy", "PodDisruptionBudget", "Ingress", "HTTPRoute", "PodMonitor"}


@needs_helm
def test_a_worker_of_several_nodes_shares_its_devices_out() -> None:
    found = only(objects("--values", str(CASES["hub"])), "LeaderWorkerSet", "chat-decode")
    template = found["spec"]["leaderWorkerTemplate"]
    container = template["workerTemplate"]["spec"]["containers"][0]
    assert template["size"] == 2
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "--num-nodes=$(LWS_GROUP_SIZE)" in container["args"]


if __name__ == "__main__":  # make chart-docs
    for case in CASES:
        (GOLDEN / f"{case}.yaml").write_text(rendered(case))
