"""Claim: products of few tokens with packed weights are faster than torch's (oneDNN, MKL) on the CPU.

The matrices of SmolLM2-135M, bfloat16 and float32, for 1 to 1,024 tokens. `plain` is our kernel on a
weight that was not packed at load, which gives the same bits.

    python benchmarks/cpu_linear.py [--threads 2] [--rounds 40]

Each matrix exists often enough that weights come from memory, as in a model's step. Printed is the
median copy's best of the rounds, and what of it that is in bytes of weights and in products.
"""

import argparse
from functools import partial

import torch
from timing import best_of_rounds
from torch import Tensor
from torch.nn.functional import linear

from disagg.layers import ops
from disagg.layers.memory import allocate

MATRICES = [("qkv", 960, 576), ("gate_up", 3072, 576), ("down", 576, 1536), ("head", 49152, 576)]
TOKENS = (1, 4, 16, 64, 1024)
# More than any cache: 32 MiB of L3 here.
BYTES = 120 * 1024 * 1024


def copies(n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    count = max(2, BYTES // (n * k * dtype.itemsize))
    memory = allocate(count * n * k * dtype.itemsize).view(dtype).view(count, n, k)
    return list(memory.normal_().unbind(0))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--rounds", type=int, default=40)
    a = ask.parse_args()
    torch.set_num_threads(a.threads)
    columns = f"{'packed':>9}{'plain':>9}{'torch':>9}{'ratio':>8}{'GB/s':>8}{'GMAC/s':>8}{'claim':>8}"
    print(f"{f'us, {a.threads} threads':<34}{columns}")
    with torch.inference_mode():
        for name, n, k in MATRICES:
            for dtype in (torch.bfloat16, torch.float32):
                plain = copies(n, k, dtype)
                packed = [ops.pack_linear(weight) for weight in copies(n, k, dtype)]
                for tokens in TOKENS:
                    if name == "head" and tokens > 64:
                        continue  # nobody wants the logits of every token of a prompt
                    x = torch.randn(tokens, k).to(dtype)
                    rounds = max(3, a.rounds // (1 + tokens // 32))
                    mine = best_of_rounds(partial(ops.linear, x), packed, rounds)
                    unpacked = best_of_rounds(partial(ops.linear, x), plain, rounds)
                    reference = best_of_rounds(partial(linear, x), plain, rounds)
                    ratio = reference / mine
                    row = f"{name} [{n}, {k}], {tokens}, {str(dtype).removeprefix('torch.')}"
                    rates = f"{n * k * dtype.itemsize / mine / 1e3:>8.1f}{n * k * tokens / mine / 1e3:>8.0f}"
                    verdict = f"{1.0:>7.1f}x  {'holds' if ratio >= 1 else 'FAILS'}" if tokens <= 64 else ""
                    print(
                        f"{row:<34}{mine:>9.1f}{unpacked:>9.1f}{reference:>9.1f}{ratio:>8.2f}{rates}{verdict}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
