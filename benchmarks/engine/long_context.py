"""Claim: a prompt of 32k tokens in chunks takes about the time of one whole and a fraction of its memory.

    python benchmarks/engine/long_context.py SHAPE_DIR [--tokens 32768] [--rounds 2]

For each chunk size (`--max-num-batched-tokens`) an engine with random weights prefills prompts of random ids,
one at a time and none cached. Printed are the median time to the first token, prompt tokens a second, the
share of 760 TFLOP/s that is, and the peak of the memory that is neither weights nor KV pool.
"""

import argparse
import gc
import json
import statistics
import time
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import torch

from disagg.llm import LLM
from disagg.models import ModelSpec, load_spec
from disagg.models.load import whole_shapes
from disagg.protocol import SamplingParams

CHUNKS = (2048, 4096, 8192, 16_384, 32_768)
PAGE_SIZE = 16
FLOPS = 760e12
"""What cuBLAS reaches on a Hopper card."""
RESULTS = Path(__file__).parent.parent / "results"


def floor_s(spec: ModelSpec, tokens: int) -> float:
    """The products' operations at `FLOPS`: each weight once a token, and half of the square of attention."""
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    weights = sum(prod(shape) for shape in whole_shapes(spec).values()) - embeddings
    attention = 2 * tokens * spec.num_heads * spec.head_dim * spec.num_layers
    return tokens * (2 * weights + attention) / FLOPS


def measure(shape: Path, spec: ModelSpec, chunk: int, tokens: int, rounds: int) -> dict[str, Any]:
    page_bytes = spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 * 2 * PAGE_SIZE
    num_pages = tokens // PAGE_SIZE + 8
    torch.cuda.reset_peak_memory_stats()
    llm = LLM(
        str(shape),
        load_format="dummy",
        dtype="bfloat16",
        max_num_seqs=1,
        max_num_batched_tokens=chunk,
        max_model_len=tokens + PAGE_SIZE,
        kv_cache_memory_bytes=num_pages * page_bytes,
        block_size=PAGE_SIZE,
    )
    times = []
    for salt in range(rounds + 1):
        draw = Random(salt)
        prompt = [draw.randrange(10_000) for _ in range(tokens)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        produced = sum(len(p.token_ids) for p in llm.run([(prompt, SamplingParams(max_tokens=1))]))
        times.append(time.perf_counter() - began)
        assert produced == 1
    weights = sum(prod(size) for size in whole_shapes(spec).values()) * 2
    seconds = statistics.median(times[1:])
    return {
        "chunk": chunk,
        "first_token_s": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
        "of_floor": round(floor_s(spec, tokens) / seconds, 2),
        "peak_beside_gb": round(
            (torch.cuda.max_memory_allocated() - weights - num_pages * page_bytes) / 1e9, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=Path, help="Folder with a config.json.")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=2)
    a = parser.parse_args()
    spec = load_spec(a.shape)
    rows = []
    for chunk in [chunk for chunk in CHUNKS if chunk <= a.tokens]:
        rows.append(measure(a.shape, spec, chunk, a.tokens, a.rounds))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_name()
    result = {
        "claim": "long prompts in chunks",
        "shape": a.shape.name,
        "card": card,
        "tokens": a.tokens,
        "floor_s": round(floor_s(spec, a.tokens), 3),
        "rows": rows,
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"long-context-{a.shape.name}-{card.removeprefix('NVIDIA ').split()[0]}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
