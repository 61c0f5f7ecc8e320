"""Claim: one core answers 2.5 times the prefix lookups of Dynamo's best index, in no more memory.

8,192 prompts of 256 pages; groups of 16 share their first 128; each prompt is held by 4 of 64 workers
(1.1 million distinct pages, 8.4 million placements). Half of the lookups hit whole, half diverge at a
random page. The peer is a program that prints the same workload's figures for the index named by its
argument; ours runs between two runs of it, on the same core, and the better of the two counts.

    python benchmarks/prefix_index.py [--peer PATH_TO_dynbench] [--core 0] [--seconds 2]
"""

import argparse
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disagg._core import PrefixIndex, page_hashes

Hashes = NDArray[np.uint64]
PROMPTS, PAGES, SHARED_PAGES, GROUP, PAGE_SIZE, QUERIES = 8192, 256, 128, 16, 16, 4096
CLAIMED_RATIO = 2.5
GROWTH_WORKERS, GROWTH_LENGTHS, GROWTH_HOLDERS = (64, 256, 1024), (1, 4, 16, 64), 64
PEER_LINE = re.compile(r": (\d+) lookups/s .* rss \+(\d+) MiB")


@dataclass(frozen=True)
class Peer:
    lookups_per_s: float
    rss_mib: float
    build_s: float


def run_peer(path: str) -> Peer:
    printed = subprocess.run([path, "crtc"], check=True, capture_output=True, text=True).stdout
    line, build = PEER_LINE.search(printed), re.search(r"build ([\d.]+)s", printed)
    assert line is not None, f"not what dynbench prints: {printed}"
    assert build is not None, f"not what dynbench prints: {printed}"
    return Peer(float(line[1]), float(line[2]), float(build[1]))


def best_rate(count: int, seconds: float, act: Callable[[], Any]) -> float:
    """How often a second, in the best of three rounds; `act` does it `count` times."""
    rates = []
    for _ in range(3):
        began, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            act()
            done += count
        rates.append(done / passed)
    return max(rates)


def make_tokens(rng: np.random.Generator) -> NDArray[np.int32]:
    """Token ids of the prompts, [PROMPTS, PAGES * PAGE_SIZE]."""
    shared = rng.integers(0, 150_000, (PROMPTS // GROUP, SHARED_PAGES * PAGE_SIZE), np.int32)
    own = rng.integers(0, 150_000, (PROMPTS, (PAGES - SHARED_PAGES) * PAGE_SIZE), np.int32)
    return np.concatenate([np.repeat(shared, GROUP, axis=0), own], axis=1)


def make_queries(rng: np.random.Generator, hashes: Hashes, asked: NDArray[np.int64]) -> Hashes:
    """The prompts asked for; every second one diverges at a random page."""
    queries = hashes[asked]
    for query in queries[1::2]:
        at = int(rng.integers(0, PAGES))
        query[at:] = rng.integers(0, 2**64, PAGES - at, np.uint64)
    return queries


def placements(hashes: Hashes, holders: NDArray[np.int64]) -> Iterator[tuple[int, Hashes]]:
    for prompt, workers in zip(hashes, holders.tolist(), strict=True):
        for worker in workers:
            yield worker, prompt


def time_updates(hashes: Hashes, holders: NDArray[np.int64]) -> tuple[PrefixIndex, float, float]:
    """Fill an index, then take a quarter out of it and put that back; placements a second each way."""
    index, num_placed = PrefixIndex(), holders.size * PAGES
    began = time.perf_counter()
    for worker, prompt in placements(hashes, holders):
        index.store(worker, prompt)
    stored = num_placed / (time.perf_counter() - began)
    tails = hashes[::2, SHARED_PAGES:]
    began = time.perf_counter()
    for worker, tail in placements(tails, holders[::2]):
        index.remove(worker, tail)
    removed = num_placed / 4 / (time.perf_counter() - began)
    for worker, tail in placements(tails, holders[::2]):
        index.store(worker, tail)
    return index, stored, removed


def growth_cell(rng: np.random.Generator, num_workers: int, num_lengths: int, seconds: float) -> float:
    """Lookups a second of prompts that 64 workers hold, to so many different lengths."""
    prompts = rng.integers(0, 2**64, (1024, PAGES), np.uint64)
    index, expected = PrefixIndex(), np.zeros((len(prompts), num_workers), np.int32)
    for prompt, row in zip(prompts, expected, strict=True):
        lengths = rng.choice(np.arange(1, PAGES + 1), num_lengths, replace=False)
        holders = rng.choice(num_workers, GROWTH_HOLDERS, replace=False)
        row[holders] = np.resize(lengths, GROWTH_HOLDERS)
        for worker in holders:
            index.store(int(worker), prompt[: row[worker]])
    found = index.match_all(prompts)
    assert np.array_equal(found, expected[:, : found.shape[1]]), "the index is wrong"
    return best_rate(len(prompts), seconds, lambda: index.match_all(prompts))


def report_growth(rng: np.random.Generator, seconds: float) -> None:
    print(f"\nMicroseconds a lookup: 1,024 prompts, each held by {GROWTH_HOLDERS} workers")
    print(f"{'match lengths:':<16}" + "".join(f"{n:>10}" for n in GROWTH_LENGTHS))
    for num_workers in GROWTH_WORKERS:
        cells = [growth_cell(rng, num_workers, n, seconds) for n in GROWTH_LENGTHS]
        print(f"{f'{num_workers:,} workers':<16}" + "".join(f"{1e6 / rate:>10.2f}" for rate in cells))


def report_hashing(tokens: NDArray[np.int32], seconds: float) -> Hashes:
    some = tokens[:256]
    rate = best_rate(len(some), seconds, lambda: [page_hashes(prompt, PAGE_SIZE) for prompt in some])
    num_tokens = tokens.shape[1]
    each = f"{1e6 / rate:.2f} us for {num_tokens:,} tokens, {1e9 / rate / num_tokens:.2f} ns a token"
    print(f"Hashing apart: {each}")
    return np.stack([page_hashes(prompt, PAGE_SIZE) for prompt in tokens])


def report_peer(peers: list[Peer], lookups_per_s: float, mib: float) -> None:
    best = max(peer.lookups_per_s for peer in peers)
    peer_mib = min(peer.rss_mib for peer in peers)
    build = PROMPTS * 4 * PAGES / min(peer.build_s for peer in peers)
    each = ", ".join(f"{peer.lookups_per_s:,.0f}" for peer in peers)
    memory = f"RSS +{peer_mib:.0f} MiB, {build / 1e6:.1f} M stored/s"
    print(f"Dynamo crtc:   {best:,.0f} lookups/s ({each}), {memory}")
    ratio = lookups_per_s / best
    verdict = "holds" if ratio >= CLAIMED_RATIO and mib <= peer_mib else "FAILS"
    share = f"{mib / peer_mib:.2f} of the memory"
    print(f"Claim {verdict}:   {ratio:.2f} times the lookups (claimed {CLAIMED_RATIO}) in {share}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--peer", help="the built peer program; without it ours alone is measured")
    ask.add_argument("--core", type=int, default=0, help="the core that everything runs on")
    ask.add_argument("--seconds", type=float, default=2.0, help="length of a round, of which there are three")
    a = ask.parse_args()
    os.sched_setaffinity(0, {a.core})
    rng = np.random.default_rng(0)
    peers = [run_peer(a.peer)] if a.peer else []

    hashes = report_hashing(make_tokens(rng), a.seconds / 4)
    holders = rng.integers(0, 16, (PROMPTS, 4)) + 16 * np.arange(4)
    index, stored, removed = time_updates(hashes, holders)
    asked = rng.integers(0, PROMPTS, QUERIES)
    queries = make_queries(rng, hashes, asked)
    found = index.match_all(queries)
    assert (np.take_along_axis(found, holders[asked], axis=1)[::2] == PAGES).all(), "the index is wrong"
    lookups = best_rate(QUERIES, a.seconds, lambda: index.match_all(queries))
    singly = best_rate(QUERIES, a.seconds, lambda: [index.match(query) for query in queries])
    mib, per_page = index.memory_bytes / 2**20, index.memory_bytes / index.num_hashes
    print(f"Updates:       {stored / 1e6:.1f} M stored/s, {removed / 1e6:.1f} M removed/s")
    print(f"disagg:        {lookups:,.0f} lookups/s, {mib:.0f} MiB, {per_page:.1f} bytes a page")
    print(f"               {singly:,.0f} lookups/s when Python asks for one at a time")
    if a.peer:
        peers.append(run_peer(a.peer))
        report_peer(peers, lookups, mib)
    report_growth(rng, a.seconds / 8)


if __name__ == "__main__":
    main()
