"""A copy of a worker's prefix cache that notices when it is wrong."""

import numpy as np
import pytest
from numpy.typing import NDArray

from disagg._core import PrefixIndex
from disagg.protocol import SummaryDelta, SummaryDigest, SummarySnapshot
from disagg.router.summaries import (
    DISTRUST_MAX_S,
    DISTRUST_MIN_S,
    SNAPSHOT_TIMEOUT_S,
    SummaryFollower,
    Trust,
)

WORKER = 3


def array(*hashes: int) -> NDArray[np.uint64]:
    return np.array(hashes, np.uint64)


def delta(seq: int, *stored: int, removed: tuple[int, ...] = (), epoch: int = 1) -> SummaryDelta:
    return SummaryDelta(epoch, seq, array(*stored).tobytes(), array(*removed).tobytes())


def snapshot(seq: int, *hashes: int, last: bool = True, epoch: int = 1) -> SummarySnapshot:
    return SummarySnapshot(epoch, seq, array(*hashes).tobytes(), last)


def digest(seq: int, *hashes: int, epoch: int = 1) -> SummaryDigest:
    return SummaryDigest(epoch, seq, len(hashes), int(np.bitwise_xor.reduce(array(*hashes), initial=0)))


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex()


@pytest.fixture
def follower(index: PrefixIndex) -> SummaryFollower:
    """Of a worker that holds pages 10 and 11."""
    follower = SummaryFollower(index, WORKER)
    follower.reset(0.0)
    assert not follower.on_snapshot(snapshot(5, 10, 11), 0.0)
    return follower


def held(index: PrefixIndex, *prompt: int) -> int:
    matched = index.match(array(*prompt))
    return int(matched[WORKER]) if len(matched) > WORKER else 0


def test_deltas_are_followed(index: PrefixIndex, follower: SummaryFollower) -> None:
    assert not follower.on_delta(delta(6, 12), 0.0)
    assert held(index, 10, 11, 12) == 3
    assert not follower.on_delta(delta(7, removed=(12,)), 0.0)
    assert held(index, 10, 11, 12) == 2
    assert not follower.on_digest(digest(7, 10, 11), 0.0)


def test_a_duplicate_changes_nothing(index: PrefixIndex, follower: SummaryFollower) -> None:
    follower.on_delta(delta(6, 12), 0.0)
    follower.on_delta(delta(7, removed=(12,)), 0.0)
    assert not follower.on_delta(delta(6, 12), 0.0)
    assert held(index, 10, 11, 12) == 2


@pytest.mark.parametrize("late", [delta(7, 12), delta(6, 12, epoch=2)], ids=["a gap", "another epoch"])
def test_what_does_not_follow_asks_for_a_snapshot(
    index: PrefixIndex, follower: SummaryFollower, late: SummaryDelta
) -> None:
    assert follower.on_delta(late, 0.0)
    assert held(index, 10, 11) == 2, "the old copy serves until then"
    assert not follower.on_snapshot(snapshot(7, 20, epoch=late.epoch), 0.0)
    assert (held(index, 10, 11), held(index, 20)) == (0, 1)


@pytest.mark.parametrize(
    "wrong", [digest(5, 10), digest(5, 10, 12), digest(4, 10, 11), digest(5, 10, 11, epoch=2)]
)
def test_a_digest_that_disagrees_is_a_gap(follower: SummaryFollower, wrong: SummaryDigest) -> None:
    assert follower.on_digest(wrong, 0.0)


def test_a_snapshot_in_parts_replaces_the_copy_when_it_is_whole(
    index: PrefixIndex, follower: SummaryFollower
) -> None:
    follower.ask_again(0.0)
    follower.on_snapshot(snapshot(9, 20, last=False), 0.0)
    assert held(index, 10, 11) == 2
    follower.on_delta(delta(10, 22), 0.0)  # between two parts
    follower.on_snapshot(snapshot(9, 21), 0.0)
    assert (held(index, 10), held(index, 20, 21, 22)) == (0, 3)


def test_a_snapshot_that_does_not_come_is_asked_for_again(follower: SummaryFollower) -> None:
    assert follower.on_delta(delta(9), 0.0)
    assert not follower.on_delta(delta(10), SNAPSHOT_TIMEOUT_S - 0.1)
    assert follower.on_digest(digest(11), SNAPSHOT_TIMEOUT_S)
    assert not follower.on_digest(digest(11), SNAPSHOT_TIMEOUT_S + 0.1)


def test_trust_ends_with_promises_that_are_not_kept_and_comes_back_later() -> None:
    trust = Trust()
    assert not trust.observe(900, 0, 0.0), "too few to prove anything"
    assert trust.observe(900, 0, 0.0)
    assert not trust.holds(DISTRUST_MIN_S - 0.1)
    assert trust.holds(DISTRUST_MIN_S)
    assert trust.observe(2000, 0, DISTRUST_MIN_S)
    assert not trust.holds(DISTRUST_MIN_S * 2.9), "twice as long the second time"
    for _ in range(20):
        trust.observe(2000, 0, 0.0)
    assert trust.holds(DISTRUST_MAX_S)


def test_an_honest_worker_may_evict_in_between() -> None:
    trust = Trust()
    assert not any(trust.observe(1000, 600, 0.0) for _ in range(100))
    assert trust.holds(0.0)


def test_finding_more_than_was_promised_earns_no_credit() -> None:
    trust = Trust()
    trust.observe(10, 100_000, 0.0)
    assert trust.observe(2000, 0, 0.0)
