"""The router's process over real ZeroMQ and HTTP, with fake workers in processes that can be killed."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.checkpoints import make_checkpoint
from support.cluster import MODEL, Cluster
from support.system import eventually


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("r"), checkpoint)  # short: a socket's path is limited
    yield cluster
    cluster.close()


def start_pair(cluster: Cluster) -> Cluster:
    for name in ("prefill-0", "decode-0", "decode-1"):
        cluster.start_worker(name)
    cluster.start_router()
    return cluster


@pytest.fixture
def pair(cluster: Cluster) -> Cluster:
    """One prefill and two decode workers behind a router."""
    return start_pair(cluster)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    """The same, for tests that leave it as it was."""
    cluster = start_pair(Cluster(tmp_path_factory.mktemp("s"), checkpoint))
    yield cluster
    cluster.close()


def test_a_request_goes_through_both_pools_and_leaves_nothing(shared: Cluster) -> None:
    answer = shared.complete()
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 20
    record = shared.record(answer.headers["x-request-id"])
    assert (record["decision"], record["finish_reason"], record["release"]) == (
        "disaggregated",
        "length",
        "finished",
    )
    assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] > 0
    assert record["attempts"] == 1
    local = shared.complete(headers={"x-disagg-decision": "never"})
    assert local.json()["choices"][0]["text"] == answer.json()["choices"][0]["text"]
    assert shared.record(local.headers["x-request-id"])["decision"] == "local"
    assert "disagg_requests_total" in shared.http.get("/metrics").text
    shared.assert_nothing_held()


def test_a_known_prefix_is_found_by_the_router(shared: Cluster) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 5
    shared.complete(prompt)

    def predicted() -> dict[str, Any] | None:
        record = shared.record(shared.complete(prompt).headers["x-request-id"])
        return record if record["predicted"]["prefill_cached_tokens"] else None

    record = eventually(predicted, "the summary has arrived")
    assert record["predicted"]["prefill_cached_tokens"] == record["cached_tokens"]["prefill"]
    assert record["kv"]["pages"] == 1, "only the page that always has to move"


def test_a_stream_goes_on_when_its_decode_worker_is_killed(pair: Cluster) -> None:
    undisturbed, _ = pair.stream()

    def on_event(count: int) -> None:
        if count == 5:
            newest = pair.http.get("/disagg/requests?limit=1").json()[0]
            pair.kill(newest["decode_worker"])

    text, request_id = pair.stream(on_event)
    assert text == undisturbed
    record = pair.record(request_id)
    assert (record["attempts"], record["finish_reason"]) == (2, "length")
    assert sorted(pair.states().values()) == ["lost", "ready", "ready"]


def test_a_prefill_worker_that_is_killed_is_replaced_by_another(cluster: Cluster) -> None:
    for name in ("prefill-0", "prefill-1", "decode-0"):
        cluster.start_worker(name, prefill_s=1.5)
    cluster.start_router()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.complete)
        record = eventually(
            lambda: [r for r in cluster.http.get("/disagg/requests").json() if r["prefill_worker"]], "placed"
        )[0]
        cluster.kill(record["prefill_worker"])
        assert answer.result().status_code == 200
    record = cluster.record(record["request_id"])
    assert (record["decision"], record["attempts"]) == ("disaggregated", 2)
    # Its pages at the decode worker are fenced by the proof that the process is gone.
    cluster.assert_nothing_held()


def test_a_worker_that_comes_back_at_its_address_is_used_again(pair: Cluster) -> None:
    pair.kill("prefill-0")
    eventually(lambda: pair.states()["prefill-0"] == "lost", "its death is noticed", 2.0)
    assert pair.record(pair.complete().headers["x-request-id"])["reason"] == "no prefill worker"
    pair.start_worker("prefill-0")
    pair.wait_ready("prefill-0")
    assert pair.record(pair.complete().headers["x-request-id"])["decision"] == "disaggregated"


def test_a_worker_that_stops_silently_is_lost_and_found_again(pair: Cluster) -> None:
    process = pair.workers["decode-0"]
    process.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: pair.states()["decode-0"] == "lost", "its silence is noticed", 5.0)
        assert pair.complete().status_code == 200
    finally:
        process.send_signal(signal.SIGCONT)
    pair.wait_ready("decode-0")
    pair.assert_nothing_held()


def test_a_client_that_leaves_frees_both_sides(shared: Cluster) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}
    with shared.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    record = eventually(
        lambda: (r := shared.record(response.headers["x-request-id"]))["finish_reason"] and r, "it has ended"
    )
    assert (record["finish_reason"], record["release"]) == ("abort", "aborted")
    shared.assert_nothing_held()


def test_faults_of_workers_do_not_reach_clients(cluster: Cluster) -> None:
    cluster.start_worker("prefill-0", reject=["queue_full"], fail=["no_pages"])
    cluster.start_worker("decode-0", reject=["no_pages"], hand_back_after=[3, 5])
    cluster.start_router()
    text, request_id = cluster.stream()
    record = cluster.record(request_id)
    assert record["attempts"] == 4, "refusals are no attempts"
    assert record["completion_tokens"] == 40
    assert text == cluster.stream()[0]
    cluster.assert_nothing_held()


def test_many_clients_at_once_leave_nothing_behind(shared: Cluster) -> None:
    process = psutil.Process(shared.router.pid)
    idle_fds = process.num_fds()

    def ask(count: int, **fields: Any) -> None:
        """Complete requests from 16 threads, and hang up."""
        with httpx.Client(base_url=shared.http.base_url, timeout=60, trust_env=False) as http:
            body = {"model": MODEL, "max_tokens": 5, "ignore_eos": True} | fields

            def complete(i: int) -> int:
                return http.post("/v1/completions", json=body | {"prompt": f"prompt {i}"}).status_code

            with ThreadPoolExecutor(16) as pool:
                assert set(pool.map(complete, range(count))) == {200}

    ask(60, n=2)
    ask(200)
    eventually(lambda: process.num_fds() <= idle_fds, f"{idle_fds} descriptors again: {process.num_fds()}")
    shared.assert_nothing_held()


def test_a_full_queue_is_answered_429(cluster: Cluster) -> None:
    cluster.start_worker("unified-0", max_num_seqs=1, step_s=0.1)
    cluster.start_router(routing={"max_queued_tokens": 50})
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(cluster.complete, "word " * 20) for _ in range(2)]
        eventually(lambda: len(cluster.http.get("/disagg/requests").json()) == 2, "both are there")
        refused = cluster.complete("word " * 20)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert cluster.record(refused.headers["x-request-id"])["error"] == "Overloaded"
        assert {answer.result().status_code for answer in waiting} == {200}


def test_without_a_decode_worker_it_is_unhealthy_and_answers_503(cluster: Cluster) -> None:
    """The second at once: where none has come back in time, none is waited for."""
    cluster.start_worker("prefill-0")
    cluster.start_worker("decode-0")
    cluster.start_router(lease={"lease_ttl_s": 1.0})
    assert cluster.http.get("/health").status_code == 200
    cluster.kill("decode-0")
    eventually(lambda: cluster.http.get("/health").status_code == 503, "it says so")
    assert cluster.http.get("/live").status_code == 200
    assert [cluster.complete().status_code for _ in range(2)] == [503, 503]


def test_a_request_waits_for_a_decode_worker_that_starts_again(cluster: Cluster) -> None:
    cluster.start_worker("decode-0")
    cluster.start_router()
    cluster.kill("decode-0")
    eventually(lambda: cluster.http.get("/health").status_code == 503, "it is lost")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.complete)
        eventually(lambda: len(cluster.http.get("/disagg/requests").json()) == 1, "it waits")
        cluster.start_worker("decode-0")
        assert answer.result().status_code == 200


def test_sigterm_drains_and_the_status_is_0(pair: Cluster) -> None:
    whole, _ = pair.stream(max_tokens=60)
    events: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(pair.stream, events.append, max_tokens=60)
        eventually(lambda: events, "the stream has begun")
        with socket.create_connection(("127.0.0.1", pair.http.base_url.port or 0), timeout=10) as kept:
            pair.router.send_signal(signal.SIGTERM)
            assert kept.recv(1) == b"", "a client would ask here again, and be refused"
        eventually(lambda: pair.http.get("/health").status_code == 503, "it refuses")
        assert pair.complete().status_code == 503
        assert streaming.result()[0] == whole
    assert pair.router.wait(10) == 0


def test_a_second_signal_stops_at_once(pair: Cluster) -> None:
    events: list[int] = []
    failed = threading.Event()

    def stream() -> None:
        try:
            pair.stream(events.append, max_tokens=2000)
        except (AssertionError, httpx.HTTPError):
            failed.set()

    thread = threading.Thread(target=stream)
    thread.start()
    eventually(lambda: events, "the stream has begun")
    began = time.monotonic()
    pair.router.send_signal(signal.SIGTERM)
    pair.router.send_signal(signal.SIGINT)
    assert pair.router.wait(10) == 0
    assert time.monotonic() - began < 5
    thread.join(5)
    assert failed.is_set()


def test_idle_it_uses_next_to_no_cpu(shared: Cluster) -> None:
    process = psutil.Process(shared.router.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(3)  # what is measured is time itself
    assert (sum(process.cpu_times()[:2]) - before) / 3 < 0.03


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:5600", "tcp://127.0.0.1", "udp://127.0.0.1:1", "ipc://"])
def test_addresses_that_leave_the_machine_are_refused(address: str, checkpoint: Path) -> None:
    from disagg.config import ModelConfig, RouterConfig
    from disagg.errors import ConfigError
    from disagg.router.app import run_router

    config = RouterConfig(port=0, workers=(address,), model=ModelConfig(model=str(checkpoint)))
    with pytest.raises(ConfigError, match="workers must be"):
        run_router(config, ready=lambda _: pytest.fail("it must not serve"))
