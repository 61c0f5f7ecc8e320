"""Follows what one worker's prefix cache holds, and how far that can be believed.

A summary is numbered: within an epoch each delta counts up by one. A gap, another epoch or a
digest that disagrees is answered the same way, by asking for a snapshot; until it is here the
copy is used as it is, since a wrong hash costs a detour and never a wrong token.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from disagg.protocol import SummaryDelta, SummaryDigest, SummarySnapshot

SNAPSHOT_TIMEOUT_S = 5.0
"""A snapshot that has not come by then is asked for again."""
TRUST_DECAY = 0.95
"""Weight of older observations, each; about the last twenty count."""
TRUST_MIN_TOKENS = 1_000.0
"""Fewer promised tokens than this prove nothing."""
TRUST_MIN_SHARE = 0.5
"""Honest workers evict between promise and use, so some of it may be missing, but not this much."""
DISTRUST_MIN_S = 10.0
DISTRUST_MAX_S = 300.0


class Index(Protocol):
    """What a follower writes to: `disagg._core.PrefixIndex`."""

    def store(self, worker: int, hashes: NDArray[np.uint64]) -> None:
        """Note that `worker` holds pages, parents first."""

    def remove(self, worker: int, hashes: NDArray[np.uint64]) -> None:
        """Note that it no longer does."""

    def drop_worker(self, worker: int) -> None:
        """Forget all of its pages."""

    def match(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Pages matched by each worker."""

    def digest(self, worker: int) -> tuple[int, int]:
        """Count and XOR of its pages."""


class SummaryFollower:
    """One worker's copy in the index. Each `on_` returns whether to ask for a snapshot now."""

    def __init__(self, index: Index, worker: int) -> None:
        self._index = index
        self._worker = worker
        self._epoch: int | None = None
        self._seq = 0
        self._parts: list[NDArray[np.uint64]] = []
        self._later: list[SummaryDelta] = []
        self._asked_at: float | None = None

    def reset(self, now: float) -> None:
        """Start over: another process, which sends a snapshot unasked."""
        self._index.drop_worker(self._worker)
        self._epoch, self._seq = None, 0
        self._parts.clear()
        self._later.clear()
        self._asked_at = now

    def on_delta(self, delta: SummaryDelta, now: float) -> bool:
        """Apply the next delta; one that does not follow is a gap."""
        if self._asked_at is not None:
            # Between two parts of the snapshot: applied once it is whole.
            self._later.append(delta)
            return self._overdue(now)
        if delta.epoch == self._epoch and delta.seq <= self._seq:
            return False  # a duplicate
        if delta.epoch != self._epoch or delta.seq != self._seq + 1:
            return self._gap(now)
        self._apply(delta)
        return False

    def on_snapshot(self, part: SummarySnapshot, now: float) -> bool:
        """Collect a part; the last one replaces the copy."""
        if not self._parts:
            self._later.clear()  # sent before the snapshot, so contained in it
        self._parts.append(_hashes(part.hashes))
        if not part.last:
            return False
        self._index.drop_worker(self._worker)
        for hashes in self._parts:
            if len(hashes):
                self._index.store(self._worker, hashes)
        self._parts.clear()
        self._epoch, self._seq, self._asked_at = part.epoch, part.seq, None
        later, self._later = self._later, []
        return any([self.on_delta(delta, now) for delta in later])

    def on_digest(self, digest: SummaryDigest, now: float) -> bool:
        """Compare; where it disagrees the copy has a gap that no number showed."""
        if self._asked_at is not None:
            return self._overdue(now)
        agrees = (digest.epoch, digest.seq) == (self._epoch, self._seq) and (
            digest.count,
            digest.xor,
        ) == self._index.digest(self._worker)
        return False if agrees else self._gap(now)

    def ask_again(self, now: float) -> bool:
        """Ask for a snapshot for a reason of the caller's."""
        return self._gap(now) if self._asked_at is None else self._overdue(now)

    def _apply(self, delta: SummaryDelta) -> None:
        self._seq = delta.seq
        # Removals first: a page can be removed and stored again under the same hash in one delta
        # only in that order, for add and remove between two deltas cancel.
        if removed := delta.removed:
            self._index.remove(self._worker, _hashes(removed))
        if stored := delta.stored:
            self._index.store(self._worker, _hashes(stored))

    def _gap(self, now: float) -> bool:
        self._asked_at = now
        self._parts.clear()
        self._later.clear()
        return True

    def _overdue(self, now: float) -> bool:
        assert self._asked_at is not None
        if now - self._asked_at < SNAPSHOT_TIMEOUT_S:
            return False
        return self._gap(now)


class Trust:
    """Compares the prefix hits a worker's summary promises with what the worker then finds."""

    def __init__(self) -> None:
        self._promised = 0.0
        self._found = 0.0
        self._until = 0.0
        self._next_s = DISTRUST_MIN_S

    def holds(self, now: float) -> bool:
        """Whether promises count at present."""
        return now >= self._until

    def observe(self, promised_tokens: int, found_tokens: int, now: float) -> bool:
        """Take one comparison; True when it ends the trust, and a snapshot is worth asking for.

        Finding more than promised is no lie (another router's prompt) and earns no credit.
        """
        self._promised = self._promised * TRUST_DECAY + promised_tokens
        self._found = self._found * TRUST_DECAY + min(found_tokens, promised_tokens)
        if self._promised < TRUST_MIN_TOKENS or self._found >= TRUST_MIN_SHARE * self._promised:
            return False
        self._promised = self._found = 0.0
        self._until = now + self._next_s
        self._next_s = min(self._next_s * 2, DISTRUST_MAX_S)
        return True


def _hashes(data: bytes) -> NDArray[np.uint64]:
    """Read a little-endian array off the wire; a few stray bytes at the end are dropped."""
    return np.frombuffer(data, dtype="<u8", count=len(data) // 8).astype(np.uint64, copy=False)
