"""What routers are told of the prefix cache."""

import numpy as np
import pytest

from disagg.protocol import SummaryDelta, SummaryDigest, SummarySnapshot
from disagg.worker import prefix
from disagg.worker.outbox import Outbox, ToRouter, ToRouters
from disagg.worker.prefix import SummaryPublisher, peek_cached_tokens
from support.clock import FakeClock
from support.engines import make_cache

PAGE_SIZE = 4


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.cache = make_cache(64, PAGE_SIZE)
        self.outbox = Outbox()
        self.publisher = SummaryPublisher(self.cache, self.outbox, self.clock)

    def store(self, seed: int, num_pages: int = 2) -> list[int]:
        """Compute a prompt and let go of it."""
        tokens = np.random.default_rng(seed).integers(0, 100, num_pages * PAGE_SIZE).astype(np.int32)
        match = self.cache.match(tokens, "", len(tokens))
        pages = self.cache.take(num_pages - len(match.page_ids))
        assert pages is not None
        commit = self.cache.commit(tokens[match.num_tokens :], pages, "", match.node)
        self.cache.unlock(commit.node)
        return tokens.tolist()

    def said(self) -> list[object]:
        return [effect.message for effect in self.outbox.take() if isinstance(effect, ToRouters | ToRouter)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_prompt_is_cached_up_to_its_last_token(bench: Bench) -> None:
    """The last one is always computed, so a prompt of whole pages lacks its last page."""
    tokens = bench.store(1, 3)
    assert peek_cached_tokens(bench.cache, tokens, "") == 8
    assert peek_cached_tokens(bench.cache, [*tokens, 5], "") == 12
    assert peek_cached_tokens(bench.cache, tokens, "salt") == 0
    assert bench.cache.num_in_use == 0


def test_changes_are_told_at_most_every_interval_and_when_idle_at_once(bench: Bench) -> None:
    bench.publisher.publish(at_once=False)
    assert bench.said() == []  # nothing has changed
    bench.store(1)
    bench.publisher.publish(at_once=False)
    assert [message.seq for message in bench.said()] == [1]
    bench.store(2)
    bench.publisher.publish(at_once=False)
    assert bench.said() == []
    bench.clock.advance(prefix.DELTA_INTERVAL_S)
    bench.store(3)
    bench.publisher.publish(at_once=False)
    (delta,) = bench.said()
    assert isinstance(delta, SummaryDelta)
    assert (delta.seq, len(delta.stored), delta.removed) == (2, 4 * 8, b"")
    bench.store(4)
    bench.publisher.publish(at_once=True)
    assert [message.seq for message in bench.said()] == [3]


def test_a_snapshot_follows_the_delta_that_it_includes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SNAPSHOT_HASHES", 3)
    bench.store(1, 4)
    bench.store(2, 4)
    bench.publisher.send_snapshot("r")
    delta, *parts = bench.said()
    assert isinstance(delta, SummaryDelta)
    assert all(isinstance(part, SummarySnapshot) and part.seq == delta.seq for part in parts)
    assert [part.last for part in parts] == [False, False, True]
    assert [len(part.hashes) // 8 for part in parts] == [3, 3, 2]
    hashes = np.frombuffer(b"".join(part.hashes for part in parts), np.uint64)
    assert set(hashes.tolist()) == set(np.frombuffer(delta.stored, np.uint64).tolist())


def test_an_empty_cache_has_a_snapshot(bench: Bench) -> None:
    bench.publisher.send_snapshot("r")
    assert bench.said() == [SummarySnapshot(bench.cache.prefix.epoch, 0, b"", True)]


def test_the_digest_is_of_what_was_told(bench: Bench) -> None:
    bench.store(1)
    bench.clock.advance(prefix.DIGEST_INTERVAL_S)
    bench.publisher.on_tick()
    delta, digest = bench.said()
    assert isinstance(digest, SummaryDigest)
    stored = np.frombuffer(delta.stored, np.uint64)
    assert (digest.seq, digest.count) == (1, 2)
    assert digest.xor == int(np.bitwise_xor.reduce(stored))
    bench.publisher.on_tick()
    assert bench.said() == []
