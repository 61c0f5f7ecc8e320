"""Page hashes as Python sees them; the value itself is pinned in tests/cpp."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg._core import page_hashes

prompts = st.lists(st.integers(0, 3), max_size=40)
page_sizes = st.integers(1, 9)


def hash_of(tokens: list[int], page_size: int, salt: str = "") -> list[int]:
    return [int(h) for h in page_hashes(np.array(tokens, np.int32), page_size, salt)]


@settings(deadline=None)
@given(prompts, prompts, page_sizes)
def test_equal_hashes_are_equal_prefixes(a: list[int], b: list[int], page_size: int) -> None:
    """A router finds the common prefix of two prompts by their hashes alone."""
    hashes_a, hashes_b = hash_of(a, page_size), hash_of(b, page_size)
    assert len(hashes_a) == len(a) // page_size
    for page, (x, y) in enumerate(zip(hashes_a, hashes_b, strict=False), 1):
        assert (x == y) == (a[: page * page_size] == b[: page * page_size])


@settings(deadline=None)
@given(prompts, page_sizes, st.lists(st.text(max_size=20), min_size=2, max_size=5, unique=True))
def test_salts_and_page_sizes_share_nothing(tokens: list[int], page_size: int, salts: list[str]) -> None:
    """One tenant's cache must not be seen in another's routing."""
    runs = [hash_of(tokens, page_size, salt) for salt in salts] + [hash_of(tokens, page_size + 1, salts[0])]
    every = [h for run in runs for h in run]
    assert len(set(every)) == len(every)


@settings(deadline=None)
@given(prompts, page_sizes)
def test_what_follows_a_full_page_does_not_change_its_hash(tokens: list[int], page_size: int) -> None:
    grown = [hash_of(tokens[:n], page_size) for n in range(len(tokens) + 1)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(grown))


def test_nothing_is_converted_silently() -> None:
    """A silent copy on the hot path, or a truncated token id, would never be noticed."""
    for wrong in (np.zeros(8, np.int64), np.zeros(8, np.uint32), np.zeros(16, np.int32)[::2], [0] * 8):
        with pytest.raises(TypeError):
            page_hashes(wrong, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        page_hashes(np.zeros(8, np.int32), 0)
    read_only = np.zeros(8, np.int32)
    read_only.flags.writeable = False
    assert len(page_hashes(read_only, 4)) == 2
