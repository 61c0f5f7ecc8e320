"""What routers are told of the prefix cache: deltas, snapshots, digests. Engine thread only."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from disagg.kv import KvCache
from disagg.protocol import SummaryDelta, SummaryDigest, SummarySnapshot
from disagg.worker.outbox import Outbox, ToRouter, ToRouters

DELTA_INTERVAL_S = 0.05
"""At most so often under load; a router's picture need not be younger than a step or two."""
DIGEST_INTERVAL_S = 5.0
SNAPSHOT_HASHES = 65_536
"""Of one message: half a megabyte."""


def peek_cached_tokens(cache: KvCache, token_ids: Sequence[int], salt: str) -> int:
    """Say how many of a prompt's tokens are cached now, the last one apart, which is always computed."""
    tokens = np.array(token_ids[:-1], np.int32)
    _, page_ids = cache.prefix.match(tokens, salt)
    return len(page_ids) * cache.page_size


class SummaryPublisher:
    """Numbers what changes in one prefix cache and tells every router."""

    def __init__(self, cache: KvCache, outbox: Outbox, clock: Callable[[], float]) -> None:
        self._prefix = cache.prefix
        self._outbox = outbox
        self._clock = clock
        self._seq = 0
        self._delta_at = float("-inf")
        self._digest_at = clock()

    def publish(self, *, at_once: bool) -> None:
        """Send what has changed; unless `at_once`, only where the last delta is a while ago."""
        now = self._clock()
        if not at_once and now < self._delta_at + DELTA_INTERVAL_S:
            return
        seq, stored, removed = self._prefix.drain_delta()
        self._seq = seq
        if len(stored) or len(removed):
            self._delta_at = now
            self._outbox.put(
                ToRouters(SummaryDelta(self._prefix.epoch, seq, stored.tobytes(), removed.tobytes()))
            )

    def send_snapshot(self, router_id: str) -> None:
        """Send one router everything, as of a delta that all have been sent."""
        self.publish(at_once=True)
        for snapshot in self._snapshots():
            self._outbox.put(ToRouter(router_id, snapshot))

    def on_tick(self) -> None:
        """Send what has changed, and every few seconds the digest."""
        self.publish(at_once=True)
        now = self._clock()
        if now >= self._digest_at + DIGEST_INTERVAL_S:
            self._digest_at = now
            count, xor = self._prefix.digest()
            self._outbox.put(ToRouters(SummaryDigest(self._prefix.epoch, self._seq, count, xor)))

    def _snapshots(self) -> Iterator[SummarySnapshot]:
        hashes = self._prefix.snapshot()
        starts = range(0, max(1, len(hashes)), SNAPSHOT_HASHES)
        for start in starts:
            part = hashes[start : start + SNAPSHOT_HASHES]
            yield SummarySnapshot(self._prefix.epoch, self._seq, part.tobytes(), start == starts[-1])
