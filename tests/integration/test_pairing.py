"""Two versions of a model behind one router over real sockets: the fake workers' tokens tell them apart."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from disagg.checkpoint import tokenizer_hash
from support.checkpoints import make_checkpoint
from support.cluster import Cluster
from support.system import eventually

VERSIONS: dict[str, dict[str, Any]] = {
    "a": {"model_hash": "a" * 32, "first_token_id": 33, "num_token_ids": 40},
    "b": {"model_hash": "b" * 32, "first_token_id": 80, "num_token_ids": 40},
}


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A pair of each version, and a second decode worker of `a`."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"))
    cluster = Cluster(tmp_path_factory.mktemp("p"), checkpoint)
    tokenizer = tokenizer_hash(checkpoint)
    for name in ("prefill-a", "decode-a", "decode-a2", "prefill-b", "decode-b"):
        version = VERSIONS[name.split("-")[1][0]]
        cluster.start_worker(name, tokenizer_hash=tokenizer, **version)
    cluster.start_router()
    yield cluster
    cluster.close()


def version_of(name: str) -> str:
    return name.split("-")[1][0]


def test_every_request_is_computed_within_one_version(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: cluster.complete("the same prompt"), range(24)))
    texts: dict[str, set[str]] = {}
    for answer in answers:
        record = cluster.record(answer.headers["x-request-id"])
        assert (record["decision"], record["attempts"]) == ("disaggregated", 1)
        version = version_of(record["decode_worker"])
        assert version_of(record["prefill_worker"]) == version
        texts.setdefault(version, set()).add(answer.json()["choices"][0]["text"])
    assert {version: len(seen) for version, seen in texts.items()} == {"a": 1, "b": 1}
    assert texts["a"] != texts["b"]
    shown = {w["id"]: w["incompatible"] for w in cluster.http.get("/disagg/workers").json()}
    assert shown["prefill-b"].keys() == {"decode-a", "decode-a2"}
    cluster.assert_nothing_held()


def test_a_stream_goes_on_within_its_version(cluster: Cluster) -> None:
    """Its decode worker is killed; there is room with the other version too."""
    cluster.kill("decode-b")
    eventually(lambda: cluster.states()["decode-b"] == "lost", "no stream begins there")
    whole, _ = cluster.stream(max_tokens=250)
    killed: list[str] = []

    def on_event(count: int) -> None:
        if count == 5:
            cluster.start_worker("decode-b")
            cluster.wait_ready("decode-b")
            killed.append(cluster.http.get("/disagg/requests?limit=1").json()[0]["decode_worker"])
            cluster.kill(killed[0])

    text, request_id = cluster.stream(on_event, max_tokens=250)
    assert text == whole
    record = cluster.record(request_id)
    assert (record["attempts"], record["finish_reason"]) == (2, "length")
    assert {killed[0], record["decode_worker"]} == {"decode-a", "decode-a2"}


def test_workers_that_cannot_be_used_are_listed_with_the_reason(cluster: Cluster) -> None:
    for name, changes in (
        ("decode-a", {"protocol_version": 99}),
        ("decode-a2", {"tokenizer_hash": "another"}),
    ):
        cluster.kill(name)
        cluster.start_worker(name, **changes)

    def refused() -> dict[str, str] | None:
        shown = {w["id"]: w["refused"] for w in cluster.http.get("/disagg/workers").json()}
        return shown if shown["decode-a"] and shown["decode-a2"] else None

    shown = eventually(refused, "both are listed")
    assert shown["decode-a"] == "it speaks protocol version 99, this router 1"
    assert shown["decode-a2"].startswith("its tokenizer is another, this router's ")
    for _ in range(4):
        record = cluster.record(cluster.complete().headers["x-request-id"])
        assert record["decode_worker"] == "decode-b"
