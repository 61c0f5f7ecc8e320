"""Claim: decode attention reads KV at 93 % or more of the bandwidth that a copy reaches on this card.

    python benchmarks/engine/decode_attention.py [--rounds 20] [--no-flashinfer] [--json FILE]
        [--kv-cache-dtype fp8]

A step of several layers is captured in a CUDA graph and replayed; each layer is another of a pool far
larger than the L2 cache, and its pages are scattered. Printed is the median replay's time a layer, what
that makes of the bytes of K and V, and their share of a copy's bandwidth in the same run (bytes read and
written). Beside it FlashInfer's tensor-core decode over the same pool, captured alike; its `plan()`,
which it needs once a step on the host, is timed apart, and so is ours, a kernel.
"""

import argparse
import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from replay import replay_us
from torch import Tensor

from disagg._cuda import DecodeAttention

PAGE_SIZE, DTYPE = 16, torch.bfloat16
CLAIM = 0.93


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    dim: int = 128


QWEN3_06B = Shape("Qwen3-0.6B", 16, 8)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 8)
QWEN3_30B = Shape("Qwen3-30B-A3B", 32, 4)
SMALL = Shape("head_dim 64", 9, 3, 64)


def uneven(count: int, low: int, high: int) -> list[int]:
    source = random.Random(0)
    return [source.randint(low, high) for _ in range(count)]


CASES = [  # shape, what, lengths, whether it is the claim
    (LLAMA_8B, "256 x 100..2000", uneven(256, 100, 2000), True),
    (QWEN3_06B, "256 x 100..2000", uneven(256, 100, 2000), True),
    (QWEN3_30B, "256 x 100..2000", uneven(256, 100, 2000), True),
    (LLAMA_8B, "64 x 2048", [2048] * 64, True),
    (QWEN3_06B, "64 x 2048", [2048] * 64, True),
    (QWEN3_06B, "256 x 100..200", uneven(256, 100, 200), False),
    (LLAMA_8B, "32 x 100..2000", uneven(32, 100, 2000), False),
    (LLAMA_8B, "8 x 8192", [8192] * 8, False),
    (LLAMA_8B, "8 x 1024", [1024] * 8, False),
    (LLAMA_8B, "1 x 32768", [32768], False),
    (LLAMA_8B, "1 x 2048", [2048], False),
    (QWEN3_30B, "1 x 131072", [131072], False),
    (SMALL, "64 x 2048", [2048] * 64, False),
]


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 4 GiB, read and written."""
    source = torch.ones(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / replay_us(lambda: torch.neg(source, out=target), 1, 10) / 1e3


class Batch:
    def __init__(self, shape: Shape, kv_lens: list[int], kv_dtype: torch.dtype = DTYPE) -> None:
        counts = [-(-length // PAGE_SIZE) for length in kv_lens]
        page_bytes = shape.kv_heads * 2 * PAGE_SIZE * shape.dim * kv_dtype.itemsize
        # Several times the L2 cache between two uses of a layer, in at most 32 GiB.
        wanted = max(4, (512 << 20) // (sum(counts) * page_bytes) + 1)
        self.layers = min(wanted, 64, (32 << 30) // (sum(counts) * page_bytes))
        self.kv_lens = kv_lens
        self.kv_bytes = sum(kv_lens) * page_bytes // PAGE_SIZE
        self.pool = torch.empty(
            sum(counts), shape.kv_heads, self.layers, 2, PAGE_SIZE, shape.dim, dtype=kv_dtype, device="cuda"
        )
        for part in self.pool.split(256):
            part.copy_(torch.randn(part.shape, dtype=DTYPE, device="cuda"))
        self.lens = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
        self.indptr = [0, *accumulate(counts)]
        self.page_indptr = torch.tensor(self.indptr, dtype=torch.int32, device="cuda")
        self.page_indices = torch.randperm(sum(counts), device="cuda").int()
        self.q = torch.randn(len(kv_lens), shape.heads, shape.dim, device="cuda").to(DTYPE)


def ours(shape: Shape, batch: Batch, rounds: int) -> tuple[float, float, Tensor]:
    """Microseconds a layer and a plan, and the last layer's output."""
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    attention = DecodeAttention(
        shape.heads, shape.kv_heads, shape.dim, PAGE_SIZE, len(batch.kv_lens), DTYPE, sms, batch.pool.dtype
    )
    workspace = torch.empty(attention.workspace_bytes(), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(batch.q)

    def plan() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        attention.plan(batch.lens, batch.page_indptr, workspace, stream)

    def layers() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        tables = (batch.page_indices, batch.lens, batch.page_indptr)
        for layer in range(batch.layers):
            attention.run(batch.q, batch.pool, layer, *tables, out, workspace, stream)

    def plans() -> None:
        for _ in range(20):
            plan()

    plan_us = replay_us(plans, 20, rounds)
    return replay_us(layers, batch.layers, rounds), plan_us, out


def flashinfer(shape: Shape, batch: Batch, rounds: int) -> tuple[float, float, Tensor]:
    """As `ours`; the plan is host work."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    count = len(batch.kv_lens)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    last = ((batch.lens - 1) % PAGE_SIZE + 1).int()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty(count + 1, dtype=torch.int32, device="cuda"),
        paged_kv_indices_buffer=torch.empty_like(batch.page_indices),
        paged_kv_last_page_len_buffer=torch.empty(count, dtype=torch.int32, device="cuda"),
    )
    indptr = batch.page_indptr.cpu()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = perf_counter()
        wrapper.plan(
            indptr,
            batch.page_indices,
            last,
            shape.heads,
            shape.kv_heads,
            shape.dim,
            PAGE_SIZE,
            q_data_type=DTYPE,
            kv_data_type=batch.pool.dtype,
        )
        torch.cuda.synchronize()
        times.append((perf_counter() - began) * 1e6)
    out = torch.empty_like(batch.q)

    def layers() -> None:
        for layer in range(batch.layers):
            kv = (batch.pool[:, :, layer, 0], batch.pool[:, :, layer, 1])
            wrapper.run(batch.q, kv, out=out)

    return replay_us(layers, batch.layers, rounds), median(times), out


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rounds", type=int, default=20)
    ask.add_argument("--no-flashinfer", action="store_true")
    ask.add_argument("--cases", type=int, default=len(CASES), help="only so many, the claim's first")
    ask.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    ask.add_argument("--json", type=Path)
    a = ask.parse_args()
    torch.manual_seed(0)
    card, copy = torch.cuda.get_device_name(), copy_bandwidth()
    print(f"{card}; copy {copy:.0f} GB/s; times in us")
    print(
        f"{'shape':<16}{'batch':<18}{'KV MB':>7}{'ours':>9}{'GB/s':>7}{'share':>7}{'plan':>7}"
        f"{'FlashInfer':>12}{'plan':>8}{'ratio':>7}{'error':>9}  claim"
    )
    results = []
    for shape, name, kv_lens, claimed in CASES[: a.cases]:
        batch = Batch(shape, kv_lens, torch.float8_e4m3fn if a.kv_cache_dtype == "fp8" else DTYPE)
        us, plan_us, out = ours(shape, batch, a.rounds)
        rate = batch.kv_bytes / us / 1e3
        row = {
            "shape": shape.name,
            "batch": name,
            "kv_bytes": batch.kv_bytes,
            "us": us,
            "plan_us": plan_us,
            "share": rate / copy,
        }
        print(
            f"{shape.name:<16}{name:<18}{batch.kv_bytes / 1e6:>7.0f}{us:>9.1f}{rate:>7.0f}"
            f"{rate / copy:>7.2f}{plan_us:>7.1f}",
            end="",
        )
        if not a.no_flashinfer:
            their_us, their_plan_us, their_out = flashinfer(shape, batch, a.rounds)
            error = ((out.float() - their_out.float()).norm() / their_out.float().norm()).item()
            row |= {"flashinfer_us": their_us, "flashinfer_plan_us": their_plan_us, "difference": error}
            print(f"{their_us:>12.1f}{their_plan_us:>8.0f}{their_us / us:>7.2f}{error:>9.1e}", end="")
        verdict = ("holds" if rate / copy >= CLAIM else "FAILS") if claimed else ""
        print(f"  {verdict}", flush=True)
        results.append(row)
        del batch, out
    if a.json:
        versions = {"torch": torch.__version__}
        a.json.write_text(
            json.dumps({"card": card, "copy_gb_per_s": copy, "versions": versions, "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()
