from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from disagg._core import PagePool


def pages(ids: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(ids, np.int32)


class PoolAgainstSet(RuleBasedStateMachine):
    """The twin is the set of free pages."""

    @initialize(num_pages=st.integers(0, 12))
    def make(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.free = set(range(num_pages))

    @rule(n=st.integers(0, 14))
    def take(self, n: int) -> None:
        taken = self.pool.take(n)
        assert (taken is None) == (n > len(self.free))
        if taken is not None:
            assert len(taken) == n
            assert set(taken.tolist()) <= self.free
            self.free -= set(taken.tolist())

    @rule(ids=st.lists(st.integers(-2, 14), max_size=4))
    def give_back(self, ids: list[int]) -> None:
        held = set(range(self.pool.num_pages)) - self.free
        if set(ids) <= held and len(set(ids)) == len(ids):
            self.pool.give_back(pages(ids))
            self.free |= set(ids)
        else:
            with pytest.raises(ValueError, match="is not in use"):
                self.pool.give_back(pages(ids))

    @invariant()
    def agrees(self) -> None:
        self.pool.audit()
        assert self.pool.num_free == len(self.free)


TestPool = PoolAgainstSet.TestCase
TestPool.settings = settings(deadline=None)


def test_the_page_given_back_last_is_taken_first() -> None:
    """Its memory is the likeliest to be in a cache."""
    pool = PagePool(4)
    assert pool.take(3).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    pool.give_back(pages([1]))
    assert pool.take(2).tolist() == [1, 3]  # type: ignore[union-attr]


def test_bad_counts_are_named() -> None:
    with pytest.raises(ValueError, match="num_pages must be in"):
        PagePool(-1)
    with pytest.raises(ValueError, match="num_pages must be in"):
        PagePool(2**31)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        PagePool(4).take(-1)
