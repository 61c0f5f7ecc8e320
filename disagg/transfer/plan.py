"""Which bytes of a source pool go where in a target pool. Pure arithmetic, no addresses.

Heads are the outermost axis of a page, so what one rank shares with another is one run of bytes
a page, whatever their tensor-parallel sizes; where both hold exactly the same heads, consecutive
pages join into one run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disagg.errors import LayoutMismatch, TransferError
from disagg.kv.layout import PageLayout
from disagg.protocol import KvLayout

Offsets = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """Runs of bytes to copy, as columns: row i is `(source_offset, target_offset, length)`.

    Columns and not a list of records, because a transport takes them as arrays and a long
    prompt has thousands.
    """

    source_offsets: Offsets
    target_offsets: Offsets
    lengths: Offsets

    @property
    def num_runs(self) -> int:
        """How many separate copies this is."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes moved in all."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True)
class HeadSpan:
    """The heads that a source rank and a target rank share, numbered within each."""

    source_head: int
    target_head: int
    num_heads: int


def check_layouts(source: KvLayout, target: KvLayout) -> None:
    """Make sure that pages of `source` mean the same in `target`.

    Raises:
        LayoutMismatch: names every field that differs; `tp_size` may differ.
    """
    differing = [
        f"{field} is {getattr(source, field)} at the source and {getattr(target, field)} at the target"
        for field in ("page_size", "num_kv_heads", "num_layers", "head_dim", "dtype")
        if getattr(source, field) != getattr(target, field)
    ]
    if differing:
        raise LayoutMismatch("; ".join(differing))
    for side, layout in (("source", source), ("target", target)):
        if layout.tp_size < 1 or layout.num_kv_heads % layout.tp_size:
            raise LayoutMismatch(
                f"tp_size {layout.tp_size} of the {side} does not divide num_kv_heads {layout.num_kv_heads}"
            )


def pairs(source_tp: int, target_tp: int) -> list[tuple[int, int]]:
    """List the (source rank, target rank) pairs that share heads, in order.

    Independent of the number of heads: rank r of n holds the share `[r/n, (r+1)/n)` of them.
    """
    return [
        (source, target)
        for source in range(source_tp)
        for target in range(target_tp)
        if source * target_tp < (target + 1) * source_tp and target * source_tp < (source + 1) * target_tp
    ]


def shared_heads(source: KvLayout, source_rank: int, target: KvLayout, target_rank: int) -> HeadSpan | None:
    """Find the heads that both ranks hold; None where they share none."""
    source_heads = source.num_kv_heads // source.tp_size
    target_heads = target.num_kv_heads // target.tp_size
    first = max(source_rank * source_heads, target_rank * target_heads)
    end = min((source_rank + 1) * source_heads, (target_rank + 1) * target_heads)
    if first >= end:
        return None
    return HeadSpan(first - source_rank * source_heads, first - target_rank * target_heads, end - first)


def plan_transfer(
    source: KvLayout,
    source_rank: int,
    target: KvLayout,
    target_rank: int,
    source_pages: Sequence[int],
    target_pages: Sequence[int],
) -> ByteRuns:
    """Find the runs that bring `source_pages` of one rank into `target_pages` of another.

    Args:
        source: Layout of the source pool, all ranks; `check_layouts` has passed.
        source_rank: Whose share is read.
        target: Layout of the target pool, all ranks.
        target_rank: Whose share is written.
        source_pages: Pages in prompt order, shape `[n]`.
        target_pages: Where each of them goes, shape `[n]`.

    Returns:
        At most `n` runs with offsets from each pool's base; none where the ranks share no head.

    Source: "The KV page is one contiguous run" in the architecture document.
    """
    if len(source_pages) != len(target_pages):
        raise TransferError(f"{len(source_pages)} source pages for {len(target_pages)} target pages")
    span = shared_heads(source, source_rank, target, target_rank)
    if span is None:
        return _runs(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    source_page, target_page = PageLayout.of(source), PageLayout.of(target)
    head_bytes = source_page.head_bytes
    return _merge(
        _runs(
            np.asarray(source_pages, np.int64) * source_page.page_bytes + span.source_head * head_bytes,
            np.asarray(target_pages, np.int64) * target_page.page_bytes + span.target_head * head_bytes,
            span.num_heads * head_bytes,
        )
    )


def expected_bytes(source: KvLayout, target: KvLayout, num_pages: int) -> dict[tuple[int, int], int]:
    """Say how many bytes each (source rank, target rank) pair moves for `num_pages` pages."""
    head_bytes = PageLayout.of(source).head_bytes
    expected = {}
    for source_rank, target_rank in pairs(source.tp_size, target.tp_size):
        span = shared_heads(source, source_rank, target, target_rank)
        assert span is not None, "pairs and shared_heads disagree"
        expected[source_rank, target_rank] = num_pages * span.num_heads * head_bytes
    return expected


def check_pages(page_ids: Sequence[int], num_pages: int, side: str) -> None:
    """Refuse page ids outside the pool: they come from the network, and a write would follow them.

    Raises:
        TransferError: a page is not in `[0, num_pages)`.
    """
    for page in page_ids:
        if not 0 <= page < num_pages:
            raise TransferError(f"{side} page {page} is not in [0, {num_pages})")


def _runs(source_offsets: Offsets, target_offsets: Offsets, length: int) -> ByteRuns:
    return ByteRuns(source_offsets, target_offsets, np.full(len(source_offsets), length, np.int64))


def _merge(runs: ByteRuns) -> ByteRuns:
    """Join each run with the one before it where they touch on both sides."""
    if runs.num_runs < 2:
        return runs
    lengths = runs.lengths[:-1]
    touches = (runs.source_offsets[:-1] + lengths == runs.source_offsets[1:]) & (
        runs.target_offsets[:-1] + lengths == runs.target_offsets[1:]
    )
    starts = np.flatnonzero(np.concatenate(([True], ~touches)))
    return ByteRuns(
        runs.source_offsets[starts], runs.target_offsets[starts], np.add.reduceat(runs.lengths, starts)
    )
