from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from disagg.errors import LayoutMismatch, TransferError
from disagg.kv.layout import PageLayout
from disagg.protocol import KvLayout
from disagg.transfer.plan import (
    ByteRuns,
    check_layouts,
    check_pages,
    expected_bytes,
    pairs,
    plan_transfer,
    shared_heads,
)


def make_layout(num_kv_heads: int = 6, tp_size: int = 1, **changes: Any) -> KvLayout:
    fields = {"page_size": 2, "num_layers": 2, "head_dim": 2, "dtype": "float16"} | changes
    return KvLayout(num_kv_heads=num_kv_heads, tp_size=tp_size, **fields)


def copy(runs: ByteRuns, source: np.ndarray, target: np.ndarray) -> None:
    """Move bytes as the plan says, with nothing but byte offsets."""
    source_bytes, target_bytes = source.reshape(-1).view(np.uint8), target.reshape(-1).view(np.uint8)
    for start, to, length in zip(runs.source_offsets, runs.target_offsets, runs.lengths, strict=True):
        target_bytes[to : to + length] = source_bytes[start : start + length]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def reshardings(draw: st.DrawFn) -> tuple[KvLayout, KvLayout, list[int], list[int], int]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    source = make_layout(heads, draw(st.sampled_from(divisors(heads))))
    target = make_layout(heads, draw(st.sampled_from(divisors(heads))))
    num_pages = 8
    count = draw(st.integers(0, num_pages))
    ids = st.permutations(range(num_pages)).map(lambda p: p[:count])
    # Often in order, so that runs are merged.
    ordered = st.integers(0, num_pages - count).map(lambda first: list(range(first, first + count)))
    return source, target, draw(ids | ordered), draw(ids | ordered), num_pages


@given(reshardings(), st.data())
def test_moving_bytes_by_the_plan_is_slicing_heads_of_the_whole_array(
    resharding: tuple[KvLayout, KvLayout, list[int], list[int], int], data: st.DataObject
) -> None:
    """Every rank of the target ends with exactly its heads, whatever the two TP sizes."""
    source, target, source_pages, target_pages, num_pages = resharding
    whole_page = (source.num_kv_heads, source.num_layers, 2, source.page_size, source.head_dim)
    whole = data.draw(arrays(np.uint16, (num_pages, *whole_page)))
    pools = np.split(whole, source.tp_size, axis=1)
    for target_rank in range(target.tp_size):
        pool = np.zeros((num_pages, *PageLayout.of(target).shape), np.uint16)
        for source_rank in range(source.tp_size):
            runs = plan_transfer(source, source_rank, target, target_rank, source_pages, target_pages)
            copy(runs, np.ascontiguousarray(pools[source_rank]), pool)
        expected = np.zeros_like(pool)
        if source_pages:
            expected[target_pages] = np.split(whole, target.tp_size, axis=1)[target_rank][source_pages]
        np.testing.assert_array_equal(pool, expected)


@given(reshardings())
def test_bytes_of_the_plan_are_the_bytes_expected_of_each_pair(
    resharding: tuple[KvLayout, KvLayout, list[int], list[int], int],
) -> None:
    """Decode adds up what arrives against `expected_bytes`, so the two must agree."""
    source, target, source_pages, target_pages, _ = resharding
    planned = {
        (s, t): plan_transfer(source, s, target, t, source_pages, target_pages).num_bytes
        for s, t in pairs(source.tp_size, target.tp_size)
    }
    assert planned == expected_bytes(source, target, len(source_pages))
    assert sum(planned.values()) == len(source_pages) * PageLayout.of(source).page_bytes * source.tp_size


@pytest.mark.parametrize("source_tp", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("target_tp", [1, 2, 3, 4, 6])
def test_pairs_are_those_that_share_a_head(source_tp: int, target_tp: int) -> None:
    """The pairs need no head count: decode waits for these and no other."""
    source, target = make_layout(12, source_tp), make_layout(12, target_tp)
    assert pairs(source_tp, target_tp) == [
        (s, t)
        for s in range(source_tp)
        for t in range(target_tp)
        if shared_heads(source, s, target, t) is not None
    ]


def test_equal_shares_of_consecutive_pages_are_one_run() -> None:
    """A long prompt on a fresh worker moves in one piece."""
    layout = make_layout(tp_size=2)
    runs = plan_transfer(layout, 1, layout, 1, [3, 4, 5, 9, 10], [0, 1, 2, 3, 7])
    page = PageLayout.of(layout).page_bytes
    assert runs.source_offsets.tolist() == [3 * page, 9 * page, 10 * page]
    assert runs.target_offsets.tolist() == [0, 3 * page, 7 * page]
    assert runs.lengths.tolist() == [3 * page, page, page]


def test_part_of_a_page_is_never_joined_with_the_next_page() -> None:
    """Half of the heads leaves a gap between pages on the wider side."""
    runs = plan_transfer(make_layout(tp_size=1), 0, make_layout(tp_size=2), 1, [0, 1], [0, 1])
    assert runs.num_runs == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("page_size", 4), ("num_kv_heads", 12), ("num_layers", 3), ("head_dim", 4), ("dtype", "bfloat16")],
)
def test_a_layout_that_differs_is_refused_by_the_name_of_the_field(field: str, value: object) -> None:
    """Who reads the message must see what to change."""
    changes = {field: value}
    with pytest.raises(LayoutMismatch, match=f"^{field} is .* at the source and {value} at the target$"):
        check_layouts(make_layout(), make_layout(**changes))


def test_a_tp_size_that_does_not_divide_the_heads_is_refused() -> None:
    """The peer's layout comes from the network."""
    with pytest.raises(LayoutMismatch, match="tp_size 4 of the target does not divide num_kv_heads 6"):
        check_layouts(make_layout(), make_layout(tp_size=4))
    with pytest.raises(LayoutMismatch, match="tp_size 0"):
        check_layouts(make_layout(), make_layout(tp_size=0))


def test_layouts_that_differ_in_tp_size_alone_fit() -> None:
    check_layouts(make_layout(tp_size=3), make_layout(tp_size=2))


@pytest.mark.parametrize("page", [-1, 8, 2**40])
def test_a_page_outside_the_pool_is_refused(page: int) -> None:
    """A write would follow it into other memory of the peer."""
    check_pages([0, 7], 8, "target")
    with pytest.raises(TransferError, match=rf"target page {page} is not in \[0, 8\)"):
        check_pages([0, page], 8, "target")


def test_unequal_numbers_of_pages_are_refused() -> None:
    with pytest.raises(TransferError, match="2 source pages for 1 target pages"):
        plan_transfer(make_layout(), 0, make_layout(), 0, [0, 1], [0])
