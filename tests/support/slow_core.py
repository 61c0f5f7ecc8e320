"""Slow Python twins of the C++ core: the same rules in the fewest lines that can be trusted."""

import numpy as np


class SlowPagePool:
    def __init__(self, num_pages):
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self):
        return len(self._free)

    def take(self, n):
        if n > len(self._free):
            return None
        return np.array([self._free.pop() for _ in range(n)], np.int32)

    def give_back(self, page_ids):
        for page in page_ids.tolist():
            if page in self._free or not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is free already or out of range")
            self._free.append(page)

    def audit(self):
        assert len(set(self._free)) == len(self._free)


class _Node:
    def __init__(self, handle, parent, key, page):
        self.handle, self.parent, self.key, self.page = handle, parent, key, page
        self.children = {}
        self.locks = 0
        self.used_at = 0


class SlowRadixTree:
    """One node a page."""

    epoch = 0

    def __init__(self, page_size):
        self._page_size = page_size
        self._roots = {}
        self._nodes = {}
        self._clock = 0

    @property
    def num_pages(self):
        return len(self._nodes)

    @property
    def num_locked_pages(self):
        return sum(node.locks > 0 for node in self._nodes.values())

    def _walk(self, token_ids, salt, after=0):
        size = self._page_size
        for i in range(len(token_ids) // size):
            key = tuple(token_ids[i * size : (i + 1) * size].tolist())
            yield key if i or after else (salt, *key)

    def _touch(self, node):
        self._clock += 1
        while node is not None:
            node.used_at = self._clock
            node = node.parent

    def match(self, token_ids, salt=""):
        node, children, pages = None, self._roots, []
        for key in self._walk(token_ids, salt):
            if key not in children:
                break
            node = children[key]
            children = node.children
            pages.append(node.page)
        self._touch(node)
        return (node.handle if node else 0), np.array(pages, np.int32)

    def _ancestors(self, handle):
        node = self._nodes[handle] if handle else None
        while node is not None:
            yield node
            node = node.parent

    def lock(self, handle):
        for node in self._ancestors(handle):
            node.locks += 1

    def unlock(self, handle):
        for node in self._ancestors(handle):
            assert node.locks > 0
            node.locks -= 1

    def insert(self, token_ids, page_ids, salt="", after=0):
        assert len(page_ids) == len(token_ids) // self._page_size
        node = self._nodes[after] if after else None
        children, pages = node.children if node else self._roots, []
        for key, page in zip(self._walk(token_ids, salt, after), page_ids.tolist(), strict=True):
            if key not in children:
                self._clock += 1
                children[key] = _Node(self._clock, node, key, page)
                self._nodes[self._clock] = children[key]
            node = children[key]
            children = node.children
            pages.append(node.page)
        self._touch(node)
        return (node.handle if node else 0), np.array(pages, np.int32)

    def evict(self, num_pages):
        pages = []
        while len(pages) < num_pages:
            leaves = [node for node in self._nodes.values() if not node.children and not node.locks]
            if not leaves:
                break
            leaf = min(leaves, key=lambda node: node.used_at)
            pages.append(leaf.page)
            del self._nodes[leaf.handle]
            del (leaf.parent.children if leaf.parent else self._roots)[leaf.key]
        return np.array(pages, np.int32)

    def clear(self):
        self.epoch += 1
        return self.evict(len(self._nodes))

    def audit(self):
        pages = [node.page for node in self._nodes.values()]
        assert len(set(pages)) == len(pages)
