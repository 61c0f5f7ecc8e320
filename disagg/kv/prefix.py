"""How computed pages are found again: one interface, `radix` and `none`.

A prefix cache owns pages, a request that uses them locks them. `RadixTree` of the C++ core is the
one that matters; its header states the rules in full.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from disagg._core import RadixTree
from disagg.errors import ConfigError

Tokens = NDArray[np.int32]
PageIds = NDArray[np.int32]
Hashes = NDArray[np.uint64]

NO_PAGES: PageIds = np.empty(0, np.int32)
NO_HASHES: Hashes = np.empty(0, np.uint64)


class PagePool(Protocol):
    """Free pages. A page that is not free belongs to whoever took it."""

    @property
    def num_pages(self) -> int:
        """Free or not."""

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""

    def take(self, n: int, /) -> PageIds | None:
        """Take `n` pages, or none at all where fewer are free."""

    def give_back(self, page_ids: PageIds, /) -> None:
        """Free pages; ValueError for one that is free already or out of range."""

    def audit(self) -> None:
        """Raise on a broken invariant."""


class PrefixCache(Protocol):
    """Pages of computed prefixes by their tokens, whole pages only.

    A node handle names a prefix and stays valid while it is locked; handle 0 is the empty prefix.
    """

    @property
    def num_pages(self) -> int:
        """Pages that the cache owns."""

    @property
    def num_locked_pages(self) -> int:
        """Of those, the ones that a lock protects from eviction."""

    @property
    def epoch(self) -> int:
        """Changes when the cache is emptied."""

    def match(self, token_ids: Tokens, salt: str = "") -> tuple[int, PageIds]:
        """Find the longest cached prefix; not locked yet."""

    def lock(self, node: int) -> None:
        """Protect a node and all its ancestors; counted."""

    def unlock(self, node: int) -> None:
        """Undo one `lock`."""

    def insert(
        self, token_ids: Tokens, page_ids: PageIds, salt: str = "", after: int = 0
    ) -> tuple[int, PageIds]:
        """Offer the full pages of `token_ids`; returns the node and the canonical page ids.

        They follow the prefix that `after` names, which must be locked and of that salt. Where
        another page already stood for a position, its id comes back and the caller keeps his own. A
        cache may keep fewer pages than offered: then fewer ids come back, and the pages past them
        stay the caller's.
        """

    def evict(self, num_pages: int) -> PageIds:
        """Give up to `num_pages` unlocked pages back to the caller, least recently used first."""

    def clear(self) -> PageIds:
        """Give all pages back and begin a new epoch. Requires no locks."""

    def drain_delta(self) -> tuple[int, Hashes, Hashes]:
        """Number the changes since the last call: (seq, stored hashes parents first, removed hashes)."""

    def snapshot(self) -> Hashes:
        """All page hashes as of the last drain, parents first."""

    def digest(self) -> tuple[int, int]:
        """(count, xor) of the same hashes."""

    def audit(self) -> None:
        """Raise on a broken invariant."""


class NoPrefixCache:
    """Remembers nothing, so every prompt is computed whole."""

    num_pages = 0
    num_locked_pages = 0
    epoch = 0

    def match(self, token_ids: Tokens, salt: str = "") -> tuple[int, PageIds]:
        """Find nothing."""
        return 0, NO_PAGES

    def lock(self, node: int) -> None:
        """Nothing to protect."""

    def unlock(self, node: int) -> None:
        """Nothing was protected."""

    def insert(
        self, token_ids: Tokens, page_ids: PageIds, salt: str = "", after: int = 0
    ) -> tuple[int, PageIds]:
        """Keep none of the pages."""
        return 0, NO_PAGES

    def evict(self, num_pages: int) -> PageIds:
        """Nothing to give up."""
        return NO_PAGES

    def clear(self) -> PageIds:
        """Nothing to give back."""
        return NO_PAGES

    def drain_delta(self) -> tuple[int, Hashes, Hashes]:
        """Never a change."""
        return 0, NO_HASHES, NO_HASHES

    def snapshot(self) -> Hashes:
        """Hold nothing."""
        return NO_HASHES

    def digest(self) -> tuple[int, int]:
        """Of nothing."""
        return 0, 0

    def audit(self) -> None:
        """Nothing can break."""


PREFIX_CACHES: dict[str, Callable[[int], PrefixCache]] = {
    "radix": RadixTree,
    "none": lambda page_size: NoPrefixCache(),
}
"""By name: what makes an empty cache of pages of so many tokens."""


def make_prefix_cache(name: str, page_size: int) -> PrefixCache:
    """Make an empty prefix cache. Raises ConfigError for an unknown name."""
    make = PREFIX_CACHES.get(name)
    if make is None:
        raise ConfigError(f"--prefix-cache {name!r} is not one of {', '.join(PREFIX_CACHES)}")
    return make(page_size)
