"""Page hashes, page pool, radix tree and prefix index, in C++. The headers in csrc/core say how.

Arrays must be contiguous and of the very dtype named; nothing is converted. Returned arrays are the
caller's. Each object belongs to one thread at a time.
"""

import numpy as np
from numpy.typing import NDArray

def page_hashes(token_ids: NDArray[np.int32], page_size: int, salt: str = "") -> NDArray[np.uint64]:
    """Hash the full pages of a prompt, each hash covering the salt and every token up to its page's end.

    Returns one hash for each full page. Equal on every machine; equal hashes mean equal prefixes up
    to chance.
    """

class PagePool:
    """The free pages of a KV pool. `audit()` raises InvariantBroken."""

    def __init__(self, num_pages: int) -> None: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def take(self, n: int) -> NDArray[np.int32] | None:
        """Take `n` pages, or none and return None when fewer are free."""

    def give_back(self, page_ids: NDArray[np.int32]) -> None:
        """Give pages back: all, or none and ValueError when one is free already, doubled or out of range."""

    def audit(self) -> None: ...

class RadixTree:
    """Which page of KV holds which page of which prompt, compared token by token.

    A node handle names a full prefix and keeps meaning it while the tree is split and grown. It goes
    stale when a page of it is evicted, which a lock prevents; a stale one is a ValueError. 0 is the
    empty prefix. `audit()` raises InvariantBroken.
    """

    def __init__(self, page_size: int) -> None: ...
    @property
    def num_pages(self) -> int:
        """Pages that belong to the tree."""

    @property
    def num_locked_pages(self) -> int:
        """Of those, pages on the way to a locked node."""

    @property
    def num_nodes(self) -> int:
        """Runs of pages, and one root for each salt in use."""

    @property
    def epoch(self) -> int:
        """Changes when the tree is cleared."""

    def match(self, token_ids: NDArray[np.int32], salt: str = "") -> tuple[int, NDArray[np.int32]]:
        """Find the longest cached prefix in whole pages; it counts as used now and is not locked."""

    def lock(self, node: int) -> None:
        """Keep a prefix from being evicted until it is unlocked as often as it was locked."""

    def unlock(self, node: int) -> None:
        """Take one lock back; ValueError if there is none."""

    def insert(
        self, token_ids: NDArray[np.int32], page_ids: NDArray[np.int32], salt: str = "", after: int = 0
    ) -> tuple[int, NDArray[np.int32]]:
        """Cache the full pages of a prompt, or those that follow a prefix of it.

        Args:
            token_ids: The prompt; a last page that is not full is ignored.
            page_ids: One for each full page. The leading ones may be the tree's own from `match`.
            salt: Prompts with different salts share nothing.
            after: The node of the prefix that `token_ids` follow, which is then of that salt already.

        Returns:
            The node of the whole sequence, and for each page given the page id that is cached there now.
            Where that differs from `page_ids`, the tree held one already and the caller's page stays
            the caller's; the others belong to the tree now.
        """

    def evict(self, num_pages: int) -> NDArray[np.int32]:
        """Hand back up to `num_pages` pages that are not locked, least recently used leaves first."""

    def clear(self) -> NDArray[np.int32]:
        """Hand back all pages and begin a new epoch; ValueError while pages are locked."""

    def drain_delta(self) -> tuple[int, NDArray[np.uint64], NDArray[np.uint64]]:
        """Return `(seq, stored, removed)`: page hashes gained (parents first) and lost since the last drain.

        `seq` counts the drains of this epoch that were not empty; an empty one repeats the last.
        """

    def snapshot(self) -> NDArray[np.uint64]:
        """Return all page hashes as of the last drain, parents first."""

    def digest(self) -> tuple[int, int]:
        """Return count and XOR of all page hashes as of the last drain."""

    def audit(self) -> None: ...

class PrefixIndex:
    """A router's picture of what every worker holds; one lookup tells every worker's match.

    Workers are numbers in `[0, 4096)`. Two threads inside at once are a RuntimeError. `audit()`
    raises InvariantBroken.
    """

    def __init__(self) -> None: ...
    def store(self, worker: int, hashes: NDArray[np.uint64]) -> None:
        """Note that a worker holds these pages; those it holds already change nothing."""

    def remove(self, worker: int, hashes: NDArray[np.uint64]) -> None:
        """Note that a worker holds these pages no more; those it does not hold change nothing."""

    def drop_worker(self, worker: int) -> None:
        """Forget everything a worker holds."""

    def match(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return how many leading pages of a prompt each worker holds, shape `[num_workers]`."""

    def match_all(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Match several prompts of equal length, `[prompts, pages]` to `[prompts, num_workers]`."""

    def digest(self, worker: int) -> tuple[int, int]:
        """Return count and XOR of what a worker holds, to compare with its own."""

    @property
    def num_workers(self) -> int:
        """One more than the highest worker that ever stored."""

    @property
    def num_hashes(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    def audit(self) -> None: ...
