"""Claim: the C++ prefix cache costs a fraction of a pure-Python radix tree, in every operation.

Prompts of 1,024 tokens in pages of 16; groups of 16 share their first half. The Python tree is written
as the engines that have one write it: runs of tokens in nodes, children in a dict by their first page,
leaves gathered into a heap by each eviction. Both must give the same pages, or the run stops.

    python benchmarks/radix_tree.py [--prompts 4096]
"""

import argparse
import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disagg._core import RadixTree

PAGE_SIZE, PAGES, SHARED_PAGES, GROUP, EVICTED_AT_ONCE = 16, 64, 32, 16, 64
Tokens = tuple[int, ...]


@dataclass
class Node:
    """A run of pages, in the Python tree."""

    tokens: Tokens = ()
    pages: list[int] = field(default_factory=list)
    parent: "Node | None" = None
    children: dict[Tokens, "Node"] = field(default_factory=dict)
    last_used: int = 0


class PythonTree:
    """The rival: the same tree without locks, salts, hashes or deltas."""

    def __init__(self) -> None:
        self.root, self.now = Node(), 0

    def walk(self, tokens: Tokens) -> tuple[Node, list[int]]:
        self.now += 1
        node, pages, at = self.root, [], 0
        while (child := node.children.get(tokens[at : at + PAGE_SIZE])) is not None:
            common = self.common_tokens(child.tokens, tokens, at)
            node = child if common == len(child.tokens) else self.split(child, common)
            node.last_used = self.now
            pages += node.pages
            at += common
        return node, pages

    def common_tokens(self, run: Tokens, tokens: Tokens, at: int) -> int:
        common = 0
        while common < len(run) and run[common : common + PAGE_SIZE] == tokens[at : at + PAGE_SIZE]:
            common, at = common + PAGE_SIZE, at + PAGE_SIZE
        return common

    def split(self, lower: Node, common: int) -> Node:
        upper = Node(lower.tokens[:common], lower.pages[: common // PAGE_SIZE], lower.parent)
        assert lower.parent is not None
        lower.parent.children[upper.tokens[:PAGE_SIZE]] = upper
        lower.tokens, lower.pages = lower.tokens[common:], lower.pages[common // PAGE_SIZE :]
        lower.parent, upper.children[lower.tokens[:PAGE_SIZE]] = upper, lower
        return upper

    def match(self, tokens: Tokens) -> list[int]:
        return self.walk(tokens)[1]

    def insert(self, tokens: Tokens, pages: list[int]) -> list[int]:
        node, held = self.walk(tokens)
        if rest := tokens[len(held) * PAGE_SIZE :]:
            new = Node(rest, pages[len(held) :], node, last_used=self.now)
            node.children[rest[:PAGE_SIZE]] = new
        return held + pages[len(held) :]

    def leaves(self) -> Iterable[Node]:
        nodes = list(self.root.children.values())
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if not node.children:
                yield node

    def evict(self, num_pages: int) -> list[int]:
        heap = [(leaf.last_used, id(leaf), leaf) for leaf in self.leaves()]
        heapq.heapify(heap)
        evicted: list[int] = []
        while heap and len(evicted) < num_pages:
            _, _, leaf = heapq.heappop(heap)
            keep = max(0, len(leaf.pages) - (num_pages - len(evicted)))
            evicted += reversed(leaf.pages[keep:])
            leaf.tokens, leaf.pages = leaf.tokens[: keep * PAGE_SIZE], leaf.pages[:keep]
            parent = leaf.parent
            if not keep and parent is not None:
                parent.children = {key: child for key, child in parent.children.items() if child is not leaf}
                if not parent.children and parent.parent is not None:
                    heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return evicted


def make_prompts(num_prompts: int) -> NDArray[np.int32]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 150_000, (-(-num_prompts // GROUP), SHARED_PAGES * PAGE_SIZE), np.int32)
    own = rng.integers(0, 150_000, (num_prompts, (PAGES - SHARED_PAGES) * PAGE_SIZE), np.int32)
    return np.concatenate([np.repeat(shared, GROUP, axis=0)[:num_prompts], own], axis=1)


def timed(act: Callable[..., Any], calls: list[tuple[Any, ...]]) -> tuple[float, list[Any]]:
    """Microseconds a call, and what the calls returned."""
    began = time.perf_counter()
    results = [act(*call) for call in calls]
    return (time.perf_counter() - began) / len(calls) * 1e6, results


def measure(tree: Any, prompts: list[Any], pages: list[Any]) -> list[tuple[float, list[Any]]]:
    evictions = len(prompts) // GROUP * 4
    return [
        timed(tree.insert, list(zip(prompts, pages, strict=True))),
        timed(tree.match, [(prompt,) for prompt in prompts]),
        timed(tree.insert, list(zip(prompts, pages, strict=True))),
        timed(tree.evict, [(EVICTED_AT_ONCE,)] * evictions),
    ]


def page_lists(results: list[Any]) -> list[list[int]]:
    """What a tree returned, be it a list or an array, with a node or without."""
    arrays = [result[1] if isinstance(result, tuple) else result for result in results]
    return [list(map(int, array)) for array in arrays]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--prompts", type=int, default=4096)
    a = ask.parse_args()
    prompts = make_prompts(a.prompts)
    pages = np.arange(a.prompts * PAGES, dtype=np.int32).reshape(a.prompts, PAGES)
    ours = measure(RadixTree(PAGE_SIZE), list(prompts), list(pages))
    rivals = measure(PythonTree(), [tuple(prompt.tolist()) for prompt in prompts], pages.tolist())
    names = ["insert new", "match", "insert again", f"evict {EVICTED_AT_ONCE} pages"]
    print(f"{'us a call':<18}{'disagg':>10}{'Python':>12}{'ratio':>9}")
    for name, (us, results), (rival_us, rival_results) in zip(names, ours, rivals, strict=True):
        assert page_lists(results) == page_lists(rival_results), f"the trees disagree: {name}"
        print(f"{name:<18}{us:>10.2f}{rival_us:>12.2f}{rival_us / us:>8.0f}x")


if __name__ == "__main__":
    main()
