"""The one owner of a worker's page ids.

Each page is in exactly one of three places: free in the pool, cached in the prefix cache with no
lock on it, or in use. In use are the pages that requests hold: private ones, which their holder
alone may write, and cached ones, which are locked and which nobody writes.
"""

from typing import NamedTuple

import numpy as np

from disagg import _core
from disagg.errors import InvariantBroken
from disagg.kv.prefix import PageIds, PagePool, PrefixCache, Tokens, make_prefix_cache


class PrefixMatch(NamedTuple):
    """The cached start of a prompt, locked until `KvCache.unlock(node)`."""

    page_ids: PageIds
    num_tokens: int
    node: int


class Commit(NamedTuple):
    """What became of computed pages that were offered to the prefix cache."""

    node: int
    """Locked in place of the node that was passed in."""
    page_ids: PageIds
    """The pages that the cache holds in place of those offered; the holder's row must show these."""
    surplus: PageIds
    """The holder's own pages that duplicated cached ones: still private, to be given back by him."""


class KvCache:
    """Free pages and cached pages behind one count. Scheduler thread only.

    Invariant, after every call: `num_free + num_cached + num_in_use == num_pages`.
    """

    def __init__(self, pool: PagePool, prefix: PrefixCache, page_size: int) -> None:
        self.prefix = prefix
        self.page_size = page_size
        self.num_pages = pool.num_pages
        self._pool = pool
        self._is_private = np.zeros(pool.num_pages, np.bool_)
        self._num_private = 0

    @classmethod
    def make(cls, num_pages: int, page_size: int, prefix_cache: str = "radix") -> "KvCache":
        """Make an empty cache of `num_pages`, with the prefix cache of that name."""
        return cls(_core.PagePool(num_pages), make_prefix_cache(prefix_cache, page_size), page_size)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Pages that only the prefix cache holds; evicted when `take` runs short."""
        return self.prefix.num_pages - self.prefix.num_locked_pages

    @property
    def num_in_use(self) -> int:
        """Pages that somebody holds."""
        return self._num_private + self.prefix.num_locked_pages

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: free ones and those it would evict."""
        return self.num_free + self.num_cached

    def match(self, token_ids: Tokens, salt: str, max_tokens: int) -> PrefixMatch:
        """Lock the longest cached prefix of at most `max_tokens` tokens, whole pages only."""
        node, page_ids = self.prefix.match(token_ids[:max_tokens], salt)
        self.prefix.lock(node)
        return PrefixMatch(page_ids, len(page_ids) * self.page_size, node)

    def unlock(self, node: int) -> None:
        """Undo the lock of a `match` or `commit`."""
        self.prefix.unlock(node)

    def take(self, n: int) -> PageIds | None:
        """Take `n` private pages, evicting cached ones where needed; None if too few are available."""
        if n > self.num_available:
            return None
        if n > self.num_free:
            self._pool.give_back(self.prefix.evict(n - self.num_free))
        page_ids = self._pool.take(n)
        if page_ids is None:
            raise InvariantBroken(f"the prefix cache evicted fewer pages than it counts: {n} wanted")
        self._is_private[page_ids] = True
        self._num_private += n
        return page_ids

    def commit(self, token_ids: Tokens, page_ids: PageIds, salt: str, node: int) -> Commit:
        """Offer a sequence's newly full pages, all computed, to the prefix cache.

        Args:
            token_ids: The tokens of `page_ids`, whole pages.
            page_ids: The sequence's pages that follow those of `node`.
            salt: Separates prompts that must not share pages.
            node: The lock that the sequence holds so far, of a match or commit; traded for the returned one.
        """
        new_node, canonical = self.prefix.insert(token_ids, page_ids, salt, node)
        self.prefix.lock(new_node)
        self.prefix.unlock(node)
        own = page_ids[: len(canonical)]
        is_ours = own == canonical
        self._disown(own[is_ours])
        return Commit(new_node, canonical, own[~is_ours])

    def give_back(self, page_ids: PageIds) -> None:
        """Free private pages."""
        self._disown(page_ids)
        self._pool.give_back(page_ids)

    def private_pages(self) -> PageIds:
        """All pages that somebody took and neither committed nor gave back, ascending."""
        return np.flatnonzero(self._is_private).astype(np.int32)

    def audit(self) -> None:
        """Raise InvariantBroken unless every page is in exactly one place."""
        self.prefix.audit()
        self._pool.audit()
        if int(self._is_private.sum()) != self._num_private:
            raise InvariantBroken(f"{self._is_private.sum()} private pages, {self._num_private} counted")
        if self.num_free + self.num_cached + self.num_in_use != self.num_pages:
            raise InvariantBroken(
                f"{self.num_free} free + {self.num_cached} cached + {self.num_in_use} in use "
                f"is not {self.num_pages} pages"
            )

    def _disown(self, page_ids: PageIds) -> None:
        if np.count_nonzero(self._is_private[page_ids]) != len(page_ids):
            raise InvariantBroken(f"pages given up by one who does not hold them: {page_ids.tolist()}")
        self._is_private[page_ids] = False
        self._num_private -= len(page_ids)
