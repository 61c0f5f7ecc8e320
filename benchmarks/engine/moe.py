"""Claim: a mixture of experts takes less than twice its floor at batch 64, router and weighted sum included.

    python benchmarks/engine/moe.py SHAPE_DIR [--batches 1,8,64,256,1024,8192]

The floor is the bytes of the experts that are touched at 4.3 TB/s or the operations at 760 TFLOP/s, whichever
is more. Layers of random weights, far more than the L2 cache holds, run one after the other in a CUDA graph;
printed is the median replay's time a layer. Every token chooses its experts at random. Beside it the same
products by torch's grouped matrix product alone, without routing, activation and sum.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from replay import replay_us
from torch import Tensor

from disagg.layers import ops, torch_ops
from disagg.models import ModelSpec, load_spec

RESULTS = Path(__file__).parent.parent / "results"
BYTES_PER_US, OPERATIONS_PER_US = 4.3e6, 760e6
LAYERS, CLAIM_BATCH, CLAIM = 4, 64, 2.0


def noise(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)


class Layers:
    def __init__(self, spec: ModelSpec) -> None:
        assert spec.experts is not None
        self.count, self.choices = spec.experts.count, spec.experts.choices
        self.normalize = spec.experts.normalize
        width, inner = spec.hidden_size, spec.intermediate_size
        self.width, self.inner = width, inner
        # A router of large weights chooses evenly, as its scores are independent and far from ties.
        self.routers = [noise(self.count, width) * 50 for _ in range(LAYERS)]
        self.gate_ups = [noise(self.count, 2 * inner, width) for _ in range(LAYERS)]
        self.downs = [noise(self.count, width, inner) for _ in range(LAYERS)]

    def run(self, batch: int) -> dict[str, Any]:
        x = noise(batch, self.width) * 50
        out, pages = torch.empty_like(x), torch.zeros(batch, dtype=torch.int32, device="cuda")
        weights = list(zip(self.routers, self.gate_ups, self.downs, strict=True))
        chosen = (self.choices, self.normalize)

        def ours() -> None:
            for router, gate_up, down in weights:
                ops.experts(x, ops.linear(x, router), *chosen, pages, gate_up, down, out=out)

        order = ops.linear(x, self.routers[0]).topk(self.choices).indices.flatten()
        ends = order.bincount(minlength=self.count).cumsum(0).int()
        pairs = noise(batch * self.choices, self.width), noise(batch * self.choices, self.inner)

        def grouped() -> None:
            for _, gate_up, down in weights:
                torch._grouped_mm(pairs[0], gate_up.mT, ends)
                torch._grouped_mm(pairs[1], down.mT, ends)

        touched = [
            int(ops.linear(x, router).topk(self.choices).indices.unique().numel()) for router in self.routers
        ]
        expert = 3 * self.width * self.inner
        floors = (
            sum(touched) / LAYERS * expert * 2 / BYTES_PER_US,
            2 * len(order) * expert / OPERATIONS_PER_US,
        )
        us, floor = replay_us(ours, LAYERS), max(floors)
        return {
            "batch": batch,
            "experts_touched": sum(touched) / LAYERS,
            "us": round(us, 1),
            "floor_us": round(floor, 1),
            "times_floor": round(us / floor, 2),
            "grouped_mm_products_us": round(replay_us(grouped, LAYERS), 1),
            "relative_error": self.error(x[:16]),
        }

    def error(self, x: Tensor) -> float:
        """Against float64 over the weights as they are, of the last layer."""
        pages = torch.zeros(len(x), dtype=torch.int32, device="cuda")
        scores = ops.linear(x, self.routers[-1])
        chosen = (self.choices, self.normalize)
        got = ops.experts(x, scores, *chosen, pages, self.gate_ups[-1], self.downs[-1])
        wide = (x.double(), scores.double(), *chosen, pages)
        want = torch.empty_like(wide[0])
        torch_ops.experts(*wide, _Wide(self.gate_ups[-1]), _Wide(self.downs[-1]), want)  # type: ignore[arg-type]
        return float(f"{(got.double() - want).norm() / want.norm():.1e}")


class _Wide:
    """Experts' weights as float64, one at a time."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def __getitem__(self, expert: int) -> Tensor:
        return self._weights[expert].double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=Path, help="Folder with a config.json.")
    parser.add_argument("--batches", default="1,8,64,256,1024,8192")
    a = parser.parse_args()
    layers = Layers(load_spec(a.shape))
    card = torch.cuda.get_device_name()
    print(f"{card}: {a.shape.name}, µs a layer")
    print(f"{'batch':>6}{'experts':>9}{'ours':>9}{'floor':>9}{'ratio':>7}{'grouped_mm':>12}{'error':>10}")
    rows = []
    for batch in map(int, a.batches.split(",")):
        r = layers.run(batch)
        rows.append(r)
        print(
            f"{r['batch']:>6}{r['experts_touched']:>9.1f}{r['us']:>9}{r['floor_us']:>9}{r['times_floor']:>7}"
            f"{r['grouped_mm_products_us']:>12}{r['relative_error']:>10.1e}",
            flush=True,
        )
    holds = all(r["times_floor"] < CLAIM for r in rows if r["batch"] == CLAIM_BATCH)
    result = {
        "claim": f"a mixture of experts takes less than {CLAIM} times its floor at batch {CLAIM_BATCH}",
        "holds": holds,
        "shape": a.shape.name,
        "card": card,
        "torch": torch.__version__,
        "layers": rows,
    }
    short = card.removeprefix("NVIDIA ").split()[0]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"moe-{short}.json").write_text(json.dumps(result, indent=2) + "\n")
    print("holds" if holds else "FAILS")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
