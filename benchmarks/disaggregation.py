"""Claim: moving KV costs little: P/D against one unified worker, and the transfer's share of TTFT.

The same engine, the same router, the same machine; closed loop. On a machine whose workers share
their cores this shows the cost of disaggregation, not its gain: isolation needs a device a pool.

    python benchmarks/disaggregation.py [--requests 48] [--concurrency 4] [--prompt-tokens 512]
"""

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.system import DEFAULT_MODEL, System, running

SYSTEMS = {
    "P/D 1+1": ["--prefill", "1", "--decode", "1"],
    "unified 1": ["--unified", "1"],
}
Result = tuple[str, float, list[float]]
"""Request id, time to first token and inter-token latencies in seconds."""


async def one(http: httpx.AsyncClient, prompt_tokens: int, tokens: int) -> Result:
    prompt = [random.randrange(1000, 40000) for _ in range(prompt_tokens)]
    body = {
        "model": DEFAULT_MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
    began, times = time.perf_counter(), []
    async with http.stream("POST", "/v1/completions", json=body | {"temperature": 0}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return response.headers["x-request-id"], times[0] - began, gaps


async def load(base: str, a: argparse.Namespace) -> list[Result]:
    gate = asyncio.Semaphore(a.concurrency)
    async with httpx.AsyncClient(base_url=base, timeout=300, trust_env=False) as http:

        async def gated() -> Result:
            async with gate:
                return await one(http, a.prompt_tokens, a.tokens)

        await one(http, a.prompt_tokens, 4)
        return await asyncio.gather(*(gated() for _ in range(a.requests)))


def transfers(system: System, results: list[Result]) -> list[tuple[float, float]]:
    """(seconds, share of TTFT) of each request's KV transfer, from the ledger."""
    records: list[dict[str, Any]] = [system.record(request_id) for request_id, _, _ in results]
    return [
        (record["kv"]["seconds"], record["kv"]["seconds"] / ttft)
        for record, (_, ttft, _) in zip(records, results, strict=True)
        if record["decision"] == "disaggregated"
    ]


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("requests", 48), ("concurrency", 4), ("prompt-tokens", 512), ("tokens", 48)):
        ask.add_argument(f"--{name}", type=int, default=default)
    a = ask.parse_args()
    header = ("TTFT p50", "p99 ms", "ITL p50", "p99 ms", "tokens/s", "KV ms", "KV/TTFT")
    print(f"{'':<12}" + "".join(f"{name:>10}" for name in header))
    for name, flags in SYSTEMS.items():
        with running(*flags, log=Path("/dev/null")) as system:
            began = time.perf_counter()
            results = asyncio.run(load(system.base, a))
            wall = time.perf_counter() - began
            moved = transfers(system, results)
        ttft = [result[1] * 1e3 for result in results]
        itl = [gap * 1e3 for result in results for gap in result[2]]
        cells = [quantile(ttft, 0.5), quantile(ttft, 0.99), quantile(itl, 0.5), quantile(itl, 0.99)]
        cells.append(a.requests * a.tokens / wall)
        row = "".join(f"{value:>10.1f}" for value in cells)
        if moved:
            row += f"{statistics.median(seconds for seconds, _ in moved) * 1e3:>10.2f}"
            row += f"{statistics.median(share for _, share in moved):>10.2%}"
        print(f"{name:<12}{row}")


if __name__ == "__main__":
    main()
