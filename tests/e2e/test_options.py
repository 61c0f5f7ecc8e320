"""What a user sets beyond the defaults, all at once: a claim's model, keys and certificates of his own."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from e2e.cluster import Pod, Release, helm_test, installed, kubectl, run

CERTIFICATES = Path(__file__).parents[1] / "support" / "certificates"
CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: weights}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
"""
SERIES = "vllm:kv_cache_usage_perc"
API_KEY = "open sesame".replace(" ", "-")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "current").write_bytes(os.urandom(32))
    (folder / "keys").write_text(f"# one a line\n{API_KEY}\n")
    kubectl("apply", "-f", "-", stdin=CLAIM)
    fill = Pod("fill", "fill.py", claim="weights")
    fill.wait(120)
    fill.remove()
    kubectl("create", "secret", "generic", "own-transport", f"--from-file={folder / 'current'}")
    kubectl("create", "secret", "generic", "own-api", f"--from-file={folder / 'keys'}")
    pair = (f"--cert={CERTIFICATES / 'one.pem'}", f"--key={CERTIFICATES / 'one.key'}")
    kubectl("create", "secret", "tls", "own-tls", *pair)
    with installed(
        "own",
        modelArtifacts={"uri": "pvc://weights/smol", "name": "smol"},
        transport={"existingSecret": "own-transport"},
        auth={"existingSecret": "own-api"},
        router={"replicas": 2, "tls": {"secretName": "own-tls"}},
        unified={"replicas": 1},
        monitoring={"podMonitor": {"enabled": True, "interval": "5s"}},
        networkPolicy={"scrapers": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]},
    ) as release:
        release.headers = {"authorization": f"Bearer {API_KEY}"}
        yield release
    kubectl("delete", "secret/own-transport", "secret/own-api", "secret/own-tls", "pvc/weights")


def test_the_claim_s_model_is_served_through_both_pools_over_tls(release: Release) -> None:
    assert " bytes of KV in " in helm_test(release.name)
    (model,) = release.call("/v1/models")["data"]
    assert model["id"] == "smol"
    assert kubectl("get", "secrets", "-o", "name").count("own-keys") == 0


def test_every_router_answers_for_the_records_of_all(release: Release) -> None:
    """The helm test went through one of them."""
    helm_test(release.name)
    pods = [pod["metadata"]["name"] for pod in release.pods("router")]
    script = (
        "import httpx,sys;"
        f"h={release.headers};"
        "print(httpx.get('https://127.0.0.1:8000/disagg/requests'+sys.argv[1],headers=h,verify=False).text)"
    )

    def ask(pod: str, path: str) -> str:
        return kubectl("exec", pod, "--", "python", "-c", script, path)

    ids = {pod: _ids(ask(pod, "?limit=100")) for pod in pods}
    assert any(ids.values())
    for pod in pods:
        for request_id in set().union(*ids.values()):
            assert request_id in ask(pod, f"/{request_id}"), (pod, ids)


def _ids(records: str) -> set[str]:
    return {record["request_id"] for record in json.loads(records)}


def test_a_changed_api_key_counts_without_a_restart(release: Release) -> None:
    """The kubelet brings the Secret within about a minute."""
    pod = release.pods("router")[0]["metadata"]["name"]
    run(
        "kubectl",
        "--namespace",
        "disagg-e2e",
        "patch",
        "secret",
        "own-api",
        "--patch",
        '{"stringData": {"keys": "another\\n' + API_KEY + '"}}',
    )
    script = (
        "import httpx,time\n"
        "for _ in range(150):\n"
        "    a=httpx.get('https://127.0.0.1:8000/v1/models',headers=dict(authorization='Bearer another'),"
        "verify=False)\n"
        "    if a.status_code==200: break\n"
        "    time.sleep(1)\n"
        "print(a.status_code)"
    )
    assert kubectl("exec", pod, "--", "python", "-c", script, timeout_s=200).strip() == "200"
    assert release.pods("router")[0]["status"]["containerStatuses"][0]["restartCount"] == 0


def test_prometheus_scrapes_every_pod(release: Release) -> None:
    prometheus = os.environ.get("DISAGG_E2E_PROMETHEUS")
    if prometheus is None:
        pytest.skip("DISAGG_E2E_PROMETHEUS names no Prometheus that reads PodMonitors")
    workers = [pod["metadata"]["name"] for c in ("prefill", "decode", "unified") for pod in release.pods(c)]
    queries = [quote(f'{SERIES}{{pod="{name}"}}') for name in workers]
    urls = [f"{prometheus}/api/v1/query?query={query}" for query in queries]
    ask = Pod("ask", "ask.py", '"value"', *urls)
    try:
        assert len(ask.wait(240)) == len(workers)
    finally:
        ask.remove()
