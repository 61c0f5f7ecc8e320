"""Claim: KV pages move between processes at memcpy's speed, whatever the tensor-parallel sizes.

A push goes through the transfer threads of real processes, as in serving: from its submission at
the prefill ranks to the last notification at the decode ranks. Beside it, from the same run:

    memcpy       the same scattered pages copied within one process, by one thread
    layer-major  the same bytes pushed from and into pools laid out [layer, k/v, page, …], as other
                 engines lay them out: one descriptor for each page, layer, and K or V

With `--cuda` the pools are on one GPU, pages go by CUDA IPC and by NIXL in turn, and the rows are
kept in benchmarks/results/.

    python benchmarks/kv_transfer.py [--pages 1 16 64 256] [--repeat 9] [--tcp | --cuda]
                                     [--model Llama-3-8B] [--tp 1 1]
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from disagg.kv.layout import PageLayout
from disagg.protocol import KvLayout
from disagg.transfer import (
    Arrived,
    AwaitKv,
    Connect,
    Connected,
    FinishPush,
    PushChunk,
    PushComplete,
    pairs,
    plan_transfer,
)
from support.kv_ranks import DEVICE, TRANSPORT, Rank, hello_of

SMOLLM2 = KvLayout(page_size=16, num_kv_heads=3, num_layers=30, head_dim=64, dtype="bfloat16", tp_size=1)
LLAMA_8B = KvLayout(page_size=16, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16", tp_size=1)
CASES = [
    ("SmolLM2-135M", SMOLLM2, [(1, 1), (3, 1), (1, 3), (3, 3)]),
    ("Llama-3-8B", LLAMA_8B, [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)]),
]
TO_REACH_GB_S = 250.0
"""256 pages of the 8B shape, from the submission to the last notification."""
RESULTS = Path(__file__).parent / "results"
LEAD_S = 0.02
"""Between giving ranks their commands and the instant at which all of them begin."""
WARM_UP = 2
"""The first pushes open links and touch memory."""


@dataclass(frozen=True)
class Measured:
    """One way to move some pages. Rates are the best repetition's, which other load disturbs least."""

    num_bytes: int
    num_descriptors: int
    """Of all ranks together."""
    seconds: list[float]
    write_seconds: list[float] = field(default_factory=list)
    """Of these, from the first write's post to the last one's end."""

    @property
    def best_ms(self) -> float:
        return min(self.seconds) * 1e3

    @property
    def gigabytes_per_s(self) -> float:
        return self.num_bytes / self.best_ms / 1e6

    def to_row(self) -> dict[str, Any]:
        return {
            "bytes": self.num_bytes,
            "descriptors": self.num_descriptors,
            "median_ms": round(statistics.median(self.seconds) * 1e3, 3),
            "best_ms": round(self.best_ms, 3),
            "writes_ms": round(min(self.write_seconds) * 1e3, 3) if self.write_seconds else None,
            "gigabytes_per_s": round(self.gigabytes_per_s, 1),
        }

    def __str__(self) -> str:
        writes = f"{min(self.write_seconds) * 1e3:9.2f}" if self.write_seconds else f"{'':9}"
        median_ms = statistics.median(self.seconds) * 1e3
        return f"{median_ms:9.2f} {self.best_ms:9.2f} {writes} {self.gigabytes_per_s:6.1f}"


class Workers:
    """A prefill and a decode worker of real ranks, connected."""

    def __init__(self, source: KvLayout, target: KvLayout, num_pages: int, environ: dict[str, str]) -> None:
        self.source, self.target = source, target
        self.prefill = [
            Rank("p", r, source, num_pages, seed=r, environ=environ) for r in range(source.tp_size)
        ]
        self.decode = [Rank("d", r, target, num_pages, environ=environ) for r in range(target.tp_size)]
        self._generation = 0
        hello = hello_of("decode-0", "d", target, self.decode)
        for rank in self.decode:
            rank.submit(AwaitKv(+1))
        for rank in self.prefill:
            _ = rank.endpoint
            rank.submit(Connect(hello))
            rank.expect(Connected)

    def push(self, pages: list[int], targets: list[int]) -> tuple[float, float]:
        """Seconds from the submission to the last notification, and those of the slowest rank's writes."""
        self._generation += 1
        key, begin_at = ("bench", self._generation), time.monotonic() + LEAD_S
        chunk = PushChunk(key, "d", pages, targets, begin_at + 60.0)
        for rank in self.prefill:
            rank.submit_at(begin_at, chunk, FinishPush(key, token_id=0, position=0, finished=False))
        for rank in self.prefill:
            rank.submitted()
        write_s = max(rank.expect(PushComplete).seconds for rank in self.prefill)
        last_at = max(
            self.decode[d].expect_at(Arrived)[1] for _, d in pairs(self.source.tp_size, self.target.tp_size)
        )
        return last_at - begin_at, write_s

    def measure(self, pages: list[int], targets: list[int], repeat: int) -> Measured:
        pushes = [self.push(pages, targets) for _ in range(WARM_UP + repeat)][WARM_UP:]
        runs = [
            plan_transfer(self.source, s, self.target, d, pages, targets)
            for s, d in pairs(self.source.tp_size, self.target.tp_size)
        ]
        num_bytes, num_descriptors = sum(r.num_bytes for r in runs), sum(r.num_runs for r in runs)
        return Measured(num_bytes, num_descriptors, [p[0] for p in pushes], [p[1] for p in pushes])

    def stop(self) -> None:
        for rank in [*self.prefill, *self.decode]:
            rank.stop()


@contextlib.contextmanager
def workers(source: KvLayout, target: KvLayout, num_pages: int, environ: dict[str, str]) -> Iterator[Workers]:
    made = Workers(source, target, num_pages, environ)
    try:
        yield made
    finally:
        made.stop()


def scattered(num_pages: int, of: int, seed: int) -> list[int]:
    """Pages as a pool that has been used for a while gives them."""
    return np.random.default_rng(seed).permutation(of)[:num_pages].tolist()


def layer_major(layout: KvLayout) -> KvLayout:
    """A pool whose pages are what a layer-major pool holds in one place: one page's K or V of one layer."""
    # A page of one layer holds K and V, so half as many tokens of both are as many bytes.
    return KvLayout(layout.page_size // 2, layout.num_kv_heads, 1, layout.head_dim, layout.dtype, 1)


def layer_major_pages(pages: list[int], num_pages: int, num_layers: int) -> list[int]:
    return [plane * num_pages + page for plane in range(2 * num_layers) for page in pages]


def gpu_copy(num_pages: int, page_bytes: int, counts: list[int], repeat: int) -> dict[int, Measured]:
    """Copy pages within the GPU by one kernel."""
    import torch

    source = torch.ones(num_pages, page_bytes // 8, dtype=torch.int64, device="cuda")
    target = torch.zeros_like(source)

    def copy(pages: list[int], targets: list[int]) -> float:
        where = [torch.tensor(ids, device="cuda") for ids in (pages, targets)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.index_copy_(0, where[1], source[where[0]])
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return {count: timed(copy, count, num_pages, page_bytes, repeat) for count in counts}


def memcpy(
    layout: KvLayout, num_pages: int, counts: list[int], repeat: int, on_gpu: bool
) -> dict[int, Measured]:
    """Copy pages one by one within this process."""
    page_bytes = PageLayout.of(layout).page_bytes
    if on_gpu:
        return gpu_copy(num_pages, page_bytes, counts, repeat)
    source, target = np.ones((num_pages, page_bytes), np.uint8), np.zeros((num_pages, page_bytes), np.uint8)

    def copy(pages: list[int], targets: list[int]) -> float:
        began = time.perf_counter()
        for page, where in zip(pages, targets, strict=True):
            target[where] = source[page]
        return time.perf_counter() - began

    return {count: timed(copy, count, num_pages, page_bytes, repeat) for count in counts}


def timed(
    copy: Callable[[list[int], list[int]], float], count: int, num_pages: int, page_bytes: int, repeat: int
) -> Measured:
    pages, targets = scattered(count, num_pages, 1), scattered(count, num_pages, 2)
    seconds = [copy(pages, targets) for _ in range(WARM_UP + repeat)][WARM_UP:]
    return Measured(count * page_bytes, count, seconds)


def with_tp(layout: KvLayout, tp_size: int) -> KvLayout:
    return KvLayout(
        layout.page_size, layout.num_kv_heads, layout.num_layers, layout.head_dim, layout.dtype, tp_size
    )


def compare(
    name: str, layout: KvLayout, sizes: list[tuple[int, int]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print one model's table; return its rows."""
    rows: list[dict[str, Any]] = []
    counts, num_pages = options.pages, max(options.pages)
    environ = {"UCX_TLS": "tcp,self"} if options.tcp else {}
    if options.cuda:
        environ = {DEVICE: "cuda"}
    kib = PageLayout.of(layout).page_bytes // 1024
    print(f"\n{name}: {kib} KiB a page, {options.repeat} pushes each, scattered pages")
    columns = ("median ms", "best ms", "writes ms")
    titles = " ".join(f"{title:>9}" for title in columns)
    print(f"{'':28}{'pages':>6} {'MB':>7} {'descr.':>7} {titles} {'GB/s':>6}  of memcpy")
    plain = memcpy(layout, num_pages, counts, options.repeat, options.cuda)

    def show(label: str, count: int, measured: Measured) -> None:
        share = plain[count].best_ms / measured.best_ms
        print(
            f"{label:28}{count:6} {measured.num_bytes / 1e6:7.1f} {measured.num_descriptors:7} {measured}  "
            f"{share:8.0%}",
            flush=True,
        )
        rows.append({"model": name, "what": label, "pages": count, **measured.to_row()})

    for count in counts:
        show("memcpy, one process", count, plain[count])
    flat, planes = layer_major(layout), 2 * layout.num_layers
    with workers(flat, flat, num_pages * planes, environ) as both:
        for count in counts:
            pages = layer_major_pages(scattered(count, num_pages, 1), num_pages, layout.num_layers)
            targets = layer_major_pages(scattered(count, num_pages, 2), num_pages, layout.num_layers)
            show("push, layer-major 1→1", count, both.measure(pages, targets, options.repeat))
    transports = ["cuda_ipc", "nixl"] if options.cuda else ["nixl"]
    for (source_tp, target_tp), transport in itertools.product(sizes, transports):
        here, there = with_tp(layout, source_tp), with_tp(layout, target_tp)
        with workers(here, there, num_pages, {**environ, TRANSPORT: transport}) as both:
            for count in counts:
                pages, targets = scattered(count, num_pages, 1), scattered(count, num_pages, 2)
                measured = both.measure(pages, targets, options.repeat)
                show(f"push, TP {source_tp}→{target_tp}, {transport}", count, measured)
    return rows


def keep(rows: list[dict[str, Any]]) -> None:
    """Write what was measured on this card."""
    import torch

    card = torch.cuda.get_device_name()
    result = {
        "claim": "KV pages move between two processes on one GPU at hundreds of GB/s",
        "card": card,
        "to_reach": {"model": "Llama-3-8B", "pages": 256, "gigabytes_per_s": TO_REACH_GB_S},
        "rows": rows,
        "torch": torch.__version__,
        "nixl": importlib.metadata.version("nixl"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kv_transfer-{card.removeprefix('NVIDIA ').split()[0]}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--tcp", action="store_true", help="hold UCX to TCP, as between hosts without RDMA")
    parser.add_argument("--cuda", action="store_true", help="pools on the GPU, all on one")
    parser.add_argument("--model", choices=[case[0] for case in CASES], help="this model alone")
    parser.add_argument("--tp", type=int, nargs=2, help="these tensor-parallel sizes alone: source, target")
    options = parser.parse_args()
    lane = "TCP over loopback" if options.tcp else "what UCX chooses on one host"
    lane += ", pools on one GPU" if options.cuda else ""
    print(f"KV transfer on {len(os.sched_getaffinity(0))} cores, {lane}.")
    print("A push is timed from its submission at the prefill ranks to the last decode rank's notification.")
    rows: list[dict[str, Any]] = []
    for name, layout, sizes in CASES:
        if options.model in (None, name):
            rows += compare(name, layout, [tuple(options.tp)] if options.tp else sizes, options)
    if options.cuda:
        keep(rows)


if __name__ == "__main__":
    main()
