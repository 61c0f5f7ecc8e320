"""What every prefix cache promises, whatever it keeps."""

import random

import numpy as np
import pytest

from disagg.errors import ConfigError
from disagg.kv import PREFIX_CACHES, PrefixCache, make_prefix_cache
from support.slow_core import SlowRadixTree

CACHES = {**{name: name for name in PREFIX_CACHES}, "slow": "slow"}
NONE = np.empty(0, np.int32)


def make(name: str) -> PrefixCache:
    return SlowRadixTree(2) if name == "slow" else make_prefix_cache(name, 2)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'lru' is not one of radix, none"):
        make_prefix_cache("lru", 16)


@pytest.mark.parametrize("name", CACHES)
def test_nothing_is_found_in_an_empty_cache(name: str) -> None:
    cache = make(name)
    node, pages = cache.match(np.arange(6, dtype=np.int32))
    assert (node, pages.tolist()) == (0, [])
    cache.lock(node)
    cache.unlock(node)
    assert (cache.num_pages, cache.num_locked_pages) == (0, 0)
    assert cache.evict(3).tolist() == []
    cache.audit()


@pytest.mark.parametrize("name", CACHES)
def test_random_use_keeps_every_promise(name: str) -> None:
    """Pages found are pages inserted under the same tokens; locked ones stay; each has one owner."""
    rng = random.Random(name)
    cache = make(name)
    owned: dict[int, tuple[str, tuple[int, ...]]] = {}
    locks: list[tuple[int, list[int]]] = []
    free = list(range(40))
    for _ in range(2000):
        token_ids = np.array([rng.randint(0, 1) for _ in range(rng.randint(0, 12))], np.int32)
        salt = rng.choice(["", "x"])
        action = rng.random()
        if action < 0.2 and locks and len(free) >= len(token_ids) // 2:
            # As `insert` of the whole.
            before, held_pages = rng.choice(locks)
            offered = np.array(rng.sample(free, len(token_ids) // 2), np.int32)
            prefix_salt, prefix_ids = owned[held_pages[-1]] if held_pages else (salt, ())
            node, pages = cache.insert(token_ids, offered, prefix_salt, before)
            for i, page in enumerate(pages.tolist()):
                prefix = (prefix_salt, (*prefix_ids, *token_ids[: 2 * i + 2].tolist()))
                assert owned.setdefault(page, prefix) == prefix
                assert page not in free or page == offered[i], "a page from nowhere"
                free = [other for other in free if other != page]
            cache.lock(node)
            locks.append((node, held_pages + pages.tolist()))
        elif action < 0.4 and len(free) >= len(token_ids) // 2:
            offered = np.array(rng.sample(free, len(token_ids) // 2), np.int32)
            node, pages = cache.insert(token_ids, offered, salt)
            for i, page in enumerate(pages.tolist()):
                prefix = (salt, tuple(token_ids[: 2 * i + 2].tolist()))
                if page in owned:
                    assert owned[page] == prefix
                else:
                    assert page == offered[i], "a page from nowhere"
                    owned[page] = prefix
                    free.remove(page)
            cache.lock(node)
            locks.append((node, pages.tolist()))
        elif action < 0.6:
            node, pages = cache.match(token_ids, salt)
            found = [owned[page] for page in pages.tolist()]
            assert found == [(salt, tuple(token_ids[: 2 * i + 2].tolist())) for i in range(len(found))]
            longer = (salt, tuple(token_ids[: 2 * len(found) + 2].tolist()))
            assert len(found) == len(token_ids) // 2 or longer not in owned.values(), "not the longest"
            cache.lock(node)
            locks.append((node, pages.tolist()))
        elif action < 0.8 and locks:
            cache.unlock(locks.pop(rng.randrange(len(locks)))[0])
        else:
            evicted = cache.evict(rng.randint(1, 3)).tolist()
            for page in evicted:
                del owned[page]
            free += evicted
        held = {page for _, pages in locks for page in pages}
        assert held <= owned.keys(), "a locked page was evicted"
        assert (cache.num_pages, cache.num_locked_pages) == (len(owned), len(held))
        cache.audit()
    for node, _ in locks:
        cache.unlock(node)
    assert sorted(cache.clear().tolist() + free) == list(range(40))
