"""Discovery over real HTTP: the official client against a server that plays the API server, and a router."""

import asyncio
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from disagg.errors import ConfigError
from disagg.kubernetes import Member, client, discovery, follow_release
from disagg.kubernetes.client import KubernetesApi
from disagg.kubernetes.slices import EndpointSlice
from disagg.kubernetes.watch import ApiError, Changed, Expired, Removed, SliceWatch
from support.api_server import ApiServer, make_endpoint, make_slice
from support.checkpoints import make_checkpoint
from support.clock import FakeClock
from support.cluster import Cluster
from support.system import eventually

SERVICES = ["chat-prefill", "chat-decode", "chat-unified"]


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
    api = KubernetesApi(None, SERVICES)
    yield api
    api.close()


# --- the client ----------------------------------------------------------------------------------


def test_a_list_is_of_the_services_in_the_namespace(server: ApiServer, api: KubernetesApi) -> None:
    server.put(make_slice("a", [make_endpoint("10.0.0.7")]))
    listed = api.list_slices()
    assert listed.items is not None
    assert [part.service for part in listed.items] == ["chat-decode"]
    assert listed.metadata.resource_version == "101"
    kind, query = server.requests.get_nowait()
    assert kind == "list"
    assert query["path"] == "/apis/discovery.k8s.io/v1/namespaces/team/endpointslices"
    assert query["labelSelector"] == "kubernetes.io/service-name in (chat-prefill,chat-decode,chat-unified)"


def test_the_namespace_can_be_another(server: ApiServer) -> None:
    api = KubernetesApi("other", SERVICES)
    api.list_slices()
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
    for event in api.watch_slices("101"):
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
    assert list(api.watch_slices("7")) == [Expired()]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"{}"),
        (403, b'{"kind":"Status","message":"forbidden"}'),
        (429, b"{}"),
        (200, b"<html>a proxy's page</html>"),
        (200, b"{}"),
        (200, b'{"kind":"Status","metadata":{}}'),
        (200, b""),
    ],
)
def test_what_is_no_list_is_an_error_and_not_an_empty_list(
    server: ApiServer, api: KubernetesApi, status: int, body: bytes
) -> None:
    """Read as an empty list it would end every worker's service."""
    server.list_answers.append((status, body))
    with pytest.raises(ApiError):
        api.list_slices()


def test_a_server_that_is_away_is_an_error(server: ApiServer, api: KubernetesApi) -> None:
    server.stop()
    with pytest.raises(ApiError):
        api.list_slices()
    with pytest.raises(ApiError):
        list(api.watch_slices("1"))


def test_a_connection_that_is_half_dead_is_noticed(
    server: ApiServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side's machine is gone: nothing comes, not even an end."""
    monkeypatch.setattr(client, "SILENCE_S", 0.2)
    server.silent.set()
    with pytest.raises(ApiError, match="timed out"):
        list(api.watch_slices("100"))


def test_without_a_cluster_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="discover needs a service account"):
        KubernetesApi(None, SERVICES)


# --- following -----------------------------------------------------------------------------------


def test_five_minutes_without_the_api_server_change_nothing(server: ApiServer, api: KubernetesApi) -> None:
    """Connections are refused for as long; then what has happened meanwhile is told, and nothing else."""
    server.put(make_slice("a", [make_endpoint("10.0.0.7", pod="a")]))
    clock = FakeClock()
    told: list[list[EndpointSlice]] = []
    began_at = clock.now

    def tell(slices: list[EndpointSlice]) -> None:
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

    SliceWatch(api, tell, wait=wait, clock=clock).run()
    assert clock.now - began_at >= 300
    assert [sorted(part.metadata.name for part in slices) for slices in told] == [["a"], ["a", "b"]]


class Followed:
    """A discovery on a loop of its own, and what it tells."""

    def __init__(self) -> None:
        self.told: queue.Queue[dict[str, str]] = queue.Queue()
        self._stop: Callable[[], Any]
        started = threading.Event()

        async def main() -> None:
            loop, stopping = asyncio.get_running_loop(), asyncio.Event()
            self._stop = lambda: loop.call_soon_threadsafe(stopping.set)
            found = follow_release("chat", None, self._on_members)
            found.start()
            started.set()
            await stopping.wait()
            found.stop()

        self.thread = threading.Thread(target=lambda: asyncio.run(main()))
        self.thread.start()
        assert started.wait(20)

    def _on_members(self, members: Mapping[str, Member]) -> None:
        self.told.put({member.pod: member.condition for member in members.values()})

    def next(self) -> dict[str, str]:
        return self.told.get(timeout=10)

    def stop(self) -> None:
        self._stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert not [t for t in threading.enumerate() if t.name == "discovery"], "its thread has ended"


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
    eventually(lambda: server.num_watchers == 1, "it watches")
    followed.stop()
    server.end_watches()
    assert discovery.STOP_S < client.SILENCE_S, "else the test shows nothing"


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
        host = self._hosts.setdefault(name, f"127.0.0.{len(self._hosts) + 2}")
        return f"tcp://{host}:{self.port}"

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


def test_the_router_ends_with_its_watch(cluster: DiscoveredCluster) -> None:
    assert cluster.complete().status_code == 200
    assert cluster.stop() == 0
