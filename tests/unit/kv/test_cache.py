"""Where pages are, and who may take them."""

import numpy as np
import pytest

from disagg.errors import InvariantBroken
from disagg.kv import KvCache
from support.engines import make_cache

PAGE_SIZE = 4


def tokens(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def counts(cache: KvCache) -> tuple[int, int, int]:
    assert cache.num_free + cache.num_cached + cache.num_in_use == cache.num_pages
    cache.audit()
    return cache.num_free, cache.num_cached, cache.num_in_use


@pytest.fixture(params=["radix", "slow"])
def cache(request: pytest.FixtureRequest) -> KvCache:
    return make_cache(num_pages=8, page_size=PAGE_SIZE, prefix=request.param)


def commit(cache: KvCache, token_ids: np.ndarray, salt: str = "") -> tuple[int, np.ndarray]:
    """Compute a prompt of whole pages that shares nothing; returns its lock and pages."""
    pages = cache.take(len(token_ids) // PAGE_SIZE)
    done = cache.commit(token_ids, pages, salt, 0)
    assert len(done.surplus) == 0
    return done.node, done.page_ids


def test_a_page_is_free_then_in_use_then_cached_then_free_again(cache: KvCache) -> None:
    assert counts(cache) == (8, 0, 0)
    pages = cache.take(3)
    assert counts(cache) == (5, 0, 3)
    done = cache.commit(tokens(8), pages[:2], "", 0)
    assert counts(cache) == (5, 0, 3)
    cache.unlock(done.node)
    assert counts(cache) == (5, 2, 1)
    cache.give_back(pages[2:])
    assert counts(cache) == (6, 2, 0)
    assert len(cache.take(8)) == 8
    assert counts(cache) == (0, 0, 8)


def test_take_gives_all_or_nothing(cache: KvCache) -> None:
    """A request with half of its pages would wait for the other half while it holds these."""
    node, _ = commit(cache, tokens(8))
    assert cache.take(7) is None
    assert counts(cache) == (6, 0, 2)
    cache.unlock(node)
    assert cache.take(9) is None
    assert counts(cache) == (6, 2, 0)


def test_take_evicts_no_more_than_it_lacks(cache: KvCache) -> None:
    node, _ = commit(cache, tokens(16))
    cache.unlock(node)
    cache.take(5)
    assert counts(cache) == (0, 3, 5)


def test_a_locked_prefix_is_never_evicted(cache: KvCache) -> None:
    node, pages = commit(cache, tokens(16))
    cache.unlock(node)
    match = cache.match(tokens(8), "", 8)
    assert cache.num_available == 6
    taken = cache.take(6)
    assert not set(taken.tolist()) & set(match.page_ids.tolist())
    assert match.page_ids.tolist() == pages[:2].tolist()
    cache.unlock(match.node)
    assert counts(cache) == (0, 2, 6)


def test_a_match_is_whole_pages_and_no_longer_than_allowed(cache: KvCache) -> None:
    commit(cache, tokens(12))
    assert cache.match(tokens(12), "", 12).num_tokens == 12
    # The last token of a prompt has to be computed for its logits.
    assert cache.match(tokens(12), "", 11).num_tokens == 8
    assert cache.match(tokens(7), "", 7).num_tokens == 4
    assert cache.match(tokens(12, first=1), "", 12) == (pytest.approx(np.empty(0)), 0, 0)


def test_salts_share_nothing(cache: KvCache) -> None:
    commit(cache, tokens(8), "a")
    assert cache.match(tokens(8), "b", 8).num_tokens == 0
    assert cache.match(tokens(8), "a", 8).num_tokens == 8


def test_the_second_to_compute_a_page_keeps_its_own_and_is_shown_the_first(cache: KvCache) -> None:
    node, first = commit(cache, tokens(8))
    second = cache.take(3)
    done = cache.commit(tokens(12), second, "", 0)
    assert done.page_ids.tolist() == [*first.tolist(), second[2]]
    assert done.surplus.tolist() == second[:2].tolist()
    assert counts(cache) == (3, 0, 5)
    cache.give_back(done.surplus)
    cache.unlock(node)
    assert counts(cache) == (5, 0, 3)
    cache.unlock(done.node)
    assert counts(cache) == (5, 3, 0)


def test_giving_back_a_page_twice_is_noticed(cache: KvCache) -> None:
    pages = cache.take(2)
    cache.give_back(pages)
    with pytest.raises(InvariantBroken, match="does not hold"):
        cache.give_back(pages)
    assert counts(cache) == (8, 0, 0)


def test_committed_pages_cannot_be_given_back(cache: KvCache) -> None:
    """They are the prefix cache's, and others may be reading them."""
    _, pages = commit(cache, tokens(8))
    with pytest.raises(InvariantBroken, match="does not hold"):
        cache.give_back(pages)


def test_the_audit_notices_a_page_in_two_places(cache: KvCache) -> None:
    pages = cache.take(2)
    cache._pool.give_back(pages)
    with pytest.raises(InvariantBroken, match="8 pages"):
        cache.audit()


def test_without_a_prefix_cache_pages_stay_private() -> None:
    cache = make_cache(num_pages=8, page_size=PAGE_SIZE, prefix="none")
    pages = cache.take(3)
    done = cache.commit(tokens(12), pages, "", 0)
    assert done == (0, pytest.approx(np.empty(0)), pytest.approx(np.empty(0)))
    assert cache.match(tokens(12), "", 12).num_tokens == 0
    assert counts(cache) == (5, 0, 3)
    cache.give_back(pages)
    assert counts(cache) == (8, 0, 0)
