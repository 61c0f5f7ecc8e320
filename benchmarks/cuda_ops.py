"""Claim: every CUDA operator runs at 70 % of the GPU's copy rate or, in a decode step, within 5 us of that.

    python benchmarks/cuda_ops.py [--out benchmarks/results/cuda_ops-CARD.json]

Each is launched 50 times in a CUDA graph; printed is a launch's share of the fastest of 20 replays,
beside the time that its bytes take at the measured rate of a copy. Shapes are Qwen3-0.6B's (hidden
1024) and Llama-3.1-8B's (4096); 256 tokens are a decode step, 8,192 a prefill.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from disagg.layers import RopeSpec, cos_sin_cache, cuda_ops, ops

LAUNCHES, REPLAYS = 50, 20
VOCAB = 151936


def microseconds(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            run()
    best = float("inf")
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, began.elapsed_time(ended) * 1e3 / LAUNCHES)
    return best


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def operators(
    tokens: int, hidden: int, heads: int, kv_heads: int, wide: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """What to run, and the bytes that it must move."""
    x, residual, weight, out = (
        tensor(tokens, hidden),
        tensor(tokens, hidden),
        tensor(hidden),
        tensor(tokens, hidden),
    )
    gate_up, gated = tensor(tokens, 2 * wide), tensor(tokens, wide)
    q, k, v = tensor(tokens, heads + 2 * kv_heads, 128).split([heads, kv_heads, kv_heads], 1)
    pool = torch.zeros(tokens // 16 + 1, kv_heads, 2, 2, 16, 128, dtype=torch.bfloat16, device="cuda")
    order = torch.arange(tokens, dtype=torch.int32, device="cuda")
    cos_sin = cos_sin_cache(RopeSpec(), 128, tokens, torch.device("cuda"))
    norms = tensor(128), tensor(128)
    where = (order, cos_sin, pool, 0, order // 16, order % 16)
    table, ids = tensor(VOCAB, hidden), torch.randint(VOCAB, (tokens,), dtype=torch.int32, device="cuda")
    return {
        "rms_norm": (lambda: ops.rms_norm(x, weight, 1e-6, out=out), 4 * x.numel()),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, residual, weight, 1e-6, out=out), 8 * x.numel()),
        "silu_and_mul": (lambda: ops.silu_and_mul(gate_up, out=gated), 6 * gated.numel()),
        "rope_and_store": (
            lambda: ops.rope_and_store(q, k, v, *where, *norms),
            tokens * 128 * 2 * (2 * heads + 5 * kv_heads),
        ),
        "embedding": (lambda: ops.embedding(ids, table, out=out), 4 * x.numel()),
    }


def samplers(rows: int) -> dict[str, tuple[Callable[[], object], int]]:
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    out, last = torch.empty_like(slots), torch.empty_like(slots)
    keys = torch.randint(1 << 30, (rows, 2), dtype=torch.int32, device="cuda")
    # Flat as a random model's, so that almost any token may win; and peaked as a trained one's.
    flat, peaked = tensor(rows, VOCAB), tensor(rows, VOCAB) * 4

    def run(
        logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> Callable[[], object]:
        def column(value: float) -> Tensor:
            return torch.full((rows,), value, device="cuda")

        limits = (column(temperature), column(top_k).int(), column(top_p), column(min_p))
        return lambda: cuda_ops.sample(logits, *limits, keys, slots, out, last)

    kinds = {
        "greedy": run(flat, 0.0, 0, 1.0, 0.0),
        "temperature 0.6, flat": run(flat, 0.6, 0, 1.0, 0.0),
        "temperature 0.6, peaked": run(peaked, 0.6, 0, 1.0, 0.0),
        "top_k 50": run(peaked, 1.0, 50, 1.0, 0.0),
        "top_p 0.9": run(peaked, 1.0, 0, 0.9, 0.0),
        "min_p 0.05": run(peaked, 1.0, 0, 1.0, 0.05),
        "top_k 50, top_p 0.9": run(peaked, 1.0, 50, 0.9, 0.0),
    }
    return {f"sample {name}": (kind, 2 * rows * VOCAB) for name, kind in kinds.items()}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path)
    a = ask.parse_args()
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    rate = 2 * source.numel() / microseconds(lambda: target.copy_(source))  # bytes a microsecond
    card = torch.cuda.get_device_name()
    print(f"{card}: copies at {rate / 1e6:.2f} TB/s")
    print(f"{'us a launch':<52}{'ours':>8}{'bytes':>8}")
    rows = []
    for tokens in (1, 32, 256, 8192):
        cases = {}
        for model, shape in {"0.6B": (1024, 16, 8, 3072), "8B": (4096, 32, 8, 14336)}.items():
            cases |= {f"{name} {model}": case for name, case in operators(tokens, *shape).items()}
        for name, (run, num_bytes) in (cases | (samplers(tokens) if tokens <= 256 else {})).items():
            ours, floor = microseconds(run), num_bytes / rate
            holds = ours <= max(floor / 0.7, floor + 5.0)
            rows.append({"operator": name, "tokens": tokens, "us": ours, "floor_us": floor, "holds": holds})
            print(f"{f'{name}, {tokens}':<52}{ours:>8.1f}{floor:>8.1f}  {'holds' if holds else 'FAILS'}")
    if a.out:
        figures = {"card": card, "torch": torch.__version__, "copy_bytes_per_us": rate, "rows": rows}
        a.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
