"""The radix tree against ten lines of Python: a map from every cached prefix to its page."""

from functools import reduce
from itertools import count
from operator import xor
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg._core import RadixTree, page_hashes

Prefix = tuple[str, tuple[int, ...]]
"""A salt and the tokens of whole pages."""


def array(values: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


class Model:
    """Pages by prefix, and when each was last used."""

    def __init__(self, page_size: int) -> None:
        self.page_size, self.now = page_size, 0
        self.page: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}

    def prefixes(self, salt: str, tokens: list[int]) -> list[Prefix]:
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def match(self, salt: str, tokens: list[int]) -> list[Prefix]:
        self.now += 1
        found = [prefix for prefix in self.prefixes(salt, tokens) if prefix in self.page]
        self.used |= dict.fromkeys(found, self.now)
        return found

    def insert(self, salt: str, tokens: list[int], pages: list[int]) -> list[int]:
        path = self.prefixes(salt, tokens)
        self.page = dict(zip(path, pages, strict=True)) | self.page
        return [self.page[prefix] for prefix in self.match(salt, tokens)]

    def evict(self, num_pages: int, locked: set[Prefix]) -> list[int]:
        evicted: list[int] = []
        while len(evicted) < num_pages and self.page.keys() - locked:
            inner = {(salt, tokens[: -self.page_size]) for salt, tokens in self.page}
            leaf = min(self.page.keys() - locked - inner, key=self.used.__getitem__)
            evicted.append(self.page.pop(leaf))
        return evicted


tokens_of = st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=14)
salts = st.sampled_from(["", "", "tenant"])


class TreeAgainstModel(RuleBasedStateMachine):
    @initialize(page_size=st.integers(1, 3))
    def make(self, page_size: int) -> None:
        self.tree, self.model = RadixTree(page_size), Model(page_size)
        self.new_pages = count()
        self.locks: list[tuple[int, Prefix]] = []
        self.told: set[int] = set()
        self.seq = 0

    def locked(self) -> set[Prefix]:
        return {p for _, (salt, tokens) in self.locks for p in self.model.prefixes(salt, list(tokens))}

    @rule(salt=salts, tokens=tokens_of, is_locked=st.booleans())
    def match(self, salt: str, tokens: list[int], is_locked: bool) -> None:
        node, pages = self.tree.match(array(tokens), salt)
        found = self.model.match(salt, tokens)
        assert pages.tolist() == [self.model.page[prefix] for prefix in found]
        assert (node == 0) == (not found)
        if is_locked:
            self.tree.lock(node)
            self.locks += [(node, found[-1])] if found else []

    @rule(salt=salts, tokens=tokens_of, is_locked=st.booleans())
    def insert(self, salt: str, tokens: list[int], is_locked: bool) -> None:
        own = [next(self.new_pages) for _ in range(len(tokens) // self.model.page_size)]
        node, canonical = self.tree.insert(array(tokens), array(own), salt)
        assert canonical.tolist() == self.model.insert(salt, tokens, own)
        if own and is_locked:
            self.tree.lock(node)
            self.locks.append((node, self.model.prefixes(salt, tokens)[-1]))

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), more=tokens_of)
    def insert_after(self, data: st.DataObject, more: list[int]) -> None:
        """The same as inserting the whole, told of what is new alone."""
        node, (salt, tokens) = data.draw(st.sampled_from(self.locks))
        own = [next(self.new_pages) for _ in range(len(more) // self.model.page_size)]
        longer, canonical = self.tree.insert(array(more), array(own), salt, after=node)
        num_before = len(tokens) // self.model.page_size
        before = [self.model.page[prefix] for prefix in self.model.prefixes(salt, list(tokens))]
        whole = self.model.insert(salt, [*tokens, *more], before + own)
        assert canonical.tolist() == whole[num_before:]
        assert own or longer == node
        self.tree.lock(longer)
        self.locks.append((longer, self.model.prefixes(salt, [*tokens, *more])[-1]))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.tree.unlock(node)

    @rule(num_pages=st.integers(0, 8))
    def evict(self, num_pages: int) -> None:
        assert self.tree.evict(num_pages).tolist() == self.model.evict(num_pages, self.locked())

    @rule()
    def drain(self) -> None:
        seq, stored, removed = self.tree.drain_delta()
        self.seq += 1 if len(stored) + len(removed) else 0
        assert seq == self.seq
        assert not set(stored.tolist()) & self.told
        assert set(removed.tolist()) <= self.told
        self.told = self.told - set(removed.tolist()) | set(stored.tolist())
        assert len(stored) == len(set(stored.tolist()))
        assert self.told == set(self.parents(self.model.page))
        self.check_parents_first(stored.tolist(), self.told - set(stored.tolist()))

    @rule()
    def snapshot(self) -> None:
        """Asked for between two drains too, when the tree has moved on: what was told, not what is."""
        hashes = self.tree.snapshot().tolist()
        assert len(hashes) == len(self.told)
        assert set(hashes) == self.told
        self.check_parents_first(hashes, set())

    @precondition(lambda self: not self.locks)
    @rule()
    def clear(self) -> None:
        epoch = self.tree.epoch
        assert sorted(self.tree.clear().tolist()) == sorted(self.model.page.values())
        assert self.tree.epoch != epoch
        assert self.tree.num_nodes == 0
        self.model.page, self.told, self.seq = {}, set(), 0

    def parents(self, prefixes: Any) -> dict[int, int | None]:
        """Each prefix's hash and the hash of the page before it."""
        found: dict[int, int | None] = {}
        for salt, tokens in prefixes:
            run = page_hashes(array(tokens), self.model.page_size, salt).tolist()
            found[run[-1]] = run[-2] if len(run) > 1 else None
        return found

    def check_parents_first(self, hashes: list[int], known: set[int]) -> None:
        parents = self.parents(self.model.used)
        for page_hash in hashes:
            assert parents[page_hash] is None or parents[page_hash] in known
            known = known | {page_hash}

    @invariant()
    def agrees(self) -> None:
        self.tree.audit()
        assert self.tree.num_pages == len(self.model.page)
        assert self.tree.num_locked_pages == len(self.locked())
        assert self.tree.digest() == (len(self.told), reduce(xor, self.told, 0))

    def teardown(self) -> None:
        """Nothing is left once all locks are back, not even a root for a salt."""
        if not hasattr(self, "tree"):
            return
        for node, _ in self.locks:
            self.tree.unlock(node)
        self.tree.evict(self.tree.num_pages)
        assert (self.tree.num_pages, self.tree.num_nodes, self.tree.num_locked_pages) == (0, 0, 0)
        self.tree.audit()


TestTree = TreeAgainstModel.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_stale_node_is_refused() -> None:
    """A handle kept without a lock must not protect, or unprotect, whoever lives there now."""
    tree = RadixTree(2)
    node, _ = tree.insert(array([1, 2, 3, 4]), array([7, 8]))
    assert tree.evict(1).tolist() == [8]
    with pytest.raises(ValueError, match="was evicted"):
        tree.insert(array([5, 6]), array([9]), after=node)
    with pytest.raises(ValueError, match="was evicted"):
        tree.lock(node)
    with pytest.raises(ValueError, match="is not locked"):
        tree.unlock(node)
    for invented in (node + 1, 2**64 - 1):
        with pytest.raises(ValueError, match="was evicted or never existed"):
            tree.lock(invented)


def test_a_lock_survives_a_split() -> None:
    """Another prompt that branches off inside a locked run must not loosen it."""
    tree = RadixTree(1)
    node, _ = tree.insert(array([1, 2, 3]), array([0, 1, 2]))
    tree.lock(node)
    tree.insert(array([1, 9]), array([5, 6]))
    assert tree.evict(9).tolist() == [6]
    tree.unlock(node)
    assert tree.evict(9).tolist() == [2, 1, 0]


def test_clear_waits_for_locks() -> None:
    tree = RadixTree(1)
    node, _ = tree.insert(array([1]), array([0]))
    tree.lock(node)
    with pytest.raises(ValueError, match="1 pages are locked"):
        tree.clear()
    assert (tree.num_pages, tree.epoch) == (1, RadixTree(1).epoch)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        RadixTree(0)
    tree = RadixTree(4)
    with pytest.raises(ValueError, match="one entry for each of the 2 full pages, got 3"):
        tree.insert(array(range(11)), array(range(3)))
    with pytest.raises(ValueError, match="num_pages must be at least 0"):
        tree.evict(-1)
    with pytest.raises(TypeError):
        tree.match(np.zeros(8, np.int64))
