"""Claim: eight-bit weights make large steps faster and halve the weights' memory.

    python benchmarks/engine/fp8.py SHAPE_DIR [--layers 8] [--rows 1,8,64,256,2048,8192]

A layer's four products, rounding of the activations included, by bfloat16 and by e4m3 weights with a scale
a row: median replay of a CUDA graph over several layers, far more bytes than the L2 cache holds. Then the
logits of one prompt of random ids, by the same random weights in both: the error of e4m3, and of bfloat16
as it is, in standard deviations of the logits of float32.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec.structs import replace
from replay import replay_us
from torch import Tensor

from disagg.attention import AttentionBatch, AttentionSizes, make_attention
from disagg.attention.batch import HostIndices
from disagg.checkpoint import ModelFiles
from disagg.kv.layout import PageLayout
from disagg.layers import ops
from disagg.layers.fp8 import Weight
from disagg.models import Decoder, ModelSpec, load_model, load_spec

RESULTS = Path(__file__).parent.parent / "results"
CLAIM_ROWS = 256
PAGE_SIZE, PROMPT_TOKENS = 16, 512


def load(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, quantization: Literal["fp8"] | None = None
) -> Decoder:
    files = ModelFiles(folder, "m", "benchmark")
    return load_model(files, spec, device="cuda", dtype=dtype, load_format="dummy", quantization=quantization)


def matrices(decoder: Decoder) -> list[tuple[Weight, ...]]:
    return [(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in decoder._layers]


def products_us(decoder: Decoder, rows: int) -> float:
    layers = matrices(decoder)
    inputs = [torch.randn(rows, weight.shape[1], device="cuda").bfloat16() for weight in layers[0]]
    outs = [x.new_empty(rows, weight.shape[0]) for x, weight in zip(inputs, layers[0], strict=True)]

    def step() -> None:
        for layer in layers:
            for x, weight, out in zip(inputs, layer, outs, strict=True):
                ops.linear(x, weight, out=out)

    return replay_us(step, len(layers))


@torch.inference_mode()
def logits(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Of every token of one prompt."""
    spec, count = decoder.spec, len(token_ids)
    layout = PageLayout(PAGE_SIZE, spec.num_kv_heads, spec.num_layers, spec.head_dim, decoder.dtype.itemsize)
    sizes = AttentionSizes(layout=layout, num_qo_heads=spec.num_heads, dtype=decoder.dtype)
    attention = make_attention("reference", sizes, decoder.device)
    pool = torch.zeros((-(-count // PAGE_SIZE), *layout.shape), dtype=decoder.dtype, device="cuda")
    positions = torch.arange(count, dtype=torch.int32, device="cuda")
    one = [torch.tensor(v, dtype=torch.int32) for v in ([0, count], [count], [0, len(pool)])]
    qo_indptr, kv_lens, page_indptr = (t.cuda() for t in one)
    batch = AttentionBatch(
        num_decodes=0,
        qo_indptr=qo_indptr,
        kv_lens=kv_lens,
        page_indptr=page_indptr,
        page_indices=torch.arange(len(pool), dtype=torch.int32, device="cuda"),
        positions=positions,
        token_pages=positions // PAGE_SIZE,
        token_offsets=positions % PAGE_SIZE,
        max_qo_len=count,
        max_kv_len=count,
        on_host=HostIndices(*one),
    )
    attention.plan(batch)
    return decoder.forward(token_ids, batch, attention, pool, None).float()


def error(got: Tensor, want: Tensor) -> dict[str, float]:
    off = (got - want).abs() / want.std()
    agree = (got.argmax(1) == want.argmax(1)).float().mean()
    return {
        "mean": round(off.mean().item(), 5),
        "max": round(off.max().item(), 4),
        "same_likeliest": round(agree.item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=Path, help="Folder with a config.json.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", default="1,8,64,256,2048,8192")
    a = parser.parse_args()
    spec = replace(load_spec(a.shape), num_layers=a.layers, max_position_embeddings=PROMPT_TOKENS)
    token_ids = torch.randint(spec.vocab_size, (PROMPT_TOKENS,), device="cuda")
    exact = logits(load(a.shape, spec, torch.float32), token_ids)
    plain, rounded = load(a.shape, spec, torch.bfloat16), load(a.shape, spec, torch.bfloat16, "fp8")
    card = torch.cuda.get_device_name()
    print(f"{card}: {a.shape.name}, {a.layers} layers; µs of a layer's products\n  rows bfloat16      fp8")
    rows: list[dict[str, Any]] = []
    for count in map(int, a.rows.split(",")):
        row = {"rows": count, "bfloat16_us": products_us(plain, count), "fp8_us": products_us(rounded, count)}
        rows.append(row)
        print(f"{count:>6}{row['bfloat16_us']:>9.1f}{row['fp8_us']:>9.1f}", flush=True)
    of_layer = {
        "bfloat16": sum(w.numel() * 2 for w in matrices(plain)[0] if isinstance(w, Tensor)),
        "fp8": sum(t.nbytes for w in matrices(rounded)[0] for t in w),
    }
    errors = {
        "bfloat16": error(logits(plain, token_ids), exact),
        "fp8": error(logits(rounded, token_ids), exact),
    }
    print(f"bytes of a layer: {of_layer}\nerror of logits, of their deviation: {errors}")
    holds = all(r["fp8_us"] < r["bfloat16_us"] for r in rows if r["rows"] >= CLAIM_ROWS)
    result = {
        "claim": f"eight-bit weights are faster from {CLAIM_ROWS} rows on, and halve the weights",
        "holds": holds,
        "shape": a.shape.name,
        "layers": a.layers,
        "card": card,
        "torch": torch.__version__,
        "products": rows,
        "layer_bytes": of_layer,
        "logit_error_in_deviations": errors,
    }
    RESULTS.mkdir(exist_ok=True)
    short = card.removeprefix("NVIDIA ").split()[0]
    (RESULTS / f"fp8-{a.shape.name}-{short}.json").write_text(json.dumps(result, indent=2) + "\n")
    print("holds" if holds else "FAILS")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
