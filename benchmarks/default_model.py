"""Claim: the default model through the whole P/D path beats transformers on the same threads.

Single-stream decode at least 1.3 times transformers' tokens/s, a 1k-token prefill not slower,
and batch 16 decode at least 6 times our own single-stream throughput. bfloat16, CPU. Ours goes
through HTTP, router, prefill worker, NIXL and decode worker; transformers runs in a bare loop.

    python benchmarks/default_model.py [--tokens 128] [--repeat 3]
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.system import DEFAULT_MODEL, running

TRANSFORMERS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
path, threads, tokens, repeat = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
decode, prefill = [], []
with torch.inference_mode():
    for _ in range(repeat + 1):
        ids = torch.randint(0, 40000, (1, 64))
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        began = time.perf_counter()
        for _ in range(tokens):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode.append(tokens / (time.perf_counter() - began))
        ids = torch.randint(0, 40000, (1, 1024))
        began = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        prefill.append(time.perf_counter() - began)
print(json.dumps([decode[1:], prefill[1:]]))
"""


async def stream(http: httpx.AsyncClient, prompt: list[int], tokens: int) -> list[float]:
    """Arrival times of one stream's events, the request's start first."""
    body = {
        "model": DEFAULT_MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
    times = [time.perf_counter()]
    async with http.stream("POST", "/v1/completions", json=body | {"temperature": 0}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


def rate(times: list[float], tokens: int) -> float:
    """Tokens per second after the first."""
    return (tokens - 1) / (times[-1] - times[1])


def random_prompt(length: int) -> list[int]:
    return [random.randrange(1000, 40000) for _ in range(length)]


async def measure(base: str, tokens: int, repeat: int) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=base, timeout=300, trust_env=False) as http:
        await stream(http, random_prompt(64), 8)
        single = [rate(await stream(http, random_prompt(64), tokens), tokens) for _ in range(repeat)]
        await stream(http, random_prompt(1024), 1)
        prefill = [(t := await stream(http, random_prompt(1024), 1))[1] - t[0] for _ in range(repeat)]
        batch = []
        for _ in range(repeat):
            streams = await asyncio.gather(*(stream(http, random_prompt(64), tokens) for _ in range(16)))
            # Only the span in which all 16 decode counts.
            began, ended = max(s[1] for s in streams), min(s[-1] for s in streams)
            inside = sum(sum(began <= t <= ended for t in s[1:]) for s in streams)
            batch.append(inside / (ended - began))
    median = statistics.median
    return {"single": median(single), "prefill": median(prefill), "batch16": median(batch)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--tokens", type=int, default=128)
    ask.add_argument("--repeat", type=int, default=3)
    ask.add_argument("--threads", type=int, default=2)
    a = ask.parse_args()
    flags = ["--dtype", "bfloat16", "--num-threads", str(a.threads)]
    with running(*flags, log=Path("/dev/null")) as system:
        ours = asyncio.run(measure(system.base, a.tokens, a.repeat))
    from disagg.checkpoint import resolve

    arguments = [str(resolve(DEFAULT_MODEL).path), str(a.threads), str(a.tokens), str(a.repeat)]
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, *arguments], capture_output=True, text=True, check=True
    )
    decode, prefill = (statistics.median(values) for values in json.loads(done.stdout.splitlines()[-1]))
    single, batch = ours["single"], ours["batch16"]
    rows = [
        ("single-stream decode, tokens/s", single, decode, single / decode, 1.3),
        ("1k-token prefill (ours: TTFT), s", ours["prefill"], prefill, prefill / ours["prefill"], 1.0),
        ("batch 16 decode against own single", batch, single, batch / single, 6.0),
    ]
    print(f"{'':<38}{'ours':>9}{'reference':>11}{'ratio':>8}{'claim':>8}")
    for name, mine, reference, ratio, claim in rows:
        verdict = "holds" if ratio >= claim else "FAILS"
        print(f"{name:<38}{mine:>9.2f}{reference:>11.2f}{ratio:>8.2f}{claim:>7.1f}x  {verdict}")


if __name__ == "__main__":
    main()
