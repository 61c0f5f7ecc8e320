"""Claim: paged attention on the CPU is not slower than torch's scaled_dot_product_attention.

Torch gets K and V gathered beforehand, contiguous and padded to one length, which costs it nothing
here; ours reads them from pages scattered over a pool of 30 layers. SmolLM2-135M's heads (9 query,
3 KV, of 64), bfloat16 and float32. The first row is the claim: 8 sequences, 1,024 tokens of context.

    python benchmarks/cpu_attention.py [--threads 2] [--rounds 40]

Both go through all 30 layers in turn, so KV comes from memory as in a model's step. Printed is the
median layer's best of the rounds, which is what the machine does when nobody disturbs it.
"""

import argparse
from itertools import accumulate

import torch
from timing import best_of_rounds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from disagg.attention import AttentionBatch, AttentionSizes, make_attention
from disagg.kv.layout import PageLayout
from disagg.kv.views import layer_views
from disagg.layers.memory import allocate

HEADS, KV_HEADS, DIM, PAGE_SIZE, LAYERS = 9, 3, 64, 16, 30
CASES = [  # sequences, context, new tokens each, whether it is the claim
    (8, 1024, 1, True),
    (1, 1024, 1, False),
    (16, 128, 1, False),
    (32, 1024, 1, False),
    (1, 1024, 1024, False),
    (4, 1024, 256, False),
]


def make_batch(count: int, context: int, new: int, num_pages: int) -> AttentionBatch:
    used = context // PAGE_SIZE
    positions = torch.arange(context - new, context, dtype=torch.int32).repeat(count)
    tables = torch.randperm(num_pages)[: count * used].to(torch.int32)
    rows = torch.arange(count).repeat_interleave(new) * used + positions // PAGE_SIZE
    return AttentionBatch(
        num_decodes=count if new == 1 else 0,
        qo_indptr=torch.arange(0, count * new + 1, new, dtype=torch.int32),
        kv_lens=torch.full((count,), context, dtype=torch.int32),
        page_indptr=torch.tensor(list(accumulate([used] * count, initial=0)), dtype=torch.int32),
        page_indices=tables,
        positions=positions,
        token_pages=tables[rows],
        token_offsets=positions % PAGE_SIZE,
        max_qo_len=new,
        max_kv_len=context,
    )


def compare(
    count: int, context: int, new: int, dtype: torch.dtype, threads: int, rounds: int
) -> tuple[float, float]:
    """Microseconds a layer of ours and of torch's."""
    layout = PageLayout(PAGE_SIZE, KV_HEADS, LAYERS, DIM, dtype.itemsize)
    num_pages = count * context // PAGE_SIZE
    pool = allocate(num_pages * layout.page_bytes).view(dtype).view(num_pages, *layout.shape)
    pool.normal_()
    batch = make_batch(count, context, new, num_pages)
    q = torch.randn(count * new, HEADS, DIM).to(dtype)
    out = torch.empty_like(q)
    ours = make_attention(
        "cpu", AttentionSizes(layout=layout, num_qo_heads=HEADS, dtype=dtype), "cpu", threads
    )
    ours.plan(batch)

    def gather(view: Tensor) -> Tensor:
        pages = view[batch.page_indices.long()].unflatten(0, (count, -1))
        return pages.transpose(1, 2).flatten(2, 3).contiguous()

    gathered = [tuple(gather(view) for view in layer_views(pool, layer)) for layer in range(LAYERS)]
    queries = q.view(count, new, HEADS, DIM).transpose(1, 2)
    # Torch's own causal mask is aligned to the first token; with a context before, it must be given.
    mask = None if new == 1 else torch.ones(new, context, dtype=torch.bool).tril(context - new)
    whole = new == context

    def torchs(layer: int) -> Tensor:
        k, v = gathered[layer]
        options = {"is_causal": True} if whole else {"attn_mask": mask}
        return scaled_dot_product_attention(queries, k, v, enable_gqa=True, **options)

    ours.run(3, q, pool, out)
    torch.testing.assert_close(
        out.view(count, new, HEADS, DIM).transpose(1, 2), torchs(3), atol=2e-2, rtol=2e-2
    )
    fewer = max(3, rounds // (1 + count * new * context // (1 << 18)))
    layers = range(LAYERS)
    mine = best_of_rounds(lambda layer: ours.run(layer, q, pool, out), layers, fewer)
    return mine, best_of_rounds(torchs, layers, fewer)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--rounds", type=int, default=40)
    a = ask.parse_args()
    torch.set_num_threads(a.threads)
    print(f"us a layer, {a.threads} threads{'':<22}{'ours':>9}{'torch':>9}{'ratio':>8}{'claim':>7}")
    with torch.inference_mode():
        for count, context, new, claimed in CASES:
            for dtype in (torch.bfloat16, torch.float32):
                mine, reference = compare(count, context, new, dtype, a.threads, a.rounds)
                ratio = reference / mine
                name = f"{count} x {context}, {new} new, {str(dtype).removeprefix('torch.')}"
                verdict = f"{1.0:>6.1f}x  {'holds' if ratio >= 1 else 'FAILS'}" if claimed else ""
                print(f"{name:<43}{mine:>9.1f}{reference:>9.1f}{ratio:>8.2f}{verdict}", flush=True)


if __name__ == "__main__":
    main()
