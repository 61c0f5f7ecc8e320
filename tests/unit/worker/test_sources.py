"""Which prefill workers may still write here."""

import pytest

from disagg.protocol import KvLayout, PeerHello
from disagg.worker.sources import Sources

LAYOUT = KvLayout(16, 6, 3, 16, "float32", 1)


def hello(uuid: str, worker_id: str = "p0", host: str = "here", pids: tuple[int, ...] = (1, 2)) -> PeerHello:
    return PeerHello(1, worker_id, uuid, LAYOUT, [], host, [(pid, 100 + pid) for pid in pids])


@pytest.fixture
def dead() -> set[tuple[int, int]]:
    return set()


@pytest.fixture
def sources(dead: set[tuple[int, int]]) -> Sources:
    return Sources("here", lambda pid, start_time: (pid, start_time) in dead)


def test_gone_only_when_every_rank_is(sources: Sources, dead: set[tuple[int, int]]) -> None:
    """One rank of a dying worker may still be writing."""
    sources.add(hello("a"))
    dead.add((1, 101))
    assert sources.gone() == []
    dead.add((2, 102))
    assert sources.gone() == ["a"]


def test_another_hosts_pids_prove_nothing(sources: Sources, dead: set[tuple[int, int]]) -> None:
    sources.add(hello("a", host="there"))
    sources.add(hello("b", "p1", pids=()))
    dead |= {(1, 101), (2, 102)}
    assert sources.gone() == []


def test_a_successor_proves_its_predecessor_gone(sources: Sources) -> None:
    sources.add(hello("a"))
    sources.add(hello("other", "p1"))
    assert sources.add(hello("a")) == []
    assert sources.add(hello("b")) == ["a"]
    assert sources.uuids == ["other", "b"]
