"""Claim: a decode step's products with weights are faster than cuBLAS's, where they are used.

    python benchmarks/engine/linear.py [--rounds 10] [--sweep] [--rows 8 40 ...] [--shape N K] [--json FILE]

Each product is captured in a CUDA graph over many weights in turn, far more than the L2 cache holds, and
the graph is replayed; printed is the median replay's time a product beside cuBLAS's (torch.mm) and the
floor, bytes at 4.3 TB/s or operations at 760 TFLOP/s. `--sweep` tries other plans and names the best. Then
a layer's four products and the small kernels between them, as the engine runs them.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from replay import replay_us
from torch import Tensor

from disagg import _cuda

LAYERS = {  # qkv, output, gate and up, down: [n, k]
    "Qwen3-0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "Llama-3.1-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
}
ROWS = (8, 40, 64, 96, 128, 160, 192, 240)
WEIGHT_BYTES = 240 << 20
TOKENS = (16, 32, 64, 96, 128, 160, 192, 224, 256)
Norm = tuple[Tensor | None, float, Tensor | None, Tensor | None, Tensor | None]
PLAIN: Norm = (None, 1e-6, None, None, None)


def weights(n: int, k: int) -> list[Tensor]:
    count = max(2, -(-WEIGHT_BYTES // (n * k * 2)))
    made = torch.empty(count, n, k, dtype=torch.bfloat16, device="cuda").normal_(std=k**-0.5)
    torch.cuda.synchronize()
    return list(made)


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Ours:
    """Calls with plans that are made once."""

    def __init__(self) -> None:
        self.sms = torch.cuda.get_device_properties("cuda").multi_processor_count
        self.workspace = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        self.plans: dict[tuple[int, ...], _cuda.LinearPlan] = {}

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        gated: bool = False,
        norm: Norm | None = None,
    ) -> None:
        key = (len(x), *w.shape)
        if key not in self.plans:
            self.plans[key] = _cuda.plan_linear(*key, gated, self.sms)
        plan = self.plans[key]
        _cuda.linear(x, w, None, residual, out, gated, *(norm or PLAIN), plan, self.workspace, stream())


def floor_us(rows: int, n: int, k: int) -> float:
    return max(n * k * 2 / 4.3e6, 2 * rows * n * k / 760e6)


def text(plan: _cuda.LinearPlan) -> str:
    return (
        f"{plan.tokens}t {plan.groups}g {plan.multicast}m {plan.splits}s {plan.slices} "
        f"w{plan.w_stages} x{plan.x_stages} {'sends' if plan.sends else ''}"
    )


def plans(rows: int, n: int, k: int, sms: int) -> list[_cuda.LinearPlan]:
    """What `--sweep` tries, beside the rule's."""
    depth, found = k // 64, {}
    sizes = {next(s for s in TOKENS if s >= -(-rows // parts)) for parts in (1, 2, 3, 4)}
    for tokens, groups, multicast in product(sorted(sizes), (1, 2), (1, 2, 4)):
        token_tiles, tiles = -(-rows // tokens), n // (64 * groups * multicast)
        if n % (64 * groups * multicast) or tokens % (8 * multicast):
            continue
        cuts = [(s, tiles * s) for s in (1, 2, 4, 8) if s <= depth and s * multicast <= 8]
        if tiles * multicast * token_tiles > sms:
            cuts.append((1, sms // (multicast * token_tiles)))
        for (splits, slices), room, sends in product(cuts, (112, 224), (0, 1)):
            each = -(-tiles * depth // slices)
            partials = splits * -(-tokens // 8 // splits) * groups * 2048 if splits > 1 else 0
            stages = min(each, 24, ((room << 10) - partials) // ((groups << 13) + tokens * 128))
            ctas = slices * multicast * token_tiles
            if stages < min(each, 3) or not 40 <= ctas <= 3 * sms or (splits == 1 and sends):
                continue
            key = (tokens, groups, multicast, splits, slices, stages, stages, sends)
            found[key] = _cuda.LinearPlan(*key)
    return list(found.values())


def one(rows: int, n: int, k: int, ours: Ours, rounds: int, sweep: bool) -> dict[str, float | str]:
    ws = weights(n, k)
    x = torch.randn(rows, k, device="cuda").bfloat16()
    out, want = (torch.empty(rows, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def by(run: Callable[[Tensor], None]) -> float:
        def step() -> None:
            for w in ws:
                run(w)

        return replay_us(step, len(ws), rounds)

    cublas = by(lambda w: torch.mm(x, w.t(), out=want))
    us = by(lambda w: ours(x, w, out))
    error = (out.float() - want.float()).abs().max().item()
    rule = ours.plans[rows, n, k]
    swept = []
    for plan in plans(rows, n, k, ours.sms) if sweep else ():
        try:
            tried = by(
                partial(
                    lambda w, plan: _cuda.linear(
                        x, w, None, None, out, False, *PLAIN, plan, ours.workspace, stream()
                    ),
                    plan=plan,
                )
            )
        except ValueError:
            continue  # does not fit
        swept.append((tried, text(plan)))
    floor = floor_us(rows, n, k)
    times = f"{floor:>8.1f}{cublas:>9.1f}{us:>8.1f}{us / cublas:>7.2f}{error:>9.1e}  {text(rule)}"
    best = "".join(f" | {us:.1f} {text}" for us, text in sorted(swept)[:3])
    print(f"{n:>7}{k:>7}{rows:>5}{times}{best}", flush=True)
    result = {"n": n, "k": k, "rows": rows, "floor_us": floor, "cublas_us": cublas, "ours_us": us}
    return result


def layer(name: str, rows: int, ours: Ours, rounds: int) -> dict[str, float | str]:
    """A layer without its attention and rotation, by cuBLAS, by ours, by ours with what follows inside."""
    shapes = LAYERS[name]
    ws = list(zip(*(weights(*shape) for shape in shapes), strict=False))
    hidden, inner = shapes[0][1], shapes[3][1]
    new = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    residual, normed, delta = (new(rows, hidden) for _ in range(3))
    qkv, attended = new(rows, shapes[0][0]), new(rows, shapes[1][1])
    gate_up, gated, norm = new(rows, shapes[2][0]), new(rows, inner), new(hidden)

    def step(mm: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        for w_qkv, w_o, w_gate_up, w_down in ws:
            mm(normed, w_qkv, qkv)
            mm(attended, w_o, delta)
            _cuda.rms_norm(delta, residual, norm, normed, 1e-6, stream())
            mm(normed, w_gate_up, gate_up)
            _cuda.silu_and_mul(gate_up, gated, False, stream())
            mm(gated, w_down, delta)
            _cuda.rms_norm(delta, residual, norm, normed, 1e-6, stream())

    def fused() -> None:
        for w_qkv, w_o, w_gate_up, w_down in ws:
            ours(normed, w_qkv, qkv)
            ours(attended, w_o, residual, residual)
            _cuda.rms_norm(residual, None, norm, normed, 1e-6, stream())
            ours(normed, w_gate_up, gated, gated=True)
            ours(gated, w_down, residual, residual)
            _cuda.rms_norm(residual, None, norm, normed, 1e-6, stream())

    squares = torch.ones(hidden // 64, 256, device="cuda")
    taken, left = (squares, 1e-6, None, None, None), (None, 1e-6, squares, norm, normed)

    def normed_inside() -> None:
        for w_qkv, w_o, w_gate_up, w_down in ws:
            ours(normed, w_qkv, qkv, norm=taken)
            ours(attended, w_o, residual, residual, norm=left)
            ours(normed, w_gate_up, gated, gated=True, norm=taken)
            ours(gated, w_down, residual, residual, norm=left)

    cublas = replay_us(lambda: step(lambda x, w, out: torch.mm(x, w.t(), out=out)), len(ws), rounds)
    plain = replay_us(lambda: step(ours), len(ws), rounds)
    inside = replay_us(fused, len(ws), rounds)
    all_inside = replay_us(normed_inside, len(ws), rounds)
    print(f"{name:<14}{rows:>5}{cublas:>9.1f}{plain:>9.1f}{inside:>9.1f}{all_inside:>9.1f}", flush=True)
    result: dict[str, float | str] = {"layer": name, "rows": rows, "cublas_us": cublas, "ours_us": plain}
    return result | {"fused_us": inside, "normed_us": all_inside}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rounds", type=int, default=10)
    ask.add_argument("--sweep", action="store_true")
    ask.add_argument("--rows", type=int, nargs="+", default=ROWS)
    ask.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    ask.add_argument("--model", choices=LAYERS, action="append")
    ask.add_argument("--json", type=Path)
    a = ask.parse_args()
    torch.manual_seed(0)
    card, ours, results = torch.cuda.get_device_name(), Ours(), []
    print(f"{card}; times in us")
    print(f"{'n':>7}{'k':>7}{'rows':>5}{'floor':>8}{'cuBLAS':>9}{'ours':>8}{'ratio':>7}{'differ':>9}  plan")
    models = a.model or list(LAYERS)
    for n, k in a.shape or [shape for model in models for shape in LAYERS[model]]:
        for rows in a.rows:
            results.append(one(rows, n, k, ours, a.rounds, a.sweep))
    print(f"{'layer':<14}{'rows':>5}{'cuBLAS':>9}{'ours':>9}{'fused':>9}{'normed':>9}")
    for model, rows in product(() if a.shape else models, a.rows):
        results.append(layer(model, rows, ours, a.rounds))
    if a.json:
        a.json.write_text(
            json.dumps({"card": card, "torch": torch.__version__, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
