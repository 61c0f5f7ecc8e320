"""Discovery over real HTTP: the official client against a server that plays the API server, and a router."""

import asyncio
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from disagg.errors import ConfigError
from disagg.kubernetes import Member, PodEnd, client, discovery, follow_release
from disagg.kubernetes.client import KubernetesApi
from disagg.kubernetes.refusals import Refusal
from disagg.kubernetes.slices import EndpointSlice
from disagg.kubernetes.watch import ApiError, Changed, Expired, Removed, Watch
from support.api_server import ApiServer, make_container_end, make_endpoint, make_pod, make_slice
from support.checkpoints import make_checkpoint
from support.clock import FakeClock
from support.cluster import Cluster
from support.system import eventually


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ApiServer]:
    """A running API server, which the kubeconfig in the environment names."""
    server = ApiServer()
    server.start()
    path = server.write_kubeconfig(tmp_path / "kubeconfig", namespace="team")
    monkeypatch.setenv("KUBECONFIG", str(path))
    yield server
    server.stop()


@pytest.fixture
def api(server: ApiServer) -> Iterator[KubernetesApi]:
    api = KubernetesApi(None, "chat")
    yield api
    api.close()


# --- the client ----------------------------------------------------------------------------------


def test_a_list_is_of_the_services_in_the_namespace(server: ApiServer, api: KubernetesApi) -> None:
    server.put(make_slice("a", [make_endpoint("10.0.0.7")]))
    listed = api.slices.list()
    assert listed.items is not None
    assert [part.service for part in listed.items] == ["chat-decode"]
    assert listed.metadata.resource_version == "101"
    kind, query = server.requests.get_nowait()
    assert kind == "list"
    assert query["path"] == "/apis/discovery.k8s.io/v1/namespaces/team/endpointslices"
    assert query["labelSelector"] == (
        "kubernetes.io/service-name in (chat-prefill,chat-decode,chat-unified,chat-router-peers)"
    )


def test_the_namespace_can_be_another(server: ApiServer) -> None:
    api = KubernetesApi("other", "chat")
    api.slices.list()
    assert "/namespaces/other/" in server.requests.get_nowait()[1]["path"]
    api.close()


def test_a_watch_tells_what_has_changed_and_ends_when_the_server_ends_it(
    server: ApiServer, api: KubernetesApi
) -> None:
    server.put(make_slice("old", []))
    server.put(make_slice("a", []))
    server.put(make_slice("a", [make_endpoint("10.0.0.7")]))
    server.delete("a")
    events = []
    for event in api.slices.watch("101"):
        events.append(event)
        if len(events) == 3:
            server.end_watches()
    assert [type(event) for event in events] == [Changed, Changed, Removed]
    query = server.requests.get_nowait()[1]
    assert (query["resourceVersion"], query["timeoutSeconds"]) == ("101", "30")
    assert query["allowWatchBookmarks"].lower() == "true"


@pytest.mark.parametrize("expire_within", [False, True], ids=["status", "event"])
def test_a_version_that_is_too_old_is_told(
    server: ApiServer, api: KubernetesApi, expire_within: bool
) -> None:
    server.expire_within = expire_within
    server.forget()
    assert list(api.slices.watch("7")) == [Expired()]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"{}"),
        (403, b'{"kind":"Status","message":"forbidden"}'),
        (429, b"{}"),
        (200, b"<html>a proxy's page</html>"),
        (200, b"{}"),
        (200, b'{"kind":"Status","metadata":{}}'),
        (200, b'{"kind":"PodList","metadata":{},"items":[]}'),
        (200, b""),
    ],
)
def test_what_is_no_list_is_an_error_and_not_an_empty_list(
    server: ApiServer, api: KubernetesApi, status: int, body: bytes
) -> None:
    """Read as an empty list it would end every worker's service."""
    server.list_answers.append((status, body))
    with pytest.raises(ApiError):
        api.slices.list()


def test_a_server_that_is_away_is_an_error(server: ApiServer, api: KubernetesApi) -> None:
    server.stop()
    with pytest.raises(ApiError):
        api.slices.list()
    with pytest.raises(ApiError):
        list(api.slices.watch("1"))


def test_a_connection_that_is_half_dead_is_noticed(
    server: ApiServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side's machine is gone: nothing comes, not even an end."""
    monkeypatch.setattr(client, "SILENCE_S", 0.2)
    server.silent.set()
    with pytest.raises(ApiError, match="timed out"):
        list(api.slices.watch("100"))


def test_an_event_that_another_router_has_made_is_enough(server: ApiServer, api: KubernetesApi) -> None:
    refusal = Refusal("p", "uid-p", "worker", "containerd://0123", "2026-01-01T00:00:00Z", "2 heads")
    for _ in range(2):
        api.post(refusal)
    assert list(server.events) == ["p.0123"]
    assert server.events["p.0123"]["message"] == "2 heads"
    server.is_forbidden.add("Event")
    with pytest.raises(ApiError, match="403"):
        api.post(refusal)


def test_without_a_cluster_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="discover needs a service account"):
        KubernetesApi(None, "chat")


# --- following -----------------------------------------------------------------------------------


def test_five_minutes_without_the_api_server_change_nothing(server: ApiServer, api: KubernetesApi) -> None:
    """Connections are refused for as long; then what has happened meanwhile is told, and nothing else."""
    server.put(make_slice("a", [make_endpoint("10.0.0.7", pod="a")]))
    clock = FakeClock()
    told: list[list[EndpointSlice]] = []
    began_at = clock.now

    def tell(slices: list[EndpointSlice], _: EndpointSlice | None) -> None:
        told.append(slices)
        if len(told) == 1:
            server.stop()
        else:
            server.end_watches()

    def wait(seconds: float) -> bool:
        clock.advance(seconds)
        if clock.now - began_at >= 300 and not server.is_up:
            assert len(told) == 1
            server.start()
            server.put(make_slice("b", [make_endpoint("10.0.0.8", pod="b")]))
        return len(told) == 2

    Watch(api.slices, tell, wait=wait, clock=clock).run()
    assert clock.now - began_at >= 300
    assert [sorted(part.metadata.name for part in slices) for slices in told] == [["a"], ["a", "b"]]


class Followed:
    """A discovery on a loop of its own, and what it tells."""

    def __init__(self) -> None:
        self.told: queue.Queue[dict[str, str]] = queue.Queue()
        self.routers: queue.Queue[list[str]] = queue.Queue()
        self.ended: queue.Queue[set[str]] = queue.Queue()
        self._stop: Callable[[], Any]
        started = threading.Event()

        async def main() -> None:
            loop, stopping = asyncio.get_running_loop(), asyncio.Event()
            self._stop = lambda: loop.call_soon_threadsafe(stopping.set)
            found = follow_release("chat", None, self._on_members, self._on_routers, self._on_ended)
            found.start()
            started.set()
            await stopping.wait()
            found.stop()

        self.thread = threading.Thread(target=lambda: asyncio.run(main()))
        self.thread.start()
        assert started.wait(20)

    def _on_members(self, members: Mapping[str, Member]) -> None:
        self.told.put({member.pod: member.condition for member in members.values()})

    def _on_routers(self, members: Mapping[str, Member]) -> None:
        self.routers.put(list(members))

    def _on_ended(self, ends: frozenset[PodEnd]) -> None:
        self.ended.put({end.name for end in ends})

    def next(self) -> dict[str, str]:
        return self.told.get(timeout=10)

    def stop(self) -> None:
        self._stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert not [t for t in threading.enumerate() if t.name.startswith("discovery")], (
            "its threads have ended"
        )


@pytest.fixture
def followed(server: ApiServer) -> Iterator[Followed]:
    followed = Followed()
    yield followed
    followed.stop()


def test_members_are_told_as_they_change(server: ApiServer, followed: Followed) -> None:
    assert followed.next() == {}
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a")]))
    assert followed.next() == {"a": "ready"}
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a", ready=False, terminating=True)]))
    assert followed.next() == {"a": "terminating"}
    server.delete("s")
    assert followed.next() == {}


def test_routers_are_told_apart_from_workers(server: ApiServer, followed: Followed) -> None:
    assert followed.next() == {}
    assert followed.routers.get(timeout=10) == []
    server.put(make_slice("r", [make_endpoint("10.0.0.9", pod="r")], service="chat-router-peers", port=5602))
    assert followed.routers.get(timeout=10) == ["tcp://10.0.0.9:5602"]
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a")]))
    assert followed.next() == {"a": "ready"}
    assert followed.routers.empty()


def test_a_change_that_changes_no_member_is_not_told(server: ApiServer, followed: Followed) -> None:
    assert followed.next() == {}
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a")]))
    assert followed.next() == {"a": "ready"}
    server.put(make_slice("empty", []))
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a"), make_endpoint("10.0.0.8", pod="b")]))
    assert followed.next() == {"a": "ready", "b": "ready"}


def test_what_a_compaction_hid_is_found_by_listing_again(server: ApiServer, followed: Followed) -> None:
    assert followed.next() == {}
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a")]))
    assert followed.next() == {"a": "ready"}
    server.stop()
    server.delete("s")
    server.put(make_slice("t", [make_endpoint("10.0.0.8", pod="b")]))
    server.forget()
    server.start()
    assert followed.next() == {"b": "ready"}


def test_it_stops_in_the_middle_of_a_silent_watch(server: ApiServer) -> None:
    server.silent.set()
    followed = Followed()
    followed.next()
    eventually(lambda: server.num_watchers() == server.num_watchers("Pod") == 1, "it watches")
    followed.stop()
    server.end_watches()
    assert discovery.STOP_S < client.SILENCE_S, "else the test shows nothing"


def test_ends_of_pods_are_told_and_nothing_else_of_them(server: ApiServer, followed: Followed) -> None:
    """An object that vanishes is no end; a label selects the release's."""
    assert followed.next() == {}
    eventually(lambda: server.num_watchers("Pod") == 1, "it watches")
    for name in ("a", "b"):
        server.put(make_pod(name, "Running", "10.0.0.7"))
    server.delete("a", "Pod")
    server.put(make_pod("b", "Failed", "10.0.0.7"))
    assert followed.ended.get(timeout=10) == {"b"}
    selectors = {query["path"]: query["labelSelector"] for _, query in list(server.requests.queue)}
    assert selectors["/api/v1/namespaces/team/pods"] == "app.kubernetes.io/instance=chat"


def test_an_end_that_a_compaction_hid_is_found_by_listing_again(
    server: ApiServer, followed: Followed
) -> None:
    server.put(make_pod("a", "Running", "10.0.0.7"))
    eventually(lambda: server.num_watchers("Pod") == 1, "it watches")
    server.stop()
    server.put(make_pod("a", "Failed", "10.0.0.7"))
    server.forget()
    server.start()
    assert followed.ended.get(timeout=10) == {"a"}


def misconfigured(name: str) -> dict[str, Any]:
    """A pod that ends in one sentence, again and again."""
    pod = make_pod(name, "Running", "10.0.0.7")
    end = make_container_end(2, "disagg: 2 does not divide 9 heads\n", f"containerd://{name}")
    pod["status"]["containerStatuses"] = [{"name": "worker", "state": {"waiting": {}}, "lastState": end}]
    return pod


def test_why_a_pod_cannot_start_is_made_an_event(server: ApiServer, followed: Followed) -> None:
    server.put(misconfigured("a"))
    eventually(lambda: server.events, "it is told")
    (event,) = server.events.values()
    assert (event["involvedObject"]["name"], event["message"]) == ("a", "disagg: 2 does not divide 9 heads")
    assert event["metadata"]["namespace"] == "team"


def test_who_may_make_no_events_says_so_and_goes_on(
    server: ApiServer, followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    server.is_forbidden.add("Event")
    server.put(misconfigured("a"))
    eventually(lambda: "pod is misconfigured, and no event says so pod=a" in caplog.text, "its log says so")
    assert "403" in caplog.text
    server.put(make_pod("a", "Failed", "10.0.0.7"))
    assert followed.ended.get(timeout=10) == {"a"}


def test_who_may_not_see_pods_still_finds_members(server: ApiServer) -> None:
    server.is_forbidden.add("Pod")
    followed = Followed()
    assert followed.next() == {}
    server.put(make_slice("s", [make_endpoint("10.0.0.7", pod="a")]))
    assert followed.next() == {"a": "ready"}
    followed.stop()


# --- the router ----------------------------------------------------------------------------------


class DiscoveredCluster(Cluster):
    """Fake workers at addresses of the loopback net, which the router finds by slices."""

    def __init__(self, folder: Path, checkpoint: Path, server: ApiServer) -> None:
        super().__init__(folder, checkpoint)
        self.server = server
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._hosts: dict[str, str] = {}

    def address(self, name: str) -> str:
        return f"tcp://{self.host(name)}:{self.port}"

    def host(self, name: str) -> str:
        return self._hosts.setdefault(name, f"127.0.0.{len(self._hosts) + 2}")

    def publish(self, **conditions: str | None) -> None:
        """Say of each worker how it is; None takes it out."""
        for name, condition in conditions.items():
            name = name.replace("_", "-")
            flags: dict[str, Any] = {"ready": condition == "ready", "terminating": condition == "terminating"}
            endpoints = [make_endpoint(self._hosts[name], pod=name, **flags)] if condition else []
            role = name.partition("-")[0]
            self.server.put(make_slice(name, endpoints, service=f"chat-{role}", port=self.port))

    def addresses(self) -> list[str]:
        return sorted(w["id"] for w in self.http.get("/disagg/workers").json())


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, server: ApiServer) -> Iterator[DiscoveredCluster]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"))
    cluster = DiscoveredCluster(tmp_path_factory.mktemp("d"), checkpoint, server)
    for name in ("prefill-0", "decode-0", "decode-1"):
        cluster.start_worker(name)
    cluster.publish(prefill_0="ready", decode_0="ready", decode_1="ready")
    cluster.start_router(workers=[], discover="chat")
    yield cluster
    cluster.close()


def test_a_worker_that_turns_terminating_finishes_its_stream_and_is_let_go_of(
    cluster: DiscoveredCluster,
) -> None:
    """No new lease from the moment that the slice says so; what it holds it keeps."""
    whole, _ = cluster.stream(max_tokens=60)
    ending: list[str] = []

    def on_event(count: int) -> None:
        if count == 5:
            worker = cluster.http.get("/disagg/requests?limit=1").json()[0]["decode_worker"]
            cluster.publish(**{worker.replace("-", "_"): "terminating"})
            eventually(lambda: cluster.states()[worker] == "draining", "the router has seen it")
            ending.append(worker)
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda i: cluster.complete(f"prompt {i}"), range(8)))
            records = [cluster.record(answer.headers["x-request-id"]) for answer in answers]
            assert {record["attempts"] for record in records} == {1}
            assert worker not in {record["decode_worker"] for record in records}
            cluster.publish(**{worker.replace("-", "_"): None})

    text, request_id = cluster.stream(on_event, max_tokens=60)
    assert text == whole
    record = cluster.record(request_id)
    assert (record["attempts"], record["decode_worker"]) == (1, ending[0])
    eventually(lambda: ending[0] not in cluster.states(), "it is let go of")
    assert len(cluster.states()) == 2
    cluster.assert_nothing_held()


def test_traffic_goes_on_while_the_api_server_is_away(cluster: DiscoveredCluster) -> None:
    cluster.server.stop()
    for _ in range(3):
        assert cluster.complete().status_code == 200
    assert set(cluster.states().values()) == {"ready"}
    cluster.start_worker("decode-2")
    cluster.server.start()
    cluster.publish(decode_2="ready")
    cluster.wait_ready("decode-2")


def test_pages_that_a_dead_pod_may_write_are_kept_until_it_has_ended(
    tmp_path: Path, server: ApiServer
) -> None:
    """Not when its object vanishes: who force-deletes a pod does not stop its process."""
    cluster = DiscoveredCluster(tmp_path, make_checkpoint(tmp_path / "model"), server)
    cluster.start_worker("decode-0")
    cluster.publish(decode_0="ready")
    cluster.start_router(workers=[], discover="chat")

    def pages_in_use(leases: int) -> int | None:
        """Of the decode worker, once it holds so many leases and runs nothing."""
        workers = {w["id"]: w for w in cluster.http.get("/disagg/workers").json()}
        decode = workers["decode-0"]
        return (
            int(decode["pages"]["in_use"]) if (decode["running"], decode["leases"]) == (0, leases) else None
        )

    def lose_while_kv_moves(name: str, prompt: str) -> None:
        # Its pid is of another namespace: nothing on this machine proves its end.
        cluster.start_worker(name, kv_s=600.0, pid=1)
        server.put(make_pod(name, "Running", cluster.host(name)))
        cluster.publish(**{name.replace("-", "_"): "ready"})
        cluster.wait_ready(name)

        def on_event(count: int) -> None:
            if count == 1:
                cluster.kill(name)

        cluster.stream(on_event, prompt=prompt)
        cluster.publish(**{name.replace("-", "_"): None})
        eventually(lambda: name not in cluster.states(), "it is let go of")

    try:
        lose_while_kv_moves("prefill-0", "a" * 40)
        few = eventually(lambda: pages_in_use(leases=1), "its pages are quarantined")
        lose_while_kv_moves("prefill-1", "b" * 400)
        eventually(lambda: (pages_in_use(leases=2) or 0) > 2 * few, "so are those of the second")
        server.delete("prefill-0", "Pod")
        server.put(make_pod("prefill-1", "Failed"))  # its address as it was before
        eventually(lambda: pages_in_use(leases=1) == few, "the second has ended, and the first not")
    finally:
        cluster.close()


def test_a_router_answers_for_the_records_of_another(tmp_path: Path, server: ApiServer) -> None:
    """Behind one Service a client's next request reaches any of them."""
    checkpoint = make_checkpoint(tmp_path / "model")
    with ExitStack() as stack:
        routers = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            router = DiscoveredCluster(tmp_path / name, checkpoint, server)
            routers.append(router)
        one, other = routers
        one.start_worker("decode-0")
        stack.callback(one.close_workers)
        one.publish(decode_0="ready")
        for router in routers:
            router.start_router(workers=[], discover="chat", peer_bind=f"tcp://127.0.0.1:{router.port}")
            stack.callback(router.close_router)
            endpoint = make_endpoint("127.0.0.1", pod=f"router-{router.port}")
            name = f"router-{router.port}"
            server.put(make_slice(name, [endpoint], service="chat-router-peers", port=router.port))
        other.wait_ready("decode-0")
        for asked, having in ((one, other), (other, one)):
            answer = having.complete()
            assert answer.status_code == 200
            path = f"/disagg/requests/{answer.headers['x-request-id']}"
            eventually(lambda: asked.http.get(path).status_code == 200, "they have met")  # noqa: B023
            assert asked.http.get(path).json() == having.http.get(path).json()
            assert asked.http.get("/disagg/requests/unknown").status_code == 404
        assert one.stop() == 0
        assert other.http.get(path).status_code == 404, "nobody has it any more"


def test_the_router_ends_with_its_watch(cluster: DiscoveredCluster) -> None:
    assert cluster.complete().status_code == 200
    assert cluster.stop() == 0
