"""The prefix index against brute force: a set of hashes a worker, walked page by page."""

import threading
from functools import reduce
from itertools import takewhile
from operator import xor
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg._core import PrefixIndex, RadixTree, page_hashes

WORKERS = [0, 1, 2, 63, 64, 300]


def array(values: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def prompt_hashes(tokens: list[int]) -> list[int]:
    return [int(h) for h in page_hashes(np.array(tokens, np.int32), 1)]


prompts = st.lists(st.sampled_from([0, 0, 0, 0, 1, 2]), max_size=60).map(prompt_hashes)
workers = st.sampled_from(WORKERS)
any_hashes = st.lists(st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]), max_size=6)


class IndexAgainstSets(RuleBasedStateMachine):
    """Workers hold whole prefixes, as prefix caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[int, set[int]] = {worker: set() for worker in WORKERS}
        self.stored: dict[int, list[list[int]]] = {worker: [] for worker in WORKERS}

    @rule(worker=workers, prompt=prompts)
    def store(self, worker: int, prompt: list[int]) -> None:
        self.index.store(worker, array(prompt))
        self.held[worker] |= set(prompt)
        self.stored[worker].append(prompt)

    @precondition(lambda self: any(self.stored.values()))
    @rule(data=st.data())
    def remove_a_tail(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([w for w in WORKERS if self.stored[w]]))
        prompt = self.stored[worker].pop(data.draw(st.integers(0, len(self.stored[worker]) - 1)))
        keep = data.draw(st.integers(0, len(prompt)))
        self.stored[worker].append(prompt[:keep])
        needed = {h for other in self.stored[worker] for h in other}
        gone = [h for h in prompt[keep:] if h not in needed]
        self.index.remove(worker, array(gone))
        self.held[worker] -= set(gone)

    @rule(worker=workers)
    def drop_worker(self, worker: int) -> None:
        self.index.drop_worker(worker)
        self.held[worker], self.stored[worker] = set(), []

    @rule(prompt=prompts)
    def match(self, prompt: list[int]) -> None:
        lengths = self.index.match(array(prompt))
        assert len(lengths) == self.index.num_workers
        expected = [0] * len(lengths)
        for worker in WORKERS:
            if worker < len(lengths):
                expected[worker] = len(list(takewhile(self.held[worker].__contains__, prompt)))
            else:
                assert not self.held[worker]
        assert lengths.tolist() == expected
        assert self.index.match_all(array([prompt, prompt])).tolist() == [expected, expected]

    @invariant()
    def agrees(self) -> None:
        self.index.audit()
        assert self.index.num_hashes == len(set().union(*self.held.values()))
        for worker, held in self.held.items():
            assert self.index.digest(worker) == (len(held), reduce(xor, held, 0))


TestIndex = IndexAgainstSets.TestCase
TestIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class IndexAgainstLies(RuleBasedStateMachine):
    """Workers hold anything at all: late summaries leave holes."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[int, set[int]] = {0: set(), 1: set()}

    @rule(worker=st.integers(0, 1), hashes=any_hashes)
    def store(self, worker: int, hashes: list[int]) -> None:
        self.index.store(worker, array(hashes))
        self.held[worker] |= set(hashes)

    @rule(worker=st.integers(0, 1), hashes=any_hashes)
    def remove(self, worker: int, hashes: list[int]) -> None:
        self.index.remove(worker, array(hashes))
        self.held[worker] -= set(hashes)

    @rule(prompt=any_hashes)
    def match(self, prompt: list[int]) -> None:
        for worker, length in enumerate(self.index.match(array(prompt)).tolist()):
            walked = len(list(takewhile(self.held[worker].__contains__, prompt)))
            assert length >= walked
            assert length == 0 or prompt[length - 1] in self.held[worker]
            assert length == len(prompt) or prompt[length] not in self.held[worker]

    @invariant()
    def agrees(self) -> None:
        self.index.audit()
        for worker, held in self.held.items():
            assert self.index.digest(worker) == (len(held), reduce(xor, held, 0))


TestLies = IndexAgainstLies.TestCase
TestLies.settings = settings(deadline=None)


def test_a_workers_tree_and_the_index_agree_by_deltas() -> None:
    """What a worker drains, applied by the router, is what the worker can serve."""
    rng = np.random.default_rng(0)
    tree, index = RadixTree(2), PrefixIndex()
    for step in range(300):
        tokens = rng.integers(0, 2, rng.integers(0, 30)).astype(np.int32)
        tree.insert(tokens, np.arange(step * 20, step * 20 + len(tokens) // 2, dtype=np.int32))
        tree.evict(int(rng.integers(0, 20)))
        _, stored, removed = tree.drain_delta()
        index.store(0, stored)
        index.remove(0, removed)
        assert index.digest(0) == tree.digest()
        prompt = rng.integers(0, 2, 30).astype(np.int32)
        assert index.match(page_hashes(prompt, 2))[0] == len(tree.match(prompt)[1])


def test_two_threads_inside_at_once_are_refused() -> None:
    """Long calls let other threads run; one of them must not find the table half rebuilt."""
    index, hashes = PrefixIndex(), np.random.default_rng(0).integers(0, 2**64, 500_000, np.uint64)
    refused = threading.Event()

    def store_until_refused() -> None:
        for _ in range(200):
            if not refused.is_set():
                index.store(0, hashes)

    thread = threading.Thread(target=store_until_refused)
    thread.start()
    while thread.is_alive() and not refused.is_set():
        try:
            index.match(hashes[:1])
        except RuntimeError:
            refused.set()
    thread.join()
    assert refused.is_set()
    index.audit()


def test_wrong_arguments_are_named() -> None:
    index = PrefixIndex()
    for worker in (-1, 4096):
        with pytest.raises(ValueError, match=f"worker must be in .*, got {worker}"):
            index.store(worker, array([1]))
    with pytest.raises(TypeError):
        index.match(np.zeros(3, np.int64))
    assert index.digest(5) == (0, 0)
    assert index.match(array([1])).tolist() == []
