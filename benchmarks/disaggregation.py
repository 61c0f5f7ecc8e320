"""Claim: moving KV costs little: P/D against one unified worker, and the transfer's share of TTFT.

The same engine, the same router, the same machine; closed loop. On a machine whose workers share
their cores or their GPU this shows the cost of disaggregation, not its gain: isolation needs a device
a pool.

    python benchmarks/disaggregation.py [--requests 48] [--concurrency 4] [--prompt-tokens 512]

With `--shape DIR`, a folder with a config.json, the weights are random and the result is kept in
benchmarks/results/. Added to TTFT at 4,096 tokens, with nothing else running, on one GPU:

    python benchmarks/disaggregation.py --shape DIR --requests 20 --concurrency 1 --prompt-tokens 4096 \
        --tokens 8 --flags="--gpu-memory-utilization 0.4 --max-num-batched-tokens 4096"
"""

import argparse
import asyncio
import itertools
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, models

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.checkpoints import write_tokenizer
from support.system import DEFAULT_MODEL, System, running

SYSTEMS = {
    "unified 1": ["--unified", "1"],
    "P/D 1+1": ["--prefill", "1", "--decode", "1"],
}
RESULTS = Path(__file__).parent / "results"
TO_REACH = 0.03
"""Of TTFT, added by disaggregation at a prompt of 4,096 tokens with nothing else running."""
Result = tuple[str, float, list[float]]
"""Request id, time to first token and inter-token latencies in seconds."""


async def one(http: httpx.AsyncClient, model: str, prompt_tokens: int, tokens: int) -> Result:
    prompt = [random.randrange(1000, 40000) for _ in range(prompt_tokens)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    began, times = time.perf_counter(), []
    async with http.stream("POST", "/v1/completions", json=body | {"temperature": 0}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return response.headers["x-request-id"], times[0] - began, gaps


async def load(base: str, model: str, a: argparse.Namespace) -> list[Result]:
    gate = asyncio.Semaphore(a.concurrency)
    async with httpx.AsyncClient(base_url=base, timeout=300, trust_env=False) as http:

        async def gated() -> Result:
            async with gate:
                return await one(http, model, a.prompt_tokens, a.tokens)

        for _ in range(a.warm_up):
            await one(http, model, a.prompt_tokens, 4)
        return await asyncio.gather(*(gated() for _ in range(a.requests)))


def transfers(system: System, results: list[Result]) -> list[dict[str, Any]]:
    """Each request's KV transfer, from the ledger."""
    records: list[dict[str, Any]] = [system.record(request_id) for request_id, _, _ in results]
    return [
        {**record["kv"], "share": record["kv"]["seconds"] / ttft}
        for record, (_, ttft, _) in zip(records, results, strict=True)
        if record["decision"] == "disaggregated"
    ]


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


@contextmanager
def model_folder(shape: Path | None) -> Iterator[str]:
    """A model to serve: the default one, or a shape with a tokenizer that has a word for every id."""
    if shape is None:
        yield DEFAULT_MODEL
        return
    config = json.loads((shape / "config.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / shape.name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder)
        words = {f"w{i}": i for i in range(config["vocab_size"])}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
        yield str(folder)


def measure(model: str, pools: list[str], a: argparse.Namespace) -> dict[str, Any]:
    """Serve with these pools, load it, and sum up what was seen."""
    flags = [model, *pools, *shlex.split(a.flags), *(["--load-format", "dummy"] if a.shape else [])]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        try:
            with running(*flags, log=Path(log.name)) as system:
                began = time.perf_counter()
                results = asyncio.run(load(system.base, model, a))
                wall = time.perf_counter() - began
                moved = transfers(system, results)
        except BaseException:
            sys.stderr.write("".join(Path(log.name).read_text().splitlines(keepends=True)[-20:]))
            raise
    ttft = [result[1] * 1e3 for result in results]
    itl = [gap * 1e3 for result in results for gap in result[2]]
    row: dict[str, Any] = {
        "ttft_ms": {"p50": statistics.median(ttft), "p99": quantile(ttft, 0.99), "min": min(ttft)},
        "itl_ms": {"p50": quantile(itl, 0.5), "p99": quantile(itl, 0.99)},
        "tokens_per_s": a.requests * a.tokens / wall,
    }
    if moved:
        row["kv"] = {
            "transport": moved[0]["transport"],
            "p50_ms": statistics.median(each["seconds"] for each in moved) * 1e3,
            "share_of_ttft": statistics.median(each["share"] for each in moved),
        }
    return row


def show(name: str, row: dict[str, Any]) -> None:
    ttft, itl = row["ttft_ms"], row["itl_ms"]
    cells = [ttft["p50"], ttft["p99"], itl["p50"], itl["p99"], row["tokens_per_s"]]
    line = "".join(f"{value:>10.1f}" for value in cells)
    if kv := row.get("kv"):
        line += f"{kv['p50_ms']:>10.2f}{kv['share_of_ttft']:>10.2%} {kv['transport']}"
    print(f"{name:<12}{line}", flush=True)


def keep(a: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Write what was measured on this card, and say what disaggregation added."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    medians = [row["ttft_ms"]["p50"] for row in rows.values()]
    added = medians[1] / medians[0] - 1
    print(f"TTFT added by disaggregation: {added:.2%} ({medians[1] - medians[0]:+.2f} ms)", flush=True)
    result = {
        "claim": "disaggregation adds little to TTFT",
        "card": card,
        "shape": a.shape.name,
        "prompt_tokens": a.prompt_tokens,
        "requests": a.requests,
        "concurrency": a.concurrency,
        "flags": a.flags,
        "ttft_added": round(added, 4),
        "to_reach": TO_REACH,
        "systems": rows,
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"disaggregation-{a.shape.name}-{card.removeprefix('NVIDIA ').split()[0]}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"requests": 48, "concurrency": 4, "prompt-tokens": 512, "tokens": 48, "warm-up": 1}
    for name, default in numbers.items():
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--shape", type=Path, help="folder with a config.json: random weights of this shape")
    ask.add_argument("--flags", default="", help="more flags of disagg serve, as one argument")
    a = ask.parse_args()
    header = ("TTFT p50", "p99 ms", "ITL p50", "p99 ms", "tokens/s", "KV ms", "KV/TTFT")
    print(f"{'':<12}" + "".join(f"{name:>10}" for name in header))
    rows = {}
    with model_folder(a.shape) as model:
        for name, pools in SYSTEMS.items():
            rows[name] = measure(model, pools, a)
            show(name, rows[name])
    if a.shape:
        keep(a, rows)


if __name__ == "__main__":
    main()
