"""Claim: KV in e4m3 takes half the memory, and moves logits little more than bfloat16's own rounding does.

    python benchmarks/engine/kv_dtype.py SHAPE_DIR [--prompt 512] [--steps 32]

Random weights; eight prompts of random ids, then steps of one more random token each: the same for a pool
of each type. Printed are bytes of KV a token, and how far the logits are from those over a float32 pool
of a float32 model by torch alone, `--reference` off to leave that out: relative in norm, largest Kullback-
Leibler divergence, and how often the likeliest token is the same. Weights are drawn in each type from the
same seed. Speed: `decode_attention.py` and `offline.py` with `--kv-cache-dtype fp8`.
"""

import argparse
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from disagg.config import EngineConfig, ModelConfig
from disagg.engine.batch import build_tensors
from disagg.engine.build import load_rank
from disagg.engine.plan import SamplePlan, StepPlan, packed
from disagg.kv.layout import PageLayout

ROWS, PAGE_SIZE = 8, 16


def plan_of(token_ids: list[list[int]], lengths: list[int], num_pages: int) -> StepPlan:
    """New tokens of each row, which makes it `lengths` long; row i has pages i, ROWS + i, ..."""
    counts = [-(-n // PAGE_SIZE) for n in lengths]
    assert max(counts) * ROWS <= num_pages
    indptr = [sum(counts[:i]) for i in range(ROWS + 1)]
    return StepPlan(
        step=0,
        num_decodes=ROWS if len(token_ids[0]) == 1 else 0,
        num_tokens=sum(map(len, token_ids)),
        token_ids=packed([token for row in token_ids for token in row]),
        slots=packed(range(ROWS)),
        query_lens=packed([len(row) for row in token_ids]),
        kv_lens=packed(lengths),
        page_indptr=packed(indptr),
        page_indices=packed([page * ROWS + row for row, n in enumerate(counts) for page in range(n)]),
        samples=SamplePlan(rows=packed(range(ROWS))),
    )


@torch.inference_mode()
def logits_of(shape: Path, prompt: int, steps: int, dtype: str, kv: str, backend: str) -> tuple[Tensor, int]:
    """Logits `[1 + steps, ROWS, vocab]` in float32 on the host, and bytes of KV a token."""
    model = ModelConfig(model=str(shape), load_format="dummy", dtype=dtype, max_model_len=prompt + steps)
    fields = {"kv_cache_dtype": kv, "attention_backend": backend, "max_num_batched_tokens": ROWS * prompt}
    engine = EngineConfig(max_num_seqs=ROWS, kv_cache_memory_bytes=2 << 30, **fields)
    rank = load_rank(model, engine)
    runner, random = rank.runner, Random(1)
    found = []
    for step in range(steps + 1):
        count = prompt if step == 0 else 1
        token_ids = [[random.randrange(10_000) for _ in range(count)] for _ in range(ROWS)]
        plan = plan_of(token_ids, [prompt + step] * ROWS, rank.num_pages)
        tokens, logits_at, batch, _ = build_tensors(plan, PAGE_SIZE, rank.device)
        runner._attention.plan(batch)
        logits = runner._decoder.forward(tokens, batch, runner._attention, rank.pool, logits_at)
        found.append(logits.float().cpu())
    return torch.stack(found), PageLayout.of(rank.layout).page_bytes // PAGE_SIZE


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("shape", type=Path, help="Folder with a config.json.")
    ask.add_argument("--prompt", type=int, default=512)
    ask.add_argument("--steps", type=int, default=32)
    ask.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    a = ask.parse_args()
    runs = {kv: logits_of(a.shape, a.prompt, a.steps, "bfloat16", kv, "auto") for kv in ("auto", "fp8")}
    against = {"bfloat16 KV": runs["auto"][0]}
    if a.reference:
        against["float32"] = logits_of(a.shape, a.prompt, a.steps, "float32", "auto", "reference")[0]
    print(f"{a.shape.name}, {ROWS} x {a.prompt} tokens and {a.steps} steps")
    print(f"{'KV':<10}{'bytes a token':>14}  {'against':<12}{'relative':>10}{'KL':>10}{'same token':>12}")
    for name, (logits, token_bytes) in runs.items():
        for what, wanted in against.items():
            if wanted is logits:
                continue
            error = ((logits - wanted).norm() / wanted.norm()).item()
            logs, wanted_logs = logits.log_softmax(-1), wanted.log_softmax(-1)
            divergence = (wanted_logs.exp() * (wanted_logs - logs)).sum(-1).max().item()
            same = (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item()
            kind = "bfloat16" if name == "auto" else "e4m3"
            print(f"{kind:<10}{token_bytes:>14}  {what:<12}{error:>10.2e}{divergence:>10.2e}{same:>12.3f}")


if __name__ == "__main__":
    main()
